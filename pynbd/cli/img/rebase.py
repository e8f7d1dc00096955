"""`pynbd img rebase`: another backing file for an image, whose disk stays the same unless `-u` says otherwise."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pynbd.cli.img import arguments as common
from pynbd.cli.walk import walk

if TYPE_CHECKING:
    from pynbd.block.extents import ChainExtent
    from pynbd.block.graph import Graph
    from pynbd.block.node import Node
    from pynbd.cli.img.images import Image
    from pynbd.cli.progress import Progress

PIECE_BYTES = 2 << 20
MIN_UNIT_BYTES = 64 << 10
"""What is compared at a time."""

SUBCLUSTERS, MIN_PIECE_BYTES = 32, 512
"""Where units differ, the parts of a cluster that may be taken alone are compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "[-u] -b BACKING [-F FORMAT] FILENAME")
    common.add_image(parser)
    parser.add_argument("-b", dest="backing", metavar="FILE", help='the new backing file ("" for none)')
    parser.add_argument("-F", dest="backing_format", default="", metavar="FORMAT", help="its format")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="change the name only, whatever the disk shows")
    common.add_cache(parser, "-t", "cache", "writeback", "the image")
    common.add_cache(parser, "-T", "source_cache", "writeback", "backing files")
    common.add_progress(parser)
    common.add_quiet(parser)
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.errors import OptionError
    from pynbd.cli.progress import Progress

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    if arguments.backing is None and not arguments.unsafe:
        raise OptionError("the new backing file is missing: give -b, or -u for none")
    with Progress(wanted=arguments.progress and not arguments.quiet) as progress:
        progress.tell(0)
        await _rebase(graph, arguments, filename, progress)
    return 0


async def _rebase(graph: Graph, arguments: argparse.Namespace, filename: str, progress: Progress) -> None:
    from pynbd.block import registry
    from pynbd.block.errors import BlockError, OptionError
    from pynbd.block.families import Backed
    from pynbd.cli.img.images import describe, open_node

    common.cache_mode(arguments.source_cache)
    if arguments.backing_format:
        registry.driver_class(arguments.backing_format)
    backing = arguments.backing or ""
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    if arguments.unsafe:
        tree = {"backing": None, **tree}
    async with open_node(graph, tree, writing=True, cache=arguments.cache) as node:
        if not isinstance(node.driver, Backed):
            raise BlockError(f"{filename}: format {node.driver.name!r} has no backing files")
        if backing and not arguments.backing_format:
            raise OptionError(f"backing file {backing!r} without its format: give it with -F")
        if not arguments.unsafe:
            await _keep_what_differs(graph, arguments, node, progress)
        progress.tell(100)
        await node.driver.change_backing_file(backing, arguments.backing_format)


async def _keep_what_differs(graph: Graph, arguments: argparse.Namespace, node: Node, progress: Progress) -> None:
    """Write into the image what the old backing file shows and the new one does not."""
    from pynbd.block.image_names import named_from
    from pynbd.cli.img.images import attached, open_image

    async with contextlib.AsyncExitStack() as opened:
        image = await opened.enter_async_context(
            attached(graph, node, arguments.words[0], writing=True, cache=arguments.cache)
        )
        old = new = base = None
        below = node.backing()
        if below is not None:
            old = await opened.enter_async_context(attached(graph, below, "the old backing file"))
        if arguments.backing:
            name = named_from(node.filename(), arguments.backing)
            base = _in_chain(below, name)
            new = await opened.enter_async_context(
                attached(graph, base, "the new backing file")
                if base is not None
                else open_image(graph, name, format=arguments.backing_format, cache=arguments.source_cache)
            )
        work = Rebase(image, old, new, base, (await node.info()).cluster_size)
        with progress.follow(image.size, lambda: work.done_bytes):
            await work.run()
            await image.backend.flush()


def _in_chain(node: Node | None, name: str) -> Node | None:
    """The image of that file name among some image and its backing files."""
    while node is not None and node.filename() != name:
        node = node.backing()
    return node


class Rebase:
    """An image that gets another backing file.

    Args:
        image: the image, still over its old backing file.
        old, new: what lies below it now and then, if anything does.
        base: the new one, if it is in the old one's chain: then what it holds shows through as before.
        cluster: bytes of one of the image's clusters.
    """

    def __init__(self, image: Image, old: Image | None, new: Image | None, base: Node | None, cluster: int) -> None:
        self.done_bytes = 0
        self._image, self._old, self._new = image, old, new
        self._base = base
        self._unit = max(cluster, MIN_UNIT_BYTES)
        self._piece = max(cluster // SUBCLUSTERS, MIN_PIECE_BYTES)

    async def run(self) -> None:
        """Write what has to be written.

        Raises:
            OSError: something can't be read or written; the disk still shows what it did.
        """
        offset = 0
        buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(2)]
        async for extent in walk(self._own_extents, 0, self._image.size):
            if not extent.depth:
                await self._look(offset, extent.length, buffers)
            offset += extent.length
            self.done_bytes = offset

    async def _own_extents(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What the image itself holds, whatever lies below it."""
        return await self._image.block_status(offset, length, self._image.node.backing())

    async def _look(self, offset: int, length: int, buffers: list[memoryview]) -> None:
        """A range that the image itself does not hold: keep what will not show through any more."""
        end = offset + length
        while offset < end:
            stop = min(end, offset - offset % self._unit + PIECE_BYTES)
            if await self._shows_both(offset, stop - offset):
                offset = self.done_bytes = await self._same_until(offset, end)
                continue
            before, after = (buffer[: stop - offset] for buffer in buffers)
            await asyncio.gather(_read(self._old, offset, before), _read(self._new, offset, after))
            await self._write_what_differs(offset, before, after)
            offset = self.done_bytes = stop

    async def _shows_both(self, offset: int, length: int) -> bool:
        return await self._same_until(offset, offset + length) >= offset + length

    async def _same_until(self, offset: int, end: int) -> int:
        """Up to where the new backing file surely shows what the old one does, without a look at the bytes."""
        shown = await self._shown_until(offset, end)
        if shown > offset:
            return shown
        return min(await _zero_until(self._old, offset, end), await _zero_until(self._new, offset, end))

    async def _shown_until(self, offset: int, end: int) -> int:
        """Up to where what the old backing file shows is the new one's, as that lies below it."""
        if self._base is None or self._old is None or offset >= self._old.size:
            return offset
        if self._base is self._old.node:
            return end
        found = await self._old.block_status(offset, min(end, self._old.size) - offset, self._base)
        for extent in found:
            if extent.depth or offset >= self._base.size:
                break
            offset += extent.length
        return min(offset, end, self._base.size)

    async def _write_what_differs(self, offset: int, before: memoryview, after: memoryview) -> None:
        """Pieces that differ, those beside one another together."""
        start = end = 0
        for first, last in self._differing(offset, before, after):
            if first != end:
                await self._write(offset + start, before[start:end])
            start, end = (start if first == end else first), last
        await self._write(offset + start, before[start:end])

    async def _write(self, offset: int, data: memoryview) -> None:
        from pynbd.block.node_requests import is_zero

        if data and is_zero(data):
            await self._image.backend.write_zeroes(offset, len(data), 0)
            if await self._holds(offset, len(data)):
                return
        if data:
            await self._image.backend.write(offset, data)

    async def _holds(self, offset: int, length: int) -> bool:
        """Whether the image itself has all of a range: one that can't note zeroes may have left them nowhere."""
        end, below = offset + length, self._image.node.backing()
        while offset < end:
            for extent in await self._image.block_status(offset, end - offset, below):
                if not extent.depth:
                    return False
                offset += extent.length
        return True

    def _differing(self, offset: int, before: memoryview, after: memoryview) -> Iterator[tuple[int, int]]:
        """[start, end) of all pieces that are not the same, found in two steps."""
        for first, last in _unequal(before, after, (0, len(before)), self._unit, offset):
            yield from _unequal(before, after, (first, last), self._piece, offset)


async def _zero_until(image: Image | None, offset: int, end: int) -> int:
    """Up to where a backing file surely reads as zeroes, as it does behind its end."""
    if image is None or offset >= image.size:
        return end
    for extent in await image.block_status(offset, min(end, image.size) - offset):
        if not extent.zero:
            return offset
        offset += extent.length
    return end if offset >= image.size else offset


def _unequal(
    before: memoryview, after: memoryview, within: tuple[int, int], unit: int, offset: int
) -> Iterator[tuple[int, int]]:
    """[start, end) of all units of the disk that are not the same in a part of two buffers, which begin at `offset`."""
    start, end = within
    while start < end:
        stop = min(end, start + unit - (offset + start) % unit)
        if bytearray(before[start:stop]) != after[start:stop]:
            yield start, stop
        start = stop


async def _read(image: Image | None, offset: int, into: memoryview) -> None:
    """Fill `into`; where there is no image any more are zeroes."""
    if image is None:
        into[:] = bytes(len(into))
    else:
        await image.read(offset, into)
