"""Requests of which nothing need be said: answered without objects; what is anything else is left to others."""

import asyncio
import errno
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from nbd_protocol.transmission import Batch, ServerTransmission
from pynbd.block.statistics import Operation
from pynbd.server.budget import RESERVE_BYTES
from pynbd.server.export import Export
from pynbd.server.scratch import INLINE_READ_BYTES, MAX_BATCH_REQUESTS, SLOT_BYTES
from pynbd.storage import file as file_module
from pynbd.storage import linux
from tests.peers import require_tool, run
from tests.server.clients import LIMIT_S, MODES, Served, send_together, serving, the_connection, write
from tests.server.held import HELD, held, pattern

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 8 * MIB}


@pytest.fixture(params=["memory", "file"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A disk of 8 MiB, all of it data."""
    if request.param == "memory":
        return MEMORY
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\1" * 8 * MIB)
    return {"driver": "raw", "file": {"driver": "file", "filename": str(file)}}


@pytest.fixture(params=["memory", "file", "qcow2"])
def disk_or_image(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The same, or an image without holes."""
    if request.param == "memory":
        return MEMORY
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\1" * 8 * MIB)
    if request.param == "file":
        return {"driver": "raw", "file": {"driver": "file", "filename": str(file)}}
    image = tmp_path / "disk.qcow2"
    run(require_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", file, image)
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}


@pytest.fixture
def no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes an object of a request fails."""

    parse_all = ServerTransmission.parse

    def parse(framing: ServerTransmission, data: memoryview, most: int) -> Batch:
        assert not most, f"{len(data)} bytes were left to the parser: {bytes(data[:28]).hex()}"
        return parse_all(framing, data, most)

    monkeypatch.setattr(ServerTransmission, "parse", parse)
    # Where a write in place has taken long, as it may beside others' load, the next ones are left to threads.
    monkeypatch.setattr(file_module, "SLOW_S", math.inf)


def counted(served: Served) -> tuple[int, int, int, int]:
    """Reads, their bytes, writes, their bytes."""
    told = the_connection(served).backend.statistics
    return tuple(of[kind] for kind in (Operation.READ, Operation.WRITE) for of in (told.operations, told.bytes))  # type: ignore[return-value]  # four


@pytest.mark.usefixtures("no_objects")
@pytest.mark.parametrize("mode", MODES)
async def test_plain_requests_need_no_objects(mode: ReplyMode, disk: dict[str, Any]) -> None:
    source, model = random.Random(str(mode)), bytearray(b"\1" * 8 * MIB)
    async with serving(disk) as served:
        client = await served.connect(mode=mode)
        if disk is MEMORY:
            for offset in range(0, 8 * MIB, 32 * KIB):
                await client.write(offset, bytes(model[offset : offset + 32 * KIB]))
        before, reads, writes = counted(served), [], []
        for _ in range(40):
            requests: list[tuple[Any, ...]] = []
            expected: list[bytes] = []
            for _ in range(source.randint(1, 6)):
                length = source.choice([1, 100, 4 * KIB, 32 * KIB, 40_000, INLINE_READ_BYTES])
                offset = source.randrange(8 * MIB - length)
                if source.random() < 0.7:
                    reads.append(length)
                    requests.append((Command.READ, offset, length))
                    expected.append(bytes(model[offset : offset + length]))
                else:
                    data = source.randbytes(min(length, 16 * KIB))
                    writes.append(len(data))
                    requests.append(write(offset, data))
                    expected.append(b"")
                    model[offset : offset + len(data)] = data
            for cookie, data in zip(await send_together(client, *requests), expected, strict=True):
                reply = await client.reply(cookie)
                assert (reply.error, bytes(reply.data)) == (0, data)
        grown = tuple(after - then for after, then in zip(counted(served), before, strict=True))
        assert grown == (len(reads), sum(reads), len(writes), sum(writes))


@pytest.mark.parametrize("mode", MODES)
async def test_the_first_that_is_not_plain_ends_it_and_all_are_answered(mode: ReplyMode) -> None:
    async with serving(MEMORY) as served:
        client = await served.connect(mode=mode)
        await client.write(0, b"a" * 8 * KIB)
        cookies = await send_together(
            client,
            (Command.READ, 0, 4 * KIB),
            write(0, b"b" * 4 * KIB),
            (Command.FLUSH,),
            (Command.READ, 0, 4 * KIB),
            (Command.READ, 8 * MIB - 1, 2),
            (Command.WRITE, 4 * KIB, 0, CommandFlag.FUA, b"c" * 4 * KIB),
            (Command.READ, 4 * KIB, 4 * KIB),
            (Command.READ, 8 * MIB, 0),
            (Command.READ, 0, 8 * KIB),
        )
        replies = [await client.reply(cookie) for cookie in cookies]
        assert [reply.error for reply in replies] == [0, 0, 0, 0, Errno.EINVAL, 0, 0, 0, 0]
        assert [bytes(replies[number].data[:1]) for number in (0, 3, 6, 8)] == [b"a", b"b", b"c", b"b"]


@pytest.mark.parametrize("what", ["in memory", "behind the hole"])
@pytest.mark.parametrize("mode", MODES)
async def test_long_reads_of_holes_are_left_to_others(mode: ReplyMode, what: str) -> None:
    """Where holes can be told, they are; where not, those of files are read as any bytes."""
    async with serving(MEMORY) as served:
        client = await served.connect(mode=mode)
        await client.write(0, b"a" * 64 * KIB)
        offset = 32 * KIB if what == "in memory" else MIB
        reply = await client.ask(Command.READ, offset, 64 * KIB)
        assert reply.data == (b"a" * 32 * KIB if what == "in memory" else b"").ljust(64 * KIB, b"\0")
        if mode is not ReplyMode.SIMPLE:
            assert [kind for kind, _, _ in reply.chunks][-1] == "hole"


@pytest.mark.parametrize("mode", MODES)
async def test_who_must_not_write_is_told_so(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}, read_only=True) as served:
        driver = held(served.node())
        driver.writes_now = True
        client = await served.connect(mode=mode)
        reply = await client.ask(Command.WRITE, 0, payload=b"x" * 512)
        assert reply.error == Errno.EPERM
        assert not driver.written


async def test_one_turn_has_its_share() -> None:
    """What has come beyond it is kept, and served after the others."""
    async with serving(MEMORY) as served:
        client = await served.connect()
        connection = the_connection(served)
        count = 3 * MAX_BATCH_REQUESTS + 5
        turns: list[int] = []
        plain = connection._plain

        class Counting:
            def serve(self, data: memoryview) -> tuple[int, int]:
                done, requests = plain.serve(data)
                turns.append(requests)
                return done, requests

        connection._plain = Counting()  # type: ignore[assignment]  # of it only this is called
        cookies = await send_together(client, *((Command.READ, 0, 512) for _ in range(count)))
        for cookie in cookies:
            assert len((await client.reply(cookie)).data) == 512
        assert sum(turns) == count
        assert max(turns) == MAX_BATCH_REQUESTS


async def test_a_client_that_is_gone_when_it_is_answered() -> None:
    async with serving(MEMORY) as served:
        client = await served.connect(receive_bytes=4096)
        await client.write(0, b"a" * MIB)
        requests = [client.prepared(Command.READ, 0, 32 * KIB)[1] for _ in range(500)]
        await client.send_bytes(b"".join(b"".join(buffers) for buffers in requests))
        client.sock.close()
        async with asyncio.timeout(LIMIT_S):
            await served.until_gone()
        assert not served.server.budget.taken


@pytest.mark.parametrize("stays", [True, False])
async def test_what_may_move_is_copied(stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client has bytes that were sent from a file when it fetches them; others may lie there by then."""
    file = tmp_path / "disk"
    file.write_bytes(random.Random(1).randbytes(MIB))
    sent: list[int] = []
    sendfile = os.sendfile

    def counting(out: int, fd: int, offset: int, count: int) -> int:
        sent.append(count)
        return sendfile(out, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", counting)
    monkeypatch.setattr(Export, "located_for_good", lambda _: stays)
    async with serving({"driver": "file", "filename": str(file)}) as served:
        client = await served.connect()
        assert await client.read(64 * KIB, 64 * KIB) == file.read_bytes()[64 * KIB : 128 * KIB]
    assert sent == ([64 * KIB] if stays else [])


@pytest.mark.usefixtures("no_objects")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", SLOT_BYTES)
async def test_reads_that_are_alike(length: int, mode: ReplyMode, disk_or_image: dict[str, Any]) -> None:
    """Many of one length, more than one turn has; then others behind them."""
    source, size = random.Random(length), 8 * MIB
    data = source.randbytes(size)
    async with serving(disk_or_image) as served:
        client = await served.connect(mode=mode)
        for offset in range(0, size, 32 * KIB):
            await client.write(offset, data[offset : offset + 32 * KIB])
        before = counted(served)
        for count in (2, 3, MAX_BATCH_REQUESTS - 1, MAX_BATCH_REQUESTS, MAX_BATCH_REQUESTS + 1, 150):
            offsets = [source.randrange(size - length) for _ in range(count)]
            requests: list[tuple[Any, ...]] = [(Command.READ, offset, length) for offset in offsets]
            cookies = await send_together(client, *requests, write(5, data[5:6]), (Command.READ, 7, 9))
            for cookie, offset in zip(cookies, offsets, strict=False):
                reply = await client.reply(cookie)
                assert (reply.error, bytes(reply.data)) == (0, data[offset : offset + length])
            assert [bytes((await client.reply(cookie)).data) for cookie in cookies[-2:]] == [b"", data[7:16]]
        reads = 2 + 3 + 3 * MAX_BATCH_REQUESTS + 150
        grown = tuple(after - then for after, then in zip(counted(served), before, strict=True))
        assert grown == (reads + 6, reads * length + 6 * 9, 6, 6)


@pytest.mark.parametrize("wrong", ["beyond the end", "flags", "cookie only", "magic"])
async def test_one_of_the_reads_that_are_alike_is_not(wrong: str, disk: dict[str, Any]) -> None:
    async with serving(disk) as served:
        client = await served.connect()
        await client.write(0, b"a" * 64 * KIB)
        good = (Command.READ, 4 * KIB, 4 * KIB)
        odd: tuple[Any, ...] = {
            "beyond the end": (Command.READ, 8 * MIB - 4 * KIB + 1, 4 * KIB),
            "flags": (Command.READ, 0, 4 * KIB, CommandFlag.DF),
            "cookie only": good,
            "magic": good,
        }[wrong]
        if wrong == "magic":
            headers = [b"".join(client.prepared(*request)[1]) for request in (good, good, odd)]
            await client.send_bytes(headers[0] + headers[1] + b"\xff" + headers[2][1:])
            async with asyncio.timeout(LIMIT_S):
                await served.until_gone()
            return
        cookies = await send_together(client, good, good, odd, good)
        replies = [await client.reply(cookie) for cookie in cookies]
        assert [reply.error for reply in replies] == [0, 0, Errno.EINVAL if wrong == "beyond the end" else 0, 0]
        assert {bytes(reply.data) for reply in replies if not reply.error} == {b"a" * 4 * KIB}


@pytest.mark.usefixtures("no_objects")
@pytest.mark.parametrize("mode", MODES)
async def test_many_writes_go_where_the_disk_lies(mode: ReplyMode, disk: dict[str, Any]) -> None:
    """And are found there, and flushed, and counted."""
    source, model = random.Random(7), bytearray(8 * MIB)
    async with serving(disk) as served:
        client = await served.connect(mode=mode)
        for offset in range(0, 8 * MIB, 32 * KIB):
            await client.write(offset, bytes(32 * KIB))
        node = served.node()
        while node.children:
            node = node.children["file"].node
        before, generation, count = counted(served), node._generation, 0
        for _ in range(20):
            requests: list[tuple[Any, ...]] = []
            expected: list[bytes] = []
            for _ in range(20):
                offset, data = source.randrange(8 * MIB - 512), source.randbytes(512)
                requests += [write(offset, data), (Command.READ, offset, 512)]
                model[offset : offset + 512] = data
                expected += [b"", data]
                count += 1
            for cookie, wanted in zip(await send_together(client, *requests), expected, strict=True):
                reply = await client.reply(cookie)
                assert (reply.error, bytes(reply.data)) == (0, wanted)
        grown = tuple(after - then for after, then in zip(counted(served), before, strict=True))
        assert grown == (count, count * 512, count, count * 512)
        assert node._generation > generation, "a flush has something to do"
        assert node.write_highest_offset > 8 * MIB - 32 * KIB
        assert await client.read(0, 64 * KIB) == model[: 64 * KIB]


async def test_a_write_where_the_disk_lies_fails(disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and those before and behind it are made."""
    pwrite = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset == 4 * KIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    async with serving(disk) as served:
        client = await served.connect()
        cookies = await send_together(client, *(write(offset, b"z" * 512) for offset in range(0, 16 * KIB, 512)))
        errors = [(await client.reply(cookie)).error for cookie in cookies]
        assert errors == [Errno.ENOSPC if number == 8 else 0 for number in range(32)]
        assert await client.read(8 * KIB, 512) == b"z" * 512
        assert (await client.ask(Command.FLUSH)).error == 0


@pytest.mark.usefixtures("no_objects")
@pytest.mark.parametrize("mode", MODES)
async def test_coroutines_that_need_not_wait(mode: ReplyMode) -> None:
    """A driver that only has coroutines is read and written in the same loop."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.release()
        client = await served.connect(mode=mode)
        requests: list[tuple[Any, ...]] = []
        expected: list[bytes] = []
        for number in range(40):
            offset = number * 1000
            if number % 3:
                requests.append((Command.READ, offset, 100 * (number + 1)))
                expected.append(pattern(offset, 100 * (number + 1)))
            else:
                requests.append(write(offset, bytes([number]) * 512))
                expected.append(b"")
        for cookie, data in zip(await send_together(client, *requests), expected, strict=True):
            reply = await client.reply(cookie)
            assert (reply.error, bytes(reply.data)) == (0, data)
        assert driver.written == {number * 1000: bytes([number]) * 512 for number in range(0, 40, 3)}
        assert counted(served) == (26, sum(map(len, expected)), 14, 14 * 512)
        connection = the_connection(served)
        assert connection.account.held == 0
        assert connection.idle


async def test_coroutines_that_wait() -> None:
    """The first one goes on as a task, holds memory, and those behind it take the other ways."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect()
        connection = the_connection(served)
        cookies = await send_together(
            client, (Command.READ, 0, 4096), (Command.READ, 8, 4096), write(64, b"w" * 4096), (Command.READ, 16, 4096)
        )
        await driver.until(4)
        assert connection.in_flight == 4
        assert connection.account.held == 4 * 4096
        driver.release()
        replies = [await client.reply(cookie) for cookie in cookies]
        assert [bytes(reply.data) for reply in replies] == [
            pattern(0, 4096),
            pattern(8, 4096),
            b"",
            pattern(16, 4096),
        ]
        assert driver.written == {64: b"w" * 4096}
        assert connection.account.held == 0
        assert counted(served) == (3, 3 * 4096, 1, 4096)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "full"), RuntimeError("a mistake")])
async def test_coroutines_that_fail(problem: Exception, waits: bool) -> None:
    """Once, and the client is told of it."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect()

        def fail() -> None:
            raise problem

        if waits:
            cookies = await send_together(client, (Command.READ, 0, 512), write(0, b"x" * 512))
            await driver.until(2)
            for request in driver.waiting:
                request.go.set_exception(problem)
            driver.waiting.clear()
        else:
            driver.release()
            driver.on_call = fail
            cookies = await send_together(client, (Command.READ, 0, 512), write(0, b"x" * 512))
        expected = Errno.ENOSPC if isinstance(problem, OSError) else Errno.EIO
        assert [(await client.reply(cookie)).error for cookie in cookies] == [expected] * 2
        assert [call[0] for call in driver.calls] == ["read", "write"]
        driver.on_call = None
        driver.release()
        assert await client.read(0, 512) == pattern(0, 512)
        assert the_connection(served).account.held == 0


async def test_who_holds_much_asks_before_more_begins() -> None:
    """Where a connection's own share of memory is used up, requests wait for memory as ever."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.release()
        client = await served.connect()
        connection = the_connection(served)
        connection.account.charge(RESERVE_BYTES)
        assert not connection._outstanding.may_begin_in_place(1)
        assert await client.read(0, 512) == pattern(0, 512)
        connection.account.give(RESERVE_BYTES)
        assert connection._outstanding.may_begin_in_place(RESERVE_BYTES)
        assert not connection._outstanding.may_begin_in_place(RESERVE_BYTES + 1)


async def test_files_known_to_be_cached_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that are sent from the page cache, all within one region of it."""
    file = tmp_path / "disk"
    file.write_bytes(random.Random(1).randbytes(2 * MIB))
    asked: list[int] = []
    readable_at_once = linux.readable_at_once

    def counting(fd: int, offset: int, length: int) -> bool:
        asked.append(offset)
        return readable_at_once(fd, offset, length)

    monkeypatch.setattr(linux, "readable_at_once", counting)
    async with serving({"driver": "file", "filename": str(file)}) as served:
        client = await served.connect()
        for offset in range(0, MIB, 64 * KIB):
            assert await client.read(offset, 64 * KIB) == file.read_bytes()[offset : offset + 64 * KIB]
    assert asked == [0]


async def test_coroutines_of_a_drained_graph() -> None:
    """What comes meanwhile is parked, and done when the drain is over."""
    async with serving({"driver": HELD}) as served:
        driver, backend = held(served.node()), served.server.exports[""].backend
        driver.release()
        client = await served.connect()
        backend.begin_drain()
        cookies = await send_together(client, (Command.READ, 8, 512), write(64, b"w" * 512), (Command.READ, 16, 512))
        async with asyncio.timeout(LIMIT_S):
            while backend.parked < 3:
                await asyncio.sleep(0)
        assert backend.in_flight == 0
        assert not driver.calls
        backend.end_drain()
        replies = [await client.reply(cookie) for cookie in cookies]
        assert [bytes(reply.data) for reply in replies] == [pattern(8, 512), b"", pattern(16, 512)]
        assert driver.written == {64: b"w" * 512}
        assert counted(served) == (2, 1024, 1, 512)
