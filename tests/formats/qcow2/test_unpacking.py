"""Compressed clusters that QEMU wrote, read one by one and many at once."""

from __future__ import annotations

import asyncio
import errno
import random
import sys
from pathlib import Path
from typing import cast

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.mapping import Piece
from tests.formats.qcow2.workload import in_file
from tests.peers import require_tool, run

SIZE_BYTES = 6 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Some of it gets smaller, some does not, and some are zeroes."""
    source = random.Random(5)
    data = bytearray()
    while len(data) < SIZE_BYTES:
        length = source.randint(1, 200) << 10
        data += source.choice(
            [source.randbytes(length), source.randbytes(length // 2) + bytes(length // 2), bytes(length)]
        )
    path = tmp_path / "disk.raw"
    path.write_bytes(data[:SIZE_BYTES])
    return path


async def opened(graph: Graph, path: Path) -> BlockBackend:
    """A reader of an image."""
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(in_file(path)), Permission.CONSISTENT_READ)
    return backend


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
async def test_reads_of_all_lengths(graph: Graph, tmp_path: Path, disk: Path, cluster: str, compression: str) -> None:
    """Side by side, so that each finds clusters that another one has decompressed."""
    path = tmp_path / "image.qcow2"
    options = f"cluster_size={cluster},compression_type={compression}"
    run(require_tool("qemu-img"), "convert", "-c", "-O", "qcow2", "-o", options, disk, path)
    backend = await opened(graph, path)
    expected, source = disk.read_bytes(), random.Random(6)

    async def read_some() -> None:
        for longest in (600, 5000, 70_000, 300_000, 5 << 20):
            for _ in range(4):
                offset = source.randrange(SIZE_BYTES)
                into = bytearray(min(source.randint(1, longest), SIZE_BYTES - offset))
                await backend.read(offset, memoryview(into))
                assert into == expected[offset : offset + len(into)]

    await asyncio.gather(*(read_some() for _ in range(4)))
    graph.detach(backend)


async def test_one_of_many_is_damaged(graph: Graph, tmp_path: Path) -> None:
    """The error says where it lies; all others can be read."""
    disk, path = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    clusters = [random.Random(number).randbytes(6000).ljust(64 << 10, b"\0") for number in range(40)]
    disk.write_bytes(b"".join(clusters))
    run(require_tool("qemu-img"), "convert", "-c", "-W", "-m", "1", "-O", "qcow2", disk, path)
    backend = await opened(graph, path)
    assert backend.root is not None
    mapping = cast(Qcow2, backend.root.node.driver).map
    where, _ = mapping.compressed_place((await mapping.entry(20 << 16))[0])
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff")  # no kind of block
    with pytest.raises(OSError, match=f"{where}.*can't be decompressed|can't be decompressed.*{where}"):
        await backend.read(0, memoryview(bytearray(len(clusters) << 16)))
    for number, expected in enumerate(clusters):
        into = bytearray(64 << 10)
        if number == 20:
            with pytest.raises(OSError, match="can't be decompressed"):
                await backend.read(number << 16, memoryview(into))
        else:
            await backend.read(number << 16, memoryview(into))
            assert into == expected
    graph.detach(backend)


class Gate:
    """Holds up who decompresses a cluster until it is opened.

    Args:
        driver: whose readers.
    """

    def __init__(self, driver: Qcow2, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0
        self.open = asyncio.Event()
        self._unpack = driver.unpacking._unpack_one
        monkeypatch.setattr(driver.unpacking, "_unpack_one", self._pass)

    async def _pass(self, descriptor: int) -> bytes:
        self.passed += 1
        found = await self._unpack(descriptor)
        await self.open.wait()
        return found


def one_cluster(tmp_path: Path) -> tuple[Path, bytes]:
    """(an image with a single compressed cluster, what that is)."""
    disk, path = tmp_path / "disk.raw", tmp_path / "image.qcow2"
    data = random.Random(1).randbytes(6000).ljust(64 << 10, b"\0")
    disk.write_bytes(data)
    run(require_tool("qemu-img"), "convert", "-c", "-O", "qcow2", disk, path)
    return path, data


async def read_at(backend: BlockBackend, offset: int) -> bytes:
    """4 KiB."""
    into = bytearray(4096)
    await backend.read(offset, memoryview(into))
    return bytes(into)


async def test_a_cluster_that_many_want_is_decompressed_once(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if who began is cancelled: then once more."""
    path, data = one_cluster(tmp_path)
    backend = await opened(graph, path)
    assert backend.root is not None
    gate = Gate(driver := cast(Qcow2, backend.root.node.driver), monkeypatch)
    readers = [asyncio.create_task(read_at(backend, offset)) for offset in range(0, 64 << 10, 4096)]
    while not gate.passed:
        await asyncio.sleep(0)
    readers[0].cancel()
    readers[5].cancel()
    cancelled = await asyncio.gather(readers[0], readers[5], return_exceptions=True)
    assert [type(one) for one in cancelled] == [asyncio.CancelledError] * 2
    gate.open.set()
    left = [number for number in range(16) if number not in (0, 5)]
    found = await asyncio.gather(*(readers[number] for number in left))
    assert found == [data[number * 4096 : number * 4096 + 4096] for number in left]
    assert gate.passed == 2
    assert not driver.unpacking._coming
    assert await read_at(backend, 0) == data[:4096]
    assert gate.passed == 2
    graph.detach(backend)


async def test_a_damaged_cluster_that_many_want(graph: Graph, tmp_path: Path) -> None:
    """Each is told."""
    path, _ = one_cluster(tmp_path)
    backend = await opened(graph, path)
    assert backend.root is not None
    mapping = cast(Qcow2, backend.root.node.driver).map
    where, _ = mapping.compressed_place((await mapping.entry(0))[0])
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff")  # no kind of block
    told = await asyncio.gather(*(read_at(backend, offset) for offset in (0, 4096, 8192)), return_exceptions=True)
    assert ["can't be decompressed" in str(one) and str(where) in str(one) for one in told] == [True] * 3
    graph.detach(backend)


async def test_what_was_given_up_is_not_waited_for(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that came before a write sees what was there, one that comes after it what was written."""
    path, data = one_cluster(tmp_path)
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(in_file(path)), Permission.CONSISTENT_READ | Permission.WRITE)
    assert backend.root is not None
    driver = cast(Qcow2, backend.root.node.driver)
    gate = Gate(driver, monkeypatch)
    before = asyncio.create_task(read_at(backend, 4096))
    while not gate.passed:
        await asyncio.sleep(0)
    kept_for = driver.unpacking._coming
    assert kept_for
    await backend.write(0, memoryview(b"x" * (64 << 10)))
    assert driver.unpacking._coming is not kept_for
    assert await read_at(backend, 4096) == b"x" * 4096
    gate.open.set()
    assert await before == data[4096:8192]
    assert not driver.unpacking.keeps
    graph.detach(backend)


async def test_what_is_given_up_during_a_read_is_not_kept(
    graph: Graph, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes may come to lie there that have the same descriptor."""
    disk.write_bytes(b"".join(random.Random(number).randbytes(6000).ljust(64 << 10, b"\0") for number in range(4)))
    path = tmp_path / "image.qcow2"
    run(require_tool("qemu-img"), "convert", "-c", "-O", "qcow2", disk, path)
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(in_file(path)), Permission.CONSISTENT_READ | Permission.WRITE)
    assert backend.root is not None
    driver = cast(Qcow2, backend.root.node.driver)
    find, found = driver.map.piece, 0

    async def write_in_between(offset: int, end: int) -> Piece:
        nonlocal found
        found += 1
        if found == 2:
            await backend.write(0, memoryview(b"x" * (64 << 10)))
        return await find(offset, end)

    monkeypatch.setattr(driver.map, "piece", write_in_between)
    into = bytearray(100 << 10)
    await backend.read(512, memoryview(into))
    assert found > 2
    monkeypatch.undo()
    assert into == disk.read_bytes()[512 : 512 + len(into)]  # it began before the write did
    assert not driver.unpacking.keeps
    await backend.read(512, memoryview(into))
    assert into[: 63 << 10] == b"x" * (63 << 10)
    graph.detach(backend)


async def test_without_the_library(graph: Graph, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is missing; nothing is wrong with the image."""
    path = tmp_path / "image.qcow2"
    run(require_tool("qemu-img"), "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", disk, path)
    before = path.read_bytes()
    for name in ("compression", "compression.zstd", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(compression, "_zstd", compression._zstd.__wrapped__)
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(in_file(path)), Permission.CONSISTENT_READ | Permission.WRITE)
    with pytest.raises(OSError, match=r"backports\.zstd") as caught:
        await backend.read(0, memoryview(bytearray(SIZE_BYTES)))
    assert caught.value.errno == errno.ENOTSUP
    graph.detach(backend)
    await graph.close_all()
    assert path.read_bytes() == before
