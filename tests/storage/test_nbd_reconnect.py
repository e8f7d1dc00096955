"""A server that goes away and comes back: what is sent again, what fails, and that nothing is lost silently.

Where the moment matters the server is one in the test itself, so that nothing has to be waited for by the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from nbd_protocol.constants import Command, TransmissionFlag
from nbd_protocol.negotiation import ExportInfo
from pynbd.block.backend import BlockBackend
from pynbd.block.requests import RequestFlag
from tests import peers
from tests.conftest import DiskMaker
from tests.storage.nbd_liar import ALL, INFO, SIZE, Asked, Talk, server
from tests.storage.nbd_servers import client_of, driver_of, read

PATIENT = {"reconnect-delay": 60}
LOST_WRITES = "before writes that the server had answered were flushed"


class Restartable:
    """A server of one disk in memory, whose connections a test can break at any moment."""

    def __init__(self) -> None:
        self.disk = bytearray(SIZE)
        self.info = INFO
        self.held: set[int] = set()
        """Commands that are not answered for the time being."""
        self.refused: set[int] = set()
        """Commands that are answered ESHUTDOWN."""
        self.down = False
        self.attempts = 0
        self.arrived: asyncio.Queue[Asked] = asyncio.Queue()
        self._talks: list[Talk] = []

    async def script(self, talk: Talk) -> None:
        self.attempts += 1
        if self.down:
            return
        await talk.negotiate(self.info)
        self._talks.append(talk)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while (asked := await talk.asked()).command != Command.DISC:
                self.arrived.put_nowait(asked)
                if asked.command in self.refused:
                    talk.reply(asked, errno.ESHUTDOWN)
                elif asked.command not in self.held:
                    talk.reply(asked, data=self._carry_out(asked))

    def _carry_out(self, asked: Asked) -> bytes:
        place = slice(asked.offset, asked.offset + asked.length)
        if asked.command == Command.WRITE:
            self.disk[place] = asked.payload
        elif asked.command == Command.WRITE_ZEROES:
            self.disk[place] = bytes(asked.length)
        return bytes(self.disk[place]) if asked.command == Command.READ else b""

    def hang_up(self, number: int | None = None) -> None:
        """Break all connections, or one of them."""
        talks = self._talks if number is None else self._talks[number : number + 1]
        for talk in talks:
            talk.writer.transport.abort()
        self._talks = [talk for talk in self._talks if talk not in talks]


@contextlib.asynccontextmanager
async def restartable(**options: object) -> AsyncIterator[tuple[Restartable, BlockBackend]]:
    it = Restartable()
    async with server(it.script) as uri, client_of(uri, **options) as backend:
        yield it, backend


async def write(backend: BlockBackend, offset: int, data: bytes, flags: int = 0) -> None:
    await backend.write(offset, memoryview(data), flags)


# --- with patience ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 3])
async def test_what_is_not_answered_is_sent_again(connections: int) -> None:
    async with restartable(**PATIENT, connections=connections) as (it, backend):
        it.disk[:4096] = b"r" * 4096
        it.held = {Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM, Command.CACHE}
        requests = [
            asyncio.ensure_future(request)
            for request in (
                read(backend, 0, 4096),
                write(backend, 8192, b"w" * 4096),
                write(backend, 65536, b"W" * 70_000, RequestFlag.FUA),
                backend.write_zeroes(16384, 4096),
                backend.cache(0, 512),
            )
        ]
        before = [await it.arrived.get() for _ in requests]
        it.held = set()
        it.hang_up()
        assert await asyncio.gather(*requests) == [b"r" * 4096, None, None, None, None]
        again = [await it.arrived.get() for _ in requests]
        assert {asked._replace(cookie=0) for asked in again} == {asked._replace(cookie=0) for asked in before}
        assert it.disk[8192:12288] == b"w" * 4096
        assert it.disk[65536 : 65536 + 70_000] == b"W" * 70_000


async def test_a_large_read_that_broke_off_begins_anew() -> None:
    """Part of the data had been received in place already."""
    content = random.Random(4).randbytes(SIZE)

    async def script(talk: Talk) -> None:
        await talk.negotiate()
        if talk.number == 0:
            asked = await talk.asked()
            talk.reply(asked, data=b"x" * 500_000)
            return
        await talk.serve(bytearray(content))

    async with server(script) as uri, client_of(uri, **PATIENT) as backend:
        assert await read(backend, 0, SIZE) == content


async def test_one_of_several_connections_breaks() -> None:
    """What was on it is sent again, the others go on."""
    async with restartable(**PATIENT, connections=3) as (it, backend):
        it.held = {Command.READ}
        requests = [asyncio.ensure_future(read(backend, n * 512, 512)) for n in range(6)]
        for _ in requests:
            await it.arrived.get()
        it.held = set()
        it.hang_up(1)
        again = [await it.arrived.get() for _ in range(2)]  # each connection had two of the six
        assert {asked.command for asked in again} == {Command.READ}
        it.hang_up()
        assert await asyncio.gather(*requests) == [bytes(512)] * 6


async def test_a_server_that_shuts_down_is_waited_for() -> None:
    """ESHUTDOWN is no answer to a request that can be sent again, and the client leaves by itself."""
    async with restartable(**PATIENT) as (it, backend):
        it.refused = {Command.WRITE}
        writing = asyncio.ensure_future(write(backend, 512, b"w" * 512))
        assert (await it.arrived.get()).command == Command.WRITE
        it.refused = set()
        await writing
        assert it.attempts == 2
        assert it.disk[512:1024] == b"w" * 512


async def test_patience_ends() -> None:
    """After the delay what waits fails; the next request tries again."""
    async with restartable(**{"reconnect-delay": 1}) as (it, backend):
        it.down = True
        it.hang_up()
        with pytest.raises(OSError, match="the connection was lost") as caught:
            await read(backend, 0, 512)
        assert caught.value.errno == errno.EIO
        attempts = it.attempts
        assert attempts > 2
        with pytest.raises(OSError, match="the connection was lost"):
            await read(backend, 0, 512)
        assert it.attempts == attempts + 1
        it.down = False
        assert await read(backend, 0, 512) == bytes(512)


# --- without ---------------------------------------------------------------------------------------------------


async def test_without_a_delay_requests_fail_at_once() -> None:
    """And the next one tries to connect."""
    async with restartable() as (it, backend):
        it.held = {Command.READ}
        reading = asyncio.ensure_future(read(backend, 0, 512))
        await it.arrived.get()
        it.hang_up()
        with pytest.raises(OSError, match="the connection was lost") as caught:
            await reading
        assert caught.value.errno == errno.EIO
        it.down = True
        with pytest.raises(OSError, match="the server closed the connection") as caught:
            await read(backend, 0, 512)
        assert caught.value.errno == errno.EIO
        it.down, it.held = False, set()
        assert await read(backend, 0, 512) == bytes(512)


async def test_requests_that_wait_for_one_attempt_share_it() -> None:
    async with restartable() as (it, backend):
        it.hang_up()
        with contextlib.suppress(OSError):
            await read(backend, 0, 1)  # the loss is noticed here at the latest
        attempts = it.attempts
        it.hang_up()
        it.down = True
        with contextlib.suppress(OSError):
            await read(backend, 0, 1)
        attempts = it.attempts
        answers = await asyncio.gather(*(read(backend, 0, 512) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(answer, OSError) for answer in answers)
        assert it.attempts == attempts + 1


# --- durability ------------------------------------------------------------------------------------------------


async def noticed(it: Restartable, backend: BlockBackend) -> None:
    """Break the connection, and return when the client is connected again."""
    it.hang_up()
    while not it.arrived.empty():
        it.arrived.get_nowait()
    with contextlib.suppress(OSError):  # without a delay the first may fail
        await read(backend, 0, 1)
    await read(backend, 0, 1)


@pytest.mark.parametrize("delay", [0, 60])
async def test_lost_writes_make_one_flush_fail(delay: int) -> None:
    async with restartable(**{"reconnect-delay": delay}) as (it, backend):
        for zeroes in (False, True):
            if zeroes:
                await backend.write_zeroes(0, 512)
            else:
                await write(backend, 0, b"w" * 512)
            await noticed(it, backend)
            with pytest.raises(OSError, match=LOST_WRITES) as caught:
                await backend.flush()
            assert caught.value.errno == errno.EIO
            await backend.flush()
            await write(backend, 0, b"w" * 512)
            await backend.flush()


@pytest.mark.parametrize("delay", [0, 60])
async def test_durable_writes_are_not_mourned(delay: int) -> None:
    """What was flushed, or written with FUA, is not lost with a server."""
    async with restartable(**{"reconnect-delay": delay}) as (it, backend):
        await write(backend, 0, b"w" * 512)
        await backend.flush()
        await noticed(it, backend)
        await write(backend, 512, b"w" * 512, RequestFlag.FUA)
        await noticed(it, backend)
        await backend.flush()


async def test_a_flush_in_flight_fails_with_the_writes_before_it() -> None:
    """It must not be sent again: the server that comes back would answer it well, and has forgotten."""
    async with restartable(**PATIENT) as (it, backend):
        await write(backend, 0, b"w" * 512)
        await it.arrived.get()
        it.held = {Command.FLUSH}
        flushing = asyncio.ensure_future(backend.flush())
        assert (await it.arrived.get()).command == Command.FLUSH
        it.held = set()
        it.hang_up()
        with pytest.raises(OSError, match=LOST_WRITES):
            await flushing
        await backend.flush()


@pytest.mark.parametrize("delay", [0, 60])
async def test_a_flush_of_nothing_needs_no_server(delay: int) -> None:
    """If all that was written was flushed before, a flush that was in flight has succeeded, whatever happens."""
    async with restartable(**{"reconnect-delay": delay}) as (it, backend):
        it.held = {Command.FLUSH}
        flushing = asyncio.ensure_future(backend.flush())
        assert (await it.arrived.get()).command == Command.FLUSH
        it.held = set()
        it.down = True
        it.hang_up()
        await flushing
        await backend.flush()
        it.down = False


async def test_several_flushes_in_flight_all_fail() -> None:
    """Each of them was to cover the same writes."""
    async with restartable(**PATIENT) as (it, backend):
        driver = driver_of(backend)
        await write(backend, 0, b"w" * 512)
        await it.arrived.get()
        it.held = {Command.FLUSH}
        # The node merges flushes, its driver does not.
        flushing = [asyncio.ensure_future(driver.flush_to_disk()) for _ in range(3)]
        for _ in flushing:
            assert (await it.arrived.get()).command == Command.FLUSH
        it.held = set()
        it.hang_up()
        answers = await asyncio.gather(*flushing, return_exceptions=True)
        assert [str(answer).partition(LOST_WRITES)[1] for answer in answers] == [LOST_WRITES] * 3
        await backend.flush()


async def test_a_write_answered_in_the_last_moment_counts() -> None:
    """The answer and the loss arrive together: the write is known to be answered before its caller wakes up."""

    async def script(talk: Talk) -> None:
        await talk.negotiate()
        if talk.number == 0:
            talk.reply(await talk.asked())
            return
        await talk.serve(bytearray(SIZE))

    async with server(script) as uri, client_of(uri, **PATIENT) as backend:
        await write(backend, 0, b"w" * 512)
        await read(backend, 0, 1)
        with pytest.raises(OSError, match=LOST_WRITES):
            await backend.flush()


async def test_closing_needs_no_server_when_nothing_is_to_be_flushed() -> None:
    async with restartable() as (it, backend):
        await read(backend, 0, 512)
        it.down = True
        it.hang_up()


# --- what comes back must be the same --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 2 * SIZE}, f"its size is {2 * SIZE} now, it was {SIZE}"),
        ({"flags": ALL | TransmissionFlag.READ_ONLY}, "it is read-only now"),
        ({"flags": ALL & ~TransmissionFlag.SEND_FLUSH}, "it has no SEND_FLUSH any more"),
        ({"min_block": 4096}, "its minimum block is 4096 now, it was 1"),
        ({"max_payload": 65536}, "its maximum payload is 65536 now"),
    ],
)
@pytest.mark.parametrize("delay", [0, 60])
async def test_another_export_is_refused(change: dict[str, int], said: str, delay: int) -> None:
    """At once, however long one would have waited; and the right one is taken when it is there again."""
    async with restartable(**{"reconnect-delay": delay}) as (it, backend):
        it.held = {Command.READ}
        reading = asyncio.ensure_future(read(backend, 0, 512))
        await it.arrived.get()
        it.held = set()
        it.info = msgspec.structs.replace(INFO, **change)
        it.hang_up()
        with pytest.raises(OSError, match="the connection was lost"):
            await reading
        with pytest.raises(OSError, match=said) as caught:
            await read(backend, 0, 512)
        assert caught.value.errno == errno.EIO
        it.info = ExportInfo(SIZE, ALL | TransmissionFlag.ROTATIONAL, max_payload=1 << 26)
        assert await read(backend, 0, 512) == bytes(512)


# --- open-timeout ----------------------------------------------------------------------------------------------


async def test_opening_goes_on_trying() -> None:
    async def script(talk: Talk) -> None:
        if talk.number < 3:
            return
        await talk.negotiate()
        await talk.serve(bytearray(SIZE))

    async with server(script) as uri:
        with pytest.raises(OSError, match="the server closed the connection"):
            async with client_of(uri):
                pass
        async with client_of(uri, **{"open-timeout": 60}) as backend:
            assert await read(backend, 0, 512) == bytes(512)


async def test_opening_gives_up(tmp_path: Path) -> None:
    """After the timeout, with the reason of the last attempt."""
    with pytest.raises(OSError) as caught:
        async with client_of(f"nbd+unix:///?socket={tmp_path}/none", **{"open-timeout": 1}):
            pass
    assert caught.value.strerror == f"Failed to connect to '{tmp_path}/none': No such file or directory"


# --- real servers ----------------------------------------------------------------------------------------------

Start = Callable[[Path], AbstractContextManager[peers.Peer]]

RESTARTS: dict[str, tuple[Start, int]] = {
    "qemu-nbd killed": (lambda disk: peers.qemu_nbd(disk), signal.SIGKILL),
    "qemu-nbd ended": (lambda disk: peers.qemu_nbd(disk), signal.SIGTERM),
    "nbdkit killed": (lambda disk: peers.nbdkit("file", disk), signal.SIGKILL),
    "pynbd killed": (lambda disk: peers.pynbd_serve("-f", "raw", disk), signal.SIGKILL),
    "pynbd ended": (lambda disk: peers.pynbd_serve("-f", "raw", disk), signal.SIGTERM),
}
SLOT = 16 << 10
WRITERS = 16


async def write_and_check(backend: BlockBackend, number: int, seed: int, done: asyncio.Event) -> bytes:
    """Write to a slot of its own and read it again, until told to end; the bytes that must be there then."""
    source = random.Random(seed)
    data = b""
    while not done.is_set():
        data = source.randbytes(SLOT)
        await write(backend, number * SLOT, data, source.choice([0, RequestFlag.FUA]))
        assert await read(backend, number * SLOT, SLOT) == data
    return data


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("kind", RESTARTS)
async def test_restarts_under_load(kind: str, connections: int, make_disk: DiskMaker, tmp_path: Path) -> None:
    """A server is ended three times while sixteen writers are busy: none of them notices, and every byte is right."""
    start, signal_number = RESTARTS[kind]
    disk = make_disk(1 << 20)
    link = tmp_path / "socket"
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    with contextlib.ExitStack() as at_end:

        def restart() -> peers.Peer:
            peer = at_end.enter_context(start(disk))
            assert peer.endpoint.socket_path is not None
            link.unlink(missing_ok=True)
            link.symlink_to(peer.endpoint.socket_path)
            return peer

        peer = restart()
        uri = f"nbd+unix:///{peer.default_export}?socket={link}"
        async with client_of(uri, **PATIENT, connections=connections) as backend:
            writers = [asyncio.ensure_future(write_and_check(backend, n, n, done)) for n in range(WRITERS)]
            for _ in range(3):
                await read(backend, 0, 1)  # it works (again)
                await loop.run_in_executor(None, peer.stop, signal_number)
                peer = await loop.run_in_executor(None, restart)
            await read(backend, 0, 1)
            done.set()
            contents = await asyncio.gather(*writers)
            with contextlib.suppress(OSError):
                await backend.flush()
            await backend.flush()
        assert disk.read_bytes()[: WRITERS * SLOT] == b"".join(contents)
