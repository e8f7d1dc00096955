"""`nofilter` changes nothing and costs nothing."""

from collections.abc import AsyncIterator

import pytest

from pynbd.block.graph import Graph
from pynbd.block.holding import hold_nothing
from pynbd.block.node import Node


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await graph.close_all()


async def filtered(graph: Graph, depth: int) -> tuple[Node, Node]:
    """(top, bottom) of `depth` nofilters over a disk in memory."""
    bottom = await graph.open({"driver": "memory", "size": "1M", "discard": "unmap"})
    top = bottom
    for _ in range(depth):
        top = await graph.open({"driver": "nofilter", "file": top.name, "discard": "unmap"})
    return top, bottom


@pytest.mark.parametrize("depth", [1, 4])
async def test_is_left_out_of_every_path(graph: Graph, depth: int) -> None:
    top, bottom = await filtered(graph, depth)
    assert top is not bottom
    assert top.path == bottom.path


async def test_passes_bytes_and_shape(graph: Graph) -> None:
    top, bottom = await filtered(graph, 2)
    await top.path.write(4096, memoryview(b"through" * 10), 0)
    found = bytearray(70)
    await bottom.path.read(4096, memoryview(found), 0)
    assert found == b"through" * 10
    assert await top.block_status(0, 1 << 20) == await bottom.block_status(0, 1 << 20)
    assert top.size == bottom.size == 1 << 20
    assert await top.allocated_size() == await bottom.allocated_size() == 4096
    assert top.driver.has_zero_init()
    assert top.driver.located_for_good()
    assert top.driver.hold_located(hold_nothing) is hold_nothing
    assert top.path.locate(0, 512) == bottom.path.locate(0, 512) != None  # noqa: E711  # a chain of comparisons


async def test_resize_passes_both_ways(graph: Graph) -> None:
    top, bottom = await filtered(graph, 3)
    await top.truncate(2 << 20)
    assert (top.size, bottom.size) == (2 << 20, 2 << 20)
    await bottom.truncate(1 << 19)
    assert (top.size, bottom.size) == (1 << 19, 1 << 19)


async def test_a_node_with_work_of_its_own_stays_in_the_path(graph: Graph) -> None:
    """What the block layer does at a node is not skipped because the driver is a filter that does nothing."""
    bottom = await graph.open({"driver": "memory", "size": "1M"})
    top = await graph.open({"driver": "nofilter", "file": bottom.name, "discard": "ignore", "detect-zeroes": "on"})
    assert top.path.read == bottom.path.read
    await bottom.path.write(0, memoryview(b"x" * 8192), 0)
    before = await bottom.allocated_size()
    await top.path.discard(0, 8192)
    assert await bottom.allocated_size() == before
    await top.path.write(0, memoryview(bytes(8192)), 0)
    assert await bottom.allocated_size() == 0
