"""The life of a request, as law: whatever drivers, clients and the graph do, requests run to their end, answers are
right and reach those who asked, and nothing of it stays behind.

Every test ends with the checks of `serving`: no connection, task, descriptor or reserved byte is left.
"""

import asyncio
import contextlib
import itertools
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbd_protocol.constants import Command, Errno, ReplyMode
from pynbd.block.backend import ErrorPolicy
from pynbd.block.drain import drained
from pynbd.server import batches as batches_module
from pynbd.server import connection as connection_module
from pynbd.server import outstanding as outstanding_module
from pynbd.server import payload as payload_module
from pynbd.server import wire as wire_module
from pynbd.server.limits import ClientLimits
from pynbd.server.scratch import INLINE_READ_BYTES, MAX_BATCH_BYTES, MAX_BATCH_REQUESTS
from tests.restless import RESTLESS, restless
from tests.server.clients import CHUNKED, LIMIT_S, MODES, Client, Served, Tree, serving
from tests.server.held import HELD, held, pattern
from tests.server.workload import Workload

KIB, MIB = 1 << 10, 1 << 20

SMALL_LIMITS = {
    "MAX_REQUESTS_IN_FLIGHT": (outstanding_module, 4),
    "MAX_BYTES_IN_FLIGHT": (outstanding_module, 600 * KIB),
    "MAX_UNSENT_BYTES": (outstanding_module, 20 * KIB),
    "RESERVE_BYTES": (outstanding_module, 10 * KIB),
    "MAX_BATCH_REQUESTS": (connection_module, 5),
    "MAX_BATCH_BYTES": (batches_module, 100 * KIB),
    "PAYLOAD_STEP_BYTES": (payload_module, 64 * KIB),
    "MAX_BYTES_A_TURN": (wire_module, 50 * KIB),
}


def make_limits_small(monkeypatch: pytest.MonkeyPatch, **others: int) -> None:
    for name, (module, value) in SMALL_LIMITS.items():
        monkeypatch.setattr(module, name, others.get(name, value))


def disk(kind: str, folder: Path, size: int, **options: Any) -> Tree:
    """A disk of zeroes."""
    if kind == "restless":
        return {"driver": RESTLESS, "size": size, "fill": "zero", **options}
    if kind == "memory":
        return {"driver": "memory", "size": size}
    path = folder / "disk.raw"
    path.write_bytes(bytes(size))
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


async def run_workloads(
    served: Served, count: int, requests: int, *, part: int = MIB, refused: float = 0.0, **options: Any
) -> list[Workload]:
    """Several clients at once, in all framings, each on its own part of the disk, some of them with tiny buffers."""
    workloads = []
    for number in range(count):
        mode = MODES[number % 3]
        receive_bytes, send_bytes = (2048, 4096) if number % 2 else (0, 0)
        client = await served.connect(mode=mode, receive_bytes=receive_bytes, send_bytes=send_bytes)
        workload = Workload(client, number * part, part, seed=number, **options)
        workload.size = served.node().size
        workloads.append(workload)
    async with asyncio.TaskGroup() as group:
        for workload in workloads:
            group.create_task(workload.run(requests, refused=refused))
    return workloads


# --- whatever the driver does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["restless", "memory", "file"])
async def test_many_clients_see_their_own_bytes(kind: str, tmp_path: Path) -> None:
    async with serving(disk(kind, tmp_path, 8 * MIB, suspends=0.5)) as served:
        await run_workloads(served, 8, 150)


async def test_many_clients_over_tcp() -> None:
    async with serving(disk("restless", Path(), 8 * MIB, suspends=0.5), tcp=True) as served:
        await run_workloads(served, 8, 100)


async def test_a_driver_that_fails_is_answered_every_time() -> None:
    async with serving(disk("restless", Path(), 6 * MIB, suspends=0.5, fails=0.2)) as served:
        workloads = await run_workloads(served, 6, 100, fails=True)
        assert all(workload.failed for workload in workloads)
        restless(served.node()).fails = 0.0
        for workload in workloads:
            await workload.read_back()


@pytest.mark.parametrize("kind", ["restless", "memory", "file"])
async def test_nobody_gets_stuck_at_any_limit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All limits so small that every request meets one; refused payloads among it; the memory for them exhausted."""
    make_limits_small(monkeypatch)
    options = {"payload_pool": 64 * KIB}
    async with serving(disk(kind, tmp_path, 8 * MIB, suspends=0.3), server_options=options) as served:
        await run_workloads(served, 8, 120, refused=0.1, largest=700 * KIB)


@pytest.mark.parametrize("seed", range(10))
async def test_nobody_gets_stuck_for_want_of_payload_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random limits of every kind."""
    source = random.Random(seed)
    make_limits_small(
        monkeypatch,
        MAX_REQUESTS_IN_FLIGHT=source.choice([1, 2, 5, 1000]),
        MAX_BYTES_IN_FLIGHT=source.choice([1, 100 * KIB, 600 * KIB, 64 * MIB]),
        MAX_UNSENT_BYTES=source.choice([0, 10 * KIB, 4 * MIB]),
        RESERVE_BYTES=source.choice([0, 10 * KIB, 256 * KIB]),
        MAX_BATCH_REQUESTS=source.choice([1, 3, 64]),
        PAYLOAD_STEP_BYTES=source.choice([4 * KIB, 64 * KIB, MIB]),
    )
    client_limits = ClientLimits(
        requests=source.choice([0, 1, 3, 100]), bytes_in_flight=source.choice([0, 1, 300 * KIB, 4 * MIB])
    )
    options = {"payload_pool": source.choice([0, 4 * KIB, 300 * KIB, 2 * MIB]), "limits": client_limits}
    async with serving(disk("restless", Path(), 8 * MIB, suspends=0.5), server_options=options) as served:
        await run_workloads(served, 8, 60, refused=0.1, largest=source.choice([100 * KIB, 900 * KIB]), depth=8)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_law_of_one_connection(data: st.DataObject) -> None:
    """Any requests, cut into any pieces, against any driver: each is answered once, and rightly."""
    mode = data.draw(st.sampled_from(MODES))
    seed = data.draw(st.integers(0, 1 << 20))
    cuts = [*data.draw(st.lists(st.integers(1, 100_000), max_size=20)), 20_000]  # not every byte on its own
    suspends = data.draw(st.sampled_from([0.0, 0.3, 1.0]))

    async def run() -> None:
        async with serving({"driver": RESTLESS, "size": MIB, "fill": "zero", "suspends": suspends}) as served:
            client = await served.connect(mode=mode)
            sizes = itertools.cycle(cuts)
            whole = client.send_bytes

            async def in_pieces(buffer: bytes) -> None:
                position = 0
                while position < len(buffer):
                    size = next(sizes)
                    await whole(buffer[position : position + size])
                    position += size
                    await asyncio.sleep(0)

            client.send_bytes = in_pieces  # type: ignore[method-assign,assignment]  # the same, in pieces
            workload = Workload(client, 0, MIB, seed=seed, depth=8)
            workload.size = MIB
            await workload.run(25, refused=0.1)

    asyncio.run(run())


# --- whatever the client does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_may_vanish_at_any_byte(mode: ReplyMode) -> None:
    """A conversation cut off after each number of bytes, sent and received."""
    async with serving(disk("restless", Path(), MIB, suspends=0.5)) as served:
        witness = Workload(await served.connect(mode=mode), MIB // 2, MIB // 2, seed=1)
        recorder = await served.connect(mode=mode)
        buffers: list[Any] = []
        for offset, length in ((0, 512), (4096, 70 * KIB)):
            buffers += recorder.prepared(Command.WRITE, offset, payload=bytes(length))[1]
            buffers += recorder.prepared(Command.READ, offset, length)[1]
        conversation = b"".join(buffers)
        source = random.Random(5)
        cuts = [*range(130), *(source.randrange(len(conversation)) for _ in range(60)), len(conversation)]
        for cut in cuts:
            client = await served.connect(mode=mode)
            await client.send_bytes(conversation[:cut])
            if source.random() < 0.5:
                await asyncio.sleep(0)
            if source.random() < 0.3:
                client.sock.shutdown(socket.SHUT_WR)  # half closed: it may still want its answers
                await client_takes(client, source.randrange(100_000))
            client.sock.close()
        await served.until_gone(2)
        await witness.run(30)


async def client_takes(client: Client, count: int) -> None:
    """Receive so many bytes, or all there are."""
    async with asyncio.timeout(LIMIT_S):
        while count > 0:
            piece = await asyncio.get_running_loop().sock_recv(client.sock, count)
            if not piece:
                return
            count -= len(piece)


@pytest.mark.parametrize("mode", MODES)
async def test_half_closed_clients_get_all_their_answers(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        client = await served.connect(mode=mode)
        cookies = [await client.send(Command.READ, 64 * n, 64) for n in range(20)]
        client.sock.shutdown(socket.SHUT_WR)
        await held(served.node()).until(20)
        held(served.node()).release()
        for number, cookie in enumerate(cookies):
            assert bytes((await client.reply(cookie)).data) == pattern(64 * number, 64)
        assert await client.at_end()


async def test_requests_of_a_vanished_client_run_to_their_end() -> None:
    """They are not cancelled, and their buffers stay theirs: the driver looks whether the payload is as it was."""
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        client = await served.connect()
        data = {0: b"a" * 512, 512: b"b" * 70 * KIB, MIB: b"c" * MIB}
        for offset, payload in data.items():
            await client.send(Command.WRITE, offset, payload=payload)
        await client.send(Command.READ, 0, MIB)
        await driver.until(4)
        client.sock.close()
        # Others go on meanwhile, through the same buffers.
        driver.hold = frozenset()
        other = await served.connect()
        for _ in range(20):
            await other.write(4 * MIB, os.urandom(MIB))
            await other.write(4 * MIB, os.urandom(70 * KIB))
        assert not driver.written.keys() & data.keys()
        (gone,) = (connection for connection in served.server.connections if connection.in_flight)
        assert gone.in_flight == 4
        driver.release()
        await served.until_gone(1)
        assert {offset: driver.written[offset] for offset in data} == data


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["restless", "memory", "file"])
async def test_buffers_are_not_used_again_before_they_have_left(mode: ReplyMode, kind: str, tmp_path: Path) -> None:
    """A reader that takes a few bytes at a time, while others make the server use its common buffers all the time."""
    async with serving(disk(kind, tmp_path, 4 * MIB, suspends=0.2)) as served:
        writer = await served.connect(mode=mode)
        data = random.Random(9).randbytes(4 * MIB)
        for offset in range(0, 4 * MIB, MIB):
            await writer.write(offset, data[offset : offset + MIB])
        slow = await served.connect(mode=mode, receive_bytes=1)
        places = [(0, 4 * KIB)] * 10 + [(MIB, 60 * KIB), (MIB + 5, 300 * KIB), (7, 64 * KIB), (99, 1), (0, MIB)]
        cookies = [(place, await slow.send(Command.READ, *place)) for place in places]
        source = random.Random(3)
        for (offset, length), cookie in cookies:
            for _ in range(3):
                there = source.randrange(3 * MIB)
                assert await writer.read(there, 50 * KIB) == data[there : there + 50 * KIB]
            assert (await slow.reply(cookie)).data == data[offset : offset + length]


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("damage", ["truncated", "emptied"])
async def test_a_file_that_fails_midway_ends_in_an_error_and_the_stream_goes_on(
    mode: ReplyMode, damage: str, tmp_path: Path
) -> None:
    tree = disk("file", tmp_path, 32 * MIB)
    async with serving(tree) as served:
        client = await served.connect(mode=mode, receive_bytes=1)
        path = tmp_path / "disk.raw"
        with path.open("r+b") as file:
            file.write(b"x" * 32 * MIB)
            file.flush()
            reads = [await client.send(Command.READ, n * 8 * MIB, 8 * MIB) for n in range(4)]
            async with asyncio.timeout(LIMIT_S):
                while not any(connection.wire.queued for connection in served.server.connections):
                    await asyncio.sleep(0)
            file.truncate(3 * MIB if damage == "truncated" else 0)
        replies = [await client.reply(cookie) for cookie in reads]
        failed = [reply for reply in replies if reply.error]
        assert failed
        assert all(reply.error == Errno.EIO and "ends at" in reply.text for reply in failed)
        # What was looked at afterwards reads as zeroes, as anything behind the end of a file does.
        whole = (b"x" * 8 * MIB, bytes(8 * MIB))
        assert all(reply.data in whole for reply in replies if not reply.error)
        with path.open("r+b") as file:
            file.truncate(32 * MIB)
        assert await client.read(31 * MIB, MIB) == bytes(MIB)
        assert await client.disconnect()


# --- caps and fairness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_requests_in_flight_have_a_cap(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outstanding_module, "MAX_REQUESTS_IN_FLIGHT", 10)
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        cookies = [await client.send(Command.READ, 64 * n, 64) for n in range(35)]
        await driver.until(10)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(driver.waiting) == 10
        for done in range(1, 26):
            driver.release(1)
            await driver.until(10 if done <= 25 else 35 - done)
            assert len(driver.waiting) == 10
        driver.release()
        for number, cookie in enumerate(cookies):
            assert bytes((await client.reply(cookie)).data) == pattern(64 * number, 64)


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
async def test_bytes_in_flight_have_a_cap(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outstanding_module, "MAX_BYTES_IN_FLIGHT", MIB)
    async with serving({"driver": HELD, "size": 8 * MIB}) as served:
        driver = held(served.node())
        client = await served.connect(mode=ReplyMode.SIMPLE)

        async def ask_all() -> list[int]:
            payload = b"x" * 400 * KIB
            if command is Command.WRITE:
                return [await client.send(command, n * 400 * KIB, payload=payload) for n in range(8)]
            return [await client.send(command, n * 400 * KIB, 400 * KIB) for n in range(8)]

        asking = asyncio.create_task(ask_all())
        for _ in range(8):
            await driver.until(1)
            for _ in range(20):
                await asyncio.sleep(0)
            assert sum(request.length for request in driver.waiting) <= MIB
            assert served.server.budget.taken <= MIB
            driver.release(1)
        async with asyncio.timeout(LIMIT_S):
            cookies = await asking
        assert not any([(await client.reply(cookie)).error for cookie in cookies])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["inline reads", "large reads", "refused", "status", "waiting reads"])
async def test_a_client_that_takes_no_answers_is_not_listened_to(
    mode: ReplyMode, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short its requests and long the answers: what they take is bounded, and so is what it can send."""
    async with serving(
        {"driver": "memory", "size": 8 * MIB}, {"driver": RESTLESS, "size": 8 * MIB, "suspends": 1.0}
    ) as served:
        monkeypatch.setattr(outstanding_module, "MAX_UNSENT_BYTES", 256 * KIB)
        monkeypatch.setattr(outstanding_module, "MAX_BYTES_IN_FLIGHT", 2 * MIB)
        client = await served.connect("disk1" if what == "waiting reads" else "", mode, receive_bytes=1)
        if what in ("inline reads", "large reads"):
            await client.write(0, os.urandom(8 * MIB))
        requests = {
            "inline reads": (Command.READ, 0, 60 * KIB),
            "large reads": (Command.READ, 0, MIB),
            "refused": (Command.READ, 1 << 40, 512),
            "status": (Command.BLOCK_STATUS, 0, MIB),
            "waiting reads": (Command.READ, 0, 100 * KIB),
        }
        request = client.raw(*requests[what])
        flood = request * 2000
        (connection,) = served.server.connections
        connection.wire._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # type: ignore[attr-defined]  # a plain wire
        still = 0
        sent = 0
        while still < 200:  # turns in which nothing could be sent
            with contextlib.suppress(BlockingIOError):
                sent += client.sock.send(flood)
                still = -1
            still += 1
            assert sent < 4 * MIB, "it is listened to all the time"
            assert connection.wire.unsent < 4 * MIB
            await asyncio.sleep(0)
        client.sock.close()


async def test_where_memory_runs_short_less_is_kept_for_each() -> None:
    """Clients that take none of their answers: they hold the pool, and then no more than their reserve each."""
    options = {"payload_pool": 8 * MIB}
    async with serving({"driver": "memory", "size": MIB}, server_options=options) as served:
        clients = [await served.connect(mode=ReplyMode.SIMPLE, receive_bytes=1) for _ in range(20)]
        await clients[0].write(0, os.urandom(MIB))
        for connection in served.server.connections:
            connection.wire._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # type: ignore[attr-defined]
        for client in clients:
            flood = client.raw(Command.READ, 0, 60 * KIB) * 1000
            for _ in range(50):
                with contextlib.suppress(BlockingIOError):
                    client.sock.send(flood)
                await asyncio.sleep(0)
        largest_batch = MAX_BATCH_BYTES + 2 * INLINE_READ_BYTES
        assert served.server.budget.taken > 8 * MIB
        assert sum(connection.wire.unsent for connection in served.server.connections) < 8 * MIB + 20 * largest_batch
        assert await (await served.connect()).read(0, 4 * KIB)
        for client in clients:
            client.sock.close()


async def test_a_flood_does_not_starve_others() -> None:
    """Counted in turns of the loop: while one client asks for thousands, another one waits for a few."""
    async with serving({"driver": "memory", "size": MIB}) as served:
        statistics = served.server.exports[""].backend.statistics
        flooder, other = await served.connect(), await served.connect()
        await flooder.write(0, b"x" * MIB)
        flood = flooder.raw(Command.READ, 0, 512) * 5000
        flooder.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        position = flooder.sock.send(flood)
        for _ in range(10):
            asked = statistics.operations[0]
            cookie = await other.send(Command.READ, 0, 512)
            turns = 0
            while not is_readable(other.sock):
                before = statistics.operations[0]
                await asyncio.sleep(0)
                assert statistics.operations[0] - before <= 2 * MAX_BATCH_REQUESTS + 1
                turns += 1
                assert turns <= 4
            assert statistics.operations[0] - asked < 6 * MAX_BATCH_REQUESTS
            await other.reply(cookie)
            with contextlib.suppress(BlockingIOError):
                flooder.sock.recv(MIB)
            with contextlib.suppress(BlockingIOError):
                position += flooder.sock.send(flood[position % len(flood) :])
        flooder.sock.close()


async def test_one_turn_serves_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large reads that are answered at once do not all happen in the turn in which they were asked for."""
    async with serving({"driver": RESTLESS, "size": 4 * MIB}) as served:
        driver = restless(served.node())
        client = await served.connect(mode=ReplyMode.SIMPLE)
        requests = [client.prepared(Command.READ, 0, 700 * KIB) for _ in range(20)]
        client.sock.send(b"".join(b"".join(buffers) for _, buffers in requests))
        driver.calls.clear()
        for _ in range(6):
            before = len(driver.calls)
            await asyncio.sleep(0)
            assert sum(call[2] for call in driver.calls[before:]) <= 3 * MIB
        for cookie, _ in requests:
            assert not (await client.reply(cookie)).error


def is_readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def test_payloads_that_stall_hold_no_more_than_the_pool() -> None:
    """Thirty clients begin 32 MiB each and send a little less: the pool is not overdrawn, and others are served."""
    options = {"payload_pool": 4 * MIB}
    async with serving({"driver": "memory", "size": 64 * MIB}, server_options=options) as served:
        stalled = [await served.connect() for _ in range(30)]
        for client in stalled:
            _, buffers = client.prepared(Command.WRITE, 0, payload=bytes(32 * MIB))
            data = b"".join(buffers)
            for _ in range(10):
                with contextlib.suppress(BlockingIOError):
                    client.sock.send(data[: 512 * KIB])
                await asyncio.sleep(0)
        budget = served.server.budget
        assert budget.taken <= budget.pool + 33 * MIB
        assert budget.waiting
        other = await served.connect()
        for _ in range(5):
            await other.write(0, b"small" * 1000)
            assert await other.read(0, 5) == b"small"
        for client in stalled:
            client.sock.close()
        await other.write(0, bytes(32 * MIB))


@pytest.mark.parametrize("pool", [0, MIB])
async def test_large_payloads_of_all_clients_come_to_their_end(pool: int) -> None:
    """They all begin at once, and memory is there for hardly one of them."""
    async with serving({"driver": "memory", "size": 64 * MIB}, server_options={"payload_pool": pool}) as served:
        clients = [await served.connect(mode=MODES[n % 3]) for n in range(8)]
        data = [random.Random(n).randbytes(5 * MIB) for n in range(8)]
        async with asyncio.timeout(LIMIT_S):
            for _ in range(2):
                await asyncio.gather(*(c.write(n * 5 * MIB, data[n]) for n, c in enumerate(clients)))
        for number, client in enumerate(clients):
            assert await client.read(number * 5 * MIB, 5 * MIB) == data[number]


# --- parked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_nothing_starts_in_a_drained_section_and_all_goes_on_after_it(mode: ReplyMode) -> None:
    async with serving(disk("restless", Path(), 4 * MIB, suspends=0.3)) as served:
        driver = restless(served.node())
        clients = [await served.connect(mode=mode) for _ in range(3)]
        workloads = [Workload(client, n * MIB, MIB, seed=n) for n, client in enumerate(clients)]
        ended = False

        async def drain_again_and_again() -> None:
            while not ended:
                async with drained(served.node()):
                    calls = len(driver.calls)
                    assert driver.in_flight == 0
                    for _ in range(5):
                        await asyncio.sleep(0)
                    assert len(driver.calls) == calls
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(drain_again_and_again())
            async with asyncio.TaskGroup() as working:
                for workload in workloads:
                    working.create_task(workload.run(60))
            ended = True


async def test_what_the_error_policy_stopped_is_tried_again_on_resume() -> None:
    async with serving({"driver": RESTLESS, "suspends": 0.3}) as served:
        backend = served.server.exports[""].backend
        backend.on_read_error = backend.on_write_error = ErrorPolicy.STOP
        driver = restless(served.node())
        client = await served.connect()
        before = bytes(driver.data)
        driver.fails = 1.0
        cookies = [await client.send(Command.READ, n * 4096, 4096) for n in range(5)]
        written = await client.send(Command.WRITE, 512 * KIB, payload=b"x" * 70 * KIB)
        async with asyncio.timeout(LIMIT_S):
            while backend.parked < 6:
                await asyncio.sleep(0)
        assert not any(reply.done for reply in client.replies.values())
        driver.fails = 0.0
        backend.resume()
        for number, cookie in enumerate(cookies):
            assert (await client.reply(cookie)).data == before[number * 4096 : number * 4096 + 4096]
        assert not (await client.reply(written)).error
        assert driver.data[512 * KIB :][: 70 * KIB] == b"x" * 70 * KIB


async def test_parked_requests_end_with_eshutdown() -> None:
    async with serving({"driver": RESTLESS, "fails": 1.0}, {"driver": "memory", "size": MIB}) as served:
        backend = served.server.exports[""].backend
        backend.on_read_error = backend.on_write_error = ErrorPolicy.STOP
        client = await served.connect()
        cookies = [await client.send(Command.READ, n * 4096, 4096) for n in range(5)]
        cookies.append(await client.send(Command.WRITE, 0, payload=b"x" * 100 * KIB))
        async with asyncio.timeout(LIMIT_S):
            while backend.parked < 6:
                await asyncio.sleep(0)
            restless(served.node()).fails = 0.0
            await served.server.close(grace_s=0.01)
        assert [(await client.reply(cookie)).error for cookie in cookies] == [Errno.ESHUTDOWN] * 6
        assert await client.at_end()


# --- the graph changes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("restless", "memory"), ("memory", "file"), ("file", "restless")])
async def test_a_node_is_replaced_under_clients_that_verify(kinds: tuple[str, str], tmp_path: Path) -> None:
    """Again and again one disk is copied while nothing is in flight, and the copy takes its place."""
    async with serving(disk(kinds[0], tmp_path, 3 * MIB, suspends=0.3)) as served:
        graph, backend = served.graph, served.server.exports[""].backend
        nodes = [served.node(), await graph.open(disk(kinds[1], tmp_path, 3 * MIB, suspends=0.3))]
        ended = False

        async def copy(source: Any, target: Any) -> None:
            data = bytearray(source.size)
            await source.path.read(0, memoryview(data), 0)
            await target.path.write(0, memoryview(data), 0)

        async def replace_again_and_again() -> None:
            for turn in itertools.count():
                if ended:
                    return
                source, target = nodes[turn % 2], nodes[1 - turn % 2]
                async with drained(source):
                    await copy(source, target)
                    assert backend.root is not None
                    await graph.replace(backend.root, target)
                for _ in range(20):
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(replace_again_and_again())
            await run_workloads(served, 3, 80)
            ended = True


async def test_a_resize_is_told_to_new_clients_and_binds_old_ones() -> None:
    async with serving({"driver": "memory", "size": MIB}) as served:
        backend = served.server.exports[""].backend
        old = await served.connect()
        await backend.truncate(2 * MIB)
        assert (await served.connect()).info.size == 2 * MIB
        assert await old.read(MIB, 512) == bytes(512)
        await old.write(2 * MIB - 4, b"last")
        await backend.truncate(512 * KIB)
        assert (await served.connect()).info.size == 512 * KIB
        assert (await old.ask(Command.READ, 512 * KIB, 1)).error == Errno.EINVAL
        assert (await old.ask(Command.WRITE, 512 * KIB, payload=b"x")).error == Errno.ENOSPC
        assert await old.read(0, 512 * KIB) == bytes(512 * KIB)


async def test_a_refused_payload_stays_refused_when_the_disk_grows() -> None:
    """The refusal has been decided, and its payload is gone: a resize in between does not bring it back."""
    async with serving({"driver": HELD, "size": MIB}) as served:
        driver = held(served.node())
        client = await served.connect(mode=ReplyMode.SIMPLE)
        refused = await client.send(Command.WRITE, MIB, payload=b"x" * MIB)
        reply = await client.reply(refused)
        driver.size = 4 * MIB
        served.node().resized()
        assert reply.error == Errno.ENOSPC
        driver.release()
        await client.write(MIB, b"y" * MIB)
        assert driver.written == {MIB: b"y" * MIB}
