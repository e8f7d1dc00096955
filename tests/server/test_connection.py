"""One connection: how requests are found, put aside, and gone on with. What holds for all of them together is in
test_life_of_a_request.py; here are the ways on which a connection could come to a standstill, or mix up its bytes.
"""

import asyncio
import errno
import os
import random
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from pynbd.block.statistics import Operation
from pynbd.server import connection as connection_module
from pynbd.server import payload as payload_module
from pynbd.server.budget import OVERDRAFT_BYTES, RESERVE_BYTES, PayloadBudget
from pynbd.server.connection import Connection
from tests.server.clients import (
    LIMIT_S,
    MODES,
    PAYLOAD_LEN,
    Client,
    Served,
    no_descriptors_left,
    open_descriptors,
    serving,
)
from tests.server.held import HELD, held, pattern

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 8 * MIB}


def the_connection(served: Served) -> Connection:
    (connection,) = served.server.connections
    return connection


async def send_together(client: Client, *requests: tuple[Any, ...]) -> list[int]:
    """Several requests in one go, so that one receive finds them all."""
    prepared = [client.prepared(*request) for request in requests]
    await client.send_bytes(b"".join(b"".join(buffers) for _, buffers in prepared))
    return [cookie for cookie, _ in prepared]


def write(offset: int, payload: bytes) -> tuple[Any, ...]:
    return (Command.WRITE, offset, 0, 0, payload)


# --- going on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_payload_behind_more_answers_than_one_turn_has_room_for(mode: ReplyMode) -> None:
    """The reads fill the buffer of answers; the rest of them waits while the payload has begun."""
    async with serving(MEMORY) as served:
        client = await served.connect(mode=mode)
        data = os.urandom(64 * KIB)
        await client.write(0, data)
        payload = os.urandom(3 * MIB)
        reads = [(Command.READ, n, 60 * KIB) for n in range(40)]
        *cookies, last = await send_together(client, *reads, write(MIB, payload))
        for number, cookie in enumerate(cookies):
            assert (await client.reply(cookie)).data == data[number : number + 60 * KIB]
        assert not (await client.reply(last)).error
        assert await client.read(MIB, len(payload)) == payload


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [70 * KIB, 2 * MIB])
async def test_a_payload_behind_requests_that_wait(
    mode: ReplyMode, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "MAX_REQUESTS_IN_FLIGHT", 2)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        payload = os.urandom(length)
        asking = asyncio.create_task(
            send_together(
                client, *((Command.READ, 8 * n, 512) for n in range(5)), write(MIB, payload), (Command.FLUSH,)
            )
        )
        for _ in range(6):
            await driver.until(1)
            driver.release(1)
        async with asyncio.timeout(LIMIT_S):
            *reads, wrote, flushed = await asking
        for number, cookie in enumerate(reads):
            assert bytes((await client.reply(cookie)).data) == pattern(8 * number, 512)
        assert not (await client.reply(wrote)).error
        assert not (await client.reply(flushed)).error
        assert driver.written == {MIB: payload}


@pytest.mark.parametrize("mode", MODES)
async def test_a_refused_payload_behind_requests_that_wait(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_REQUESTS_IN_FLIGHT", 1)
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        asking = asyncio.create_task(
            send_together(
                client,
                (Command.READ, 0, 512),
                (Command.READ, 8, 512),
                write(MIB - 5, bytes(300 * KIB)),
                (Command.READ, 16, 512),
                write(MIB - 5, bytes(300 * KIB)),
                (Command.FLUSH,),
            )
        )
        for _ in range(3):
            await driver.until(1)
            driver.release(1)
        cookies = await asking
        errors = [(await client.reply(cookie)).error for cookie in cookies]
        assert errors == [0, 0, Errno.ENOSPC, 0, Errno.ENOSPC, 0]


@pytest.mark.parametrize("mode", MODES)
async def test_requests_and_a_payload_that_both_wait_for_memory(mode: ReplyMode) -> None:
    """The payload would fit into the reserve, and the request before it would not: both get their turn."""
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"payload_pool": 0}) as served:
        budget = served.server.budget
        somebody = budget.account()
        assert somebody.take(RESERVE_BYTES + OVERDRAFT_BYTES, lambda: None)
        client = await served.connect(mode=mode)
        driver = held(served.node())
        driver.release()
        payload = os.urandom(100 * KIB)
        cookies = await send_together(client, (Command.READ, 0, MIB), write(MIB, payload), (Command.READ, 8, 700 * KIB))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not driver.calls
        assert list(budget.waiting) == [the_connection(served).account]
        somebody.close()
        assert bytes((await client.reply(cookies[0])).data) == pattern(0, MIB)
        assert not (await client.reply(cookies[1])).error
        assert bytes((await client.reply(cookies[2])).data) == pattern(8, 700 * KIB)


async def test_nobody_is_woken_from_within_the_request_of_another() -> None:
    """What connections share while they serve (the buffer of answers, the current task) is one's own meanwhile."""
    async with serving(
        {"driver": HELD, "size": 8 * MIB}, {"driver": HELD}, server_options={"payload_pool": 0}
    ) as served:
        waiter, other = held(served.node()), held(served.node("disk1"))
        waiter.release()
        other.release()
        somebody = served.server.budget.account()
        assert somebody.take(RESERVE_BYTES + OVERDRAFT_BYTES, lambda: None)
        waiting = await served.connect()
        cookie = await waiting.send(Command.READ, 0, MIB)
        async with asyncio.timeout(LIMIT_S):
            while not served.server.budget.waiting:
                await asyncio.sleep(0)

        def give_all() -> None:
            other.on_call = None
            somebody.close()
            assert not waiter.calls

        other.on_call = give_all
        busy = await served.connect("disk1")
        assert await busy.read(0, 512) == pattern(0, 512)
        assert bytes((await waiting.reply(cookie)).data) == pattern(0, MIB)


@pytest.mark.parametrize("mode", MODES)
async def test_a_waiting_client_that_leaves_does_not_block_the_line(mode: ReplyMode) -> None:
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"payload_pool": MIB}) as served:
        driver = held(served.node())
        busy = await served.connect(mode=mode)
        await busy.send(Command.READ, 0, MIB)
        await busy.send(Command.READ, 0, 512)
        await driver.until(2)
        first = await served.connect(mode=mode)
        in_flight = await first.send(Command.READ, 64, 64)
        await driver.until(3)
        somebody = served.server.budget.account()
        assert somebody.take(RESERVE_BYTES + OVERDRAFT_BYTES - MIB, lambda: None)
        await first.send(Command.READ, 0, 8 * MIB)
        second = await served.connect(mode=mode)
        writing = asyncio.create_task(second.write(0, b"x" * MIB))
        async with asyncio.timeout(LIMIT_S):
            while len(served.server.budget.waiting) < 2:
                await asyncio.sleep(0)
        first.sock.close()
        assert not first.replies[in_flight].done
        somebody.close()
        driver.release()
        await writing


@pytest.mark.parametrize("mode", MODES)
async def test_requests_that_come_with_the_handshake(mode: ReplyMode) -> None:
    """A client that does not wait for the answer to its last option."""
    async with serving(MEMORY) as served:
        helper = await served.connect(mode=mode)
        cookies = [helper.prepared(*write(0, b"x" * 40 * KIB)), helper.prepared(Command.READ, 1 << 20, 512)]
        requests = b"".join(b"".join(buffers) for _, buffers in cookies)
        option = {ReplyMode.SIMPLE: b"", ReplyMode.STRUCTURED: option_bytes(8), ReplyMode.EXTENDED: option_bytes(11)}
        sock = await served.open_socket()
        everything = b"\0\0\0\3" + option[mode] + option_bytes(7, bytes(6)) + requests
        async with asyncio.timeout(LIMIT_S):
            await asyncio.get_running_loop().sock_sendall(sock, everything)
            # Up to the last ACK it is the handshake's; what follows are replies.
            data, end = b"", option_reply(7, 1)
            while end not in data:
                data += await asyncio.get_running_loop().sock_recv(sock, 1 << 16)
        helper.sock, before = sock, helper.sock
        helper._buffer += data[data.index(end) + len(end) :]
        for cookie, _ in cookies:
            if helper._buffer:
                while helper._digest():
                    pass
            assert not (await helper.reply(cookie)).error
        before.close()


def option_bytes(option: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + option.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload


def option_reply(option: int, kind: int) -> bytes:
    return (0x3E889045565A9).to_bytes(8, "big") + option.to_bytes(4, "big") + kind.to_bytes(4, "big") + bytes(4)


@pytest.mark.parametrize("mode", MODES)
async def test_disc_behind_requests_that_wait(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_REQUESTS_IN_FLIGHT", 1)
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        await send_together(client, *((Command.READ, 8 * n, 64) for n in range(4)), (Command.DISC,))
        for _ in range(4):
            await driver.until(1)
            driver.release(1)
        assert await client.at_end()
        assert sum(reply.done for reply in client.replies.values()) == 4


async def test_disc_has_no_reply_even_on_shutdown() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect()
        await client.send(Command.READ, 0, 64)
        await driver.until(1)
        the_connection(served).shut_down()
        await client.send_bytes(b"".join(client.transmission.request(Command.DISC)[1]))
        driver.release()
        assert await client.at_end()  # a reply to DISC would be one to an unknown cookie


async def test_requests_that_wait_for_memory_are_refused_on_shutdown() -> None:
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"payload_pool": 0}) as served:
        somebody = served.server.budget.account()
        assert somebody.take(RESERVE_BYTES + OVERDRAFT_BYTES, lambda: None)
        client = await served.connect()
        cookie = await client.send(Command.READ, 0, MIB)
        async with asyncio.timeout(LIMIT_S):
            while not served.server.budget.waiting:
                await asyncio.sleep(0)
        the_connection(served).shut_down()
        assert (await client.reply(cookie)).error == Errno.ESHUTDOWN
        assert await client.at_end()
        somebody.close()


@pytest.mark.parametrize("mode", MODES)
async def test_an_end_within_a_payload(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        client = await served.connect(mode=mode)
        read = await client.send(Command.READ, 0, 64)
        await held(served.node()).until(1)
        _, buffers = client.prepared(*write(0, bytes(500 * KIB)))
        await client.send_bytes(b"".join(buffers)[: 300 * KIB])
        client.sock.shutdown(socket.SHUT_WR)
        held(served.node()).release()
        assert bytes((await client.reply(read)).data) == pattern(0, 64)
        assert not await client.at_end()
        assert not held(served.node()).written


# --- memory ---------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_memory_is_taken_as_payloads_arrive() -> None:
    """Forty clients announce 32 MiB each: that is more than a gigabyte, of which next to nothing has come."""
    async with serving({"driver": "memory", "size": 64 * MIB}) as served:
        clients = [await served.connect() for _ in range(40)]
        before = resident_bytes()
        for client in clients:
            header = client.raw(Command.WRITE, 0, 32 * MIB, 0)
            await client.send_bytes(header + bytes(1000))
        async with asyncio.timeout(LIMIT_S):
            while sum(connection.payload_open for connection in served.server.connections) < 40:
                await asyncio.sleep(0)
        assert resident_bytes() - before < 40 * MIB


async def test_answers_that_are_not_taken_count() -> None:
    async with serving(MEMORY) as served:
        client = await served.connect(mode=ReplyMode.SIMPLE, receive_bytes=1)
        budget = served.server.budget
        cookies = [await client.send(Command.READ, 0, 4 * MIB) for _ in range(3)]
        async with asyncio.timeout(LIMIT_S):
            while not the_connection(served).wire.queued:
                await asyncio.sleep(0)
        assert the_connection(served).account.held >= the_connection(served).wire.unsent > 0
        for cookie in cookies:
            assert not (await client.reply(cookie)).error
        async with asyncio.timeout(LIMIT_S):
            while the_connection(served).wire.queued:
                await asyncio.sleep(0)
        assert the_connection(served).account.held == 0
        assert budget.taken == 0


@settings(deadline=None)
@given(st.data())
def test_law_of_memory_that_is_reserved_in_steps(data: st.DataObject) -> None:
    """Payloads that take their memory step by step, and give it back when they have it all: none waits for ever."""
    loop_queue: list[Any] = []
    budget = PayloadBudget(data.draw(st.integers(0, 6)) * MIB, loop_queue.append)
    ended = 0

    class Payload:
        def __init__(self, length: int) -> None:
            self.account = budget.account()
            self.length = length
            self.reserved = 0
            self.blocked = False

        def go_on(self) -> None:
            nonlocal ended
            self.blocked = False
            while self.reserved < self.length:
                step = min(MIB, self.length - self.reserved)
                if not self.account.take(step, self.go_on, begun=self.reserved > 0):
                    self.blocked = True
                    return
                self.reserved += step
                if data.draw(st.booleans()):
                    return  # the rest of it has to arrive first
            self.account.give(self.reserved)
            self.reserved = self.length = 0
            ended += 1

    payloads = [Payload(data.draw(st.integers(1, 32 * MIB))) for _ in range(data.draw(st.integers(1, 8)))]
    for _ in range(4000):
        if loop_queue:
            loop_queue.pop(0)()
        else:
            able = [payload for payload in payloads if payload.length and not payload.blocked]
            if not able:
                break
            data.draw(st.sampled_from(able)).go_on()
        assert budget.taken <= budget.pool + OVERDRAFT_BYTES
    assert ended == len(payloads)
    assert budget.taken == 0
    assert not budget.waiting


# --- payloads in parts ----------------------------------------------------------------------------------------


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


# --- sendfile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_large_reads_without_a_descriptor_left(mode: ReplyMode, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    data = random.Random(8).randbytes(4 * MIB)
    path.write_bytes(data)
    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(mode=mode)
        with no_descriptors_left():
            assert await client.read(0, 4 * MIB) == data
        assert await client.read(MIB, MIB) == data[MIB : 2 * MIB]


async def test_many_large_reads_take_one_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4 * MIB)
    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(receive_bytes=1)
        await client.read(0, 4 * MIB)
        before = open_descriptors()
        cookies = [await client.send(Command.READ, 0, 2 * MIB) for _ in range(100)]
        async with asyncio.timeout(LIMIT_S):
            while the_connection(served).in_flight < 20:
                await asyncio.sleep(0)
        assert open_descriptors() <= before + 1
        for cookie in cookies:
            assert (await client.reply(cookie)).data == b"x" * 2 * MIB
        assert open_descriptors() == before


@pytest.mark.parametrize("mode", MODES)
async def test_fua_and_other_flags_reach_the_backend(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.release()
        client = await served.connect(mode=mode)
        flags = CommandFlag.FUA | (PAYLOAD_LEN if mode is ReplyMode.EXTENDED else 0)
        assert not (await client.ask_raw(Command.WRITE, 0, 4, flags, b"abcd")).error
        assert [call[0] for call in driver.calls] == ["write", "flush"]
        driver.calls.clear()
        await client.write(0, b"efgh")
        assert [call[0] for call in driver.calls] == ["write"]


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
    monkeypatch.setattr(connection_module, "MAX_REQUESTS_IN_FLIGHT", 1 + connection_module.MAX_BATCH_REQUESTS)
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
