"""What lies where, in one layer and in a whole chain of images: `Node.layer_status` and `Node.block_status`."""

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down, round_up
from pynbd.block.errors import io_error
from pynbd.block.extents import ChainExtent, Extent, Status

if TYPE_CHECKING:
    from pynbd.block.node import Node

MAX_STATUS_EXTENTS = 4096
"""Extents that one walk through a chain collects before it stops early."""

SHORT = Status.ZERO | Status.ALLOCATED
"""A short image decides what is read past its end: zeroes, whatever lies below it."""


async def layer_status(node: "Node", offset: int, length: int) -> Sequence[Extent]:
    """What one layer holds in a range.

    Args:
        node: the layer.
        offset, length: the range in bytes; it may reach past the end.

    Returns:
        extents from `offset` on, at least one for a length over 0; they may stop before the end of the range.

    Raises:
        OSError: what the driver said; EIO if its answer makes no sense.
    """
    if not length:
        return ()
    inside = node.size - offset
    if inside <= 0:
        return (Extent(length, SHORT),)
    found: list[Extent] = []
    rest = min(length, inside)
    for extent in await _from_driver(node, offset, rest):
        if rest <= 0 or len(found) >= MAX_STATUS_EXTENTS:
            break
        part = extent.cut(rest)
        rest -= part.length
        if part.status & Status.RECURSE and part.where is not None:
            refined = await _refined(part, part.where)
            found.extend(refined)
            if sum(piece.length for piece in refined) < part.length:
                break
        else:
            found.append(part)
    if not found:
        raise io_error(errno.EIO, node.name, f"driver {node.driver.name}: block_status told nothing of {offset}")
    return found


async def _from_driver(node: "Node", offset: int, length: int) -> Sequence[Extent]:
    """The driver's answer to a question that keeps to its request alignment, cut to begin at `offset`."""
    alignment = node.driver.limits.request_alignment
    start, end = round_down(offset, alignment), offset + length
    extents = await node.calls.block_status(start, min(round_up(end, alignment), max(node.size, end)) - start)
    if any(extent.length <= 0 for extent in extents):
        raise io_error(errno.EIO, node.name, f"driver {node.driver.name}: block_status told of an empty extent")
    if start == offset:
        return extents
    result = []
    for extent in extents:
        before = offset - start
        start += min(extent.length, before)
        if extent.length > before:
            host_offset = extent.host_offset + before if extent.where is not None else 0
            result.append(Extent(extent.length - before, extent.status, extent.where, host_offset))
    return result


async def _refined(extent: Extent, holder: "Node") -> Sequence[Extent]:
    """An extent whose bytes lie in a child, split where the child knows of holes; it may stop early."""
    refined: list[Extent] = []
    rest, start = extent.length, extent.host_offset
    while rest and len(refined) < MAX_STATUS_EXTENTS:
        for below in await layer_status(holder, start, rest):
            status = extent.status & ~Status.RECURSE | below.status & Status.ZERO
            where = (holder, start) if below.where is None else (below.where, below.host_offset)
            refined.append(Extent(below.length, status, *where))
            rest -= below.length
            start += below.length
    return refined


def without_filters(node: "Node") -> "Node":
    """The first node from here down that is no filter."""
    while node.is_filter:
        node = node.children["file"].node
    return node


async def chain_status(node: "Node", offset: int, length: int, base: "Node | None", depth: int) -> list[ChainExtent]:
    """What the chain of images from a node down to `base` (not included) holds in a range.

    Args:
        node: where to begin.
        offset, length: the range in bytes.
        base: the image that is not looked at any more, or a filter above it; None for the whole chain.
        depth: the node's number in the chain that was asked about.

    Returns:
        extents from `offset` on, at least one for a length over 0; they may stop before the end of the range.
    """
    result: list[ChainExtent] = []
    backing = node.backing()
    last = backing is None or (base is not None and without_filters(backing) is without_filters(base))
    for extent in await layer_status(node, offset, length):
        status = extent.status & ~Status.RECURSE
        if status & Status.ALLOCATED:
            result.append(ChainExtent(extent.length, status, depth, extent.where, extent.host_offset))
        elif last or backing is None:
            zero = Status.ZERO if backing is None else Status.NONE
            result.append(ChainExtent(extent.length, status | zero, 0, extent.where, extent.host_offset))
        else:
            below = await chain_status(backing, offset, extent.length, base, depth + 1)
            result.extend(below)
            if sum(found.length for found in below) < extent.length:
                break
        offset += extent.length
        if len(result) >= MAX_STATUS_EXTENTS:
            break
    return result
