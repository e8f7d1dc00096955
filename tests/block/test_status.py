"""What lies where, in one layer and in a chain of images, against a model that looks at each byte."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block import status
from pynbd.block.extents import ChainExtent, Extent, Status
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from tests.block.drivers import driver, opened

UNIT = 16
DATA, ZERO = Status.DATA | Status.ALLOCATED, Status.ZERO | Status.ALLOCATED


class Image(NamedTuple):
    """One layer: its length, which units it holds (with bytes, or with zeroes), and how it is used."""

    units: int
    data: frozenset[int]
    zero: frozenset[int]
    filters: int
    verbatim: bool


IMAGES = st.builds(
    Image,
    st.integers(1, 12),
    st.frozensets(st.integers(0, 11)),
    st.frozensets(st.integers(0, 11)),
    st.integers(0, 2),
    st.booleans(),
)


def described(images: list[Image]) -> dict[str, Any]:
    """A chain of layers, the last image at the bottom, with filters above some."""
    tree: dict[str, Any] | None = None
    for image in reversed(images):
        size = image.units * UNIT
        file = {"file": {"driver": "model", "size": size}} if image.verbatim else {}
        backing = {"backing": tree} if tree else {}
        tree = {"driver": "layer", "size": size, "unit": UNIT, "verbatim": image.verbatim, **file, **backing}
        for _ in range(image.filters):
            tree = {"driver": "watcher", "file": tree}
    assert tree is not None
    return tree


def fill(node: Node, images: list[Image]) -> list[Node]:
    """Put into each layer what it holds; the layers from top to bottom."""
    layers: list[Node] = []
    for image in images:
        layer = status.without_filters(node)
        layers.append(layer)
        for unit in image.data | image.zero:
            if unit < image.units:
                driver(layer).units[unit] = (b"x" if unit in image.data else b"\0") * UNIT
        if "backing" in layer.children:
            node = layer.children["backing"].node
    return layers


def expected(images: list[Image], depth_of_base: int | None, at: int) -> tuple[bool, bool, int]:
    """(data, zero, depth) of one byte."""
    unit = at // UNIT
    for depth, image in enumerate(images, 1):
        if depth_of_base is not None and depth >= depth_of_base:
            return False, False, 0
        if unit >= image.units:
            return False, True, depth
        if unit in image.data:
            return True, False, depth
        if unit in image.zero:
            return False, True, depth
    return False, True, 0


@settings(max_examples=200, deadline=None)
@given(
    images=st.lists(IMAGES, min_size=1, max_size=4),
    ask=st.tuples(st.integers(0, 11 * UNIT), st.integers(1, 12 * UNIT)),
    base=st.integers(2, 4) | st.none(),
    through_filter=st.booleans(),
)
def test_chains(images: list[Image], ask: tuple[int, int], base: int | None, through_filter: bool) -> None:
    """Data, zero and depth of every byte; extents that may stop early, but never say nothing."""

    async def law() -> None:
        async with opened(described(images)) as (_, node):
            layers = fill(node, images)
            number = base if base is not None and base <= len(images) else None
            lowest = None
            if number is not None:
                lowest = layers[number - 1]
                if through_filter:
                    # What the layer above has as its backing: perhaps a filter above the base.
                    lowest = layers[number - 2].children["backing"].node
            offset, length = min(ask[0], node.size - 1), ask[1]
            end = min(offset + length, node.size)
            while offset < end:
                extents = await node.block_status(offset, end - offset, lowest)
                assert extents
                for extent in extents:
                    assert extent.length > 0
                    for at in range(offset, offset + extent.length):
                        found = (extent.data, extent.zero, extent.depth)
                        assert found == expected(images, number, at), at
                    assert bool(extent.status & Status.ALLOCATED) == bool(extent.depth)
                    assert not extent.status & Status.RECURSE
                    if extent.where is not None:
                        image = images[extent.depth - 1]
                        assert image.verbatim
                        assert extent.where is layers[extent.depth - 1].children["file"].node
                        assert extent.host_offset == offset
                    offset += extent.length
                assert offset <= end

    asyncio.run(law())


async def test_the_file_below_knows_of_holes(graph: Graph) -> None:
    """A format says where its bytes lie, and the storage which of them are zeroes."""
    tree = {
        "driver": "layer",
        "size": 64,
        "verbatim": True,
        "file": {"driver": "layer", "size": 56, "unit": 4, "steps": 2},
    }
    node = await graph.open(tree)
    file = node.children["file"].node
    for unit in range(4):
        driver(node).units[unit] = b"x" * 16
    driver(file).units = {0: b"abcd", 1: b"\0\0\0\0", 3: b"\0\0\0\0", 4: b"efgh"}
    extents = await node.block_status(0, 64)
    assert [(e.length, e.zero, e.host_offset) for e in extents] == [
        (4, False, 0),
        (4, True, 4),
        (4, False, 8),
        (4, True, 12),
        (4, False, 16),
        *[(4, False, at) for at in range(20, 48, 4)],
    ], "the layer tells of three units at a time"
    assert all(e.data and e.where is file for e in extents)
    (last,) = [e for e in await node.block_status(56, 8) if e.host_offset == 56]
    assert last.zero, "the file ends before the image does"


class Told(NamedTuple):
    """What a driver is going to answer."""

    extents: tuple[Extent, ...]
    calls: list[tuple[int, int]]


def tells(node: Node, *extents: Extent) -> Told:
    """Let a driver answer so."""
    told = Told(extents, [])

    async def block_status(offset: int, length: int) -> tuple[Extent, ...]:
        told.calls.append((offset, length))
        return told.extents

    node.calls.block_status = block_status  # type: ignore[method-assign]  # as if the driver were another
    return told


async def test_a_driver_is_asked_in_aligned_pieces(graph: Graph) -> None:
    limits = {"request_alignment": 512}
    node = await graph.open({"driver": "model", "size": 4096 + 100, "limits": limits})
    told = tells(node, Extent(512, DATA), Extent(1024, ZERO), Extent(9000, DATA))
    assert await node.block_status(600, 1000) == [ChainExtent(424, DATA, 1), ChainExtent(576, ZERO, 1)]
    assert told.calls == [(512, 1536)]
    told = tells(node, Extent(100, DATA, node, 4096))
    assert await node.block_status(4140, 60) == [ChainExtent(56, DATA, 1, node, 4140)]
    assert told.calls == [(4096, 100)], "not past the end"


async def test_an_answer_that_does_not_reach_the_question(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 4096, "limits": {"request_alignment": 512}, "node-name": "d"})
    tells(node, Extent(50, DATA))
    with pytest.raises(OSError, match="d: driver model: block_status told nothing of 100") as caught:
        await node.block_status(100, 10)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("extents", [(), (Extent(0, DATA),), (Extent(5, DATA), Extent(-1, ZERO))])
async def test_answers_that_make_no_sense(graph: Graph, extents: tuple[Extent, ...]) -> None:
    node = await graph.open({"driver": "model", "size": 4096, "node-name": "d"})
    tells(node, *extents)
    with pytest.raises(OSError, match="d: driver model: block_status told") as caught:
        await node.block_status(100, 10)
    assert caught.value.errno == errno.EIO


async def test_more_than_was_asked_for_is_cut(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 4096})
    tells(node, Extent(5, ZERO), Extent(1 << 40, DATA), Extent(5, ZERO))
    assert await node.block_status(0, 100) == [ChainExtent(5, ZERO, 1), ChainExtent(95, DATA, 1)]


async def test_collected_extents_are_bounded(graph: Graph) -> None:
    """A chain of many small pieces stops early, and the rest can be asked for."""
    size = 4 * status.MAX_STATUS_EXTENTS * UNIT
    tree = {
        "driver": "layer",
        "size": size,
        "steps": size,
        "verbatim": True,
        "file": {"driver": "layer", "size": size, "unit": 4, "steps": size},
        "backing": {"driver": "layer", "size": size, "steps": size},
    }
    node = await graph.open(tree)
    driver(node).units = dict.fromkeys(range(0, size // UNIT, 2), b"x" * UNIT)
    extents = await node.block_status(0, size)
    assert status.MAX_STATUS_EXTENTS <= len(extents) <= 2 * status.MAX_STATUS_EXTENTS
    covered = sum(extent.length for extent in extents)
    assert covered < size
    assert await node.block_status(covered, UNIT)


async def test_past_the_end(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 100})
    assert list(await node.layer_status(100, 50)) == [Extent(50, ZERO)]
    assert [e.length for e in await node.layer_status(90, 50)] == [10]
    assert list(await node.layer_status(100, 0)) == []


async def test_a_driver_that_knows_nothing_of_holes_has_data(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 100})
    assert await node.block_status(10, 20) == [ChainExtent(20, DATA, 1)]


@pytest.mark.parametrize("alignment", [1, 64])
async def test_nothing_is_asked_about_nothing(graph: Graph, alignment: int) -> None:
    node = await graph.open({"driver": "model", "size": 128, "limits": {"request_alignment": alignment}})
    for offset in (0, 32, 64, 128):
        assert list(await node.layer_status(offset, 0)) == []
        assert list(await node.block_status(offset, 0)) == []
