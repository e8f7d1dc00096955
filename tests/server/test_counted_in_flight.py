"""Every way in which a request can be in flight, and every way in which it can end: what is counted of the client is
there in between, and gone afterwards. How the sums and the line work is in test_in_flight.py.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from pynbd.server import payload as payload_module
from pynbd.server import server as server_module
from pynbd.server.connection import Connection
from pynbd.server.in_flight import InFlight, Part
from pynbd.server.limits import ClientLimits
from pynbd.server.payload import Payload
from pynbd.server.span_reads import SpanReads
from pynbd.storage import file as file_module
from tests.restless import RESTLESS
from tests.server.clients import CHUNKED, LIMIT_S, MODES, Buffer, Client, Served, serving
from tests.server.held import HELD, Held, held, pattern
from tests.server.workload import Workload

KIB, MIB = 1 << 10, 1 << 20

ONE = ClientLimits(requests=1)
AMPLE = ClientLimits(requests=1000, bytes_in_flight=1 << 30)

ENDS = ["answered", "closed", "half-closed", "aborted"]
"""How a connection may end with something in flight: all is answered first; the client closes its socket; it says that
it sends nothing more; the server gives it up."""

CHUNK_OVERHEAD_BYTES = 128
"""The framing of one answer, and to spare."""


@pytest.fixture
def one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads are written in parts, as when nobody else is there and the disk is quick."""
    monkeypatch.setattr(file_module, "SLOW_S", float("inf"))
    for module in (payload_module, file_module):
        monkeypatch.setattr(module, "keeps_others_waiting", lambda: False)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


async def still() -> None:
    """Long enough for everything that does not wait."""
    for _ in range(200):
        await asyncio.sleep(0)


def the_client(served: Served) -> InFlight:
    """What the only client has in flight."""
    (client,) = served.server._clients._present.values()
    assert client.in_flight is not None
    return client.in_flight


class Counted:
    """Two connections of one client: one with something in flight, and a witness that wants nothing before the end."""

    def __init__(self, served: Served, witness: Client, client: Client, connection: Connection) -> None:
        self.served = served
        self.witness = witness
        self.client = client
        self.connection = connection
        self.whole = the_client(served)

    @property
    def driver(self) -> Held:
        return held(self.served.node())

    def counts(self, requests: int, length: int) -> bool:
        return self.whole.requests == requests and length <= self.whole.bytes <= length + CHUNK_OVERHEAD_BYTES

    async def nothing_is_counted(self) -> None:
        """All is as in the beginning, and what the client may have in flight is there for the witness."""
        await until(lambda: not self.whole.requests)
        await until(lambda: not self.whole.bytes)
        assert not self.whole.line
        assert not self.served.server.budget.taken
        assert not (await self.witness.ask(Command.READ, 0, 512)).error
        await until(lambda: not (self.whole.requests or self.whole.bytes))


@contextlib.asynccontextmanager
async def counted(
    tree: dict[str, Any], limits: ClientLimits = ONE, mode: ReplyMode = ReplyMode.STRUCTURED, **options: Any
) -> AsyncIterator[Counted]:
    receive_bytes = options.pop("receive_bytes", 0)
    async with serving(tree, server_options={"limits": limits, **options}) as served:
        witness = await served.connect(mode=mode)
        (its,) = served.server.connections
        client = await served.connect(mode=mode, receive_bytes=receive_bytes)
        (connection,) = served.server.connections - {its}
        yield Counted(served, witness, client, connection)


def leave(case: Counted, how: str) -> None:
    """Let the client go, or let it be sent away; "answered" is neither."""
    match how:
        case "closed":
            case.client.sock.close()
        case "half-closed":
            case.client.sock.shutdown(socket.SHUT_WR)
        case "aborted":
            case.connection.abort()


async def end(case: Counted, how: str, cookie: int) -> None:
    """End the connection; what waits in the driver goes on only afterwards, and stays counted until then."""
    driver = case.driver
    in_the_driver = len(driver.waiting)
    leave(case, how)
    await still()
    assert case.whole.requests >= in_the_driver, "what a client asked for goes on without it, and counts"
    driver.release()
    if how == "answered":
        assert not (await case.client.reply(cookie)).error
    else:
        await case.served.until_gone(1)


def begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def half(client: Client, length: int, flags: int = 0) -> tuple[int, bytes, bytes]:
    """A WRITE, its cookie and its halves."""
    cookie, buffers = client.prepared(Command.WRITE, 0, flags=flags, payload=random.Random(1).randbytes(length))
    data = b"".join(buffers)
    return cookie, data[: len(data) // 2], data[len(data) // 2 :]


# --- ways in, ways out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("command", "length", "flags"),
    [
        (Command.READ, 100 * KIB, 0),
        (Command.WRITE, 4 * KIB, 0),
        (Command.WRITE, 4 * KIB, CommandFlag.FUA),
        (Command.FLUSH, 0, 0),
        (Command.WRITE, 2 * MIB, 0),
    ],
)
async def test_coroutines(command: Command, length: int, flags: int, mode: ReplyMode, how: str) -> None:
    async with counted({"driver": HELD, "size": 8 * MIB}, mode=mode) as case:
        driver = case.driver
        driver.hold = frozenset({"read", "write", "flush"})
        payload = bytes(length) if command is Command.WRITE else None
        cookie = await case.client.send(command, 0, length if payload is None else 0, flags, payload)
        await driver.until(1)
        await until(lambda: case.counts(1, length if command in (Command.READ, Command.WRITE) else 0))
        await end(case, how, cookie)
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.usefixtures("one_client")
async def test_a_payload_that_has_begun_counts_as_a_whole(in_parts: bool, how: str) -> None:
    async with counted({"driver": HELD, "size": 8 * MIB}) as case:
        case.driver.writes_now = in_parts
        case.driver.hold = frozenset()
        cookie, first, second = half(case.client, 4 * MIB)
        await case.client.send_bytes(first)
        await until(lambda: case.counts(1, 4 * MIB))
        if in_parts:
            await until(lambda: case.driver.calls)
        if how == "answered":
            await case.client.send_bytes(second)
        await end(case, how, cookie)
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.usefixtures("one_client")
async def test_parts_that_are_written_and_wait_for_their_flush(how: str) -> None:
    """The memory is free by then; the request is not at its end."""
    async with counted({"driver": HELD, "size": 8 * MIB}) as case:
        case.driver.writes_now = True
        case.driver.hold = frozenset({"flush"})
        cookie, first, second = half(case.client, 4 * MIB, CommandFlag.FUA)
        await case.client.send_bytes(first + second)
        await case.driver.until(1)
        await until(lambda: case.counts(1, 0))
        await end(case, how, cookie)
        assert {call[0] for call in case.driver.calls} == {"write_now", "flush"}
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ["half-closed", "closed"])
@pytest.mark.usefixtures("one_client")
async def test_a_payload_breaks_off_while_another_request_goes_on(how: str) -> None:
    """The payload counts no more, though the connection is not at its end yet."""
    async with counted({"driver": HELD, "size": 8 * MIB}, AMPLE) as case:
        case.driver.writes_now = True
        cookie = await case.client.send(Command.READ, 0, 512)
        await case.driver.until(1)
        await case.client.send_bytes(half(case.client, 4 * MIB)[1])
        await until(lambda: case.counts(2, 4 * MIB + 512))
        if how == "closed":
            case.client.sock.close()
        else:
            case.client.sock.shutdown(socket.SHUT_WR)
        await until(lambda: case.counts(1, 512))
        case.driver.release()
        if how == "half-closed":
            assert bytes((await case.client.reply(cookie)).data) == pattern(0, 512)
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("mode", CHUNKED)
async def test_spans(mode: ReplyMode, how: str, tmp_path: Path) -> None:
    """Bytes that are sent from the file are in flight until the client has taken them, though they take no memory."""
    path = tmp_path / "disk"
    data = random.Random(2).randbytes(16 * MIB)
    path.write_bytes(data)
    async with counted({"driver": "file", "filename": str(path)}, mode=mode, receive_bytes=1) as case:
        cookie = await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.counts(1, 16 * MIB))
        assert case.connection.account.held <= CHUNK_OVERHEAD_BYTES, "it is a span"
        await still()
        assert case.counts(1, 16 * MIB)
        leave(case, how)
        if how in ("answered", "half-closed"):
            assert (await case.client.reply(cookie)).data == data
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ["answered", "closed", "aborted"])
async def test_spans_behind_a_request_in_flight(how: str, tmp_path: Path) -> None:
    """Several of them, some in the queue of the wire; when the connection is lost, none stays counted."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 16 * MIB)
    async with counted({"driver": "file", "filename": str(path)}, AMPLE, receive_bytes=1) as case:
        cookies = [await case.client.send(Command.READ, 0, 4 * MIB) for _ in range(5)]
        await until(lambda: case.whole.requests >= 4)
        assert case.whole.bytes >= case.whole.requests * 4 * MIB
        if how == "closed":
            case.client.sock.close()
        elif how == "aborted":
            case.connection.abort()
        else:
            for cookie in cookies:
                assert (await case.client.reply(cookie)).data == b"x" * 4 * MIB
        await case.nothing_is_counted()


@pytest.mark.parametrize("mode", CHUNKED)
async def test_a_span_of_a_file_that_became_shorter(mode: ReplyMode, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 16 * MIB)
    async with counted({"driver": "file", "filename": str(path)}, mode=mode, receive_bytes=1) as case:
        cookie = await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.counts(1, 16 * MIB))
        with path.open("r+b") as file:
            file.truncate(8 * MIB)
        assert (await case.client.reply(cookie)).error == Errno.EIO
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ["answered", "closed", "aborted"])
@pytest.mark.parametrize("mode", MODES)
async def test_answers_that_are_not_taken(mode: ReplyMode, how: str) -> None:
    """The request is at its end, its answer is not."""
    async with counted({"driver": HELD, "size": 16 * MIB}, mode=mode, receive_bytes=1) as case:
        case.driver.hold = frozenset()
        cookie = await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.whole.bytes and not case.whole.requests)
        assert case.whole.bytes == case.connection.wire.unsent > MIB
        if how == "answered":
            assert (await case.client.reply(cookie)).data == pattern(0, 16 * MIB)
        elif how == "closed":
            case.client.sock.close()
        else:
            case.connection.abort()
        await case.nothing_is_counted()


@pytest.mark.parametrize("mode", MODES)
async def test_what_ends_within_its_turn(mode: ReplyMode, tmp_path: Path) -> None:
    """Reads and writes in place, and refusals, in one batch; with a limit of one request they are all served."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    async with counted({"driver": "file", "filename": str(path)}, mode=mode) as case:
        client = case.client
        asked: list[Buffer] = []
        right, wrong = [], []
        for number in range(40):
            for flags in (0, CommandFlag.FUA):
                cookie, buffers = client.prepared(Command.WRITE, number * 4096, flags=flags, payload=b"w" * 4096)
                right.append(cookie)
                asked += buffers
            cookie, buffers = client.prepared(Command.READ, number * 4096, 4096)
            right.append(cookie)
            asked += buffers
            cookie, buffers = client.prepared(Command.FLUSH)
            right.append(cookie)
            asked += buffers
            asked.append(client.raw(Command.READ, MIB, 4096))
            wrong.append(client.last_raw)
        asked.append(client.raw(Command.WRITE, MIB, MIB, payload=bytes(MIB)))
        wrong.append(client.last_raw)
        await client.send_bytes(b"".join(asked))
        for cookie in right:
            assert not (await client.reply(cookie)).error
        for cookie in wrong:
            assert (await client.reply(cookie)).error
        await case.nothing_is_counted()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suspends", [0.0, 1.0])
async def test_failures(suspends: float, mode: ReplyMode) -> None:
    restless = {"driver": RESTLESS, "size": 4 * MIB, "suspends": suspends}
    async with counted(restless, mode=mode) as case:
        case.served.node().driver.fails = 1.0  # type: ignore[attr-defined]  # a driver of the tests
        asked = [
            await case.client.send(Command.READ, 0, 100 * KIB),
            await case.client.send(Command.WRITE, 0, payload=bytes(4 * KIB)),
            await case.client.send(Command.WRITE, 0, payload=bytes(2 * MIB)),
            await case.client.send(Command.FLUSH),
            await case.client.send(Command.WRITE_ZEROES, 0, MIB),
        ]
        for cookie in asked:
            assert (await case.client.reply(cookie)).error == Errno.EIO
        case.served.node().driver.fails = 0.0  # type: ignore[attr-defined]  # as above
        await case.nothing_is_counted()


async def test_a_driver_that_breaks() -> None:
    async with counted({"driver": HELD, "size": MIB}) as case:
        cookie = await case.client.send(Command.READ, 0, 100 * KIB)
        await case.driver.until(1)
        case.driver.waiting.pop().go.set_exception(RuntimeError("a bug"))
        case.driver.hold = frozenset()
        assert (await case.client.reply(cookie)).error == Errno.EIO
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ["closed", "aborted"])
async def test_who_waits_for_memory_has_begun_as_well(how: str) -> None:
    """Two payloads of which only one can get more memory; the other one counts until its connection is gone."""
    async with counted({"driver": HELD, "size": 16 * MIB}, AMPLE, payload_pool=2 * MIB) as case:
        case.driver.hold = frozenset()
        other = await case.served.connect()
        cookie, first, second = half(other, 8 * MIB)
        mine = half(case.client, 8 * MIB)[1]
        await case.client.send_bytes(mine[: 100 * KIB])
        await other.send_bytes(first)
        await case.client.send_bytes(mine[100 * KIB : 2 * MIB + 100 * KIB])
        await until(lambda: case.connection._awaiting_budget)
        assert case.counts(2, 16 * MIB)
        if how == "closed":
            case.client.sock.close()
        else:
            case.connection.abort()
            assert case.counts(1, 8 * MIB)
        await other.send_bytes(second)
        assert not (await other.reply(cookie)).error
        await case.nothing_is_counted()


@pytest.mark.parametrize("how", ["closed", "aborted"])
async def test_who_waits_in_line_counts_nothing(how: str) -> None:
    async with counted({"driver": HELD, "size": 16 * MIB}) as case:
        busy = await case.served.connect()
        first = await busy.send(Command.READ, 0, 512)
        await case.driver.until(1)
        await case.client.send_bytes(half(case.client, 8 * MIB)[1][: 100 * KIB])
        await until(lambda: case.whole.line)
        assert case.counts(1, 512)
        if how == "closed":
            case.client.sock.close()
        else:
            case.connection.abort()
            assert not case.whole.line
        case.driver.release()
        assert not (await busy.reply(first)).error
        await case.nothing_is_counted()


async def test_what_is_left_of_a_connection_that_is_lost() -> None:
    """What the driver works on counts until it has done it, one by one; what waited in line is forgotten at once."""
    async with counted({"driver": HELD, "size": 16 * MIB}, ClientLimits(requests=3)) as case:
        for _ in range(4):
            await case.client.send(Command.READ, 0, 512)
        await case.driver.until(3)
        await until(lambda: case.whole.line)
        case.connection.abort()
        assert not case.whole.line
        for left in (2, 1):
            case.driver.release(1)
            await until(lambda left=left: case.counts(left, left * 512))  # type: ignore[misc]  # as in test_in_flight.py
        case.driver.release()
        await case.nothing_is_counted()


async def test_spans_of_a_connection_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else goes on for it, but they do not."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 16 * MIB)
    async with counted({"driver": "file", "filename": str(path)}, AMPLE, receive_bytes=1) as case:
        may_end = asyncio.Event()

        async def flush(*_: Any) -> None:
            await may_end.wait()

        monkeypatch.setattr(case.connection.backend, "flush", flush)
        await case.client.send(Command.FLUSH)
        await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.counts(2, 16 * MIB))
        case.connection.abort()
        assert case.counts(1, 0)
        may_end.set()
        await case.nothing_is_counted()


async def test_shutting_down_with_everything_in_flight(tmp_path: Path) -> None:
    async with counted({"driver": HELD, "size": 16 * MIB}, AMPLE) as case:
        cookie = await case.client.send(Command.READ, 0, 512)
        await case.driver.until(1)
        stalled = await case.served.connect()
        await stalled.send_bytes(half(stalled, 4 * MIB)[1])
        await until(lambda: case.counts(2, 4 * MIB + 512))
        closing = asyncio.create_task(case.served.server.close(grace_s=0.05))
        await asyncio.sleep(0)
        case.driver.release()
        assert not (await case.client.reply(cookie)).error
        await closing
        assert (case.whole.requests, case.whole.bytes, case.whole.line) == (0, 0, {})


# --- two connections ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_client")
@pytest.mark.parametrize("limits", [ONE, ClientLimits(bytes_in_flight=24 * MIB)])
async def test_parts_and_spans_share_what_their_client_may_have(limits: ClientLimits, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * MIB))
    async with counted({"driver": "file", "filename": str(path)}, limits, receive_bytes=1) as case:
        writer = await case.served.connect()
        cookie, first, second = half(writer, 16 * MIB)
        await writer.send_bytes(first)
        await until(lambda: begins(path) != bytes(512))
        reading = await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.whole.line)
        moved = case.connection.wire.moved
        await still()
        assert case.counts(1, 16 * MIB)
        assert case.connection.wire.moved == moved

        await writer.send_bytes(second)
        assert not (await writer.reply(cookie)).error
        await until(lambda: case.connection._outstanding.span_bytes)
        assert case.counts(1, 16 * MIB)

        # It is the reader now who has in flight what there may be: nothing of this payload is written.
        before = path.read_bytes()
        cookie, buffers = writer.prepared(Command.WRITE, 0, payload=b"n" * 16 * MIB)
        sending = asyncio.create_task(writer.send_bytes(b"".join(buffers)))
        await until(lambda: case.whole.line)
        await still()
        assert case.counts(1, 16 * MIB)
        assert path.read_bytes() == before
        assert not (await case.client.reply(reading)).error
        await sending
        assert not (await writer.reply(cookie)).error
        assert path.read_bytes()[: 16 * MIB] == b"n" * 16 * MIB
        await case.nothing_is_counted()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("one_client")
async def test_law_of_the_limits(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever four connections do, the sums are those of the connections, and nothing begins beyond the limits."""
    source = random.Random(seed)
    limits = ClientLimits(
        requests=source.choice([0, 1, 2, 5]), bytes_in_flight=source.choice([1, 300 * KIB, 2 * MIB, 5 * MIB])
    )
    ways = {"parts": 0, "spans": 0, "waited": 0}
    plain_answer, plain_room, plain_part = SpanReads.answer, Part.has_room, Payload.write_part
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 * MIB))
    async with serving({"driver": "file", "filename": str(path)}, server_options={"limits": limits}) as served:

        def answer(self: SpanReads, *arguments: Any) -> Any:
            items = plain_answer(self, *arguments)
            ways["spans"] += items is not None
            return items

        def write_part(self: Payload, backend: Any) -> None:
            plain_part(self, backend)
            ways["parts"] += self.written > 0

        def has_room(self: Part, length: int) -> bool:
            has = plain_room(self, length)
            ways["waited"] += not has
            requests = total = 0
            for connection in served.server.connections:
                payload = connection._payload
                begun = payload is not None and payload.reserved > 0
                requests += connection.in_flight + begun
                total += connection.account.held + connection._outstanding.span_bytes
                if payload is not None and begun:
                    total += payload.request.length - payload.reserved
            if has and requests:
                assert not limits.requests or requests < limits.requests
                assert total + length <= limits.bytes_in_flight
            return has

        monkeypatch.setattr(SpanReads, "answer", answer)
        monkeypatch.setattr(Part, "has_room", has_room)
        monkeypatch.setattr(Payload, "write_part", write_part)

        async def large() -> None:
            client = await served.connect()
            for number in range(5):
                data = random.Random(number).randbytes(3 * MIB + 512)
                await client.write(12 * MIB, data)
                assert await client.read(12 * MIB, len(data)) == data

        clients = [await served.connect() for _ in range(3)]
        whole = the_client(served)
        await asyncio.gather(
            large(),
            *(
                Workload(client, number * 4 * MIB, 4 * MIB, seed=seed + number, largest=2 * MIB, depth=8).run(80)
                for number, client in enumerate(clients)
            ),
        )
        assert all(ways.values()), ways
        await until(lambda: not (whole.requests or whole.bytes or whole.line))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("one_client")
async def test_clients_that_come_and_go_leave_nothing_behind(seed: int, tmp_path: Path) -> None:
    """Connections with everything at once, cut off at any point."""
    source = random.Random(seed)
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * MIB))
    limits = ClientLimits(requests=source.choice([1, 4]), bytes_in_flight=source.choice([0, 1, 3 * MIB]))
    async with counted({"driver": "file", "filename": str(path)}, limits) as case:
        for _ in range(40):
            client = await case.served.connect(receive_bytes=source.choice([0, 1]))
            requests: list[Buffer] = []
            for _ in range(source.randrange(1, 12)):
                offset, length = source.randrange(6 * MIB), source.choice([4 * KIB, 100 * KIB, MIB])
                if source.random() < 0.5:
                    requests += client.prepared(Command.READ, offset, length)[1]
                else:
                    flags = source.choice([0, CommandFlag.FUA])
                    requests += client.prepared(Command.WRITE, offset, flags=flags, payload=bytes(length))[1]
            data = memoryview(b"".join(requests))
            data = data[: source.randrange(1, len(data))]
            with contextlib.suppress(BlockingIOError):
                while data:
                    data = data[client.sock.send(data) :]
                    for _ in range(source.randrange(4)):
                        await asyncio.sleep(0)
            client.sock.close()
        await case.served.until_gone(2)
        await case.nothing_is_counted()


# --- standing still -------------------------------------------------------------------------------------------


async def test_who_lets_the_others_of_its_client_wait_must_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "STALL_CHECK_S", 0.01)
    monkeypatch.setattr(server_module, "STALL_CHECKS", 3)
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 16 * MIB)
    async with counted({"driver": "file", "filename": str(path)}, receive_bytes=1) as case:
        await case.client.send(Command.READ, 0, 16 * MIB)
        await until(lambda: case.counts(1, 16 * MIB))
        async with asyncio.timeout(LIMIT_S):
            assert await case.witness.read(0, 100 * KIB) == b"x" * 100 * KIB
        assert not await case.client.at_end()
        await case.nothing_is_counted()
