"""A disk that becomes full loses no data that were written before, and leaks nothing."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Driver, Preallocation
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from tests.formats.qcow2.damage import checked_by_qemu
from tests.formats.qcow2.workload import COMPRESSED, made, read_by_qemu

SMALL_DISK = str(Path(__file__).resolve())
"""What to write for `driver`."""

BLOCK, ROOM_BYTES = 4096, 3 << 20


class SmallDisk(Driver):
    """Bytes in memory that take space block by block, of which there is not much."""

    growable = True

    def __init__(self, options: object) -> None:
        super().__init__(options)  # type: ignore[arg-type]  # it has none of its own
        self.data = bytearray()
        self.blocks: set[int] = set()

    @property
    def size(self) -> int:  # type: ignore[override]  # the length of the bytes, not a number of its own
        return len(self.data)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        into[:] = self.data[offset : offset + len(into)].ljust(len(into), b"\0")

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        end = offset + len(data)
        blocks = self.blocks.union(range(offset // BLOCK, -(-end // BLOCK)))
        if len(blocks) * BLOCK > ROOM_BYTES:
            raise OSError(errno.ENOSPC, "no space left")
        self.blocks = blocks
        self.data.extend(bytes(max(end - len(self.data), 0)))
        self.data[offset:end] = data

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


Content = Callable[[int], bytes]
"""What is written by which request."""


async def write_until_full(graph: Graph, path: Path, length: int, content: Content, flags: int = 0) -> None:
    """Write `length` bytes after `length` bytes until there is no space, and see what is there then."""
    storage = await graph.open({"driver": SMALL_DISK})
    disk = cast(SmallDisk, storage.driver)
    await disk.write(0, memoryview(path.read_bytes()), 0)
    node = await graph.open({"driver": "qcow2", "file": storage.name})
    backend = BlockBackend("test")
    graph.attach(backend, node, Permission.ALL)
    written = bytearray(8 << 20)

    async def fill() -> None:
        for offset in range(0, len(written), length):
            data = content(offset // length)
            await backend.write(offset, memoryview(data), flags)
            written[offset : offset + length] = data

    with pytest.raises(OSError, match="no space left") as caught:
        await fill()
    assert caught.value.errno == errno.ENOSPC
    await backend.flush()
    graph.detach(backend)
    await graph.close_all()
    path.write_bytes(disk.data)
    assert any(written)
    assert bytes(written) == read_by_qemu(path)[: len(written)]
    found = checked_by_qemu(path)
    assert found is not None
    assert (found["corruptions"], found["leaks"]) == (0, 0)


@pytest.mark.parametrize("length", [4096, 64 << 10, 256 << 10])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on"])
async def test_what_was_written_before_is_there(graph: Graph, tmp_path: Path, options: str, length: int) -> None:
    """The tables that tell of it had their place before."""
    path = made(tmp_path, options, 8 << 20)
    await write_until_full(graph, path, length, lambda number: bytes([number % 255 + 1]) * length)


@pytest.mark.parametrize("length", [64 << 10, 256 << 10, 1 << 20])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compression_type=zstd"])
async def test_compressed_clusters_share_none_with_those_that_found_no_room(
    graph: Graph, tmp_path: Path, options: str, length: int
) -> None:
    path = made(tmp_path, options, 8 << 20)
    source = random.Random(1)

    def half_noise(_: int) -> bytes:
        return b"".join(source.randbytes(2048).ljust(4096, b"\0") for _ in range(length // 4096))

    await write_until_full(graph, path, length, half_noise, COMPRESSED)
