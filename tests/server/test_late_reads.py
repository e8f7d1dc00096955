"""Long reads of what lies scattered: piece by piece, looked up when it is sent; the long way where that can't be."""

import asyncio
import random
from pathlib import Path

import pytest

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from pynbd.block.statistics import Operation
from pynbd.server.scratch import INLINE_READ_BYTES
from pynbd.server.wire import PIECE_BYTES
from tests.crypto.tls_ends import credentials
from tests.server.clients import CHUNKED, LIMIT_S, Client, Served, serving
from tests.server.scattered import SCATTERED, Scattered, scattered
from tests.server.test_tls import secure_server, secured

KIB, MIB = 1 << 10, 1 << 20

DISK = {"driver": SCATTERED}


def disk_of(served: Served) -> Scattered:
    return scattered(served.node())


async def nothing_in_flight(served: Served) -> None:
    """All that was asked for has ended, and its memory is given back."""
    (connection,) = served.server.connections
    async with asyncio.timeout(LIMIT_S):
        while connection.in_flight:
            await asyncio.sleep(0)
    assert not connection.account.held


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("length", [INLINE_READ_BYTES + 1, PIECE_BYTES, PIECE_BYTES + 1, MIB, 3 * MIB + 12345])
async def test_pieces(mode: ReplyMode, length: int) -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(mode=mode), disk_of(served)
        offset = 7 * KIB + 1
        reply = await client.ask(Command.READ, offset, length)
        assert reply.data == disk.content[offset : offset + length]
        assert not disk.read_bytes, "some of it went the long way"
        assert [size for _, _, size in reply.chunks if size] == [
            min(PIECE_BYTES, length - start) for start in range(0, length, PIECE_BYTES)
        ]
        statistics = served.server.exports[""].backend.statistics
        assert statistics.operations[Operation.READ] == 1
        assert statistics.bytes[Operation.READ] == length
        await nothing_in_flight(served)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("missing", [0, 1, 3, 9, 15])
async def test_the_rest_goes_the_long_way(mode: ReplyMode, missing: int) -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(mode=mode), disk_of(served)
        disk.elsewhere = {missing}
        assert await client.read(0, MIB) == disk.content[:MIB]
        # A piece goes as far as it can; what is behind it is one read.
        assert disk.read_bytes == MIB - missing * disk.cluster if missing else MIB
        statistics = served.server.exports[""].backend.statistics
        assert statistics.operations[Operation.READ] == 1
        assert statistics.bytes[Operation.READ] == MIB
        await nothing_in_flight(served)


@pytest.mark.parametrize("mode", CHUNKED)
async def test_a_failure_in_the_middle_is_told(mode: ReplyMode) -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(mode=mode), disk_of(served)
        disk.elsewhere, disk.fails = {8}, True
        reply = await client.ask(Command.READ, 0, MIB)
        assert reply.error == Errno.EIO
        assert reply.data[: 8 * disk.cluster] == disk.content[: 8 * disk.cluster]
        disk.elsewhere = set()
        assert await client.read(0, MIB) == disk.content[:MIB]


async def test_what_moves_is_found_where_it_lies_then() -> None:
    """A cluster that was copied on write while its read waits to be sent: its old place may belong to others."""
    async with serving(DISK) as served:
        client, disk = await served.connect(receive_bytes=1), disk_of(served)
        cookies = await ask_for_more_than_it_takes(client, served)
        already = disk.located
        disk.elsewhere = set(range(len(disk.order)))
        for number, cookie in enumerate(cookies):
            assert (await client.reply(cookie)).data == disk.content[number % 4 * MIB :][:MIB]
        assert disk.located == already
        assert disk.read_bytes
        await nothing_in_flight(served)


@pytest.mark.parametrize("missing", [False, True])
async def test_a_client_that_leaves_gives_everything_back(missing: bool) -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(receive_bytes=1), disk_of(served)
        if missing:
            disk.elsewhere = {20, 40}
        await ask_for_more_than_it_takes(client, served)
        assert served.server.budget.taken, "a read that waits has its memory, should it go the long way"
        client.sock.close()
        await served.until_gone()
        assert not served.server.budget.taken


async def test_a_disk_that_is_drained_meanwhile_is_asked_when_it_goes_on() -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(receive_bytes=1), disk_of(served)
        backend = served.server.exports[""].backend
        cookies = await ask_for_more_than_it_takes(client, served)
        backend.begin_drain()
        located = disk.located
        last = asyncio.create_task(client.reply(cookies[-1]))
        async with asyncio.timeout(LIMIT_S):
            while not backend.parked:
                await asyncio.sleep(0)
        assert disk.located == located
        assert not disk.read_bytes
        backend.end_drain()
        await last
        for number, cookie in enumerate(cookies[:-1]):
            assert (await client.reply(cookie)).data == disk.content[number % 4 * MIB :][:MIB]
        assert disk.read_bytes


@pytest.mark.parametrize(("mode", "flags"), [(ReplyMode.SIMPLE, 0), (ReplyMode.STRUCTURED, int(CommandFlag.DF))])
async def test_a_reply_in_one_piece_where_it_must_be(mode: ReplyMode, flags: int) -> None:
    async with serving(DISK) as served:
        client, disk = await served.connect(mode=mode), disk_of(served)
        reply = await client.ask(Command.READ, 0, MIB, flags)
        assert reply.data == disk.content[:MIB]
        assert disk.read_bytes == MIB
        assert mode is ReplyMode.SIMPLE or len(reply.chunks) == 1


@pytest.mark.parametrize("seed", range(4))
async def test_many_at_once_through_a_narrow_socket(seed: int) -> None:
    source = random.Random(seed)
    async with serving(DISK) as served:
        client, disk = await served.connect(receive_bytes=source.choice([0, 1, 20000])), disk_of(served)
        disk.elsewhere = set(source.sample(range(64), 3))
        await ask_for_many(client, disk, source)
        await nothing_in_flight(served)


@pytest.mark.parametrize("seed", range(4))
async def test_many_at_once_through_tls(seed: int, pki: Path) -> None:
    source = random.Random(seed)
    async with secure_server(pki, DISK) as served:
        client, disk = await secured(served, credentials("client", pki)), disk_of(served)
        disk.elsewhere = set(source.sample(range(64), 3))
        await ask_for_many(client, disk, source)
        await nothing_in_flight(served)


async def ask_for_more_than_it_takes(client: Client, served: Served) -> list[int]:
    """Reads of a MiB each, of all four in turn: some are sent, others wait for the client to take them."""
    cookies = [await client.send(Command.READ, number % 4 * MIB, MIB) for number in range(24)]
    (connection,) = served.server.connections
    async with asyncio.timeout(LIMIT_S):
        while connection.in_flight < 8:
            await asyncio.sleep(0)
    return cookies


async def ask_for_many(client: Client, disk: Scattered, source: random.Random) -> None:
    asked = []
    for _ in range(40):
        length = source.choice([4096, 64 * KIB, 65 * KIB, source.randrange(1, 2 * MIB)])
        offset = source.randrange(disk.size - length)
        asked.append((await client.send(Command.READ, offset, length), offset, length))
    for cookie, offset, length in asked:
        assert (await client.reply(cookie)).data == disk.content[offset : offset + length]
