"""The payload of a large write, while it arrives: its memory, and how it is written in parts."""

import asyncio
import errno
import os
import random
import socket
from pathlib import Path

import pytest

from nbd_protocol.constants import Command, CommandFlag, ReplyMode
from nbd_protocol.transmission import Request
from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.driver import Filler
from pynbd.block.statistics import Operation
from pynbd.server import payload as payload_module
from pynbd.server.budget import OVERDRAFT_BYTES, PayloadBudget
from pynbd.server.buffers import BufferPool
from pynbd.server.payload import PAYLOAD_STEP_BYTES, Payload
from pynbd.storage.memory import Memory
from tests.crypto.tls_ends import credentials
from tests.server.clients import LIMIT_S, MODES, serving, the_connection, write
from tests.server.held import HELD, Held, held
from tests.server.test_tls import secure_server, secured

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


# --- into a disk that is memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [CommandFlag(0), CommandFlag.FUA])
@pytest.mark.parametrize("mode", MODES)
async def test_a_large_payload_is_received_into_memory(mode: ReplyMode, flags: CommandFlag) -> None:
    offset, payload = 5 * KIB + 1, random.Random(4).randbytes(3 * MIB + 512)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        driver.memory, driver.hold = bytearray(8 * MIB), frozenset()
        driver.writes_now = True
        node, client = served.node(), await served.connect(mode=mode)
        bitmap = node.bitmaps.setdefault("b", DirtyBitmap("b", node.size, 512))
        node.bind_path()
        await client.write(offset, payload, flags)
        [first], parts = calls(driver, "write_now"), calls(driver, "fill_now")
        ahead = driver.written[offset]
        assert first == (offset, len(ahead))
        assert ahead + driver.memory[offset + len(ahead) : offset + len(payload)] == payload
        assert sum(length for _, length in parts if length > 0) == len(payload) - len(ahead)
        assert bool(calls(driver, "flush")) == bool(flags)
        assert not calls(driver, "write")
        assert bitmap.count == 512 * (-(-(offset + len(payload)) // 512) - offset // 512)
        statistics = the_connection(served).backend.statistics
        assert statistics.operations[Operation.WRITE] == 1
        assert statistics.bytes[Operation.WRITE] == len(payload)
        assert not served.server.budget.taken


def calls(driver: Held, what: str) -> list[tuple[int, int]]:
    return [(offset, length) for kind, offset, length in driver.calls if kind == what]


@pytest.mark.parametrize("flags", [CommandFlag(0), CommandFlag.FUA])
@pytest.mark.parametrize("why", ["no memory is left", "drained", "not memory any more"])
async def test_a_payload_that_can_not_go_on_in_memory_is_received_and_written(why: str, flags: CommandFlag) -> None:
    """What is in the disk already stays there; the rest is written, and all of it made durable."""
    payload = random.Random(6).randbytes(3 * MIB)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver, backend = held(served.node()), served.server.exports[""].backend
        driver.memory, driver.hold = bytearray(8 * MIB), frozenset()
        driver.writes_now = True
        client = await served.connect()
        cookie, buffers = client.prepared(Command.WRITE, 0, payload=payload, flags=flags)
        sent = b"".join(buffers)
        await client.send_bytes(sent[:MIB])
        connection = the_connection(served)
        async with asyncio.timeout(LIMIT_S):
            while connection._payload is None or connection._payload.filled < MIB - 100:
                await asyncio.sleep(0)
        placed = connection._payload.placed
        assert placed == connection._payload.filled
        driver.writes_now = False
        if why == "no memory is left":
            driver.fill_fails = OSError(errno.EFAULT, "Bad address")
        elif why == "drained":
            backend.begin_drain()
        else:
            driver.memory = None
        await client.send_bytes(sent[MIB:])
        async with asyncio.timeout(LIMIT_S):
            while connection.payload_open:
                await asyncio.sleep(0)
        if why == "drained":
            assert not calls(driver, "write")
            backend.end_drain()
        assert not (await client.reply(cookie)).error
        [write_of_the_rest] = calls(driver, "write")
        assert write_of_the_rest == (placed, len(payload) - placed)
        assert driver.written[placed] == payload[placed:]
        assert bool(calls(driver, "flush")) == bool(flags)
        assert backend.statistics.operations[Operation.WRITE] == 1
        assert backend.statistics.bytes[Operation.WRITE] == len(payload)
        assert not served.server.budget.taken


async def test_memory_that_can_not_be_had_ends_no_program() -> None:
    """The kernel has no page to receive into: it tells who receives. Who looked at the memory would be ended."""
    payload = random.Random(7).randbytes(3 * MIB)
    async with serving({"driver": "memory", "size": 8 * MIB}) as served:
        client = await served.connect()
        cookie, buffers = client.prepared(*write(MIB, payload))
        sent = b"".join(buffers)
        await client.send_bytes(sent[:MIB])
        connection = the_connection(served)
        memory = served.node().driver
        assert isinstance(memory, Memory)
        async with asyncio.timeout(LIMIT_S):
            while connection._payload is None or connection._payload.filled < MIB - 100:
                await asyncio.sleep(0)
        placed = connection._payload.placed
        assert placed == connection._payload.filled
        os.ftruncate(memory._fd, MIB)  # behind everybody's back
        await client.send_bytes(sent[MIB:])
        assert not (await client.reply(cookie)).error
        os.ftruncate(memory._fd, 8 * MIB)
        assert await client.read(MIB + placed, len(payload) - placed) == payload[placed:]


async def test_a_client_that_is_lost_while_its_payload_goes_into_memory() -> None:
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        driver.memory, driver.writes_now = bytearray(8 * MIB), True
        client = await served.connect()
        _, buffers = client.prepared(*write(0, b"x" * 2 * MIB))
        await client.send_bytes(b"".join(buffers)[:MIB])
        client.sock.close()
        await served.until_gone()
        assert not served.server.budget.taken
        assert not any(driver.memory[MIB:])


@pytest.mark.parametrize("mode", MODES)
async def test_large_writes_to_a_disk_in_memory(mode: ReplyMode) -> None:
    """Also with holes in it, and through a format that only moves it."""
    source = random.Random(str(mode))
    tree = {"driver": "raw", "offset": 1000, "file": {"driver": "memory", "size": 8 * MIB + 1000}}
    async with serving(tree) as served:
        client, model = await served.connect(mode=mode), bytearray(8 * MIB)
        for _ in range(20):
            length = source.randrange(64 * KIB, 2 * MIB)
            offset, data = source.randrange(8 * MIB - length), source.randbytes(length)
            await client.write(offset, data, source.choice([0, CommandFlag.FUA]))
            model[offset : offset + length] = data
            hole = source.randrange(7 * MIB)
            assert not (await client.ask(Command.WRITE_ZEROES, hole, 100_000)).error
            model[hole : hole + 100_000] = bytes(100_000)
        assert await client.read(0, 8 * MIB) == model


async def test_through_tls_nothing_goes_straight_into_memory(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This program would put the bytes there, and be ended where no page is to be had."""
    payload = random.Random(8).randbytes(3 * MIB + 5)

    def refuse(memory: Memory, offset: int, length: int, filler: Filler) -> int | None:
        raise AssertionError(f"{length} bytes at {offset} would be put into memory")

    monkeypatch.setattr(Memory, "fill_now", refuse)
    async with secure_server(pki, {"driver": "memory", "size": 8 * MIB}) as served:
        client = await secured(served, credentials("client", pki))
        await client.write(MIB - 1, payload)
        assert await client.read(MIB - 1, len(payload)) == payload
