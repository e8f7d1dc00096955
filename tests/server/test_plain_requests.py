"""Requests of which nothing need be said: answered without objects; what is anything else is left to others."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from nbd_protocol.transmission import ServerTransmission
from pynbd.block.statistics import Operation
from pynbd.server.export import Export
from pynbd.server.scratch import INLINE_READ_BYTES, MAX_BATCH_REQUESTS
from tests.server.clients import LIMIT_S, MODES, Served, send_together, serving, the_connection, write
from tests.server.held import HELD, held

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


@pytest.fixture
def no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes an object of a request fails."""

    def parse(framing: ServerTransmission, data: memoryview, most: int) -> None:
        raise AssertionError(f"{len(data)} bytes were left to the parser: {bytes(data[:28]).hex()}")

    monkeypatch.setattr(ServerTransmission, "parse", parse)


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
