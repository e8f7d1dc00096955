"""How `pynbd serve` ends: in order by SIGTERM or SIGINT, at once by a second signal, losing nothing by SIGKILL."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.interop.contents import sha256, write_random
from tests.interop.framing import FRAMINGS, framing_options
from tests.interop.wire_client import FLUSH, FUA, READ, WRITE, WireClient
from tests.peers import Peer, pynbd_serve, require_tool, run

ESHUTDOWN = 108
BLOCK_BYTES = 64 << 10
PATIENCE_S = 30.0


def no_longer_listens(peer: Peer) -> None:
    """Wait until a server has begun to end: its socket is gone then."""
    deadline = time.monotonic() + PATIENCE_S
    assert peer.endpoint.socket_path is not None
    while peer.endpoint.socket_path.exists():
        assert time.monotonic() < deadline, "it goes on listening"
        os.sched_yield()


async def writes_in_flight(peer: Peer, framing: str, count: int) -> WireClient:
    """A client with `count` writes that the server has begun and not ended."""
    client = await WireClient.connect(peer.endpoint, framing)
    for number in range(count):
        client.send(WRITE, number * BLOCK_BYTES, payload=bytes([number + 1]) * BLOCK_BYTES)
    # Requests are begun in the order in which they come: when this one is answered the writes are under way.
    marker = client.send(READ, 0, 512)
    assert (await client.reply(512)).cookie == marker
    return client


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_what_is_in_flight_is_finished(
    framing: str, signal_number: signal.Signals, tmp_path: Path, empty_disk: Path
) -> None:
    """Every write that was begun is carried out and answered, and the server ends with status 0."""
    options = [*framing_options(framing, tmp_path), "-f", "raw", "--filter", "delay,write=400ms"]
    with pynbd_serve(*options, empty_disk) as peer:
        client = await writes_in_flight(peer, framing, 20)
        peer.process.send_signal(signal_number)
        replies = [await client.reply() for _ in range(20)]
        assert sorted(reply.cookie for reply in replies) == list(range(1, 21))
        assert {reply.error for reply in replies} == {0}
        assert await client.reader.read() == b""
        client.close()
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 0
    content = empty_disk.read_bytes()
    for number in range(20):
        assert content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] == bytes([number + 1]) * BLOCK_BYTES


async def test_what_comes_later_is_refused(empty_disk: Path) -> None:
    """While it ends, new requests get ESHUTDOWN and new clients are not let in; the old requests are answered."""
    with pynbd_serve("-f", "raw", "--filter", "delay,write=1s", empty_disk) as peer:
        client = await writes_in_flight(peer, "structured", 1)
        peer.process.send_signal(signal.SIGTERM)
        no_longer_listens(peer)
        late = client.send(READ, 0, 512)
        refused, done = await client.reply(), await client.reply()
        assert (refused.cookie, refused.error) == (late, ESHUTDOWN)
        assert (done.cookie, done.error) == (1, 0)
        assert await client.reader.read() == b""
        client.close()
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 0


async def test_a_second_signal_is_at_once(empty_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "--filter", "delay,write=60m", empty_disk) as peer:
        client = await writes_in_flight(peer, "simple", 1)
        peer.process.send_signal(signal.SIGTERM)
        no_longer_listens(peer)
        assert await asyncio.to_thread(peer.stop, signal.SIGINT) == 128 + signal.SIGINT
        assert await client.reader.read() == b""
        client.close()


@pytest.mark.slow
async def test_the_end_is_bounded(empty_disk: Path) -> None:
    """A request that never ends holds the server up only so long."""
    with pynbd_serve("-f", "raw", "--filter", "delay,write=60m", empty_disk) as peer:
        client = await writes_in_flight(peer, "simple", 1)
        status = await asyncio.to_thread(peer.stop, signal.SIGTERM)
        assert status in (0, 1)
        assert "did not end within" in peer.log()
        client.close()


async def test_idle_clients_do_not_hold_it_up(empty_disk: Path) -> None:
    """Clients with nothing in flight, in the middle of the handshake, or that never read are sent away."""
    with pynbd_serve("-f", "raw", empty_disk) as peer:
        idle = [await WireClient.connect(peer.endpoint, framing) for framing in FRAMINGS]
        silent = peer.endpoint.connect()
        assert silent.recv(8) == b"NBDMAGIC"
        status = await asyncio.to_thread(peer.stop)
        assert status == 0
        for client in idle:
            assert await client.reader.read() == b""
            client.close()
        silent.close()


async def test_a_stop_under_load_loses_nothing(tmp_path: Path, empty_disk: Path) -> None:
    """qemu-img bench runs into a SIGTERM: each write that was answered is in the file."""
    with pynbd_serve("-f", "raw", "-B", "b", empty_disk) as peer:
        clients = [await WireClient.connect(peer.endpoint, "structured") for _ in range(8)]
        answered: set[int] = set()
        enough = asyncio.Event()

        async def write_on(number: int, client: WireClient) -> None:
            for step in range(1000):
                block = number * 100 + step % 100
                reply = await client.call(WRITE, block * 4096, payload=block.to_bytes(4, "big") * 1024)
                if reply.error:
                    assert reply.error == ESHUTDOWN
                    return
                answered.add(block)
                if len(answered) > 100:
                    enough.set()

        async def write_until_closed(number: int, client: WireClient) -> None:
            try:
                await write_on(number, client)
            except (asyncio.IncompleteReadError, ConnectionError):
                client.close()

        load = asyncio.gather(*(write_until_closed(*pair) for pair in enumerate(clients)))
        await enough.wait()
        assert await asyncio.to_thread(peer.stop) == 0
        await load
        for client in clients:
            client.close()
    content = empty_disk.read_bytes()
    for block in answered:
        assert content[block * 4096 : (block + 1) * 4096] == block.to_bytes(4, "big") * 1024


# SIGKILL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_answered_writes_survive_a_kill(framing: str, tmp_path: Path, empty_disk: Path) -> None:
    """With FUA, or followed by a flush, or merely answered: the process keeps nothing to itself."""
    with pynbd_serve(*framing_options(framing, tmp_path), "-f", "raw", empty_disk) as peer:
        client = await WireClient.connect(peer.endpoint, framing)
        assert (await client.call(WRITE, 0, payload=b"f" * 4096, flags=FUA)).error == 0
        assert (await client.call(WRITE, 1 << 20, payload=b"a" * (1 << 20))).error == 0
        assert (await client.call(FLUSH)).error == 0
        assert (await client.call(WRITE, 4 << 20, payload=b"b" * 70_001)).error == 0
        assert peer.stop(signal.SIGKILL) == -signal.SIGKILL
        client.close()
    with pynbd_serve("-f", "raw", empty_disk) as peer:
        client = await WireClient.connect(peer.endpoint)
        assert (await client.call(READ, 0, 4097)).data == b"f" * 4096 + b"\0"
        assert (await client.call(READ, 1 << 20, 1 << 20)).data == b"a" * (1 << 20)
        assert (await client.call(READ, 4 << 20, 70_002)).data == b"b" * 70_001 + b"\0"
        await client.end()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gibibyte_survives_a_kill(tmp_path: Path) -> None:
    """1 GiB of random data copied in by nbdcopy and flushed; SIGKILL at once; served again it is identical."""
    require_tool("nbdcopy", package="libnbd-bin")
    source = write_random(tmp_path / "source.raw", 1 << 30)
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    served.touch()
    with served.open("r+b") as file:
        file.truncate(1 << 30)
    with pynbd_serve("-f", "raw", served) as peer:
        run("nbdcopy", "--connections=4", "--threads=4", "--flush", source, peer.uri())
        assert peer.stop(signal.SIGKILL) == -signal.SIGKILL
    with pynbd_serve("-f", "raw", "-r", served) as peer:
        run("nbdcopy", "--connections=4", "--threads=4", peer.uri(), copy)
    expected = sha256(source)
    source.unlink()
    assert sha256(copy) == expected
    assert sha256(served) == expected


def test_a_killed_servers_socket_is_taken_over(random_disk: Path) -> None:
    """What SIGKILL leaves behind does not stand in the way of the next server at that place."""
    require_tool("nbdinfo", package="libnbd-bin")
    with pynbd_serve("-f", "raw", random_disk) as peer:
        path = peer.endpoint.socket_path
        assert path is not None
        peer.stop(signal.SIGKILL)
        assert path.exists()
        command = [sys.executable, "-m", "pynbd", "serve", "-f", "raw", "-k", str(path), "--run", "nbdinfo --size $uri"]
        done = subprocess.run([*command, str(random_disk)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, str(8 << 20)), done.stderr
        assert not path.exists()
