"""Extents: cut, and joined with neighbours that are alike."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extents import ChainExtent, Extent, Status, merged
from pynbd.block.node import Node
from tests.block.drivers import opened

EXTENTS = st.lists(
    st.tuples(st.integers(1, 50), st.sampled_from([Status.DATA, Status.ZERO, Status.NONE]), st.integers(0, 2))
)


def test_cut() -> None:
    extent = Extent(10, Status.DATA, None, 5)
    assert extent.cut(10) is extent.cut(11) is extent
    assert extent.cut(4) == Extent(4, Status.DATA, None, 5)


def test_what_an_extent_says() -> None:
    assert ChainExtent(1, Status.DATA | Status.ZERO, 1).zero
    assert ChainExtent(1, Status.DATA | Status.ZERO, 1).data
    assert not ChainExtent(1, Status.ALLOCATED, 1).data
    assert not ChainExtent(1, Status.ALLOCATED, 1).zero


@given(extents=EXTENTS)
def test_merged(extents: list[tuple[int, int, int]]) -> None:
    """Byte for byte the same, and no two neighbours are alike."""
    given_extents = [ChainExtent(length, status, depth) for length, status, depth in extents]
    result = list(merged(given_extents))
    assert spread(result) == spread(given_extents)
    for one, two in itertools.pairwise(result):
        assert (one.status, one.depth) != (two.status, two.depth)


def spread(extents: list[ChainExtent]) -> list[tuple[int, int]]:
    """What is said of each byte."""
    return [(extent.status, extent.depth) for extent in extents for _ in range(extent.length)]


@given(pieces=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1))
def test_what_lies_elsewhere_is_not_merged(pieces: list[tuple[int, int]]) -> None:
    """Neighbours that lie verbatim in a node are one only if they lie there one after the other."""

    async def law() -> None:
        async with opened({"driver": "model", "size": 16}) as (_, node):
            extents = [ChainExtent(length, int(Status.DATA), 1, node, at) for length, at in pieces]
            result = list(merged(extents))
            assert [places(extent) for extent in result if extent.length] == [
                places(extent) for extent in joined(extents, node)
            ]
            for one, two in itertools.pairwise(result):
                assert one.host_offset + one.length != two.host_offset

    asyncio.run(law())


def places(extent: ChainExtent) -> range:
    """The places of the bytes of an extent."""
    return range(extent.host_offset, extent.host_offset + extent.length)


def joined(extents: list[ChainExtent], node: Node) -> list[ChainExtent]:
    """The same by another way: byte by byte."""
    result: list[ChainExtent] = []
    for place in [place for extent in extents for place in places(extent)]:
        if result and place == result[-1].host_offset + result[-1].length:
            last = result.pop()
            result.append(ChainExtent(last.length + 1, last.status, 1, node, last.host_offset))
        else:
            result.append(ChainExtent(1, int(Status.DATA), 1, node, place))
    return result
