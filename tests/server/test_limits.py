"""What one client may take: the rates by arithmetic, the connections by counting, and all of it at a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol.constants import Command, Errno, ReplyMode
from nbd_protocol.transmission import Request
from pynbd.block import options
from pynbd.block.errors import OptionError
from pynbd.server import limits
from pynbd.server.limits import Bucket, Client, ClientLimits, Clients, Pace, Presence
from pynbd.server.visitor import Refused, Visitor
from tests.restless import RESTLESS
from tests.server.clients import LIMIT_S, MODES, Served, serving
from tests.server.held import HELD, Held, held, pattern
from tests.server.workload import Workload

MEMORY = {"driver": "memory", "size": 4 << 20}
KIB, MIB = 1 << 10, 1 << 20


@contextmanager
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Time for rates, which goes on only when it is told to."""
    now = [1000.0]
    with monkeypatch.context() as patched:
        patched.setattr(limits, "monotonic", lambda: now[0])
        yield now


def request(command: int, length: int) -> Request:
    return Request(command, 0, 0, 1, length)


@given(
    st.integers(1, 10_000),
    st.integers(0, 10_000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 5000)), max_size=60),
)
def test_a_bucket_keeps_its_rate(rate: int, burst: int, wants: list[tuple[float, int]]) -> None:
    """Never more than the burst and what has come since, but for the one request that overdraws it."""
    bucket, now, taken, largest = Bucket(rate, burst, 0.0), 0.0, 0, 0
    for pause, amount in wants:
        now += pause
        bucket.fill(now)
        if bucket.level > 0:
            bucket.level -= amount
            taken, largest = taken + amount, max(largest, amount)
        else:
            wait = bucket.wait_s
            assert wait > 0
            bucket.fill(now + wait)
            assert bucket.level > 0
            now += wait
        assert taken <= (burst or rate) + rate * now + largest + 1e-6


def test_no_rate_is_no_limit() -> None:
    bucket = Bucket(0, 0, 0.0)
    bucket.level -= 1e18
    assert bucket.level > 0
    assert bucket.is_full


def test_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_clock(monkeypatch) as now:
        pace = Pace(ClientLimits(requests_per_second=10, bytes_per_second=100 * KIB, bytes_burst=64 * KIB))
        reads = [request(Command.READ, 4 * KIB)] * 64
        assert pace.admit(reads) == 10
        assert pace.wait_s == pytest.approx(0.1)
        now[0] += 0.35
        assert pace.admit(reads) == 4
        now[0] += 60
        assert pace.admit([request(Command.WRITE, 32 * MIB)] * 2) == 1  # a large one is served at once, and paid for
        assert pace.wait_s == pytest.approx((32 * MIB - 64 * KIB) / (100 * KIB), rel=1e-3)
        assert not pace.is_full
        now[0] += pace.wait_s + 0.01
        assert pace.admit([request(Command.TRIM, 1 << 31), request(Command.FLUSH, 0)]) == 2  # these move no bytes
        assert pace.admit([request(Command.READ, 1 << 31)]) == 1  # and this one is going to be refused
        now[0] += 60
        assert pace.is_full


def test_what_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_clock(monkeypatch):
        pace = Pace(ClientLimits(requests_per_second=10, bytes_per_second=100 * KIB))
        reads = [request(Command.READ, 4 * KIB)] * 10
        assert pace.admit(reads) == 10
        pace.give_back(reads[:3])
        assert pace.admit(reads) == 3
        pace.give_back(reads * 5)
        assert pace.is_full


def test_connections_of_a_client_are_counted() -> None:
    clients = Clients(ClientLimits(connections=2))
    alice, bob = Visitor("a", key="10.0.0.1"), Visitor("b", key="10.0.0.2")
    first, second = Presence(clients, alice), Presence(clients, alice)
    with pytest.raises(Refused, match=r"10\.0\.0\.1 has 2 connections already"):
        Presence(clients, alice)
    other = Presence(clients, bob)
    first.leave()
    third = Presence(clients, alice)
    third.named("CN=x")
    second.leave()
    other.named("CN=x")
    fourth = Presence(clients, alice)
    with pytest.raises(Refused, match="name 'CN=x' has 2 connections"):
        fourth.named("CN=x")
    for presence in (third, other, fourth):
        presence.leave()
    assert not clients._present
    assert not clients._gone


def test_to_come_back_fills_no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_clock(monkeypatch) as now:
        clients = Clients(ClientLimits(requests_per_second=10))
        visitor = Visitor("a", key="10.0.0.1")
        presence = Presence(clients, visitor)
        assert presence.pace is not None
        assert presence.pace.admit([request(Command.READ, 1)] * 20) == 10
        presence.leave()
        again = Presence(clients, visitor)
        assert again.pace is not None
        assert again.pace.admit([request(Command.READ, 1)]) == 0
        again.leave()
        now[0] += 60
        Presence(clients, visitor).leave()
        assert not clients._gone


def test_limits_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is there keeps what he has, and counts; a change of nothing fills no bucket."""
    with stopped_clock(monkeypatch):
        before = ClientLimits(requests_per_second=10, requests=5)
        clients, visitor = Clients(before), Visitor("a", key="10.0.0.1")
        staying = Presence(clients, visitor)
        kept, pace = staying.in_flight, staying.pace
        assert pace is not None
        assert pace.admit([request(Command.READ, 1)] * 20) == 10
        clients.change(ClientLimits(requests_per_second=10, requests=5))
        assert (staying.in_flight, staying.pace) == (kept, pace)
        clients.change(ClientLimits(connections=2, requests=1))
        second = Presence(clients, visitor)
        assert second.pace is None
        assert second.in_flight is not None
        assert second.in_flight is not kept
        assert second.in_flight.max_requests == 1
        with pytest.raises(Refused, match=r"10\.0\.0\.1 has 2 connections already"):
            Presence(clients, visitor)
        clients.change(ClientLimits())
        third = Presence(clients, visitor)
        assert third.in_flight is None
        for presence in (staying, second, third):
            presence.leave()
        assert not clients._present


def test_who_has_gone_is_forgotten_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_clock(monkeypatch):
        clients = Clients(ClientLimits(requests_per_second=10))
        for number in range(limits.MAX_CLIENTS_KEPT + 100):
            client = clients.enter(f"10.0.{number >> 8}.{number & 255}")
            assert isinstance(client, Client)
            assert client.pace is not None
            client.pace.admit([request(Command.READ, 1)])
            clients.leave(client)
        assert len(clients._gone) == limits.MAX_CLIENTS_KEPT


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"bytes-burst": "1M"}, "bytes-burst: it goes with bytes-per-second"),
        ({"requests-burst": 5}, "it goes with requests-per-second"),
        ({"connections": -1}, "connections"),
        ({"handshake-timeout": -1}, "handshake-timeout"),
        ({"conections": 1}, "did you mean 'connections'"),
    ],
)
def test_wrong_limits(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options.convert(tree, ClientLimits, driver="[server.client-limits]")


# --- at a server ----------------------------------------------------------------------------------------------


async def until(served: Served, condition: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not eval(condition, {"server": served.server}):
            await asyncio.sleep(0.001)


async def test_too_many_connections_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(MEMORY, server_options={"limits": ClientLimits(connections=3)}) as served:
        staying = [await served.connect() for _ in range(2)]
        shaking = await served.open_socket()
        await until(served, "len(server._handshakes) == 1")
        for _ in range(20):
            sock = await served.open_socket()
            async with asyncio.timeout(LIMIT_S):
                assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
        shaking.close()
        await until(served, "not server._handshakes")
        staying.append(await served.connect())
        for client in staying:
            await client.write(0, b"served")
            assert await client.disconnect()
        await served.until_gone()
    refusals = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in refusals if "has 3 connections already, the most it may have" in line]) == 10
    assert refusals[-1].endswith("10 more lines like these within 60 s were left out")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "rates",
    [
        {"requests_per_second": 2000, "requests_burst": 3},
        {"bytes_per_second": 100 * MIB, "bytes_burst": 1000},
        {"bytes_per_second": 100 * MIB, "bytes_burst": 1, "requests_per_second": 5000, "requests_burst": 1},
    ],
)
async def test_everything_is_served_in_the_end(mode: ReplyMode, rates: dict[str, int]) -> None:
    """Small and large requests, many at a time, on several connections of one client."""
    async with serving(MEMORY, server_options={"limits": ClientLimits(**rates)}) as served:
        clients = [await served.connect(mode=mode) for _ in range(2)]
        await asyncio.gather(
            *(Workload(client, number * MIB, MIB, seed=number).run(150) for number, client in enumerate(clients))
        )
        for client in clients:
            assert await client.disconnect()
        await served.until_gone()


async def test_nothing_is_received_beyond_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest stays with the client: neither is it read, nor does it take memory here."""
    with stopped_clock(monkeypatch) as now:
        async with serving(MEMORY, server_options={"limits": ClientLimits(requests_per_second=10)}) as served:
            client = await served.connect()
            cookies = [await client.send(Command.READ, 0, 512) for _ in range(10)]
            for cookie in cookies:
                await client.reply(cookie)
            (connection,) = served.server.connections
            cookie = await client.send(Command.READ, 0, 512)
            await until(served, "next(iter(server.connections))._pace_timer is not None")
            assert not connection.wire._reading  # type: ignore[attr-defined]  # one of PlainWire
            write, buffers = client.prepared(Command.WRITE, 0, payload=bytes(MIB))
            # The kernel has no room for so much, so it does not get away before somebody receives it.
            sending = asyncio.create_task(client.send_bytes(b"".join(buffers)))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not sending.done()
            assert len(connection._waiting) == 1
            assert connection.account.held == 0
            now[0] += 0.25
            await client.reply(cookie)
            await client.reply(write)
            await sending
            assert await client.disconnect()


async def test_the_end_does_not_wait_for_a_rate() -> None:
    limit = ClientLimits(requests_per_second=1)
    async with serving(MEMORY, server_options={"limits": limit}) as served:
        client = await served.connect()
        for _ in range(5):
            await client.send(Command.READ, 0, 512)
        await until(served, "next(iter(server.connections))._pace_timer is not None")
        gone = await served.connect()
        for _ in range(2):
            await gone.send(Command.READ, 0, 512)
        gone.sock.close()
        await served.server.close()
        assert await client.at_end()


@pytest.mark.parametrize(
    "limit", [{"requests": 1}, {"bytes_in_flight": 4 * KIB}, {"requests": 3, "bytes_in_flight": 1}]
)
async def test_little_in_flight_is_enough(limit: dict[str, int]) -> None:
    """Of three connections of one client each comes to its end, though mostly one request at a time is served."""
    restless = {"driver": RESTLESS, "size": 4 * MIB, "fill": "zero", "suspends": 0.5}
    async with serving(restless, server_options={"limits": ClientLimits(**limit)}) as served:
        clients = [await served.connect() for _ in range(3)]
        await asyncio.gather(
            *(Workload(client, number * MIB, MIB, seed=number).run(100) for number, client in enumerate(clients))
        )
        for client in clients:
            assert await client.disconnect()
        await served.until_gone()
        assert not served.server._clients._present


async def until_still(driver: Held) -> int:
    """How many requests wait in the driver when nothing moves any more."""
    still, count = 0, -1
    while still < 50:
        still = still + 1 if count == len(driver.waiting) else 0
        count = len(driver.waiting)
        await asyncio.sleep(0)
    return count


@pytest.mark.parametrize("mode", MODES)
async def test_many_connections_have_no_more_in_flight_than_one(mode: ReplyMode) -> None:
    limit = ClientLimits(requests=3)
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"limits": limit}) as served:
        driver = held(served.node())
        clients = [await served.connect(mode=mode) for _ in range(16)]
        asked = [(client, await client.send(Command.READ, 0, 512)) for client in clients for _ in range(4)]
        for left in range(len(asked), 0, -1):
            assert await until_still(driver) == min(3, left)
            driver.release(1)
        for client, cookie in asked:
            assert bytes((await client.reply(cookie)).data) == pattern(0, 512)


@pytest.mark.parametrize("mode", MODES)
async def test_payloads_of_many_connections_are_counted_together(mode: ReplyMode) -> None:
    """Those that have begun count as a whole, before their bytes are here; a flush has its turn among them."""
    limit = ClientLimits(bytes_in_flight=5 * MIB)
    async with serving({"driver": HELD, "size": 64 * MIB}, server_options={"limits": limit}) as served:
        driver = held(served.node())
        clients = [await served.connect(mode=mode) for _ in range(4)]
        writing = [asyncio.create_task(client.write(0, bytes(2 * MIB))) for client in clients]
        await driver.until(2)
        flushing = await served.connect(mode=mode)
        cookie = await flushing.send(Command.FLUSH)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(driver.waiting) == 2
        driver.release(1)
        await driver.until(2)
        driver.release()
        await asyncio.gather(*writing)
        assert not (await flushing.reply(cookie)).error


async def test_who_waits_in_line_and_leaves_lets_the_next_one_in() -> None:
    limit = ClientLimits(requests=1)
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"limits": limit}) as served:
        driver = held(served.node())
        busy, leaving, staying = [await served.connect() for _ in range(3)]
        first = await busy.send(Command.READ, 0, 512)
        await driver.until(1)
        (client,) = served.server._clients._present.values()
        assert client.in_flight is not None
        for number, waiting in enumerate((leaving, staying), 1):
            cookie = await waiting.send(Command.READ, 8, 512)
            async with asyncio.timeout(LIMIT_S):
                while len(client.in_flight.line) < number:
                    await asyncio.sleep(0)
        leaving.sock.close()
        driver.release(1)
        await driver.until(1)
        driver.release()
        assert bytes((await busy.reply(first)).data) == pattern(0, 512)
        assert bytes((await staying.reply(cookie)).data) == pattern(8, 512)


async def test_the_end_does_not_wait_for_a_line() -> None:
    limit = ClientLimits(requests=1)
    async with serving({"driver": HELD, "size": 8 * MIB}, server_options={"limits": limit}) as served:
        driver = held(served.node())
        busy, waiting = [await served.connect() for _ in range(2)]
        first = await busy.send(Command.READ, 0, 512)
        await driver.until(1)
        second = await waiting.send(Command.READ, 0, 512)
        await until(served, "any(len(connection._waiting) for connection in server.connections)")
        closing = asyncio.create_task(served.server.close())
        assert (await waiting.reply(second)).error == Errno.ESHUTDOWN
        driver.release()
        assert not (await busy.reply(first)).error
        await closing


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pynbd.server.server.STALL_CHECK_S", 0.01)
    async with serving(MEMORY, server_options={"limits": ClientLimits(idle_timeout=0.05)}) as served:
        client = await served.connect()
        assert await client.at_end()
        await served.until_gone()
