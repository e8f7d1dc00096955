"""A server that breaks the protocol gets a clear error and a closed connection (nbd-conformance 24)."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Callable

import pytest

from nbd_protocol.constants import ReplyMode
from nbd_protocol.negotiation import ExportInfo
from tests.storage.nbd_liar import ALL, SIZE, Asked, Talk, server
from tests.storage.nbd_servers import client_of, read

Lie = Callable[[Talk, Asked], None]

DATA, HOLE, STATUS, ERROR = 1, 2, 5, (1 << 15) + 1


def at(offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset) + data


def _overlap(talk: Talk, asked: Asked) -> None:
    talk.chunk(asked, DATA, at(asked.offset, bytes(3000)))
    talk.chunk(asked, HOLE, struct.pack(">QI", asked.offset + 2000, 2096), done=True)


def _gap(talk: Talk, asked: Asked) -> None:
    talk.chunk(asked, DATA, at(asked.offset, bytes(1000)), done=True)


STRUCTURED_LIES: dict[str, tuple[Lie, str]] = {
    "bad magic": (lambda talk, asked: talk.writer.write(b"HTTP/1.1 400 Bad Request\r\n"), "magic is 0x48545450"),
    "unknown cookie": (
        lambda talk, asked: talk.chunk(asked._replace(cookie=asked.cookie + 1000), 0, done=True),
        "which is not outstanding",
    ),
    "a simple reply": (lambda talk, asked: talk.reply(asked, 0, bytes(4096)), "structured replies were negotiated"),
    "outside of the request": (
        lambda talk, asked: talk.chunk(asked, DATA, at(asked.offset + 4095, b"xx"), done=True),
        "outside of the request",
    ),
    "before the request": (
        lambda talk, asked: talk.chunk(asked, DATA, at(asked.offset - 1, b"xx"), done=True),
        "outside of the request",
    ),
    "overlapping chunks": (_overlap, "sent twice"),
    "an end with bytes missing": (_gap, "ends after 1000 bytes"),
    "nothing at all": (lambda talk, asked: talk.chunk(asked, 0, done=True), "ends after 0 bytes"),
    "an endless chunk": (
        lambda talk, asked: talk.writer.write(struct.pack(">IHHQI", 0x668E33EF, 0, DATA, asked.cookie, 0xFFFFFFFF)),
        "expected 1 to 4096",
    ),
    "an endless error": (
        lambda talk, asked: talk.writer.write(struct.pack(">IHHQI", 0x668E33EF, 0, ERROR, asked.cookie, 0xFFFFFFFF)),
        "expected at most",
    ),
    "an error of no kind": (lambda talk, asked: talk.chunk(asked, ERROR, bytes(6), done=True), "error 0"),
    "an unknown chunk": (lambda talk, asked: talk.chunk(asked, 77, done=True), "not known"),
    "status for a read": (lambda talk, asked: talk.chunk(asked, STATUS, bytes(12), done=True), "chunk of type 5"),
}


@pytest.mark.parametrize("lie", STRUCTURED_LIES)
async def test_lies_about_a_read(lie: str) -> None:
    """Each ends the connection; nothing is believed of it, and what else was in flight fails with it."""
    tell, said = STRUCTURED_LIES[lie]
    left = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.negotiate(mode=ReplyMode.STRUCTURED)
        first = await talk.asked()
        await talk.asked()
        tell(talk, first)
        assert await talk.is_left()
        left.set()

    async with server(script) as uri, client_of(uri) as backend:
        problems = await asyncio.gather(read(backend, 8192, 4096), read(backend, 0, 512), return_exceptions=True)
        for problem in problems:
            assert isinstance(problem, OSError)
            assert problem.errno == errno.EIO
            assert "the server broke the protocol: " in str(problem)
            assert said in str(problem)
            assert uri in str(problem)
        await left.wait()


@pytest.mark.parametrize(
    ("tell", "said"),
    [
        (lambda talk, asked: talk.writer.write(bytes(16)), "magic is 0x0"),
        (lambda talk, asked: talk.reply(asked._replace(cookie=99)), "which is not outstanding"),
        (lambda talk, asked: talk.chunk(asked, 0, done=True), "no reply in simple mode"),
    ],
)
async def test_lies_in_simple_replies(tell: Lie, said: str) -> None:
    async def script(talk: Talk) -> None:
        await talk.negotiate()
        tell(talk, await talk.asked())
        assert await talk.is_left()

    async with server(script) as uri, client_of(uri) as backend:
        with pytest.raises(OSError, match=said) as caught:
            await backend.write(0, memoryview(b"x"))
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (struct.pack(">III", 7, 0, 0), "0 bytes"),
        (struct.pack(">III", 8, 4096, 0), "context 8"),
        (struct.pack(">II", 7, 0), "extents"),
        (struct.pack(">I", 7), "extents"),
    ],
)
async def test_lies_about_what_lies_where(payload: bytes, said: str) -> None:
    async def script(talk: Talk) -> None:
        await talk.negotiate(mode=ReplyMode.STRUCTURED)
        talk.chunk(await talk.asked(), STATUS, payload, done=True)
        assert await talk.is_left()

    async with server(script) as uri, client_of(uri) as backend:
        with pytest.raises(OSError, match=said):
            await backend.block_status(0, 65536)


async def test_more_status_than_asked_for_is_cut() -> None:
    """An extent that goes on behind the request is no lie; none of it is made up behind the disk's end."""

    async def script(talk: Talk) -> None:
        await talk.negotiate(mode=ReplyMode.STRUCTURED)
        talk.chunk(await talk.asked(), STATUS, struct.pack(">IIIII", 7, 4096, 3, 1 << 31, 0), done=True)
        await talk.serve(bytearray(SIZE))

    async with server(script) as uri, client_of(uri) as backend:
        extents = await backend.block_status(0, SIZE)
        assert [(extent.length, extent.data, extent.zero) for extent in extents] == [
            (4096, False, True),
            (SIZE - 4096, True, False),
        ]


@pytest.mark.parametrize("reply_bytes", [0, 10, 16, 1000])
async def test_a_server_that_hangs_up_in_the_middle(reply_bytes: int) -> None:
    """Half a reply is none."""

    async def script(talk: Talk) -> None:
        await talk.negotiate()
        asked = await talk.asked()
        whole = struct.pack(">IIQ", 0x67446698, 0, asked.cookie) + bytes(asked.length)
        talk.writer.write(whole[:reply_bytes])

    async with server(script) as uri, client_of(uri) as backend:
        with pytest.raises(OSError, match="the connection was lost") as caught:
            await read(backend, 0, SIZE)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ((1 << 63, 1, 4096, 1 << 25), "export size"),
        ((SIZE, 3, 4096, 1 << 25), "minimum block size 3"),
        ((SIZE, 1 << 17, 1 << 17, 1 << 25), "minimum block size 131072"),
        ((SIZE, 1, 5000, 1 << 25), "preferred block size 5000"),
        ((SIZE, 4096, 4096, 512), "maximum payload 512"),
    ],
)
async def test_an_impossible_export(told: tuple[int, int, int, int], said: str) -> None:
    """A server that tells what no export can be is not believed."""

    async def script(talk: Talk) -> None:
        await talk.negotiate_by_hand(*told)
        assert await talk.is_left()

    async with server(script) as uri:
        with pytest.raises(OSError, match=said) as caught:
            async with client_of(uri):
                pass
        assert caught.value.errno == errno.EPROTO


async def test_replies_a_byte_at_a_time() -> None:
    """However a reply is cut, it is the same reply."""
    content = bytes(range(256)) * 16

    async def script(talk: Talk) -> None:
        await talk.negotiate(mode=ReplyMode.STRUCTURED)
        asked = await talk.asked()
        payload = at(asked.offset, content[:2048])
        whole = struct.pack(">IHHQI", 0x668E33EF, 0, DATA, asked.cookie, len(payload)) + payload
        hole = struct.pack(">QI", asked.offset + 2048, 2048)
        whole += struct.pack(">IHHQI", 0x668E33EF, 1, HOLE, asked.cookie, len(hole)) + hole
        for byte in whole:
            talk.writer.write(bytes((byte,)))
            await talk.writer.drain()
            await asyncio.sleep(0)
        await talk.serve(bytearray(SIZE))

    async with server(script) as uri, client_of(uri) as backend:
        assert await read(backend, 8192, 4096) == content[:2048] + bytes(2048)


async def test_a_write_that_is_answered_before_it_is_sent() -> None:
    """A server may refuse a write by its header; the caller gets the buffer back only when it has left."""
    length = 8 << 20
    info = ExportInfo(16 << 20, ALL)
    answered = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.negotiate(info)
        header = await talk.reader.readexactly(28)
        cookie = struct.unpack(">IHHQQI", header)[3]
        talk.writer.write(struct.pack(">IIQ", 0x67446698, errno.ENOSPC, cookie))
        await talk.writer.drain()
        answered.set()
        payload = await talk.reader.readexactly(length)
        assert payload == b"x" * length
        await talk.serve(bytearray(SIZE))

    async with server(script) as uri, client_of(uri) as backend:
        data = bytearray(b"x" * length)
        with pytest.raises(OSError) as caught:
            await backend.write(0, memoryview(data))
        assert caught.value.errno == errno.ENOSPC
        data[:] = b"?" * length  # whatever had not been sent would be seen by the server
    assert answered.is_set()
