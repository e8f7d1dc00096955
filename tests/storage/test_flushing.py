"""What is durable, and what is said when it could not be."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pynbd.block.alignment import aligned_buffer
from pynbd.block.graph import Graph
from pynbd.block.requests import RequestFlag
from pynbd.storage import aio, flushing
from pynbd.storage import in_place as in_place_module
from tests.storage.conftest import OpenDisk, description


@pytest.fixture(params=["kernel", "thread"])
def flushed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who waits for a flush: the kernel's asynchronous I/O, or a thread where there is none."""
    if request.param == "thread":
        monkeypatch.setattr(aio, "_calls", None)
    monkeypatch.setattr(flushing, "FEW_FLUSHES", 0)
    return str(request.param)


@pytest.fixture
def synced(flushed_by: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that make something durable."""
    calls: list[str] = []
    pwritev, fdatasync, flush = os.pwritev, os.fdatasync, aio.FlushQueue.fdatasync

    async def counted_flush(queue: aio.FlushQueue) -> None:
        calls.append("flush")
        await flush(queue)

    def counted_pwritev(fd: int, data: object, offset: int, flags: int = 0) -> int:
        if flags:
            calls.append("dsync" if flags == os.RWF_DSYNC else f"flags {flags}")
        return pwritev(fd, data, offset, flags)  # type: ignore[arg-type]  # passed on as it came

    def counted_fdatasync(fd: int) -> None:
        calls.append("flush")
        fdatasync(fd)

    monkeypatch.setattr(os, "pwritev", counted_pwritev)
    monkeypatch.setattr(os, "fdatasync", counted_fdatasync)
    monkeypatch.setattr(aio.FlushQueue, "fdatasync", counted_flush)
    return calls


async def test_fua_is_one_flush(disk: Path, open_disk: OpenDisk, synced: list[str]) -> None:
    async with open_disk(description(disk)) as backend:
        await backend.write(0, memoryview(b"x" * 4096), RequestFlag.FUA)
        assert synced == ["flush"]
        await backend.write_zeroes(0, 4096, RequestFlag.FUA)
        assert synced == ["flush"] * 2


async def test_durable_writes_at_one_time_share_a_flush(disk: Path, open_disk: OpenDisk, synced: list[str]) -> None:
    async with open_disk(description(disk)) as backend:
        data = memoryview(b"x" * 4096)
        await asyncio.gather(*(backend.write(offset << 12, data, RequestFlag.FUA) for offset in range(16)))
        assert synced == ["flush"] * 2  # the first one's, and one for all that came while it was under way


async def test_fua_without_the_page_cache_is_one_call(disk: Path, open_disk: OpenDisk, synced: list[str]) -> None:
    async with open_disk(description(disk, cache={"direct": True})) as backend:
        await backend.write(0, aligned_buffer(4096, 4096), RequestFlag.FUA)
        assert synced == ["dsync"]
        await backend.write(0, memoryview(b"y" * 4096))
        assert synced == ["dsync"]
        await backend.flush()
        assert synced == ["dsync", "flush"]
        await backend.write_zeroes(0, 4096, RequestFlag.FUA)
        assert synced[-1] == "flush"
        assert len(synced) == 3


async def test_fua_where_the_kernel_has_none(
    disk: Path, open_disk: OpenDisk, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev
    refused = 0

    def refusing(fd: int, data: object, offset: int, flags: int = 0) -> int:
        nonlocal refused
        if flags:
            refused += 1
            raise OSError(errno.EOPNOTSUPP, "none here")
        return pwritev(fd, data, offset)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(os, "pwritev", refusing)
    async with open_disk(description(disk, cache={"direct": True})) as backend:
        await backend.write(0, aligned_buffer(4096, 4096), RequestFlag.FUA)
        page = aligned_buffer(4096, 4096)
        page[:] = b"y" * 4096
        await backend.write(0, page, RequestFlag.FUA)
        assert synced == ["flush", "flush"]
        assert refused == 1
    assert disk.read_bytes()[:4096] == b"y" * 4096


async def test_no_flush_means_none(disk: Path, open_disk: OpenDisk, synced: list[str]) -> None:
    async with open_disk(description(disk, cache={"no-flush": True})) as backend:
        await backend.write(0, memoryview(b"x" * 4096), RequestFlag.FUA)
        await backend.flush()
    assert synced == []
    assert disk.read_bytes()[:4096] == b"x" * 4096


def failing_once(code: int) -> Callable[[int], None]:
    answers = iter([code])

    def fdatasync(fd: int) -> None:
        for answer in answers:
            raise OSError(answer, os.strerror(answer))

    return fdatasync


def failing_once_in_the_kernel(code: int) -> Callable[[aio.FlushQueue], Awaitable[None]]:
    fail = failing_once(code)

    async def fdatasync(queue: aio.FlushQueue) -> None:
        fail(0)

    return fdatasync


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_after_a_failed_flush_all_later_ones_fail(
    code: int, disk: Path, open_disk: OpenDisk, flushed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have dropped what it could not write: a flush that is tried again would lie."""
    graph = Graph()
    node = await graph.open(description(disk))
    await node.path.write(0, memoryview(b"x"), 0)
    with monkeypatch.context() as patch:
        if flushed_by == "thread":
            patch.setattr(os, "fdatasync", failing_once(code))
        else:
            patch.setattr(aio.FlushQueue, "fdatasync", failing_once_in_the_kernel(code))
        with pytest.raises(OSError, match=f"{disk}.*flush") as caught:
            await node.flush()
        assert caught.value.errno == code
        for _ in range(3):  # fdatasync itself succeeds from here on
            with pytest.raises(OSError) as caught:
                await node.flush()
            assert caught.value.errno == code
        with pytest.raises(OSError) as caught:
            await node.path.write(0, memoryview(b"x"), RequestFlag.FUA)
        assert caught.value.errno == code
    with pytest.raises(OSError):
        await graph.close(node)
    async with open_disk(description(disk)) as backend:
        await backend.write(0, memoryview(b"x"))
        await backend.flush()


async def test_a_durable_write_that_finds_no_room(
    small_tmpfs: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told at the write: it is no reason to fail flushes ever after."""
    path = small_tmpfs / "disk.raw"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    async with open_disk(description(path)) as backend:
        with pytest.raises(OSError, match="write at 0 for 4194304 bytes") as caught:
            await backend.write(0, memoryview(bytes(4 << 20)), RequestFlag.FUA)
        assert caught.value.errno == errno.ENOSPC
        await backend.discard(0, 16 << 20)
        await backend.flush()


async def test_a_write_that_finds_no_room(small_tmpfs: Path, open_disk: OpenDisk) -> None:
    path = small_tmpfs / "disk.raw"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    async with open_disk(description(path)) as backend:
        answers: list[OSError] = []
        for offset in range(0, 2 << 20, 48 << 10):
            try:
                await backend.write(offset, memoryview(b"x" * (48 << 10)))
            except OSError as problem:
                answers.append(problem)
        assert {problem.errno for problem in answers} == {errno.ENOSPC}
        assert re.search(f"{path}.: write at .* for .* bytes: No space left on device", str(answers[0]))
        await backend.flush()


async def test_a_flush_in_place_for_the_only_client(
    disk: Path, open_disk: OpenDisk, flushed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else is kept waiting by it; and if it was slow, others wait for the next ones."""
    in_place: list[int] = []
    fdatasync = os.fdatasync

    def noted_fdatasync(fd: int) -> None:
        if threading.current_thread() is threading.main_thread():
            in_place.append(fd)
        fdatasync(fd)

    async def flush_after_a_write() -> int:
        await backend.write(0, memoryview(b"x"))
        await backend.flush()
        return len(in_place)

    monkeypatch.setattr(os, "fdatasync", noted_fdatasync)
    monkeypatch.setattr(flushing, "SLOW_FLUSH_S", float("inf"))
    async with open_disk(description(disk)) as backend:
        assert await flush_after_a_write() == 0
        monkeypatch.setattr(asyncio.get_running_loop(), "has_one_client", True, raising=False)
        assert await flush_after_a_write() == 1
        monkeypatch.setattr(flushing, "SLOW_FLUSH_S", 0)
        monkeypatch.setattr(in_place_module, "FIRST_PAUSE_S", float("inf"))
        assert await flush_after_a_write() == 2
        assert await flush_after_a_write() == 2
