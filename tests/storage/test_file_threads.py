"""What of a file is done in place, and what by threads."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from pynbd.block import pool
from pynbd.storage import file as file_driver
from pynbd.storage import in_place, linux
from tests.storage.conftest import SIZE, OpenDisk, description, evict


def located(path: Path) -> bool:
    """Whether files here can be read without waiting."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.nowait_flags(fd) is not None
    finally:
        os.close(fd)


async def test_what_is_cached_is_read_in_place(disk: Path, open_disk: OpenDisk, jobs: list[object]) -> None:
    if not located(disk):
        pytest.skip("the temporary folder's file system has no RWF_NOWAIT")
    content = disk.read_bytes()
    async with open_disk(description(disk)) as backend:
        jobs.clear()
        into = memoryview(bytearray(4096))
        for offset in range(0, SIZE, 40960):
            await backend.read(offset, into)
            assert into == content[offset : offset + 4096]
        assert not jobs


async def test_what_is_not_cached_is_read_by_threads(disk: Path, open_disk: OpenDisk, jobs: list[object]) -> None:
    """Many misses at once make one job per worker."""
    content = disk.read_bytes()
    async with open_disk(description(disk, aio="threads")) as backend:
        jobs.clear()
        evict(disk)
        if linux.resident_bytes(backend.node.driver._fd, 0, SIZE):  # type: ignore[attr-defined]  # a File
            pytest.skip("this file system keeps its pages")
        offsets = list(range(0, SIZE, 4096))
        random.Random(0).shuffle(offsets)
        buffers = [memoryview(bytearray(4096)) for _ in offsets]
        await asyncio.gather(*(backend.read(offset, into) for offset, into in zip(offsets, buffers, strict=True)))
        assert all(into == content[at : at + 4096] for at, into in zip(offsets, buffers, strict=True))
        assert 1 <= len(jobs) <= pool.WORKERS


async def test_what_is_cached_in_part(disk: Path, open_disk: OpenDisk) -> None:
    content = disk.read_bytes()
    async with open_disk(description(disk)) as backend:
        evict(disk)
        with disk.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), 8192, 64 << 10)
        into = memoryview(bytearray(128 << 10))
        await backend.read(64 << 10, into)
        assert into == content[64 << 10 : 192 << 10]


async def test_overlay_reads_by_threads(overlayfs: Path, open_disk: OpenDisk, jobs: list[object]) -> None:
    """Containers live on overlayfs: no read in place there, but batches."""
    path = overlayfs / "disk.raw"
    content = random.Random(3).randbytes(SIZE)
    path.write_bytes(content)
    async with open_disk(description(path, aio="threads")) as backend:
        if backend.locate(0, 1) is not None:
            pytest.skip("this kernel's overlayfs has RWF_NOWAIT")
        jobs.clear()
        buffers = [memoryview(bytearray(4096)) for _ in range(100)]
        await asyncio.gather(*(backend.read(i * 4096, into) for i, into in enumerate(buffers)))
        assert b"".join(buffers) == content[: 100 * 4096]
        assert len(jobs) == pool.WORKERS


async def test_memory_file_systems_are_read_in_place(
    small_tmpfs: Path, open_disk: OpenDisk, jobs: list[object]
) -> None:
    path = small_tmpfs / "disk.raw"
    path.write_bytes(b"x" * 8192)
    async with open_disk(description(path)) as backend:
        jobs.clear()
        into = memoryview(bytearray(8192))
        await backend.read(0, into)
        assert into == b"x" * 8192
        assert not jobs
        found = backend.locate(0, 8192)
        assert found is not None
        assert found.flags == 0


async def test_slow_writes_leave_the_loop(
    disk: Path, open_disk: OpenDisk, jobs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write in place that takes too long sends the next ones to threads, for a while."""
    now = 0.0
    monkeypatch.setattr(file_driver, "perf_counter", lambda: now)
    real = os.pwrite
    data = memoryview(b"x" * 4096)

    def slow(fd: int, data: memoryview, offset: int) -> int:
        nonlocal now
        now += 2 * in_place.SLOW_S
        return real(fd, data, offset)

    async with open_disk(description(disk)) as backend:
        jobs.clear()
        await backend.write(0, data)
        assert not jobs
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", slow)
            await backend.write(0, data)
        assert not jobs
        await backend.write(4096, data)
        assert len(jobs) == 1
        now += in_place.FIRST_PAUSE_S
        await backend.write(8192, data)
        assert len(jobs) == 1
        await backend.write(0, memoryview(bytes(file_driver.INLINE_WRITE_BYTES + 1)))
        assert len(jobs) == 2
    assert disk.read_bytes()[4096:12288] == bytes(8192)


async def test_slow_metadata_leaves_the_loop(
    disk: Path, open_disk: OpenDisk, jobs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def counter() -> float:
        nonlocal now
        now += 1.5 * in_place.SLOW_S
        return now

    async with open_disk(description(disk)) as backend:
        monkeypatch.setattr(file_driver, "perf_counter", counter)
        jobs.clear()
        first = await backend.block_status(0, SIZE)
        assert not jobs
        assert await backend.block_status(0, SIZE) == first
        assert len(jobs) == 1


async def test_prefetch(disk: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(disk)) as backend:
        evict(disk)
        await backend.cache(0, SIZE)
        into = memoryview(bytearray(SIZE))
        await backend.read(0, into)
        assert into == disk.read_bytes()


async def test_a_file_that_somebody_cut(disk: Path, open_disk: OpenDisk) -> None:
    """What is missing reads as zeroes: the disk keeps its size until it is opened again."""
    async with open_disk(description(disk)) as backend:
        os.truncate(disk, 5000)
        into = memoryview(bytearray(b"?" * 8192))
        await backend.read(0, into)
        assert into == disk.read_bytes() + bytes(8192 - 5000)
        large = memoryview(bytearray(b"?" * SIZE))
        await backend.read(0, large)
        assert large[5000:] == bytes(SIZE - 5000)
