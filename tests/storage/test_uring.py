"""The kernel's ring for reads."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block import pool
from pynbd.block.errors import OptionError
from pynbd.storage import linux, uring
from tests.storage.conftest import SIZE, OpenDisk, description, evict


@pytest.fixture
def fd(disk: Path) -> Iterator[int]:
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        ring_or_skip()
        yield descriptor
    finally:
        os.close(descriptor)


def ring_or_skip() -> None:
    try:
        os.close(uring.ReadRing._setup(ctypes.create_string_buffer(uring.PARAMS.size)))
    except OSError as problem:
        pytest.skip(f"io_uring is not to be had here: {problem}")


async def test_more_reads_than_there_is_room_for(disk: Path, fd: int) -> None:
    content = disk.read_bytes()
    evict(disk)
    ring = uring.ReadRing(fd)
    offsets = [4096 * number for number in range(SIZE // 4096)]
    random.Random(1).shuffle(offsets)
    assert len(offsets) > 2 * uring.ENTRIES
    buffers = [memoryview(bytearray(4096)) for _ in offsets]
    got = await asyncio.gather(*(ring.read(at, into) for at, into in zip(offsets, buffers, strict=True)))
    assert set(got) == {4096}
    assert all(into == content[at : at + 4096] for at, into in zip(offsets, buffers, strict=True))
    ring.close()


async def test_what_lies_past_the_end(disk: Path, fd: int) -> None:
    ring = uring.ReadRing(fd)
    into = memoryview(bytearray(b"x" * 4096))
    assert await ring.read(SIZE - 100, into) == 100
    assert into[:100] == disk.read_bytes()[-100:]
    assert await ring.read(SIZE + 4096, into) == 0
    ring.close()


async def test_errors_are_the_files(tmp_path: Path) -> None:
    ring_or_skip()
    folder = os.open(tmp_path, os.O_RDONLY)
    ring = uring.ReadRing(folder)
    with pytest.raises(IsADirectoryError):
        await ring.read(0, memoryview(bytearray(512)))
    ring.close()
    os.close(folder)


async def test_a_reader_who_is_gone(disk: Path, fd: int) -> None:
    """The buffer stays the kernel's until it is done with it, and then nobody is told."""
    ring = uring.ReadRing(fd)
    evict(disk)
    reading = asyncio.ensure_future(ring.read(0, memoryview(bytearray(4096))))
    await asyncio.sleep(0)
    reading.cancel()
    into = memoryview(bytearray(4096))
    assert await ring.read(8192, into) == 4096
    while ring._waiting:
        await asyncio.sleep(0)
    ring.close()


async def test_the_kernel_takes_no_more(disk: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those fail that it has not taken; it goes on with others later."""
    ring = uring.ReadRing(fd)
    real, failures = linux.syscall, [errno.EAGAIN, errno.EINTR, errno.EBADF]

    def fails_at_first(number: int, *arguments: object) -> int:
        if number == uring.SYS_ENTER and failures:
            raise OSError(failures.pop(0), "no")
        return real(number, *arguments)

    monkeypatch.setattr(linux, "syscall", fails_at_first)
    buffers = [memoryview(bytearray(512)) for _ in range(3)]
    told = await asyncio.gather(*(ring.read(512 * n, into) for n, into in enumerate(buffers)), return_exceptions=True)
    assert [getattr(problem, "errno", None) for problem in told] == [errno.EBADF] * 3
    assert await ring.read(0, buffers[0]) == 512
    assert buffers[0] == disk.read_bytes()[:512]
    ring.close()


async def test_reads_from_the_disk_need_no_threads(
    disk: Path, open_disk: OpenDisk, jobs: list[object], fd: int
) -> None:
    content = disk.read_bytes()
    async with open_disk(description(disk, aio="io_uring")) as backend:
        jobs.clear()
        evict(disk)
        offsets = list(range(0, SIZE, 16384))
        buffers = [memoryview(bytearray(16384)) for _ in offsets]
        await asyncio.gather(*(backend.read(at, into) for at, into in zip(offsets, buffers, strict=True)))
        assert b"".join(buffers) == content
        assert not jobs


@pytest.mark.parametrize("aio", ["auto", "native", "threads"])
async def test_threads_where_there_is_no_ring(
    aio: str, disk: Path, open_disk: OpenDisk, jobs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in many containers."""

    def forbidden(params: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(uring.ReadRing, "_setup", staticmethod(forbidden))
    content = disk.read_bytes()
    async with open_disk(description(disk, aio=aio)) as backend:
        jobs.clear()
        for _ in range(20):  # the kernel may have brought back what was evicted
            evict(disk)
            if linux.resident_bytes(backend.node.driver._fd, 0, SIZE):  # type: ignore[attr-defined]  # a File
                pytest.skip("this file system keeps its pages")
            into = memoryview(bytearray(4096))
            await backend.read(40960, into)
            assert into == content[40960 : 40960 + 4096]
            if jobs:
                break
        assert 1 <= len(jobs) <= pool.WORKERS


async def test_io_uring_that_was_asked_for_and_is_not_there(
    disk: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(params: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(uring.ReadRing, "_setup", staticmethod(missing))
    with pytest.raises(OptionError, match="aio=io_uring"):
        async with open_disk(description(disk, aio="io_uring")):
            pass
