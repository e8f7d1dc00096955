"""A hidden export is not told apart from a missing one; who may only read, can't write."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Mapping

import pytest

from nbd_protocol.constants import Command, Errno, Option, ReplyMode, TransmissionFlag
from nbd_protocol.server_negotiation import ServerNegotiation
from pynbd.server.access import AccessList, rule_from
from pynbd.server.export import Export
from pynbd.server.handshake import negotiate
from pynbd.server.offer import Offer
from pynbd.server.visitor import Visitor, plain_address
from tests.server.clients import LIMIT_S, MODES, serving

MEMORY = {"driver": "memory", "size": 1 << 20}
SOMEBODY = Visitor("192.0.2.1:5", key="192.0.2.1", address=plain_address("192.0.2.1"))
NOBODY = AccessList([rule_from("allow", "10.0.0.0/8")])
READERS = AccessList([rule_from("read-only", "unix")])


def option(number: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(payload)) + payload


def asks_for(name: bytes) -> list[bytes]:
    """Every way to ask for an export."""
    named = struct.pack(">I", len(name)) + name
    query = struct.pack(">I", 15) + b"base:allocation"
    go = [
        named + struct.pack(">H", len(infos)) + b"".join(struct.pack(">H", info) for info in infos)
        for infos in ([], [0, 1, 2, 3])
    ]
    return [
        option(Option.LIST),
        *(option(Option.INFO, payload) for payload in go),
        *(option(Option.GO, payload) for payload in go),
        option(Option.LIST_META_CONTEXT, named + bytes(4)),
        option(Option.LIST_META_CONTEXT, named + struct.pack(">I", 1) + query),
        option(Option.SET_META_CONTEXT, named + struct.pack(">I", 1) + query),
        option(Option.GO, go[0]),
        option(Option.EXPORT_NAME, name),
    ]


async def answers(exports: Mapping[str, Export], asked: bytes, told: list[str]) -> bytes:
    """All bytes that come of some options."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        offer = Offer(exports, SOMEBODY, told.append)
        task = asyncio.create_task(negotiate(theirs, offer, ServerNegotiation()))
        await loop.sock_sendall(ours, struct.pack(">I", 3) + asked)
        async with asyncio.timeout(LIMIT_S):
            assert await task is None
        theirs.shutdown(socket.SHUT_WR)
        found = b""
        while data := await loop.sock_recv(ours, 1 << 16):
            found += data
        return found


@pytest.mark.parametrize("name", ["disk1", ""])
@pytest.mark.parametrize("mode", MODES)
async def test_hidden_is_as_missing(name: str, mode: ReplyMode) -> None:
    """The same bytes, whether an export is there that the client may not see, or none."""
    begin = {
        ReplyMode.SIMPLE: b"",
        ReplyMode.STRUCTURED: option(Option.STRUCTURED_REPLY),
        ReplyMode.EXTENDED: option(Option.EXTENDED_HEADERS),
    }[mode]
    async with serving(MEMORY, MEMORY, description="what it is") as served:
        exports = served.server.exports
        exports[name].access = NOBODY
        others = {key: export for key, export in exports.items() if key != name}
        told: list[str] = []
        end = option(Option.ABORT)
        whole = b"".join(asks_for(name.encode()))
        assert b"is not present" in await answers(others, begin + whole + end, []) or not name
        for asked in [whole, *asks_for(name.encode())]:
            hidden = await answers(exports, begin + asked + end, told)
            assert hidden == await answers(others, begin + asked + end, [])
        assert told[0] == f"refused: export {name!r}: hidden from it by no rule fits"


async def test_the_list_has_what_the_client_may_use() -> None:
    async with serving(MEMORY, MEMORY, MEMORY) as served:
        served.server.exports["disk1"].access = NOBODY
        served.server.exports["disk2"].access = AccessList([rule_from("read-only", "192.0.2.0/24")])
        offer = Offer(served.server.exports, SOMEBODY)
        assert [export.name for export in offer.shown()] == ["", "disk2"]


async def test_a_name_that_tls_proves_later_counts() -> None:
    async with serving(MEMORY, access=AccessList([rule_from("allow", "name=CN=alice")])) as served:
        offer = Offer(served.server.exports, Visitor("somewhere"))
        assert offer.find("") is None
        offer.proved("CN=alice")
        assert offer.find("") is served.server.exports[""]


@pytest.mark.parametrize("mode", MODES)
async def test_who_may_only_read(mode: ReplyMode) -> None:
    async with serving(MEMORY, access=READERS, resize=True) as served:
        client = await served.connect(mode=mode)
        assert client.info.flags & TransmissionFlag.READ_ONLY
        assert not client.info.flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
        assert not client.info.flags & TransmissionFlag.SEND_RESIZE
        payload_flag = 1 << 5 if mode is ReplyMode.EXTENDED else 0
        for length in (1, 512, 300_000):
            reply = await client.ask_raw(Command.WRITE, 0, length, payload_flag, bytes([7]) * length)
            assert reply.error == Errno.EPERM
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            assert (await client.ask_raw(command, 0, 4096)).error == Errno.EPERM
        assert (await client.ask_raw(8, 0, 4096)).error in (Errno.EPERM, Errno.EINVAL)
        assert await client.read(0, 300_000) == bytes(300_000)
        assert await client.disconnect()


async def test_others_may_write_to_the_same_export() -> None:
    async with serving(MEMORY) as served:
        export = served.server.exports[""]
        writer = await served.connect()
        export.access = READERS
        reader = await served.connect()
        await writer.write(0, b"new")
        assert await reader.read(0, 3) == b"new"
        assert (await reader.ask_raw(Command.WRITE, 0, 3, 0, b"old")).error == Errno.EPERM
        assert await writer.read(0, 3) == b"new"
        assert await reader.disconnect()
        assert await writer.disconnect()


async def test_who_may_not_connect_at_all(caplog: pytest.LogCaptureFixture) -> None:
    """It is not even greeted; and others are."""
    denied = AccessList([rule_from("deny", "unix")])
    async with serving(MEMORY, server_options={"access": denied}) as served:
        sock = await served.open_socket()
        async with asyncio.timeout(LIMIT_S):
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
        served.server._access = AccessList()
        client = await served.connect()
        assert await client.disconnect()
    refusals = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(refusals) == 1
    assert refusals[0].endswith("refused: rule 0, deny address=unix")
