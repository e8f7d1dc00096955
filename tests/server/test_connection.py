"""One connection: how requests are found, put aside, and gone on with. What holds for all of them together is in
test_life_of_a_request.py; here are the ways on which a connection could come to a standstill, or mix up its bytes.
"""

import asyncio
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol.constants import Command, Errno, ReplyMode
from pynbd.server import outstanding as outstanding_module
from pynbd.server.budget import OVERDRAFT_BYTES, RESERVE_BYTES, PayloadBudget
from tests.server.clients import (
    LIMIT_S,
    MODES,
    send_together,
    serving,
    the_connection,
    write,
)
from tests.server.held import HELD, held, pattern

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 8 * MIB}


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
    monkeypatch.setattr(outstanding_module, "MAX_REQUESTS_IN_FLIGHT", 2)
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
    monkeypatch.setattr(outstanding_module, "MAX_REQUESTS_IN_FLIGHT", 1)
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
    monkeypatch.setattr(outstanding_module, "MAX_REQUESTS_IN_FLIGHT", 1)
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
