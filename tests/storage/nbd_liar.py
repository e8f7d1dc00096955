"""An NBD server in the test itself, which negotiates honestly and then does what the test says, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from nbd_protocol.constants import Command, CommandFlag, Option, OptionReplyType, ReplyMode, TransmissionFlag
from nbd_protocol.negotiation import NEED_DATA, ExportInfo, select_contexts
from nbd_protocol.negotiation_events import ExportQuery, MetaContextQuery, Ready
from nbd_protocol.server_negotiation import ServerNegotiation

SIZE = 1 << 20

ALL = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)

END_LIMIT_S = 20
"""How long a script may go on after the client has been closed."""

INFO = ExportInfo(SIZE, ALL)


class Asked(NamedTuple):
    """A request, with the payload of a write."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


class Talk:
    """One connection, from the server's side.

    Args:
        number: how many connections there were before this one.
        reader, writer: the socket.
    """

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self.mode = ReplyMode.SIMPLE

    async def negotiate(self, info: ExportInfo = INFO, *, mode: ReplyMode = ReplyMode.SIMPLE) -> Ready:
        """Serve an export, with replies of at most that kind."""
        negotiation = ServerNegotiation(structured=mode is not ReplyMode.SIMPLE, extended=mode is ReplyMode.EXTENDED)
        while True:
            event = negotiation.next_event()
            self.writer.write(negotiation.data_to_send())
            if event is NEED_DATA:
                # A byte at a time: what follows the negotiation stays with the reader.
                negotiation.receive_data(await self.reader.read(1))
            elif isinstance(event, ExportQuery):
                if event.name:
                    negotiation.refuse(OptionReplyType.ERR_UNKNOWN, "no such export")
                else:
                    negotiation.accept_export(info)
            elif isinstance(event, MetaContextQuery):
                names = select_contexts(event.option, event.queries, ["base:allocation"])
                negotiation.send_meta_contexts(list(enumerate(names, 7)))
            else:
                assert isinstance(event, Ready), event
                self.mode = event.mode
                return event

    async def asked(self) -> Asked:
        """The next request. Raises IncompleteReadError when the client is gone."""
        if self.mode is ReplyMode.EXTENDED:
            header = await self.reader.readexactly(32)
            _, flags, command, cookie, offset, length = struct.unpack(">IHHQQQ", header)
        else:
            header = await self.reader.readexactly(28)
            _, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
        payload = await self.reader.readexactly(length) if command == Command.WRITE else b""
        return Asked(flags & ~CommandFlag.PAYLOAD_LEN, command, cookie, offset, length, payload)

    def reply(self, asked: Asked, error: int = 0, data: bytes = b"") -> None:
        """A simple reply."""
        self.writer.write(struct.pack(">IIQ", 0x67446698, error, asked.cookie) + data)

    def chunk(self, asked: Asked, kind: int, payload: bytes = b"", *, done: bool = False) -> None:
        """A chunk of a structured reply."""
        self.writer.write(struct.pack(">IHHQI", 0x668E33EF, done, kind, asked.cookie, len(payload)) + payload)

    async def negotiate_by_hand(self, size: int, minimum: int, preferred: int, maximum: int) -> None:
        """Tell what no honest server can say of an export, in reply to GO; all other options are unknown here."""
        self.writer.write(b"NBDMAGICIHAVEOPT\0\3")
        await self.reader.readexactly(4)
        while True:
            _, option, length = struct.unpack(">QII", await self.reader.readexactly(16))
            await self.reader.readexactly(length)
            if option == Option.GO:
                break
            self._option_reply(option, OptionReplyType.ERR_UNSUP)
        self._option_reply(option, OptionReplyType.INFO, struct.pack(">HQH", 0, size, 1))
        self._option_reply(option, OptionReplyType.INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))
        self._option_reply(option, OptionReplyType.ACK)

    def _option_reply(self, option: int, kind: OptionReplyType, payload: bytes = b"") -> None:
        self.writer.write(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload)

    async def serve(self, disk: bytearray) -> None:
        """Serve honestly, with simple replies, until the client leaves."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while (asked := await self.asked()).command != Command.DISC:
                end = asked.offset + asked.length
                if asked.command == Command.WRITE:
                    disk[asked.offset : end] = asked.payload
                self.reply(asked, data=bytes(disk[asked.offset : end]) if asked.command == Command.READ else b"")

    async def is_left(self) -> bool:
        """Whether the client closes the connection without another word but goodbye."""
        rest = await self.reader.read()
        return not rest or (len(rest) == 28 and rest[6:8] == b"\0\2")


Script = Callable[[Talk], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(script: Script) -> AsyncIterator[str]:
    """Run `script` for each connection; gives the URI. What a script raises is raised at the end of the block."""
    talks: list[asyncio.Task[None]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.append(task)
        try:
            await script(Talk(len(talks) - 1, reader, writer))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    # The path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        path = Path(folder) / "s"
        listening = await asyncio.start_unix_server(talk, path)
        try:
            yield f"nbd+unix:///?socket={path}"
            async with asyncio.timeout(END_LIMIT_S):
                await asyncio.gather(*talks)
        finally:
            listening.close()
            for task in talks:
                task.cancel()
