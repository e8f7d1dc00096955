"""Two hundred clients at once, twenty of them hostile: the others are served, and the server's memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from tests.interop.contents import write_random
from tests.interop.framing import FRAMINGS, framing_options
from tests.interop.wire_client import BLOCK_STATUS, FLUSH, READ, WRITE, WRITE_ZEROES, WireClient, open_socket
from tests.peers import Endpoint, Peer, pynbd_serve, require_tool, run

MIB = 1 << 20
HONEST = 180
ROUNDS = 6
REGION_BYTES = 256 << 10
"""What each honest client has to itself."""

HOSTILE_MIB = 64
"""Behind the honest ones' regions: what the hostile ones read and write."""

MAX_RSS_BYTES = 300 * MIB

Attack = Callable[[Endpoint, str], AsyncIterator[asyncio.StreamWriter]]
"""Gives each connection as it is made, and does something nasty with it."""


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# The honest ---------------------------------------------------------------------------------------------------


async def write_and_verify(number: int, endpoint: Endpoint, framing: str, ready: asyncio.Barrier) -> None:
    """Requests of all sizes in a region of one's own; everything read must be what was written last."""
    client = await WireClient.connect(endpoint, framing)
    await ready.wait()
    base = number * REGION_BYTES
    expected = bytearray((await client.call(READ, base, REGION_BYTES)).data)
    assert len(expected) == REGION_BYTES
    for step in range(ROUNDS):
        offset, length = (step * 37_987 + number * 511) % (REGION_BYTES - 70_000), (512, 4096, 69_999)[step % 3]
        data = os.urandom(length)
        assert (await client.call(WRITE, base + offset, payload=data)).error == 0
        expected[offset : offset + length] = data
        assert (await client.call(WRITE_ZEROES, base + offset + 7, 100)).error == 0
        expected[offset + 7 : offset + 107] = bytes(100)
        assert (await client.call(READ, base + offset, length)).data == expected[offset : offset + length]
    assert (await client.call(READ, base, REGION_BYTES)).data == expected
    assert (await client.call(FLUSH)).error == 0
    await client.end()


# The hostile --------------------------------------------------------------------------------------------------


async def garbage_for_a_handshake(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    _, writer = await open_socket(endpoint)
    yield writer
    writer.write(os.urandom(MIB))


async def garbage_for_requests(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    client.writer.write(os.urandom(MIB))


async def options_without_end(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """One option after another, each announcing nearly 4 GiB, with as much of it as is taken."""
    _, writer = await open_socket(endpoint)
    yield writer
    writer.write(struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, 77, 0xFFFF_FFF0) + bytes(4 * MIB))


async def reader_of_nothing(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """Asks for 512 MiB in reads of 32 MiB and takes none of it."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport can
    for _ in range(16):
        client.send(READ, HONEST * REGION_BYTES, 32 * MIB)


async def slow_reader(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """Asks for thousands of small reads and takes a few bytes of them."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    for number in range(20_000):
        client.send(READ, HONEST * REGION_BYTES + number, 4096)
    await client.reader.readexactly(100)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport can


async def half_closed(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """Sends requests, says that nothing more will come, and does not listen to the answers."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport can
    for _ in range(8):
        client.send(READ, HONEST * REGION_BYTES, 16 * MIB)
    client.send(WRITE, HONEST * REGION_BYTES, payload=bytes(MIB))
    await client.writer.drain()
    client.writer.write_eof()


async def four_gibibytes(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """Lengths of nearly 4 GiB: refused where that can be said, and the end where it can't."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    assert (await client.call(READ, 0, 0xFFFF_FFFF)).error == 22
    assert (await client.call(BLOCK_STATUS, 0, 0xFFFF_FFFF)).error == 22
    assert (await client.call(WRITE_ZEROES, 4096, 0xFFFF_FFFF)).error == 28
    client.send(WRITE, 0, 0xFFFF_FFFF)
    client.writer.write(bytes(MIB))


async def half_a_payload(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """Announces 32 MiB, sends 24 of them, and stops."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    client.send(WRITE, HONEST * REGION_BYTES, 32 * MIB)
    client.writer.write(bytes(24 * MIB))


async def connect_and_idle(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    _, before = await open_socket(endpoint)
    yield before
    after = await WireClient.connect(endpoint, framing)
    yield after.writer
    after.writer.write(after.header(READ, 0, 4096)[:10])


async def flood_of_writes(endpoint: Endpoint, framing: str) -> AsyncIterator[asyncio.StreamWriter]:
    """256 MiB of writes as fast as they go, without ever looking at an answer."""
    client = await WireClient.connect(endpoint, framing)
    yield client.writer
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport can
    for _ in range(32):
        client.send(WRITE, HONEST * REGION_BYTES, payload=bytes(8 * MIB))
        await client.writer.drain()


ATTACKS: list[Attack] = [
    garbage_for_a_handshake,
    garbage_for_requests,
    options_without_end,
    reader_of_nothing,
    slow_reader,
    half_closed,
    four_gibibytes,
    half_a_payload,
    connect_and_idle,
    flood_of_writes,
]


async def stay(attack: Attack, endpoint: Endpoint, framing: str, connections: list[asyncio.StreamWriter]) -> None:
    """One hostile client, which stays as long as it is let; being thrown out is what it has to expect."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        async for writer in attack(endpoint, framing):
            connections.append(writer)  # noqa: PERF401  # each is wanted at once, to be closed whatever comes next
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def besieged(peer: Peer, framing: str, attacks: Sequence[Attack]) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Hostile clients that have begun when the block does and stay as long as it; gives their connections."""
    connections: list[asyncio.StreamWriter] = []
    hostile = [asyncio.create_task(stay(attack, peer.endpoint, framing, connections)) for attack in attacks]
    try:
        yield connections
    finally:
        for task in hostile:
            task.cancel()
        ended = await asyncio.gather(*hostile, return_exceptions=True)
        for writer in connections:
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    assert [end for end in ended if not isinstance(end, asyncio.CancelledError)] == []


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_two_hundred_clients_of_a_file(framing: str, tmp_path: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    disk = write_random(tmp_path / "disk.raw", HONEST * REGION_BYTES + HOSTILE_MIB * MIB)
    # All these clients are one program: on a busy machine some of them need long for a handshake.
    patience = ("--client-limits", "handshake-timeout=60")
    with pynbd_serve(*framing_options(framing, tmp_path), *patience, "-f", "raw", disk) as peer:
        ready = asyncio.Barrier(HONEST)
        async with besieged(peer, framing, ATTACKS * 2) as connections, asyncio.TaskGroup() as honest:
            for number in range(HONEST):
                honest.create_task(write_and_verify(number, peer.endpoint, framing, ready))
        # One of the attacks has two connections.
        assert len(connections) == 2 * (len(ATTACKS) + 1)
        assert peak_rss_bytes(peer.pid) < MAX_RSS_BYTES
        run("nbdinfo", peer.uri())
        assert "Traceback" not in peer.log()


async def copy_in_large_pieces(number: int, endpoint: Endpoint, framing: str) -> None:
    """Requests of 8 MiB, several at a time: they need the memory that hostile clients hold."""
    client = await WireClient.connect(endpoint, framing)
    payloads = [os.urandom(8 * MIB) for _ in range(2)]
    for step in range(3):
        for piece, payload in enumerate(payloads):
            client.send(WRITE, (2 * number + piece) * 8 * MIB, payload=payload)
        assert [(await client.reply()).error for _ in payloads] == [0, 0]
        for piece, payload in enumerate(payloads):
            assert (await client.call(READ, (2 * number + piece) * 8 * MIB, 8 * MIB)).data == payload, step
    await client.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "framing"),
    [("stalled payloads", "structured"), ("readers of nothing", "simple"), ("all kinds", "extended")],
)
async def test_large_requests_get_through(kind: str, framing: str, tmp_path: Path) -> None:
    """Whoever holds the memory that others wait for, and does not move, is thrown out before long.

    The filter keeps the server from sending straight out of the page cache, so that every read takes memory.
    """
    attacks = {"stalled payloads": [half_a_payload] * 4, "readers of nothing": [reader_of_nothing] * 4}.get(kind)
    disk = write_random(tmp_path / "disk.raw", HONEST * REGION_BYTES + HOSTILE_MIB * MIB)
    options = [*framing_options(framing, tmp_path), "-f", "raw", "--filter", "delay,read=1ms"]
    with pynbd_serve(*options, disk) as peer:
        async with besieged(peer, framing, attacks or ATTACKS * 2), asyncio.TaskGroup() as honest:
            for number in range(2):
                honest.create_task(copy_in_large_pieces(number, peer.endpoint, framing))
        assert peak_rss_bytes(peer.pid) < MAX_RSS_BYTES
        assert "Traceback" not in peer.log()
