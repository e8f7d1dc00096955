"""Requests that have arrived together: what is answered in place, in one buffer and with one flush."""

import asyncio
import errno
import random
from typing import Any

import pytest

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from pynbd.block.statistics import Operation
from pynbd.server import outstanding as outstanding_module
from pynbd.server.scratch import MAX_BATCH_REQUESTS
from tests.server.clients import LIMIT_S, MODES, send_together, serving, the_connection, write
from tests.server.held import HELD, held

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 8 * MIB}


@pytest.mark.parametrize("mode", MODES)
async def test_short_and_long_reads_of_one_batch(mode: ReplyMode) -> None:
    """The data of long ones are moved to an aligned address, and what would lie between is left out."""
    content = random.Random(9).randbytes(8 * MIB)
    source = random.Random(str(mode))
    async with serving(MEMORY) as served:
        client = await served.connect(mode=mode)
        await client.write(0, content)
        for _ in range(30):
            lengths = [source.choice([1, 100, 4096, 32 * KIB, 40_000, 64 * KIB]) for _ in range(source.randint(1, 12))]
            asked = [(source.randrange(8 * MIB - length), length) for length in lengths]
            cookies = await send_together(client, *((Command.READ, offset, length) for offset, length in asked))
            for cookie, (offset, length) in zip(cookies, asked, strict=True):
                assert (await client.reply(cookie)).data == content[offset : offset + length]


@pytest.mark.parametrize("mode", MODES)
async def test_reads_of_memory_leave_its_holes_alone(mode: ReplyMode) -> None:
    """What was never written takes no memory, however it is read."""
    content = random.Random(10).randbytes(MIB)
    async with serving(MEMORY) as served:
        client = await served.connect(mode=mode)
        await client.write(4 * MIB, content)
        before = await served.node().allocated_size()
        lengths = (32 * KIB, 64 * KIB)
        asked = [(offset, length) for length in lengths for offset in range(0, 8 * MIB, length)]
        for start in range(0, len(asked), 10):
            some = asked[start : start + 10]
            cookies = await send_together(client, *((Command.READ, offset, length) for offset, length in some))
            for cookie, (offset, length) in zip(cookies, some, strict=True):
                inside = content[offset - 4 * MIB :][:length] if offset >= 4 * MIB else b""
                assert (await client.reply(cookie)).data == inside.ljust(length, b"\0")
        assert await served.node().allocated_size() == before


async def test_what_a_slow_client_has_not_taken_does_not_change() -> None:
    """Reads of memory are sent from where they lie, and it is written again before they have left."""
    content, offsets = random.Random(11).randbytes(8 * MIB), range(0, 8 * MIB, 64 * KIB)
    async with serving(MEMORY) as served:
        client, other = await served.connect(receive_bytes=4096), await served.connect()
        await other.write(0, content)
        cookies = await send_together(client, *((Command.READ, offset, 64 * KIB) for offset in offsets))
        async with asyncio.timeout(LIMIT_S):
            while not any(connection.wire.unsent for connection in served.server.connections):
                await asyncio.sleep(0)
        await other.write(0, bytes(8 * MIB))
        for cookie, offset in zip(cookies, offsets, strict=True):
            assert (await client.reply(cookie)).data == content[offset : offset + 64 * KIB]


def durable(offset: int) -> tuple[Any, ...]:
    return (Command.WRITE, offset, 0, CommandFlag.FUA, b"durable!")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
async def test_durable_writes_of_a_batch_share_a_flush(mode: ReplyMode, fails: bool) -> None:
    """It begins when all of them are made, and answers them all; who wants no durability does not wait for it."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.writes_now, driver.hold = True, frozenset({"flush"})
        client = await served.connect(mode=mode)
        *waiting, plain = await send_together(
            client, durable(0), (Command.FLUSH,), durable(8), (Command.FLUSH,), write(16, b"plain")
        )
        assert not (await client.reply(plain)).error
        assert [call[0] for call in driver.calls] == ["write_now", "write_now", "write_now", "flush"]
        [flush] = driver.waiting
        driver.hold = frozenset()
        if fails:
            flush.go.set_exception(OSError(errno.ENOSPC, "no room"))
        else:
            flush.go.set_result(None)
        expected = Errno.ENOSPC if fails else 0
        assert [(await client.reply(cookie)).error for cookie in waiting] == [expected] * 4
        statistics = the_connection(served).backend.statistics
        assert statistics.operations[Operation.WRITE] == 3
        assert statistics.operations[Operation.FLUSH] == (0 if fails else 2)
        assert statistics.failed[Operation.FLUSH] == fails


async def test_without_a_write_cache_every_write_is_flushed() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.writes_now, driver.hold = True, frozenset({"flush"})
        client = await served.connect()
        the_connection(served).backend.write_cache = False
        cookie = await client.send(Command.WRITE, 0, payload=b"through", flags=CommandFlag(0))
        await driver.until(1)
        assert driver.written == {0: b"through"}
        driver.release()
        assert not (await client.reply(cookie)).error


async def test_durable_writes_are_among_the_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outstanding_module, "MAX_REQUESTS_IN_FLIGHT", 1 + MAX_BATCH_REQUESTS)
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.writes_now, driver.hold = True, frozenset({"flush"})
        client = await served.connect()
        first = await client.send(Command.WRITE, 0, payload=b"1", flags=CommandFlag.FUA)
        await driver.until(1)
        assert the_connection(served).in_flight == 1
        # There may be no room for all of another batch: its writes take the way that counts them one by one.
        second = await client.send(Command.WRITE, 1, payload=b"2", flags=CommandFlag.FUA)
        async with asyncio.timeout(LIMIT_S):
            while ("write", 1, 1) not in driver.calls:
                await asyncio.sleep(0)
        driver.release()
        assert not (await client.reply(first)).error
        assert not (await client.reply(second)).error
