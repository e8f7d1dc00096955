"""A client that sends what it is told to, sound or not: for loads by the hundred and for clients that misbehave.

It shares no code with `nbd_protocol`, so that the two don't err together.
"""

from __future__ import annotations

import asyncio
import struct
from typing import NamedTuple

from tests.peers import Endpoint

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, PAYLOAD_LEN = 1, 1 << 5

GREETING = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")

OPTION_MAGIC = 0x49484156454F5054
NO_ZEROES_AND_FIXED = 3
FRAMING_OPTION = {"structured": 8, "extended": 11}
GO = 7


class Reply(NamedTuple):
    """One complete reply.

    Args:
        cookie: of the request.
        error: the NBD error, 0 for none.
        data: what was read, put together; holes are zeroes. Offsets are relative to the lowest chunk.
    """

    cookie: int
    error: int
    data: bytes


class WireClient:
    """One connection.

    Args:
        reader, writer: the socket.
        framing: simple, structured or extended.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, framing: str) -> None:
        self.reader = reader
        self.writer = writer
        self.framing = framing
        self._last_cookie = 0
        self._chunks: dict[int, tuple[int, dict[int, bytes]]] = {}

    @classmethod
    async def connect(cls, endpoint: Endpoint, framing: str = "simple", export: str = "") -> WireClient:
        """Negotiate an export in a framing, which the server must offer."""
        client = cls(*await open_socket(endpoint), framing)
        assert await client.reader.readexactly(GREETING.size)
        client.writer.write(struct.pack(">I", NO_ZEROES_AND_FIXED))
        if framing != "simple":
            assert await client.option(FRAMING_OPTION[framing]) == 1
        name = export.encode()
        assert await client.option(GO, struct.pack(">I", len(name)) + name + bytes(2)) == 1
        return client

    async def option(self, number: int, payload: bytes = b"") -> int:
        """Send an option, and give the type of its last reply."""
        self.writer.write(OPTION.pack(OPTION_MAGIC, number, len(payload)) + payload)
        while True:
            _, _, kind, length = OPTION_REPLY.unpack(await self.reader.readexactly(OPTION_REPLY.size))
            await self.reader.readexactly(length)
            if kind == 1 or kind & 1 << 31:
                return int(kind)

    def header(self, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
        """The bytes of a request's header, with a fresh cookie."""
        self._last_cookie += 1
        if self.framing != "extended":
            return REQUEST.pack(0x25609513, flags, command, self._last_cookie, offset, length)
        if command == WRITE:
            flags |= PAYLOAD_LEN
        return EXTENDED_REQUEST.pack(0x21E41C71, flags, command, self._last_cookie, offset, length)

    def send(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request, and give its cookie; nothing is waited for."""
        self.writer.write(self.header(command, offset, length or len(payload), flags) + payload)
        return self._last_cookie

    async def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send a request and wait for its reply; there must be no other in flight."""
        cookie = self.send(command, offset, length, flags, payload)
        await self.writer.drain()
        reply = await self.reply(length if command == READ else 0)
        assert reply.cookie == cookie
        return reply

    async def reply(self, read_length: int = 0) -> Reply:
        """The next reply that is complete.

        Args:
            read_length: how many bytes follow a simple reply without an error; in other framings the reply says it.
        """
        if self.framing == "simple":
            magic, error, cookie = SIMPLE_REPLY.unpack(await self.reader.readexactly(SIMPLE_REPLY.size))
            assert magic == 0x67446698
            data = await self.reader.readexactly(read_length) if read_length and not error else b""
            return Reply(cookie, error, data)
        while (done := await self._chunk()) is None:
            pass
        return done

    async def _chunk(self) -> Reply | None:
        if self.framing == "extended":
            header = await self.reader.readexactly(EXTENDED_CHUNK.size)
            magic, flags, kind, cookie, _, length = EXTENDED_CHUNK.unpack(header)
            assert magic == 0x6E8A278C
        else:
            magic, flags, kind, cookie, length = CHUNK.unpack(await self.reader.readexactly(CHUNK.size))
            assert magic == 0x668E33EF
        payload = await self.reader.readexactly(length)
        error, pieces = self._chunks.pop(cookie, (0, {}))
        if kind == 1:
            pieces[int.from_bytes(payload[:8], "big")] = payload[8:]
        elif kind == 2:
            pieces[int.from_bytes(payload[:8], "big")] = bytes(int.from_bytes(payload[8:12], "big"))
        elif kind & 1 << 15:
            error = int.from_bytes(payload[:4], "big")
        if flags & 1:
            return Reply(cookie, error, b"".join(pieces[offset] for offset in sorted(pieces)))
        self._chunks[cookie] = error, pieces
        return None

    async def end(self) -> None:
        """Say DISC and close."""
        self.send(DISC)
        self.close()

    def close(self) -> None:
        """Close at once, without a word."""
        self.writer.transport.abort()


async def open_socket(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a server, and nothing more."""
    if endpoint.socket_path is not None:
        return await asyncio.open_unix_connection(str(endpoint.socket_path))
    return await asyncio.open_connection(endpoint.host, endpoint.port)
