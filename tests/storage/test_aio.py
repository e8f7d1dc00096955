"""Flushes by the kernel's asynchronous I/O."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from pynbd.storage import aio


@pytest.fixture
def fd(tmp_path: Path) -> int:
    return os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)


async def test_flushes_end(fd: int) -> None:
    queue = aio.FlushQueue(fd)
    for _ in range(3):
        os.pwrite(fd, b"x" * 4096, 0)
        await asyncio.gather(*(queue.fdatasync() for _ in range(4)))
    queue.close()
    os.close(fd)


async def test_more_than_the_kernel_takes_are_refused_or_end(fd: int) -> None:
    queue = aio.FlushQueue(fd)
    answers = await asyncio.gather(*(queue.fdatasync() for _ in range(1000)), return_exceptions=True)
    assert {getattr(answer, "errno", None) for answer in answers} <= {None, errno.EAGAIN}
    assert None in answers
    queue.close()
    os.close(fd)


async def test_a_failure_is_told() -> None:
    """A pipe can't be flushed: the kernel says so at once, or when it tries."""
    reader, writer = os.pipe()
    queue = aio.FlushQueue(writer)
    with pytest.raises(OSError) as caught:
        await queue.fdatasync()
    assert caught.value.errno == errno.EINVAL
    queue.close()
    os.close(reader)
    os.close(writer)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_nothing_stays_open(fd: int) -> None:
    before = open_files()
    queue = aio.FlushQueue(fd)
    await queue.fdatasync()
    queue.close()
    assert open_files() == before
    os.close(fd)


async def test_an_unknown_architecture_has_none(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_calls", None)
    with pytest.raises(OSError) as caught:
        aio.FlushQueue(fd)
    assert caught.value.errno == errno.ENOSYS
    os.close(fd)
