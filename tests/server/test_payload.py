"""The payload of a large write, while it arrives: its memory, and how it is written in parts."""

import asyncio
import random
import socket

import pytest

from nbd_protocol.constants import Command, CommandFlag, ReplyMode
from nbd_protocol.transmission import Request
from pynbd.block.statistics import Operation
from pynbd.server import payload as payload_module
from pynbd.server.budget import OVERDRAFT_BYTES, PayloadBudget
from pynbd.server.buffers import BufferPool
from pynbd.server.payload import PAYLOAD_STEP_BYTES, Payload
from tests.server.clients import LIMIT_S, MODES, serving, the_connection, write
from tests.server.held import HELD, held

KIB, MIB = 1 << 10, 1 << 20


def test_a_payload_keeps_what_has_arrived() -> None:
    pool, account = BufferPool(), PayloadBudget().account()
    payload = Payload(Request(1, 0, 7, 0, 100_000), memoryview(b"the beginning"))
    assert payload.reserve(account, pool, pytest.fail)
    assert account.held == payload.reserved == 100_000
    assert len(payload.buffer) == 100_000
    assert bytes(payload.buffer[:13]) == b"the beginning"
    assert payload.filled == 13
    assert payload.whole is not None
    pool.give(payload.whole)


def test_memory_is_reserved_a_step_ahead_of_what_arrives() -> None:
    account = PayloadBudget().account()
    payload = Payload(Request(1, 0, 7, 0, 3 * PAYLOAD_STEP_BYTES), memoryview(b"x"))
    for filled, steps in [(1, 2), (PAYLOAD_STEP_BYTES, 2), (PAYLOAD_STEP_BYTES + 1, 3), (3 * PAYLOAD_STEP_BYTES, 3)]:
        payload.filled = filled
        assert payload.reserve(account, BufferPool(), pytest.fail)
        assert account.held == payload.reserved == steps * PAYLOAD_STEP_BYTES


def test_a_payload_uses_what_it_has_before_it_waits() -> None:
    """Others take all the memory there is while it arrives."""
    budget = PayloadBudget(4 * PAYLOAD_STEP_BYTES)
    account = budget.account()
    payload = Payload(Request(1, 0, 7, 0, 3 * PAYLOAD_STEP_BYTES), memoryview(b"x"))
    assert payload.reserve(account, BufferPool(), lambda: None)
    assert payload.reserved == 2 * PAYLOAD_STEP_BYTES
    budget.account().charge(budget.pool + OVERDRAFT_BYTES)
    for filled, goes_on in [(2 * PAYLOAD_STEP_BYTES - 1, True), (2 * PAYLOAD_STEP_BYTES, False)]:
        payload.filled = filled
        assert payload.reserve(account, BufferPool(), lambda: None) == goes_on
        assert account.held == payload.reserved == 2 * PAYLOAD_STEP_BYTES
        assert list(budget.waiting) == [account]


@pytest.fixture
def one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when nobody else is there, which only the loop of a server knows."""
    monkeypatch.setattr(payload_module, "keeps_others_waiting", lambda: False)


@pytest.mark.usefixtures("one_client")
@pytest.mark.parametrize("flags", [CommandFlag(0), CommandFlag.FUA])
@pytest.mark.parametrize("mode", MODES)
async def test_a_large_payload_is_written_as_it_arrives(mode: ReplyMode, flags: CommandFlag) -> None:
    offset, payload = 5 * KIB, random.Random(3).randbytes(3 * MIB + 512)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        driver.writes_now = True
        client = await served.connect(mode=mode)
        for _ in range(2):
            driver.calls.clear()
            cookie = await client.send(Command.WRITE, offset, payload=payload, flags=flags)
            assert not (await client.reply(cookie)).error
            parts = [call for call in driver.calls if call[0] == "write_now"]
            assert len(parts) > 1
            assert [start for _, start, _ in parts[1:]] == [start + length for _, start, length in parts[:-1]]
            assert all(start % 4096 == 0 for _, start, _ in parts[1:]), "parts end where pages do"
            assert b"".join(driver.written[start] for _, start, _ in parts) == payload
            assert [call[0] for call in driver.calls if call not in parts] == (["flush"] if flags else [])
        statistics = the_connection(served).backend.statistics
        assert statistics.operations[Operation.WRITE] == 2
        assert statistics.bytes[Operation.WRITE] == 2 * len(payload)
        assert not served.server.budget.taken


@pytest.mark.usefixtures("one_client")
async def test_a_payload_whose_parts_can_not_be_written_any_more_is_written_whole() -> None:
    payload = random.Random(5).randbytes(3 * MIB)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        driver.writes_now = True

        client = await served.connect()
        sent = b"".join(client.prepared(*write(0, payload))[1])
        await client.send_bytes(sent[:MIB])
        async with asyncio.timeout(LIMIT_S):
            while not driver.calls:
                await asyncio.sleep(0)
        driver.writes_now = False
        await client.send_bytes(sent[MIB:])
        await driver.until(1)
        assert [(call[0], call[1]) for call in driver.calls][-1] == ("write", 0)
        driver.release()
        async with asyncio.timeout(LIMIT_S):
            while driver.written.get(0) != payload:
                await asyncio.sleep(0)


@pytest.mark.usefixtures("one_client")
async def test_a_payload_that_breaks_off_gives_its_memory_back() -> None:
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        driver.writes_now = True
        client = await served.connect()
        _, buffers = client.prepared(*write(0, bytes(2 * MIB)))
        await client.send_bytes(b"".join(buffers)[:MIB])
        client.sock.shutdown(socket.SHUT_WR)
        assert not await client.at_end()
        assert sum(length for _, _, length in driver.calls) <= MIB
        async with asyncio.timeout(LIMIT_S):
            while served.server.connections:
                await asyncio.sleep(0)
        assert not served.server.budget.taken
