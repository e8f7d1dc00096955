"""A client that negotiates byte by byte, well or badly."""

import asyncio
import socket
import struct

from nbd_protocol import messages as m
from nbd_protocol.constants import OptionReplyType
from tests.server.clients import LIMIT_S, Served

MEMORY = {"driver": "memory", "size": 4 << 20}
"""The disks that are served, if a test says nothing else."""


class Haggler:
    """The options of one connection, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    async def meet(cls, served: Served, flags: int = 3) -> "Haggler":
        """Take the greeting and answer it."""
        haggler = cls(await served.open_socket())
        greeting = await haggler.receive(m.GREETING.size_bytes)
        assert greeting == b"NBDMAGICIHAVEOPT\0\3"
        await haggler.send(struct.pack(">L", flags))
        return haggler

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, count: int) -> bytes:
        data = b""
        async with asyncio.timeout(LIMIT_S):
            while len(data) < count:
                piece = await asyncio.get_running_loop().sock_recv(self.sock, count - len(data))
                if not piece:
                    raise EOFError(data)
                data += piece
        return data

    async def option(self, option: int, payload: bytes = b"") -> None:
        await self.send(struct.pack(">QLL", 0x49484156454F5054, option, len(payload)) + payload)

    async def reply(self, option: int) -> tuple[int, bytes]:
        magic, echoed, kind, length = struct.unpack(">QLLL", await self.receive(20))
        assert magic == 0x3E889045565A9
        assert echoed == option
        return kind, await self.receive(length)

    async def ask(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """An option and all replies to it, the last of which is ACK or an error."""
        await self.option(option, payload)
        replies = [await self.reply(option)]
        while replies[-1][0] not in (OptionReplyType.ACK,) and not replies[-1][0] & 1 << 31:
            replies.append(await self.reply(option))
        return replies

    async def verdict(self, option: int, payload: bytes = b"") -> int:
        """The type of the last reply."""
        return (await self.ask(option, payload))[-1][0]

    async def is_closed(self) -> bool:
        try:
            await self.receive(1)
        except (EOFError, ConnectionError):
            return True
        return False


def go_payload(name: str, *infos: int) -> bytes:
    encoded = name.encode()
    return struct.pack(f">L{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)


def meta_payload(name: str, *queries: str) -> bytes:
    encoded = name.encode()
    parts = [struct.pack(">L", len(encoded)), encoded, struct.pack(">L", len(queries))]
    for query in queries:
        parts += [struct.pack(">L", len(query.encode())), query.encode()]
    return b"".join(parts)


async def still_serves(served: Served) -> None:
    """Whatever one client did, the next one is served."""
    client = await served.connect()
    await client.write(0, b"still here")
    assert await client.read(0, 10) == b"still here"
    assert await client.disconnect()
