"""Clusters that somebody else fills, in the image file itself: they get places, or stay as they were."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from tests.formats.qcow2.workload import in_file, is_sound, made, read_by_qemu

CLUSTER = 64 << 10
SIZE = 20 * CLUSTER + 512


class Filler:
    """Fills what it is given with a byte, up to a limit, and remembers what it was asked for."""

    def __init__(self, byte: bytes = b"x", most: int = SIZE, error: int = 0) -> None:
        self.byte, self.most, self.error = byte, most, error
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, fd: int, host_offset: int, length: int, fresh: bool) -> int:
        self.asked.append((length, fresh))
        done = min(length, self.most)
        os.pwrite(fd, self.byte * done, host_offset)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return done


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
    assert await backend.write_by(CLUSTER, 3 * CLUSTER + 100, filler) == 3 * CLUSTER
    assert await backend.write_by(19 * CLUSTER, CLUSTER + 512, filler) == CLUSTER
    assert await backend.write_by(20 * CLUSTER, 512, filler) == 0
    assert filler.asked == [(3 * CLUSTER, True), (CLUSTER, True)]
    await closed(graph, backend)
    assert is_sound(path)
    full = b"x" * CLUSTER
    assert read_by_qemu(path) == bytes(CLUSTER) + 3 * full + bytes(15 * CLUSTER) + full + bytes(512)


async def test_what_is_not_filled_has_no_place(graph: Graph, tmp_path: Path) -> None:
    """Its clusters are free again, and those that nobody has touched still count as zero."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    await backend.write(12 * CLUSTER, memoryview(b"a"))  # the L2 table has its place
    assert await backend.write_by(0, 4 * CLUSTER, Filler(most=CLUSTER + 4096)) == CLUSTER
    second = Filler(b"y")
    assert await backend.write_by(4 * CLUSTER, CLUSTER, second) == CLUSTER
    third = Filler(b"z")
    assert await backend.write_by(8 * CLUSTER, CLUSTER, third) == CLUSTER
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


async def test_an_error_leaves_nothing_behind(graph: Graph, tmp_path: Path) -> None:
    """But bytes in free clusters, which nobody may take for zeroes afterwards."""
    path = made(tmp_path, "", SIZE)
    backend = await opened(graph, path)
    with pytest.raises(OSError, match=r"write at \d+ for 262144 bytes") as caught:
        await backend.write_by(0, 4 * CLUSTER, Filler(error=errno.ENOSPC))
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
    assert await backend.write_by(2 * CLUSTER, CLUSTER, filler) == 0
    assert await backend.write_by(5 * CLUSTER, CLUSTER, filler) == 0
    assert await backend.write_by(CLUSTER // 2, CLUSTER, filler) == 0
    assert await backend.write_by(SIZE - CLUSTER, 2 * CLUSTER, filler) == 0
    assert filler.asked == []
    assert await backend.write_by(0, 4 * CLUSTER, filler) == 2 * CLUSTER
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
    assert await backend.write_by(0, 4 * CLUSTER, filler) == 0
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
    assert await node.path.write_by(0, 4 * CLUSTER, filler) == 0
    assert filler.asked == []


async def test_users_who_may_not_write_do_not(graph: Graph, tmp_path: Path) -> None:
    """Nor those whose writes are to be durable at once, nor while the graph stands still."""
    backend = await opened(graph, made(tmp_path, "", SIZE))
    filler = Filler()
    backend.write_cache = False
    assert await backend.write_by(0, CLUSTER, filler) == 0
    backend.write_cache = True
    backend.begin_drain()
    assert await backend.write_by(0, CLUSTER, filler) == 0
    backend.end_drain()
    reader = BlockBackend("reader")
    graph.attach(reader, backend.node, Permission.CONSISTENT_READ, Permission.ALL)
    assert await reader.write_by(0, CLUSTER, filler) == 0
    assert filler.asked == []
    assert await backend.write_by(0, CLUSTER, filler) == CLUSTER
    graph.detach(reader)
    await closed(graph, backend)
