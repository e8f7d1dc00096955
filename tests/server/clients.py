"""A client for tests, made of the protocol library and a socket, and a server in the same loop for it to talk to."""

import asyncio
import contextlib
import os
import resource
import socket
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbd_protocol.client_negotiation import ClientNegotiation
from nbd_protocol.constants import META_BASE_ALLOCATION, Command, CommandFlag, ReplyMode
from nbd_protocol.negotiation import NEED_DATA
from nbd_protocol.negotiation_events import ClientEvent, Established, Refused
from nbd_protocol.transmission import ClientTransmission, DataChunk, Done, ErrorChunk, Event, HoleChunk, StatusChunk
from nbd_protocol.transmission_outstanding import Outstanding
from nbd_protocol.transmission_server import EXTENDED_REQUEST_CODEC, REQUEST_CODEC
from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.crypto.tls_socket import TlsSocket, receive, send_all
from pynbd.server.connection import Connection
from pynbd.server.export import Export
from pynbd.server.server import NbdServer

LIMIT_S = 30.0
"""No step of a test takes longer, unless something is broken."""

RECEIVE_BYTES = 256 << 10

MODES = list(ReplyMode)
CHUNKED = [ReplyMode.STRUCTURED, ReplyMode.EXTENDED]

Tree = Mapping[str, Any]
Buffer = bytes | bytearray | memoryview


@dataclass
class Reply:
    """All that came of one request."""

    data: bytearray
    offset: int
    error: int = 0
    text: str = ""
    error_offset: int | None = None
    chunks: list[tuple[str, int, int]] = field(default_factory=list)
    extents: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    done: bool = False


class Client:
    """The transmission phase of a connection; `await reply(cookie)` receives whatever comes until that is complete."""

    def __init__(self, sock: socket.socket, established: Established) -> None:
        self.sock = sock
        self.established = established
        self.info = established.info
        self.mode = established.mode
        self.contexts = {name: number for number, name in established.contexts.items()}
        self.transmission = ClientTransmission(established.mode, context_ids=established.contexts)
        self.replies: dict[int, Reply] = {}
        self._buffer = bytearray()
        self._collecting: tuple[Reply, int, int] | None = None
        self._cookie = 1 << 40
        self._receiving = asyncio.Lock()

    # --- asking -------------------------------------------------------------------------------------------

    async def send(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: Buffer | None = None,
        context_ids: Iterable[int] | None = None,
    ) -> int:
        """Send a request; its cookie."""
        cookie, buffers = self.prepared(command, offset, length, flags, payload, context_ids)
        await self.send_bytes(b"".join(buffers))
        return cookie

    def prepared(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: Buffer | None = None,
        context_ids: Iterable[int] | None = None,
    ) -> tuple[int, Sequence[Buffer]]:
        """A request that the caller sends."""
        cookie, buffers = self.transmission.request(command, offset, length, flags, payload, context_ids)
        if command != Command.DISC:
            self.replies[cookie] = Reply(bytearray(length if command == Command.READ else 0), offset)
        return cookie, buffers

    def raw(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
        """The bytes of any request, also of one that no client should send; `last_raw` is its cookie."""
        self._cookie += 1
        cookie = self._cookie
        codec = EXTENDED_REQUEST_CODEC if self.mode is ReplyMode.EXTENDED else REQUEST_CODEC
        self.transmission._outstanding[cookie] = Outstanding(
            cookie, command, flags, offset, length, self.transmission.context_ids
        )
        self.replies[cookie] = Reply(bytearray(length if command == Command.READ else 0), offset)
        return codec.struct.pack(codec.constants[0], flags, command, cookie, offset, length) + payload

    @property
    def last_raw(self) -> int:
        """The cookie of the last `raw` request."""
        return self._cookie

    async def send_bytes(self, data: Buffer) -> None:
        async with asyncio.timeout(LIMIT_S):
            await send_all(self.sock, bytes(data))

    async def ask_raw(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Reply:
        data = self.raw(command, offset, length, flags, payload)
        cookie = self.last_raw
        await self.send_bytes(data)
        return await self.reply(cookie)

    async def ask(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: Buffer | None = None,
        context_ids: Iterable[int] | None = None,
    ) -> Reply:
        """A request and its reply."""
        return await self.reply(await self.send(command, offset, length, flags, payload, context_ids))

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = await self.ask(Command.READ, offset, length, flags)
        assert not reply.error, reply
        return bytes(reply.data)

    async def write(self, offset: int, data: Buffer, flags: int = 0) -> None:
        reply = await self.ask(Command.WRITE, offset, payload=data, flags=flags)
        assert not reply.error, reply

    # --- hearing ------------------------------------------------------------------------------------------

    async def reply(self, cookie: int) -> Reply:
        """Receive until a reply is complete.

        Raises:
            EOFError: the server has closed the connection.
        """
        reply = self.replies[cookie]
        async with asyncio.timeout(LIMIT_S), self._receiving:
            while not reply.done:
                await self._receive()
        return self.replies.pop(cookie)

    async def at_end(self) -> bool:
        """Receive until the server closes the connection; True if every request was answered before."""
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    await self._receive()
        return all(reply.done for reply in self.replies.values())

    async def _receive(self) -> None:
        data = await receive(self.sock, RECEIVE_BYTES)
        if not data:
            raise EOFError
        self._buffer += data
        while self._digest():
            pass

    def _digest(self) -> bool:
        if self._collecting is not None:
            reply, position, missing = self._collecting
            piece = self._buffer[:missing]
            reply.data[position : position + len(piece)] = piece
            del self._buffer[:missing]
            if len(piece) < missing:
                self._collecting = (reply, position + len(piece), missing - len(piece))
                return False
            self._collecting = None
        with memoryview(bytes(self._buffer)) as view:
            events, consumed = self.transmission.receive(view)
            for event in events:
                self._note(event)
        del self._buffer[:consumed]
        # Behind the data that are left to us something may have come already.
        return bool(self._buffer) and any(isinstance(event, DataChunk) and event.data is None for event in events)

    def _note(self, event: Event) -> None:
        reply = self.replies[event.cookie]
        match event:
            case DataChunk(offset=offset, length=length, data=data):
                reply.chunks.append(("data", offset, length))
                start = offset - reply.offset
                if data is None:
                    self._collecting = (reply, start, length)
                else:
                    reply.data[start : start + length] = data
            case HoleChunk(offset=offset, length=length):
                reply.chunks.append(("hole", offset, length))
            case StatusChunk(context_id=number, extents=extents):
                reply.extents[number] = extents
            case ErrorChunk(text=text, offset=where):
                reply.text, reply.error_offset = text, where
            case Done(error=error):
                reply.error, reply.done = error, True

    # --- leaving ------------------------------------------------------------------------------------------

    async def disconnect(self) -> bool:
        """Say DISC, and wait until the server has closed; True if all was answered before."""
        await self.send_bytes(b"".join(self.transmission.request(Command.DISC)[1]))
        complete = await self.at_end()
        self.sock.close()
        return complete


async def negotiate(sock: socket.socket | TlsSocket, negotiation: ClientNegotiation) -> ClientEvent:
    """Go on until the last command is answered."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            event = negotiation.next_event()
            if data := negotiation.data_to_send():
                await send_all(sock, data)
            if event is not NEED_DATA:
                return event
            negotiation.receive_data(await receive(sock, RECEIVE_BYTES))


def negotiation_for(mode: ReplyMode, **options: Any) -> ClientNegotiation:
    return ClientNegotiation(structured=mode is not ReplyMode.SIMPLE, extended=mode is ReplyMode.EXTENDED, **options)


class Served:
    """A server, the graph below it, and the way to it."""

    def __init__(self, graph: Graph, server: NbdServer, address: str | tuple[str, int]) -> None:
        self.graph = graph
        self.server = server
        self.address = address
        self.sockets: list[socket.socket] = []

    def node(self, export: str = "") -> Node:
        return self.server.exports[export].backend.node

    async def open_socket(self, *, receive_bytes: int = 0, send_bytes: int = 0) -> socket.socket:
        """A connected socket; with small kernel buffers, if so asked."""
        sock = socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET)
        self.sockets.append(sock)
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        if send_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.get_running_loop().sock_connect(sock, self.address)
        return sock

    async def connect(
        self,
        export: str = "",
        mode: ReplyMode = ReplyMode.STRUCTURED,
        *,
        contexts: Sequence[str] = (META_BASE_ALLOCATION,),
        receive_bytes: int = 0,
        send_bytes: int = 0,
    ) -> Client:
        """A client in the transmission phase."""
        sock = await self.open_socket(receive_bytes=receive_bytes, send_bytes=send_bytes)
        negotiation = negotiation_for(mode)
        negotiation.connect(export, contexts=contexts)
        event = await negotiate(sock, negotiation)
        assert isinstance(event, Established), event
        assert event.mode is mode
        assert not negotiation.trailing_data
        return Client(sock, event)

    async def refused(self, export: str, mode: ReplyMode = ReplyMode.STRUCTURED) -> Refused:
        sock = await self.open_socket()
        negotiation = negotiation_for(mode)
        negotiation.connect(export)
        event = await negotiate(sock, negotiation)
        assert isinstance(event, Refused), event
        return event

    async def until_gone(self, clients: int = 0) -> None:
        """Wait until no more than so many connections are left."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.server.connections) > clients:
                await asyncio.sleep(0.001)


async def add_export(
    graph: Graph, server: NbdServer, name: str, tree: Tree | Node, *, read_only: bool = False, **options: Any
) -> Export:
    """Open a disk and serve it."""
    node = tree if isinstance(tree, Node) else await graph.open(tree, read_only=read_only)
    backend = BlockBackend(f"export {name!r}")
    held = Permission.CONSISTENT_READ
    if not node.read_only:
        held |= Permission.WRITE | Permission.RESIZE
    graph.attach(backend, node, held)
    export = Export(name, backend, read_only=read_only, **options)
    server.add_export(export)
    return export


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Nothing can be opened meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def serving(
    *trees: Tree, tcp: bool = False, server_options: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[Served]:
    """Serve disks: the first as the default export, the others as `disk1` …; afterwards nothing may be left of it.

    Args:
        trees: the disks.
        tcp: listen on TCP instead of a Unix socket.
        server_options: of the server.
        options: of every export.
    """
    descriptors = open_descriptors()
    graph, server = Graph(), NbdServer([], **(server_options or {}))
    with tempfile.TemporaryDirectory(prefix="pynbd-test-") as folder:
        address: str | tuple[str, int] = str(Path(folder) / "nbd")
        if isinstance(address, str) and not tcp:
            server.listen_unix(address)
        else:
            (address,) = await server.listen_tcp("127.0.0.1", 0)
        for number, tree in enumerate(trees):
            await add_export(graph, server, f"disk{number}" if number else "", tree, **options)
        served = Served(graph, server, address)
        try:
            yield served
        finally:
            for sock in served.sockets:
                sock.close()
            async with asyncio.timeout(LIMIT_S):
                await server.close()
                for export in server.exports.values():
                    graph.detach(export.backend)
                await graph.close_all()
    assert_nothing_left(server)
    assert open_descriptors() == descriptors


def assert_nothing_left(server: NbdServer) -> None:
    """What every test ends with: all connections gone, all memory given back, no task running."""
    assert not server.connections
    assert not server._handshakes
    assert not server._starter.tasks
    assert server.budget.taken == 0
    assert not server.budget.waiting
    assert server.budget.overdrawn_by is None
    assert all(export.clients == 0 for export in server.exports.values())


PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)


def the_connection(served: Served) -> Connection:
    """The only one."""
    (connection,) = served.server.connections
    return connection


async def send_together(client: Client, *requests: tuple[Any, ...]) -> list[int]:
    """Several requests in one go, so that one receive finds them all."""
    prepared = [client.prepared(*request) for request in requests]
    await client.send_bytes(b"".join(b"".join(buffers) for _, buffers in prepared))
    return [cookie for cookie, _ in prepared]


def write(offset: int, payload: bytes) -> tuple[Any, ...]:
    """A write for `send_together`."""
    return (Command.WRITE, offset, 0, 0, payload)
