"""Short reads whose bytes are not in memory when they are first tried."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_protocol.constants import Command, Errno, ReplyMode
from pynbd.block.statistics import Operation
from pynbd.server import plain_requests
from pynbd.server.budget import RESERVE_BYTES
from pynbd.server.limits import ClientLimits
from pynbd.server.missed_reads import MissedReads
from pynbd.storage.file import File
from tests.peers import require_tool, run
from tests.server.clients import LIMIT_S, MODES, Served, send_together, serving, the_connection

KIB, MIB = 1 << 10, 1 << 20

SIZE = 8 * MIB


class Queue:
    """Reads that wait until they are let go on."""

    def __init__(self) -> None:
        self.fd = -1
        self.added: list[tuple[int, memoryview, Callable[[int], None]]] = []
        self.waiting: list[tuple[int, memoryview, Callable[[int], None]]] = []
        self.submitted = 0

    def put(self, offset: int, into: memoryview, ended: Callable[[int], None]) -> None:
        self.added.append((offset, into, ended))

    def submit(self) -> None:
        self.submitted += 1
        self.waiting += self.added
        self.added = []

    def go_on(self) -> None:
        for offset, into, ended in self.waiting:
            asyncio.get_running_loop().call_soon(ended, os.preadv(self.fd, [into], offset))
        self.waiting = []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say from which place on nothing is in memory, when it is tried in place."""
    limit = [0]
    preadv = os.preadv

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        @staticmethod
        def preadv(fd: int, buffers: Any, offset: int, flags: int) -> int:
            if offset >= limit[0]:
                raise BlockingIOError
            return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(plain_requests, "os", Os())

    def nothing_from(offset: int) -> None:
        limit[0] = offset

    return nothing_from


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()

    def of(driver: File) -> Queue:
        queue.fd = driver._fd
        return queue

    monkeypatch.setattr(File, "read_queue", of)
    return queue


def raw(file: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(file)}, **options}


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not what():
            await asyncio.sleep(0)


def reads(served: Served) -> tuple[int, int]:
    told = the_connection(served).backend.statistics
    return told.operations[Operation.READ], told.bytes[Operation.READ]


@pytest.mark.parametrize("offset", [0, 512])
@pytest.mark.parametrize("mode", MODES)
async def test_hits_are_answered_while_others_wait(
    mode: ReplyMode, offset: int, file: Path, uncached: Callable[[int], None], queue: Queue
) -> None:
    """All of a wake-up are submitted together, whatever their lengths; none holds up what is in memory."""
    content = file.read_bytes()[offset:]
    uncached(4 * MIB)
    asked = [(0, 4 * KIB), (5 * MIB, 4 * KIB), (8 * KIB, 4 * KIB), (6 * MIB, 4 * KIB)]
    asked += [(7 * MIB, 40 * KIB), (MIB, 100), (4 * MIB, 512), (64 * KIB, 60 * KIB)]
    async with serving(raw(file, offset=offset)) as served:
        client = await served.connect(mode=mode)
        cookies = await send_together(client, *((Command.READ, *one) for one in asked))
        by_place = dict(zip(asked, cookies, strict=True))
        for place in (one for one in asked if one[0] < 4 * MIB):
            assert (await client.reply(by_place[place])).data == content[place[0] : sum(place)]
        assert [(at - offset, len(into)) for at, into, _ in queue.waiting] == [
            one for one in asked if one[0] >= 4 * MIB
        ]
        assert queue.submitted == 1
        assert the_connection(served).backend.in_flight == the_connection(served).in_flight == 4
        queue.go_on()
        for place in (one for one in asked if one[0] >= 4 * MIB):
            assert (await client.reply(by_place[place])).data == content[place[0] : sum(place)]
        assert reads(served) == (len(asked), sum(length for _, length in asked))
        assert (the_connection(served).account.held, the_connection(served).in_flight) == (0, 0)


async def test_no_more_wait_than_there_is_memory_for(file: Path, uncached: Callable[[int], None], queue: Queue) -> None:
    """The others go the long way, where they stand in line."""
    uncached(0)
    async with serving(raw(file)) as served:
        client = await served.connect()
        count = RESERVE_BYTES // (60 * KIB)
        asked = [(number * 60 * KIB, 60 * KIB) for number in range(count + 2)]
        cookies = await send_together(client, *((Command.READ, *one) for one in asked))
        for cookie in cookies[count:]:
            await client.reply(cookie)
        assert len(queue.waiting) == count
        queue.go_on()
        for cookie in cookies[:count]:
            await client.reply(cookie)


async def test_short_ones_make_no_room_for_long_ones(file: Path, uncached: Callable[[int], None], queue: Queue) -> None:
    """Whatever their lengths, what they hold together stays within what a connection may always hold."""
    uncached(0)
    async with serving(raw(file)) as served:
        client = await served.connect()
        asked = [(0, 512), (512, 512), *((number * 60 * KIB, 60 * KIB) for number in range(1, 9)), (0, 512)]
        cookies = await send_together(client, *((Command.READ, *one) for one in asked))
        await until(lambda: bool(queue.waiting))
        assert sum(len(into) for _, into, _ in queue.waiting) <= RESERVE_BYTES
        while not all(client.replies[cookie].done for cookie in cookies if cookie in client.replies):
            queue.go_on()
            cookie = next(cookie for cookie in cookies if cookie in client.replies)
            await client.reply(cookie)


@pytest.mark.parametrize("result", [-errno.EIO, 100, 0])
async def test_what_fails_is_read_by_the_driver(
    result: int, file: Path, uncached: Callable[[int], None], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells what is wrong, if it still is."""
    content, failing = file.read_bytes(), False
    read_file = File.read

    async def read(driver: File, offset: int, into: memoryview, flags: int) -> None:
        if failing:
            raise OSError(errno.EIO, "broken")
        await read_file(driver, offset, into, flags)

    monkeypatch.setattr(File, "read", read)
    uncached(0)
    async with serving(raw(file)) as served:
        client = await served.connect()
        for failing in (False, True):
            cookies = await send_together(client, (Command.READ, 0, 4 * KIB), (Command.READ, 8 * KIB, 4 * KIB))
            await until(lambda: len(queue.waiting) == 2)
            queue.waiting[1][1][:] = content[8 * KIB : 12 * KIB]
            for (_, _, ended), got in zip(queue.waiting, (result, 4 * KIB), strict=True):
                asyncio.get_running_loop().call_soon(ended, got)  # within no task
            queue.waiting.clear()
            replies = [await client.reply(cookie) for cookie in cookies]
            assert [reply.error for reply in replies] == [Errno.EIO if failing else 0, 0]
            assert bytes(replies[1].data) == content[8 * KIB : 12 * KIB]
            if not failing:
                assert bytes(replies[0].data) == content[: 4 * KIB]
        assert (the_connection(served).account.held, the_connection(served).in_flight) == (0, 0)


async def test_a_drain_waits_for_them(file: Path, uncached: Callable[[int], None], queue: Queue) -> None:
    uncached(0)
    async with serving(raw(file)) as served:
        client, backend = await served.connect(), served.server.exports[""].backend
        cookies = await send_together(client, (Command.READ, 0, 512), (Command.READ, 512, 512))
        await until(lambda: len(queue.waiting) == 2)
        backend.begin_drain()
        idle = asyncio.ensure_future(backend.idle())
        await asyncio.sleep(0)
        assert not idle.done()
        queue.go_on()
        async with asyncio.timeout(LIMIT_S):
            await idle
        backend.end_drain()
        for cookie in cookies:
            assert (await client.reply(cookie)).error == 0


async def test_a_client_that_leaves(file: Path, uncached: Callable[[int], None], queue: Queue) -> None:
    """The connection ends with the last read that is under way."""
    uncached(0)
    async with serving(raw(file)) as served:
        client = await served.connect()
        await send_together(client, (Command.READ, 0, 512), (Command.READ, 512, 512))
        await until(lambda: len(queue.waiting) == 2)
        client.sock.close()
        connection = the_connection(served)
        connection.abort()
        assert served.server.connections == {connection}
        queue.go_on()
        await until(lambda: not served.server.connections)
        assert (connection.account.held, connection.backend.in_flight) == (0, 0)


@pytest.mark.parametrize("kind", ["threads", "qcow2"])
async def test_coroutines_where_there_is_no_queue(
    kind: str, file: Path, tmp_path: Path, uncached: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what may move, and of files whose reads are made by threads."""
    content, tree = file.read_bytes(), raw(file)
    tree["file"]["aio"] = "threads"
    if kind == "qcow2":
        image = tmp_path / "disk.qcow2"
        run(require_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", file, image)
        tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    begun: list[int] = []
    begin = MissedReads._run

    def counting(misses: MissedReads, missed: Any) -> None:
        begun.append(len(missed))
        begin(misses, missed)

    monkeypatch.setattr(MissedReads, "_run", counting)
    uncached(0)
    async with serving(tree) as served:
        client = await served.connect()
        asked = [(number * MIB, 4 * KIB) for number in range(8)]
        cookies = await send_together(client, *((Command.READ, *one) for one in asked))
        for (offset, length), cookie in zip(asked, cookies, strict=True):
            assert (await client.reply(cookie)).data == content[offset : offset + length]
        # The first read of an image loads the table that says where the others lie.
        assert begun == [7 if kind == "qcow2" else 8]
        assert reads(served) == (8, 32 * KIB)


@pytest.mark.parametrize("mode", MODES)
async def test_holes_are_told_all_the_same(
    mode: ReplyMode, tmp_path: Path, uncached: Callable[[int], None], queue: Queue
) -> None:
    """They are never in memory, but need not be read."""
    file = tmp_path / "sparse.raw"
    with file.open("wb") as sparse:
        sparse.truncate(MIB)
    uncached(0)
    async with serving(raw(file)) as served:
        client = await served.connect(mode=mode)
        cookie = await client.send(Command.READ, 0, 64 * KIB)
        if mode is ReplyMode.SIMPLE:
            await until(lambda: bool(queue.waiting))
            queue.go_on()
        reply = await client.reply(cookie)
        assert reply.data == bytes(64 * KIB)
        assert [kind for kind, _, _ in reply.chunks] == (["data"] if mode is ReplyMode.SIMPLE else ["hole"])


async def test_a_client_of_whom_little_may_be_in_flight(
    file: Path, uncached: Callable[[int], None], queue: Queue
) -> None:
    """Its rules are kept: one at a time begins without being asked for by itself."""
    uncached(0)
    async with serving(raw(file), server_options={"limits": ClientLimits(requests=2)}) as served:
        client = await served.connect()
        cookies = await send_together(client, *((Command.READ, number * 4 * KIB, 4 * KIB) for number in range(6)))
        most = 0

        async def let_go_on() -> None:
            nonlocal most
            while True:
                most = max(most, the_connection(served).in_flight)
                queue.go_on()
                await asyncio.sleep(0)

        going_on = asyncio.ensure_future(let_go_on())
        for cookie in cookies:
            assert (await client.reply(cookie)).error == 0
        going_on.cancel()
        assert 1 <= most <= 2
