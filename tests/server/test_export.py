"""What clients are told of a disk: its size, what it can do, and what lies where."""

from itertools import pairwise
from operator import and_, or_
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol.constants import TransmissionFlag
from pynbd.block.backend import BlockBackend
from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.server import export as export_module
from pynbd.server.export import Export, aligned, joined, nearest
from tests.restless import RESTLESS
from tests.server.clients import serving

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 4 * MIB}

lengths = st.integers(1, 3 * 512)
extents = st.lists(st.tuples(lengths, st.integers(0, 3)), min_size=1, max_size=30)


@given(extents)
def test_law_of_joined(pairs: list[tuple[int, int]]) -> None:
    found = list(joined(pairs, 100))
    assert spread(found) == spread(pairs)
    assert all(one[1] != other[1] for one, other in pairwise(found))


@given(extents, st.integers(1, 5))
def test_joined_stops(pairs: list[tuple[int, int]], most: int) -> None:
    found = list(joined(pairs, most))
    assert 1 <= len(found) <= most
    assert spread(pairs)[: len(spread(found))] == spread(found)


def spread(pairs: list[tuple[int, int]]) -> list[int]:
    """The flags of each byte."""
    return [flags for length, flags in pairs for _ in range(length)]


@given(extents, st.sampled_from([2, 64, 512]), st.sampled_from([and_, or_, nearest]), st.integers(0, 2000))
def test_law_of_aligned(pairs: list[tuple[int, int]], block: int, mixed: object, missing: int) -> None:
    """Whole blocks, but for the end of the range; what is all alike stays as it is; mixed blocks say what is safe."""
    before = spread(pairs)
    found = aligned(pairs, block, mixed, len(before) + missing)  # type: ignore[arg-type]  # one of three functions
    after = spread(found)
    assert found
    assert all(length for length, _ in found)
    position = 0
    for length, _ in found:
        position += length
        assert position % block == 0 or position == len(before) + missing
    assert len(after) <= len(before) + missing
    if not missing:
        assert len(after) == len(before)
    for start in range(0, len(after), block):
        whole = set(before[start : start + block])
        told = set(after[start : start + block])
        assert len(told) == 1
        if len(whole) == 1 and start + block <= len(before):
            assert told == whole
        for flags in whole:
            if mixed is and_:
                assert told.pop() & ~flags == 0
                told = set(after[start : start + block])
            if mixed is or_:
                assert flags & ~max(told) == 0


def test_nearest() -> None:
    assert [nearest(0, 0), nearest(0, 2), nearest(3, 0), nearest(1, 2), nearest(2, 2)] == [0, 2, 3, 1, 2]


async def test_flags_of_a_writable_and_of_a_read_only_export() -> None:
    async with serving(MEMORY) as served:
        flags = served.server.exports[""].flags
        for flag in TransmissionFlag:
            expected = flag not in (
                TransmissionFlag.READ_ONLY,
                TransmissionFlag.ROTATIONAL,
                TransmissionFlag.SEND_RESIZE,
            )
            assert bool(flags & flag) is expected, flag
        backend = served.server.exports[""].backend
        assert Export("r", backend, resize=True).flags & TransmissionFlag.SEND_RESIZE
        read_only = Export("r", backend, read_only=True, resize=True).flags
        assert read_only & TransmissionFlag.READ_ONLY
        assert not read_only & (
            TransmissionFlag.SEND_TRIM
            | TransmissionFlag.SEND_WRITE_ZEROES
            | TransmissionFlag.SEND_FAST_ZERO
            | TransmissionFlag.SEND_RESIZE
        )


async def test_a_backend_that_may_not_write_makes_a_read_only_export(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    async with serving({"driver": "file", "filename": str(path)}, read_only=True) as served:
        export = served.server.exports[""]
        assert export.read_only
        assert export.info().flags & TransmissionFlag.READ_ONLY


async def test_info() -> None:
    async with serving(MEMORY) as served:
        backend = served.server.exports[""].backend
        info = Export("name", backend, description="words", min_block=8192).info()
        assert (info.size, info.canonical_name, info.description) == (4 * MIB, "name", "words")
        assert (info.min_block, info.preferred_block) == (8192, 8192)
        assert Export("", backend).info().description is None
        assert Export("", backend).info().preferred_block == 4096


@pytest.mark.parametrize("min_block", [0, 3, 511, 1 << 17, -1])
async def test_a_minimum_block_that_can_not_be_told(min_block: int) -> None:
    async with serving(MEMORY) as served:
        with pytest.raises(OptionError, match="min-block"):
            Export("x", served.server.exports[""].backend, min_block=min_block)


async def test_names_and_bitmaps_are_checked() -> None:
    async with serving(MEMORY) as served:
        backend = served.server.exports[""].backend
        with pytest.raises(OptionError, match="4096"):
            Export("ä" * 2049, backend)
        with pytest.raises(OptionError, match="there is no bitmap 'b'"):
            Export("x", backend, bitmaps=["b"])
        with pytest.raises(OptionError, match="two exports"):
            served.server.add_export(Export("", backend))


async def test_contexts() -> None:
    async with serving(MEMORY) as served:
        await served.graph.add_bitmap(served.node(), "b")
        backend = served.server.exports[""].backend
        assert Export("x", backend).contexts() == ["base:allocation"]
        everything = Export("x", backend, allocation_depth=True, bitmaps=["b"])
        assert everything.contexts() == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]


async def test_extents_of_each_context() -> None:
    async with serving(MEMORY) as served:
        await served.graph.add_bitmap(served.node(), "b", 64 * KIB)
        backend = served.server.exports[""].backend
        await backend.write(MIB, memoryview(b"x" * 4096))
        export = Export("x", backend, allocation_depth=True, bitmaps=["b"])

        async def told(context: str, *, one: bool = False) -> list[tuple[int, int]]:
            return await export.context_extents(context, 0, 2 * MIB, one=one)

        assert await told("base:allocation") == [(MIB, 3), (4096, 0), (MIB - 4096, 3)]
        assert await told("qemu:dirty-bitmap:b") == [(MIB, 0), (64 * KIB, 1), (MIB - 64 * KIB, 0)]
        assert sum(length for length, _ in await told("qemu:allocation-depth")) == 2 * MIB
        assert (await told("base:allocation", one=True))[0] == (MIB, 3)
        assert (await told("qemu:dirty-bitmap:b", one=True))[0] == (MIB, 0)
        coarse = Export("x", backend, bitmaps=["b"], min_block=64 * KIB)
        extents = await coarse.context_extents("base:allocation", 0, 2 * MIB, one=False)
        assert extents == [(MIB, 3), (64 * KIB, 0), (MIB - 64 * KIB, 3)]


@pytest.mark.parametrize("min_block", [1, 4096])
async def test_an_answer_that_stops_early_stops_at_whole_blocks(
    min_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "MAX_STATUS_EXTENTS", 5)
    graph, backend = Graph(), BlockBackend("test")
    node = await graph.open({"driver": RESTLESS, "size": MIB, "fill": "zero", "holes": True})
    graph.attach(backend, node)
    try:
        driver = node.driver
        for sector in range(0, 2048, 3):
            driver.data[sector * 512] = 1  # type: ignore[attr-defined]  # the driver of the tests
        export = Export("x", backend, min_block=min_block)
        offset = 0
        while offset < MIB:
            extents = await export.context_extents("base:allocation", offset, MIB - offset, one=False)
            assert 1 <= len(extents) <= 5
            for length, flags in extents:
                assert length % min_block == 0
                assert not flags or not any(driver.data[offset : offset + length])  # type: ignore[attr-defined]  # as above
                offset += length
    finally:
        graph.detach(backend)
        await graph.close_all()
