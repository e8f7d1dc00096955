"""Long reads of an image, sent straight from its file: what they show stays there until the client has it."""

import asyncio
import errno
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from nbd_protocol.constants import Command, Errno, ReplyMode
from pynbd.block.statistics import Operation
from pynbd.formats.qcow2 import given_up as given_up_clusters
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.given_up import GivenUp
from pynbd.server import holds
from pynbd.server.connection import Connection
from pynbd.server.holds import Holds
from pynbd.server.wire import PIECE_BYTES
from tests.peers import require_tool, run
from tests.server.clients import (
    LIMIT_S,
    MODES,
    Client,
    Served,
    no_descriptors_left,
    open_descriptors,
    serving,
    the_connection,
)

KIB, MIB = 1 << 10, 1 << 20
DATA, SIZE = 24 * MIB, 32 * MIB
FIRST = MIB
"""Before that the image's own structures are near, with holes between them."""
CLUSTER = 64 * KIB


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(DATA)


@pytest.fixture
def image(content: bytes, tmp_path: Path) -> Path:
    """Its data lie in one piece, with nothing behind them in the disk."""
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(content)
    os.truncate(raw, SIZE)
    run(require_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


@asynccontextmanager
async def serving_image(path: Path) -> AsyncIterator[Served]:
    """Serve an image; it is sound afterwards, and no cluster is lost."""
    # Its file hears of no discard: where that makes a hole, nobody would see what is written there next.
    tree = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(path), "discard": "ignore"},
        "discard": "unmap",
    }
    async with serving(tree) as served:
        await served.server.exports[""].backend.read(0, memoryview(bytearray(512)))  # its only table is known then
        yield served
    run(require_tool("qemu-img"), "check", "-q", "-f", "qcow2", path)


def given_up(served: Served) -> GivenUp:
    return cast(Qcow2, served.node().driver).image.given_up


async def settled(connection: Connection) -> None:
    """All that was asked for has been sent, as far as the socket takes it."""
    async with asyncio.timeout(LIMIT_S):
        moved = -1
        while connection.wire.moved != moved:
            moved = connection.wire.moved
            await asyncio.sleep(0.01)


async def nothing_held(served: Served) -> None:
    async with asyncio.timeout(LIMIT_S):
        while given_up(served)._holds:
            await asyncio.sleep(0.01)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much each `sendfile` has sent."""
    sent: list[int] = []
    sendfile = os.sendfile

    def counting(out: int, fd: int, offset: int, count: int) -> int:
        sent.append(sendfile(out, fd, offset, count))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counting)
    return sent


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [128 * KIB, PIECE_BYTES, MIB + 4096, 8 * MIB])
async def test_what_lies_in_one_piece(
    mode: ReplyMode, length: int, image: Path, content: bytes, sent: list[int]
) -> None:
    async with serving_image(image) as served:
        client, offset = await served.connect(mode=mode), FIRST
        reply = await client.ask(Command.READ, offset, length)
        assert bytes(reply.data) == content[offset : offset + length]
        assert reply.chunks == [("data", offset, length)]
        assert PIECE_BYTES // 2 <= sum(sent) <= length, "if the client is behind, the rest may be copied"
        statistics = served.server.exports[""].backend.statistics
        assert (statistics.operations[Operation.READ], statistics.bytes[Operation.READ]) == (2, 512 + length)
        await nothing_held(served)
        assert not the_connection(served).account.held


@pytest.mark.parametrize("mode", MODES)
async def test_what_lies_scattered(mode: ReplyMode, image: Path, sent: list[int]) -> None:
    source = random.Random(2)
    data = source.randbytes(4 * MIB)
    order = list(range(0, len(data), CLUSTER))
    source.shuffle(order)
    async with serving_image(image) as served:
        client = await served.connect(mode=mode)
        for start in order:
            await client.write(DATA + start, data[start : start + CLUSTER])
        assert await client.read(DATA, len(data)) == data
        assert sum(sent) < len(data) // 2, "few clusters lie beside each other"


@pytest.mark.parametrize("held", [True, False])
async def test_its_place_is_not_used_again(
    held: bool, image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:  # to see that it is this what helps
        monkeypatch.setattr(GivenUp, "hold", lambda *_: lambda: None)
    async with serving_image(image) as served:
        reader = await served.connect()
        cookie = await reader.send(Command.READ, FIRST, PIECE_BYTES)
        await settled(the_connection(served))
        writer = await served.connect()
        await writer.ask(Command.TRIM, FIRST, PIECE_BYTES)
        await writer.ask(Command.FLUSH)
        before = image.stat().st_size
        await writer.write(DATA, b"x" * PIECE_BYTES)
        assert (image.stat().st_size > before) == held
        shown = bytes((await reader.reply(cookie)).data)
        assert shown == (content[FIRST : FIRST + PIECE_BYTES] if held else b"x" * PIECE_BYTES)
        await nothing_held(served)
        await writer.ask(Command.FLUSH)
        before = image.stat().st_size
        await writer.write(DATA + MIB, b"y" * PIECE_BYTES)
        assert (image.stat().st_size > before) != held, "now it is used again"


async def test_what_a_client_sends_is_not_what_it_has_fetched(image: Path, content: bytes) -> None:
    async with serving_image(image) as served:
        client = await served.connect()
        first = await client.send(Command.READ, FIRST, PIECE_BYTES)
        await settled(the_connection(served))
        await client.send(Command.TRIM, FIRST, PIECE_BYTES)
        await client.send(Command.FLUSH)
        await client.send(Command.WRITE, DATA, payload=b"x" * 2 * MIB)
        await settled(the_connection(served))
        await asyncio.sleep(2 * holds.LOOK_S)
        await client.send(Command.FLUSH)
        await settled(the_connection(served))
        last = await client.send(Command.WRITE, DATA + 4 * MIB, payload=b"y" * MIB)
        await settled(the_connection(served))
        assert bytes((await client.reply(first)).data) == content[FIRST : FIRST + PIECE_BYTES]
        await client.reply(last)


async def too_much(served: Served, mode: ReplyMode = ReplyMode.STRUCTURED) -> tuple[Client, int]:
    """A client that asks for more than its socket holds."""
    client = await served.connect(mode=mode)
    cookie = await client.send(Command.READ, FIRST, 20 * MIB)
    connection = the_connection(served)
    await settled(connection)
    assert connection.wire.queued
    return client, cookie


@pytest.mark.parametrize("mode", MODES)
async def test_a_stuck_client_does_not_hold_everything(
    mode: ReplyMode, image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_up_clusters, "MOST_HELD_BYTES", MIB)
    async with serving_image(image) as served:
        client, cookie = await too_much(served, mode)
        stuck = the_connection(served)
        writer = await served.connect()
        for length in (MIB, 2 * MIB):
            assert given_up(served)._holds
            assert not stuck.wire.unsent
            await writer.ask(Command.TRIM, 0, length)
            await writer.ask(Command.FLUSH)
        assert not given_up(served)._holds
        assert stuck.wire.unsent, "what was left is in memory now"
        await writer.write(DATA, b"x" * MIB)
        assert bytes((await client.reply(cookie)).data)[2 * MIB :] == content[FIRST : FIRST + 20 * MIB][2 * MIB :]
        assert await client.read(4 * MIB, MIB) == content[4 * MIB : 5 * MIB]


async def test_a_client_that_has_said_goodbye_may_fetch_its_bytes(image: Path, content: bytes) -> None:
    async with serving_image(image) as served:
        reader = await served.connect()
        cookie = await reader.send(Command.READ, FIRST, PIECE_BYTES)
        await settled(the_connection(served))
        reader.sock.shutdown(socket.SHUT_WR)
        await settled(the_connection(served))
        writer = await served.connect()
        await writer.ask(Command.TRIM, FIRST, PIECE_BYTES)
        await writer.ask(Command.FLUSH)
        await writer.write(DATA, b"x" * PIECE_BYTES)
        await writer.ask(Command.FLUSH)
        await writer.write(DATA + MIB, b"y" * PIECE_BYTES)
        assert bytes((await reader.reply(cookie)).data) == content[FIRST : FIRST + PIECE_BYTES]
        assert await reader.at_end()
        await served.until_gone(1)
        assert not given_up(served)._holds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [True, False])
async def test_what_is_left_can_not_be_kept(
    fails: bool, mode: ReplyMode, image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_image(image) as served:
        client, cookie = await too_much(served, mode)

        def pread(fd: int, length: int, offset: int) -> bytes:
            if fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return bytes(MIB)

        monkeypatch.setattr(os, "pread", pread)
        given_up(served).end_holds()
        monkeypatch.undo()
        if mode is ReplyMode.SIMPLE:
            with pytest.raises((EOFError, ConnectionError)):
                await client.reply(cookie)
            await served.until_gone()
            client = await served.connect(mode=mode)
        else:
            assert (await client.reply(cookie)).error == Errno.EIO
        assert await client.read(MIB, MIB) == content[MIB : 2 * MIB]


@pytest.mark.parametrize("leaves", ["client", "server"])
async def test_who_leaves_holds_nothing(leaves: str, image: Path) -> None:
    async with serving_image(image) as served:
        client, _ = await too_much(served)
        writer = await served.connect()
        await writer.ask(Command.TRIM, 0, DATA)
        await writer.ask(Command.FLUSH)
        assert given_up(served)._holds
        if leaves == "client":
            client.sock.close()
            await served.until_gone(1)
            assert not given_up(served)._holds
            await writer.write(DATA, b"x")
            await writer.ask(Command.FLUSH)
            assert not given_up(served)


@pytest.mark.parametrize("mode", MODES)
async def test_a_file_that_fails(mode: ReplyMode, image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with serving_image(image) as served:
        client = await served.connect(mode=mode)
        with monkeypatch.context() as broken:
            broken.setattr(os, "sendfile", sendfile)
            if mode is ReplyMode.SIMPLE:
                with pytest.raises((EOFError, ConnectionError)):
                    await client.read(FIRST, MIB)
                await served.until_gone()
                client = await served.connect(mode=mode)
            else:
                reply = await client.ask(Command.READ, FIRST, MIB)
                assert reply.error == Errno.EIO
                assert not any(reply.data)
        assert await client.read(FIRST, MIB) == content[FIRST : FIRST + MIB]
        await nothing_held(served)


async def test_no_descriptor_is_left(image: Path, content: bytes) -> None:
    async with serving_image(image) as served:
        client = await served.connect()
        with no_descriptors_left():
            assert await client.read(FIRST, MIB) == content[FIRST : FIRST + MIB]
            assert not given_up(served)._holds


async def test_what_can_not_be_held_is_copied(
    image: Path, content: bytes, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qcow2, "hold_located", lambda *_: None)
    async with serving_image(image) as served:
        client = await served.connect()
        before = open_descriptors()
        for number in range(4):
            start = FIRST + number * MIB
            assert await client.read(start, MIB) == content[start : start + MIB]
        assert not sent
        assert open_descriptors() == before


async def test_an_image_that_must_be_settled_waits_for_nobody(image: Path) -> None:
    """What is in no socket yet is right all the same."""
    data = random.Random(3).randbytes(20 * MIB)
    async with serving_image(image) as served:
        driver = cast(Qcow2, served.node().driver)
        await driver.snapshot_create("first")
        writer = await served.connect()
        await writer.write(FIRST, data)
        await served.server.exports[""].backend.read(FIRST, memoryview(bytearray(512)))
        others = set(served.server.connections)
        client = await served.connect()
        (stuck,) = set(served.server.connections) - others
        cookie = await client.send(Command.READ, FIRST, len(data))
        await settled(stuck)
        await driver.snapshot_goto("first")
        assert not given_up(served)
        await writer.write(FIRST, b"x" * 20 * MIB)
        # The last of it was not warm, and is looked up when its turn has come.
        assert bytes((await client.reply(cookie)).data)[12 * MIB : 19 * MIB] == data[12 * MIB : 19 * MIB]
        await driver.snapshot_delete("first")


async def test_a_chain_is_held_as_a_whole(image: Path, content: bytes, tmp_path: Path, sent: list[int]) -> None:
    top = tmp_path / "top"
    run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    async with serving_image(top) as served:
        backing = served.node().children["backing"].node.driver
        await served.server.exports[""].backend.read(FIRST, memoryview(bytearray(512)))
        client = await served.connect()
        cookie = await client.send(Command.READ, FIRST, MIB)
        await settled(the_connection(served))
        assert sent
        for holder in (given_up(served), cast(Qcow2, backing).image.given_up):
            assert holder._holds
        assert bytes((await client.reply(cookie)).data) == content[FIRST : FIRST + MIB]
        await nothing_held(served)
        assert not cast(Qcow2, backing).image.given_up._holds


async def test_through_tcp_it_is_copied(image: Path, content: bytes, sent: list[int]) -> None:
    """What a peer has acknowledged may lie in its pages still."""
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    async with serving(tree, tcp=True) as served:
        client = await served.connect()
        await client.read(0, 512)
        assert await client.read(MIB, MIB) == content[MIB : 2 * MIB]
        assert not sent
        assert not given_up(served)._holds


async def test_held_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each until all up to its end was fetched."""
    monkeypatch.setattr(holds, "LOOK_S", 0.001)
    fetched, released = 0, list[int]()
    copied, ended = list[int](), list[int]()
    held = Holds(
        asyncio.get_running_loop(), lambda: fetched, lambda: copied.append(len(released)), lambda: ended.append(1)
    )
    for number in range(4):
        held.begin(lambda number=number: released.append(number))  # type: ignore[misc]  # a lambda's default
        held.end(100 * (number + 1))
    for position, expected in ((99, 0), (100, 1), (350, 3)):
        fetched = position
        await asyncio.sleep(0.02)
        assert released == list(range(expected))
    assert held.any_left()
    assert not ended
    held.begin(lambda: released.append(8))
    held.revoke()
    held.revoke()
    assert (copied, released[3:]) == ([3], [8]), "copied before it may move"
    fetched = 400
    await asyncio.sleep(0.02)
    assert ended == [1]
    assert not held.any_left()
    held.begin(lambda: released.append(9))
    held.close()
    assert released == [0, 1, 2, 8, 3, 9]
