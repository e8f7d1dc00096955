"""What is fuzzed: each target takes any bytes, and raises only if something is wrong with pynbd.

A target knows more than that nothing unexpected may be raised. The server's end must come to the same, however its
bytes are cut into pieces; what both ends make of bytes must keep to what was agreed; and a URI must survive being
written and read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nbd_protocol.client_negotiation import ClientNegotiation
from nbd_protocol.constants import Command, Errno, Option, OptionReplyType, ReplyMode, TransmissionFlag
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation import NEED_DATA, ExportInfo, select_contexts
from nbd_protocol.negotiation_events import (
    Aborted,
    Closed,
    Established,
    ExportQuery,
    ListExports,
    MetaContextQuery,
    Ready,
    ServerEvent,
    StartTls,
    TlsWanted,
)
from nbd_protocol.server_negotiation import ServerNegotiation, TlsPolicy
from nbd_protocol.transmission import (
    ClientTransmission,
    DataChunk,
    Event,
    ExportRules,
    HoleChunk,
    Request,
    ServerTransmission,
    replies_for,
)
from nbd_protocol.uri import UriError, parse_uri

SIZE = 1 << 20
CONTEXTS = ["base:allocation", "qemu:dirty-bitmap:x"]
EXPORT = ExportInfo(
    size=SIZE,
    flags=TransmissionFlag(0x1FFD),
    canonical_name="disk",
    description="a disk",
    min_block=512,
    preferred_block=4096,
    max_payload=32 << 20,
)
PIECES = (1, 13, 1 << 20)
"""Lengths of the pieces in which the same bytes come."""

MAX_READ_BYTES = 1 << 16
MAX_BATCH = 64


class Outcome(NamedTuple):
    """What came of some bytes; it must not depend on how they were cut."""

    events: list[str]
    sent: bytes
    failed: str


def pieces_of(data: bytes, length: int) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]


# --- the server's end -----------------------------------------------------------------------------------------


class ServerEnd:
    """A server without a disk.

    Args:
        config: chooses what it offers.
    """

    def __init__(self, config: int) -> None:
        policies: list[TlsPolicy] = ["off", "allowed", "required"]
        self.negotiation = ServerNegotiation(
            tls=policies[config % 3], structured=bool(config & 4), extended=bool(config & 8), resize=bool(config & 16)
        )
        self.read_only = bool(config & 32)
        self.used_tls = False
        self.events: list[str] = []
        self.sent = self.negotiation.data_to_send()
        self.ended = False
        self._transmission: ServerTransmission | None = None
        self._rules: ExportRules | None = None
        self._ready: Ready | None = None
        self._kept = b""
        self._missing = 0
        self._partial: Request | None = None

    def receive(self, data: bytes) -> None:
        if self.ended:
            return
        if self._transmission is None:
            self.negotiation.receive_data(data)
            self._negotiate()
        else:
            self._serve(data)

    def _negotiate(self) -> None:
        while not self.ended:
            try:
                event = self.negotiation.next_event()
            finally:
                self.sent += self.negotiation.data_to_send()
            if event is NEED_DATA:
                return
            self.events.append(repr(event) if not isinstance(event, Ready) else f"ready {event.mode} {event.contexts}")
            self._answer(event)
            self.sent += self.negotiation.data_to_send()
            if isinstance(event, Ready):
                self._begin(event)
                return

    def _answer(self, event: ServerEvent) -> None:
        negotiation = self.negotiation
        match event:
            case ListExports():
                negotiation.send_export_list([("disk", "a disk"), ("", "")])
            case ExportQuery(name="disk" | ""):
                negotiation.accept_export(EXPORT)
            case MetaContextQuery(option=option, export="disk" | "", queries=queries):
                negotiation.send_meta_contexts(list(enumerate(select_contexts(Option(option), queries, CONTEXTS), 1)))
            case ExportQuery() | MetaContextQuery():
                negotiation.refuse(OptionReplyType.ERR_UNKNOWN, "not present")
            case StartTls():
                negotiation.accept_tls()
                self.used_tls = True
            case Aborted() | Closed():
                self.ended = True

    def _begin(self, ready: Ready) -> None:
        self._ready = ready
        flags = ready.info.flags | (TransmissionFlag.READ_ONLY if self.read_only else TransmissionFlag(0))
        self._transmission = ServerTransmission(ready.mode)
        self._rules = ExportRules(
            SIZE, flags, min_block=512, max_payload=32 << 20, mode=ready.mode, context_ids=ready.contexts
        )
        self._serve(self.negotiation.trailing_data)

    def _serve(self, data: bytes) -> None:
        transmission = self._transmission
        assert transmission is not None
        if self._missing:
            taken = min(self._missing, len(data))
            self._missing -= taken
            data = data[taken:]
            if self._missing:
                return
            assert self._partial is not None
            self._execute(self._partial)
        data = self._kept + data
        while True:
            batch = transmission.parse(memoryview(data).toreadonly(), MAX_BATCH)
            assert 0 <= batch.consumed <= len(data)
            assert len(batch.requests) <= MAX_BATCH
            for request in batch.requests:
                self._execute(request)
            data = data[batch.consumed :]
            if batch.partial is not None:
                self._begin_payload(batch.partial, data)
                return
            if batch.needs_data:
                break
            assert batch.consumed or batch.requests, "it neither goes on nor waits"
        assert len(data) <= (64 << 10) + 64, "more is kept than a header and a small payload"
        self._kept = data

    def _begin_payload(self, request: Request, arrived: bytes) -> None:
        assert len(arrived) < request.length
        self._partial = request
        self._missing = request.length - len(arrived)
        self._kept = b""

    def _execute(self, request: Request) -> None:
        assert self._ready is not None
        assert self._rules is not None
        replies = replies_for(self._ready.mode)
        refused = self._rules.refusal(request)
        self.events.append(
            f"{request.type} {request.flags} {request.cookie} {request.offset} {request.length} {refused}"
        )
        if request.type == Command.DISC:
            return
        if refused is not None:
            self.sent += replies.error(request, *refused)
            return
        assert request.type in (Command.FLUSH, Command.RESIZE) or request.offset + request.length <= SIZE
        assert not (self.read_only and request.type in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
        if request.type == Command.READ and 0 < request.length <= MAX_READ_BYTES:
            self.sent += replies.read_data(request, request.offset, request.length, done=True) + bytes(request.length)
        elif request.type == Command.READ and request.length:
            self.sent += replies.error(request, Errno.EIO, "too long for this")
        elif request.type == Command.BLOCK_STATUS:
            chosen = sorted(request.context_ids or self._ready.contexts)
            for number in chosen:
                extents = [(request.length, 0)]
                self.sent += replies.block_status(request, number, extents, done=number == chosen[-1])
        else:
            self.sent += replies.done(request)


def served(config: int, data: bytes, length: int) -> tuple[Outcome, bool]:
    """What a server makes of bytes in pieces of a length, and whether TLS was begun."""
    end = ServerEnd(config)
    failed = ""
    try:
        for piece in pieces_of(data, length):
            end.receive(piece)
    except RemoteProtocolError as problem:
        failed = str(problem)
    return Outcome(end.events, end.sent, failed), end.used_tls


def server(data: bytes) -> None:
    """The server's end: the handshake and the transmission phase. The first byte chooses what is offered."""
    if not data:
        return
    outcomes = [served(data[0], data[1:], length) for length in PIECES]
    if not any(used_tls for _, used_tls in outcomes):  # what came with STARTTLS is dropped, so there it does matter
        same(outcome for outcome, _ in outcomes)


def same(outcomes: Iterator[Outcome]) -> None:
    first, *others = outcomes
    for other in others:
        assert other.events == first.events
        assert other.failed == first.failed
        assert other.sent == first.sent


# --- the client's end -----------------------------------------------------------------------------------------


class ClientEnd:
    """A client that asks for something of everything.

    Args:
        config: chooses what it wants.
    """

    def __init__(self, config: int) -> None:
        self.negotiation = ClientNegotiation(
            structured=bool(config & 1),
            extended=bool(config & 2),
            tls="require" if config & 4 else "off",
            no_zeroes=bool(config & 8),
        )
        asked = (
            lambda: self.negotiation.connect("disk", contexts=CONTEXTS),
            lambda: self.negotiation.list_exports(),
            lambda: self.negotiation.describe("disk"),
            lambda: self.negotiation.list_meta_contexts("disk", ["base:"]),
        )
        asked[config >> 4 & 3]()
        self.used_tls = False
        self.events: list[str] = []
        self.sent = b""
        self.ended = False
        self._transmission: ClientTransmission | None = None
        self._asked: dict[int, tuple[int, int]] = {}
        self._kept = b""
        self._missing = 0
        self.negotiate()

    def receive(self, data: bytes) -> None:
        if self.ended:
            return
        if self._transmission is None:
            self.negotiation.receive_data(data)
            self.negotiate()
        else:
            self._hear(data)

    def negotiate(self) -> None:
        while True:
            event = self.negotiation.next_event()
            self.sent += self.negotiation.data_to_send()
            if event is NEED_DATA:
                return
            self.events.append(repr(event))
            if isinstance(event, TlsWanted):
                self.used_tls = True
                self.negotiation.tls_established()
                continue
            if isinstance(event, Established):
                self._begin(event)
            else:
                self.ended = True
            return

    def _begin(self, established: Established) -> None:
        transmission = ClientTransmission(established.mode, context_ids=established.contexts)
        self._transmission = transmission
        for command, offset, length in [
            (Command.READ, 0, 512),
            (Command.READ, 8192, 100_000),
            (Command.FLUSH, 0, 0),
            (Command.BLOCK_STATUS, 512, 65536),
            (Command.TRIM, 0, 512),
        ]:
            if command == Command.BLOCK_STATUS and (not established.contexts or established.mode is ReplyMode.SIMPLE):
                continue
            cookie, buffers = transmission.request(command, offset, length)
            self._asked[cookie] = (offset, length)
            self.sent += b"".join(buffers)
        self._hear(self.negotiation.trailing_data)

    def _hear(self, data: bytes) -> None:
        transmission = self._transmission
        assert transmission is not None
        taken = min(self._missing, len(data))
        self._missing -= taken
        if self._missing:
            return
        data = self._kept + data[taken:]
        while True:
            events, consumed = transmission.receive(memoryview(data).toreadonly())
            assert 0 <= consumed <= len(data)
            data = data[consumed:]
            for event in events:
                self._note(event)
            last = events[-1] if events else None
            if not (isinstance(last, DataChunk) and last.data is None):
                break
            self._missing = max(last.length - len(data), 0)
            data = data[last.length :]
            if self._missing:
                break
        self._kept = data

    def _note(self, event: Event) -> None:
        offset, length = self._asked[event.cookie]
        if isinstance(event, DataChunk | HoleChunk):
            assert offset <= event.offset
            assert event.offset + event.length <= offset + length
            assert not isinstance(event, DataChunk) or event.data is None or len(event.data) == event.length
            self.events.append(f"{type(event).__name__} {event.cookie} {event.offset} {event.length}")
        else:
            self.events.append(repr(event))


def client(data: bytes) -> None:
    """The client's end. The first byte chooses what it asks for."""
    if not data:
        return
    for length in PIECES:
        end = ClientEnd(data[0])
        with contextlib.suppress(RemoteProtocolError):
            for piece in pieces_of(data[1:], length):
                end.receive(piece)


# --- texts and images -----------------------------------------------------------------------------------------


def uri(data: bytes) -> None:
    """An NBD URI, which must survive being written and read again."""
    try:
        text = data.decode()
        found = parse_uri(text)
    except (UnicodeDecodeError, UriError):
        return
    assert parse_uri(str(found)) == found


IMAGE = f"/dev/shm/pynbd-fuzz-{os.getpid()}.qcow2"
MAX_IMAGE_READ_BYTES = 1 << 16


def image(data: bytes) -> None:
    """A qcow2 image: opened, and some of it read and looked up."""
    from pynbd.block.errors import BlockError

    try:
        with open(IMAGE, "wb") as file:  # noqa: PTH123  # the shortest way, and it is taken a million times
            file.write(data)
        with contextlib.suppress(OSError, BlockError):
            asyncio.run(open_and_read())
    finally:
        os.unlink(IMAGE)  # noqa: PTH108  # likewise


async def open_and_read() -> None:
    from pynbd.block.backend import BlockBackend
    from pynbd.block.graph import Graph
    from pynbd.block.permissions import Permission

    graph = Graph()
    tree: dict[str, Any] = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": IMAGE}}
    try:
        backend = BlockBackend("fuzz")
        graph.attach(backend, await graph.open(tree), Permission.CONSISTENT_READ, Permission.ALL)
        try:
            length = min(backend.size, MAX_IMAGE_READ_BYTES)
            if length:
                await backend.block_status(0, length)
                await backend.read(0, memoryview(bytearray(length)))
        finally:
            graph.detach(backend)
    finally:
        await graph.close_all()


TARGETS: dict[str, Callable[[bytes], None]] = {"server": server, "client": client, "uri": uri, "image": image}
