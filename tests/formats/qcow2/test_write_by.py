"""Clusters that somebody else fills, in the image file itself: they get places, or stay as they were."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Copied, Room
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.ranges import Ranges, first_bytes, total_bytes
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.tables import Table
from tests.formats.qcow2.workload import in_file, is_sound, made, read_by_qemu

CLUSTER = 64 << 10
SIZE = 20 * CLUSTER + 512


class Filler:
    """Fills what it is given with a byte, up to a limit, and remembers what it was asked for."""

    def __init__(self, byte: bytes = b"x", most: int = SIZE, error: int = 0, left_out: Ranges = ()) -> None:
        self.byte, self.most, self.error, self.left_out = byte, most, error, left_out
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, room: Room) -> Copied:
        length = total_bytes(room.places)
        self.asked.append((length, room.fresh))
        done = min(length, self.most)
        for host_offset, count in first_bytes(room.places, done - total_bytes(self.left_out)):
            os.pwrite(room.fd, self.byte * count, host_offset)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return Copied(done, self.left_out)


async def opened(graph: Graph, path: Path, **options: object) -> BlockBackend:
    backend = BlockBackend("test")
    node = await graph.open({**in_file(path), **options})
    graph.attach(backend, node, Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL)
    return backend


async def closed(graph: Graph, backend: BlockBackend) -> None:
    graph.detach(backend)
    await graph.close_all()


async def test_whole_clusters_are_filled(graph: Graph, tmp_path: Path) -> None:
    """All that lie whole in the range; the end of the disk is for others."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    filler = Filler()
    assert await backend.write_by([(CLUSTER, 3 * CLUSTER + 100)], filler) == 3 * CLUSTER
    assert await backend.write_by([(19 * CLUSTER, CLUSTER + 512)], filler) == CLUSTER
    assert await backend.write_by([(20 * CLUSTER, 512)], filler) == 0
    assert filler.asked == [(3 * CLUSTER, True), (CLUSTER, True)]
    await closed(graph, backend)
    assert is_sound(path)
    full = b"x" * CLUSTER
    assert read_by_qemu(path) == bytes(CLUSTER) + 3 * full + bytes(15 * CLUSTER) + full + bytes(512)


@pytest.mark.parametrize("options", ["", "cluster_size=512"])
async def test_several_ranges_get_places_one_behind_the_other(graph: Graph, tmp_path: Path, options: str) -> None:
    """From as many slices of L2 tables as they lie in; up to the first one that is not made of whole clusters."""
    path = made(tmp_path, options, SIZE)
    backend = await opened(graph, path)
    ranges = [(0, CLUSTER), (2 * CLUSTER, 3 * CLUSTER), (8 * CLUSTER, 2 * CLUSTER + 300), (12 * CLUSTER, CLUSTER)]
    filler = Filler()
    assert await backend.write_by(ranges, filler) == 6 * CLUSTER
    assert filler.asked == [(6 * CLUSTER, True)]
    located = [backend.locate(offset, 512) for offset in (0, 2 * CLUSTER, 5 * CLUSTER - 512, 10 * CLUSTER - 512)]
    starts = [location.host_offset - located[0].host_offset for location in located if location and located[0]]
    assert starts == [0, CLUSTER, 4 * CLUSTER - 512, 6 * CLUSTER - 512]
    await closed(graph, backend)
    assert is_sound(path)
    full, empty = b"x" * CLUSTER, bytes(CLUSTER)
    assert read_by_qemu(path) == full + empty + 3 * full + 3 * empty + 2 * full + 10 * empty + bytes(512)


async def test_clusters_that_are_left_out_have_no_place(graph: Graph, tmp_path: Path) -> None:
    """What comes behind them moves up, and what nobody needs is used by who comes next."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    ranges = [(0, 3 * CLUSTER), (4 * CLUSTER, 4 * CLUSTER)]
    gaps = [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER), (6 * CLUSTER, CLUSTER)]
    assert await backend.write_by(ranges, Filler(left_out=gaps)) == 7 * CLUSTER
    first, last = backend.locate(0, 512), backend.locate(6 * CLUSTER - 512, 512)
    assert first is not None
    assert last is not None
    assert last.host_offset == first.host_offset + 3 * CLUSTER - 512
    following = Filler(b"y")
    assert await backend.write_by([(12 * CLUSTER, CLUSTER)], following) == CLUSTER
    assert following.asked == [(CLUSTER, True)]
    placed = backend.locate(12 * CLUSTER, 512)
    assert placed is not None
    assert placed.host_offset == first.host_offset + 5 * CLUSTER  # four clusters of data, and a table
    assert await backend.write_by([(16 * CLUSTER, 2 * CLUSTER)], Filler(left_out=[(0, 2 * CLUSTER)])) == 2 * CLUSTER
    await closed(graph, backend)
    assert is_sound(path)
    x, y, z = b"x" * CLUSTER, b"y" * CLUSTER, bytes(CLUSTER)
    assert read_by_qemu(path) == x + z + x + z + z + x + x + 5 * z + y + 7 * z + bytes(512)


async def test_what_is_filled_in_part_ends_with_its_last_whole_cluster(graph: Graph, tmp_path: Path) -> None:
    """Also behind clusters that were left out."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    partly = Filler(most=4 * CLUSTER + 512, left_out=[(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)])
    assert await backend.write_by([(0, 8 * CLUSTER)], partly) == 3 * CLUSTER
    await closed(graph, backend)
    assert is_sound(path)
    assert read_by_qemu(path) == b"x" * CLUSTER + bytes(CLUSTER) + b"x" * CLUSTER + bytes(17 * CLUSTER + 512)


async def test_what_is_not_filled_has_no_place(graph: Graph, tmp_path: Path) -> None:
    """Its clusters are free again, and those that nobody has touched still count as zero."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    await backend.write(12 * CLUSTER, memoryview(b"a"))  # the L2 table has its place
    assert await backend.write_by([(0, 4 * CLUSTER)], Filler(most=CLUSTER + 4096)) == CLUSTER
    second = Filler(b"y")
    assert await backend.write_by([(4 * CLUSTER, CLUSTER)], second) == CLUSTER
    third = Filler(b"z")
    assert await backend.write_by([(8 * CLUSTER, CLUSTER)], third) == CLUSTER
    assert (second.asked, third.asked) == ([(CLUSTER, False)], [(CLUSTER, True)])
    await closed(graph, backend)
    assert is_sound(path)
    assert read_by_qemu(path) == (
        b"x" * CLUSTER
        + bytes(3 * CLUSTER)
        + b"y" * CLUSTER
        + bytes(3 * CLUSTER)
        + b"z" * CLUSTER
        + bytes(3 * CLUSTER)
        + b"a".ljust(8 * CLUSTER + 512, b"\0")
    )


async def test_what_was_touched_once_is_not_taken_for_zero_later(graph: Graph, tmp_path: Path) -> None:
    """Though others were given the same clusters, and wrote nothing into them."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    assert await backend.write_by([(0, 4 * CLUSTER)], Filler(most=512)) == 0
    idle, last = Filler(most=0), Filler(b"y")
    assert await backend.write_by([(0, 4 * CLUSTER)], idle) == 0
    assert await backend.write_by([(0, CLUSTER)], last) == CLUSTER
    assert (idle.asked, last.asked) == ([(4 * CLUSTER, False)], [(CLUSTER, False)])
    await closed(graph, backend)
    assert is_sound(path)


async def test_more_clusters_than_the_cache_has_counts_of(graph: Graph, tmp_path: Path) -> None:
    """Their blocks are kept at hand all the same, as long as they are needed."""
    path = made(tmp_path, "cluster_size=512,compat=0.10", SIZE)
    backend = await opened(graph, path, discard="unmap")
    await backend.write_by([(0, 16 * CLUSTER)], Filler())
    await backend.discard(0, 16 * CLUSTER)
    await closed(graph, backend)
    backend = await opened(graph, path, **{"refcount-cache-size": 1024})
    filler = Filler()
    assert await backend.write_by([(0, 16 * CLUSTER)], filler) == 16 * CLUSTER
    assert filler.asked == [(16 * CLUSTER, False)]
    await closed(graph, backend)
    assert is_sound(path)
    assert read_by_qemu(path) == b"x" * 16 * CLUSTER + bytes(4 * CLUSTER + 512)


async def test_a_table_that_can_t_be_had(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that nothing points to are given back; those that are pointed to already stay."""
    path = made(tmp_path, "cluster_size=512", SIZE)
    backend = await opened(graph, path)
    driver = backend.node.driver
    assert isinstance(driver, Qcow2)
    writable = driver.map.writable

    async def fail_later(offset: int) -> tuple[Table, int]:
        if offset >= CLUSTER:
            raise OSError(errno.ENOSPC, "no table")
        return await writable(offset)

    monkeypatch.setattr(driver.map, "writable", fail_later)
    with pytest.raises(OSError, match="no table"):
        await backend.write_by([(0, 4 * CLUSTER)], Filler())
    monkeypatch.undo()
    await closed(graph, backend)
    assert is_sound(path)  # also without leaks
    assert read_by_qemu(path) == b"x" * CLUSTER + bytes(19 * CLUSTER + 512)


async def test_an_error_leaves_nothing_behind(graph: Graph, tmp_path: Path) -> None:
    """But bytes in free clusters, which nobody may take for zeroes afterwards."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    with pytest.raises(OSError, match=r"write at \d+ for 262144 bytes") as caught:
        await backend.write_by([(0, 4 * CLUSTER)], Filler(error=errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    for number in range(4):
        await backend.write(number * CLUSTER + 512, memoryview(b"a"))
    await closed(graph, backend)
    assert is_sound(path)
    assert read_by_qemu(path) == 4 * (bytes(512) + b"a").ljust(CLUSTER, b"\0") + bytes(16 * CLUSTER + 512)


async def test_clusters_that_have_something_are_for_others(graph: Graph, tmp_path: Path) -> None:
    """Data, zeroes; the ones before them are filled."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    await backend.write(2 * CLUSTER, memoryview(b"a"))
    await backend.write_zeroes(5 * CLUSTER, CLUSTER)
    filler = Filler()
    assert await backend.write_by([(2 * CLUSTER, CLUSTER)], filler) == 0
    assert await backend.write_by([(5 * CLUSTER, CLUSTER)], filler) == 0
    assert await backend.write_by([(CLUSTER // 2, CLUSTER)], filler) == 0
    assert await backend.write_by([(SIZE - CLUSTER, 2 * CLUSTER)], filler) == 0
    assert filler.asked == []
    assert await backend.write_by([(0, 4 * CLUSTER)], filler) == 2 * CLUSTER
    await closed(graph, backend)
    assert is_sound(path)
    assert read_by_qemu(path)[: 3 * CLUSTER] == b"x" * 2 * CLUSTER + b"a".ljust(CLUSTER, b"\0")


@pytest.mark.parametrize("options", ["extended_l2=on", "data_file=data.raw"])
async def test_other_images_decline(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = made(tmp_path, options, SIZE)
    backend = await opened(graph, path)
    filler = Filler()
    assert await backend.write_by([(0, 4 * CLUSTER)], filler) == 0
    assert filler.asked == []
    await closed(graph, backend)


@pytest.mark.parametrize(
    "options",
    [
        {"detect-zeroes": "on"},
        {"read-only": True},
        {"file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "disk.qcow2"}}},
        {"file": {"driver": "file", "filename": "disk.qcow2", "cache": {"direct": True}}},
    ],
)
async def test_who_must_see_each_write_does(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """Nodes with an eye on zeroes, filters that wait for events, and storage around the page cache."""
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "", SIZE).rename("disk.qcow2")
    node = await graph.open({**in_file(Path("disk.qcow2")), **options})
    filler = Filler()
    assert await node.path.write_by([(0, 4 * CLUSTER)], filler) == 0
    assert filler.asked == []


async def test_users_who_may_not_write_do_not(graph: Graph, tmp_path: Path) -> None:
    """Nor those whose writes are to be durable at once, nor while the graph stands still."""
    backend = await opened(graph, made(tmp_path, "", SIZE))
    filler = Filler()
    backend.write_cache = False
    assert await backend.write_by([(0, CLUSTER)], filler) == 0
    backend.write_cache = True
    backend.begin_drain()
    assert await backend.write_by([(0, CLUSTER)], filler) == 0
    backend.end_drain()
    reader = BlockBackend("reader")
    graph.attach(reader, backend.node, Permission.CONSISTENT_READ, Permission.ALL)
    assert await reader.write_by([(0, CLUSTER)], filler) == 0
    assert filler.asked == []
    assert await backend.write_by([(0, CLUSTER)], filler) == CLUSTER
    graph.detach(reader)
    await closed(graph, backend)
