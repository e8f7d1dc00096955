"""One socket in the transmission phase: requests go out in batches, replies come in as they like.

A non-blocking socket, plain or with TLS in it, watched by the event loop. What was asked for within one turn of the
loop leaves in one `sendmsg`; small replies are received many at a time; large read payloads are received where they
belong.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final

from nbd_protocol.constants import META_BASE_ALLOCATION, Command
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError, nbd_to_errno
from nbd_protocol.negotiation_events import Established
from nbd_protocol.transmission import ClientTransmission, DataChunk, Done, ErrorChunk, Event, HoleChunk, StatusChunk
from pynbd.crypto.tls_socket import TlsSocket
from pynbd.storage.nbd.durability import Durability

RECEIVE_BYTES = 256 * 1024
"""The receive buffer: replies of many small reads, or the largest payload that is not received in place."""

LARGE_READ_BYTES = 16 * 1024
"""Reads from here up are received straight into the caller's buffer …"""

PEEK_BYTES = 512
"""… and while one is due no more than this is received beside it, because that has to be copied."""

MAX_WAKEUP_BYTES = 4 << 20
"""What is received before the rest of the process gets its turn."""

MAX_VECTORS = 512
"""Buffers of one `sendmsg`; the kernel takes 1024."""

ZEROES = bytes(1 << 20)


class Request:
    """A request from when it is made until it is answered, over as many connections as that takes.

    Args:
        command: what to do.
        offset: in bytes.
        length: in bytes.
        flags: `CommandFlag` bits.
        data: what to write; it stays the caller's and unchanged until the request is answered.
        into: where read bytes go.
        volatile: a write that is not durable when it is answered.
    """

    __slots__ = (
        "answered_before",
        "command",
        "data",
        "error",
        "extents",
        "flags",
        "future",
        "into",
        "length",
        "offset",
        "sent_at",
        "text",
        "volatile",
    )

    def __init__(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        data: memoryview | None = None,
        into: memoryview | None = None,
        volatile: bool = False,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.data = data
        self.into = into
        self.volatile = volatile
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.extents: dict[int, tuple[tuple[int, int], ...]] = {}
        self.text = ""
        self.error = 0
        self.sent_at = 0
        self.answered_before = 0

    def __str__(self) -> str:
        where = f" at {self.offset} for {self.length} bytes" if self.length else ""
        return f"{self.command.name.lower()}{where}"

    def fail(self, code: int, problem: str) -> None:
        """Answer it with an error."""
        if not self.future.done():
            self.future.set_exception(OSError(code, problem))

    def settle(self, name: str) -> None:
        """Answer it with what the server said."""
        if self.future.done():
            return
        if self.error:
            code = nbd_to_errno(self.error)
            self.fail(code, f"{name}: {self}: the server says {self.text or os.strerror(code)!r}")
        else:
            self.future.set_result(None)


Lost = Callable[["Connection", str, list[Request]], None]
"""Called once when a connection breaks, with the reason and what was not answered, oldest first."""


class Connection:
    """A connection to one export.

    Args:
        name: whose it is, for messages.
        connected: the socket, non-blocking; it is the connection's from now on.
        established: what was negotiated.
        trailing_data: what was received behind the negotiation.
        durability: where answered writes are counted.
        lost: see `Lost`.
        keeps_refused: whether a server that is shutting down (ESHUTDOWN) counts as lost, so that what it refuses is
            not answered but given to `lost`.

    Nothing is sent before the event loop's next turn.
    """

    def __init__(
        self,
        name: str,
        connected: socket.socket | TlsSocket,
        established: Established,
        trailing_data: bytes,
        durability: Durability,
        lost: Lost,
        *,
        keeps_refused: bool = False,
    ) -> None:
        self.name: Final = name
        self.established: Final = established
        self.contexts: Final = {context: number for number, context in established.contexts.items()}
        self.base_allocation: Final = self.contexts.get(META_BASE_ALLOCATION)
        self.leaving = False
        """The server shuts down: give it nothing more."""
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._secure = connected if isinstance(connected, TlsSocket) else None
        self._durability = durability
        self._lost = lost
        self._keeps_refused = keeps_refused
        self._transmission = ClientTransmission(
            established.mode,
            max_payload=established.info.max_payload,
            context_ids=established.contexts,
            large_payload=LARGE_READ_BYTES,
        )
        self._requests: dict[int, Request] = {}
        self._refused: list[Request] = []
        self._large_reads = 0
        self._closed = False
        # Sending: what is queued, how many bytes that ever was, how many have left, and who was answered before that.
        self._outgoing: list[bytes | bytearray | memoryview] = []
        self._queued_bytes = 0
        self._sent_bytes = 0
        self._answered_early: list[Request] = []
        self._sending = False  # `_send` will be called
        self._full = False  # … when the socket takes more
        # Receiving: bytes not understood yet, and where a large payload goes.
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._filled = len(trailing_data)
        self._buffer[: self._filled] = trailing_data
        self._in_place: memoryview | None = None
        self._loop.add_reader(connected.fileno(), self._readable)
        if trailing_data or self._more_than_readable:
            self._loop.call_soon(self._readable)

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        return len(self._requests)

    # --- out ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Send a request in the next turn of the loop; its future tells the rest.

        Raises:
            LocalProtocolError: it can't be said on this connection; nothing was sent.
        """
        cookie, buffers = self._transmission.request(
            request.command, request.offset, request.length, request.flags, request.data
        )
        self._requests[cookie] = request
        for buffer in buffers:
            self._queued_bytes += len(buffer)
        request.sent_at = self._queued_bytes
        self._outgoing += buffers
        if request.into is not None and request.length >= LARGE_READ_BYTES:
            self._large_reads += 1
        elif request.command is Command.FLUSH:
            request.answered_before = self._durability.answered
        if not self._sending:
            self._sending = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        if self._closed:
            return
        try:
            while self._outgoing:
                batch = self._outgoing[:MAX_VECTORS]
                sent = self._socket.sendmsg(batch)
                self._sent_bytes += sent
                self._drop_sent(batch, sent)
        except BlockingIOError:
            if not self._full:
                self._full = True
                self._loop.add_writer(self._socket.fileno(), self._send)
        except OSError as problem:
            self._lose(f"sending failed: {problem.strerror}")
            return
        else:
            self._sending = False
            if self._full:
                self._full = False
                self._loop.remove_writer(self._socket.fileno())
        if self._answered_early:
            self._settle_answered_early()

    def _drop_sent(self, batch: list[bytes | bytearray | memoryview], sent: int) -> None:
        for number, buffer in enumerate(batch):
            if sent < len(buffer):
                self._outgoing[number] = memoryview(buffer)[sent:]
                del self._outgoing[:number]
                return
            sent -= len(buffer)
        del self._outgoing[: len(batch)]

    # --- in -------------------------------------------------------------------------------------------------

    @property
    def _more_than_readable(self) -> bool:
        """Whether there may be something to receive of which the socket will not tell."""
        return self._secure is not None and self._secure.more

    def _readable(self) -> None:
        if self._closed:
            return
        try:
            self._receive()
            if self._secure is not None and self._secure.more and not self._closed:
                self._loop.call_soon(self._readable)
        except OSError as problem:
            self._lose(f"receiving failed: {problem.strerror or problem}")
        except RemoteProtocolError as problem:
            self._lose(f"the server broke the protocol: {problem}")
        except BaseException as problem:
            # A fault of ours: nobody must wait for ever because of it.
            self._lose(f"{type(problem).__name__}: {problem}")
            raise

    def _receive(self) -> None:
        budget = MAX_WAKEUP_BYTES
        if self._filled and self._in_place is None:
            self._understand()
        while budget > 0 and not self._closed:
            target = self._in_place
            if target is None:
                end = self._filled + PEEK_BYTES if self._large_reads else RECEIVE_BYTES
                target = self._buffer[self._filled : end]
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError:
                return
            if not count:
                self._lose("the server closed the connection")
                return
            budget -= count
            if self._in_place is None:
                self._filled += count
                self._understand()
            elif count < len(target):
                self._in_place = target[count:]
                continue
            else:
                self._in_place = None
                self._understand()
            if count < len(target) and self._in_place is None:
                return  # the socket is empty: asking again would only be told so

    def _understand(self) -> None:
        """Handle everything that is whole in the buffer, and keep the rest."""
        start = 0
        while True:
            events, consumed = self._transmission.receive(self._buffer[start : self._filled])
            start += consumed
            for event in events:
                self._handle(event)
            target = self._in_place
            if target is None:
                break
            here = min(len(target), self._filled - start)
            target[:here] = self._buffer[start : start + here]
            start += here
            if here < len(target):
                self._in_place = target[here:]
                break
            self._in_place = None
        rest = self._filled - start
        if rest and start:
            self._buffer[:rest] = self._buffer[start : self._filled]
        self._filled = rest
        if self.leaving and not self._requests:
            self._lose("the server is shutting down")

    def _handle(self, event: Event) -> None:
        kind = type(event)
        request = self._requests[event.cookie]
        if kind is Done:
            self._finish(request, event)  # type: ignore[arg-type]  # the class was looked at
        elif kind is DataChunk:
            assert isinstance(event, DataChunk)
            assert request.into is not None
            start = event.offset - request.offset
            if event.data is None:
                self._in_place = request.into[start : start + event.length]
            else:
                request.into[start : start + event.length] = event.data
        elif isinstance(event, HoleChunk):
            assert request.into is not None
            fill_zeroes(request.into, event.offset - request.offset, event.length)
        elif isinstance(event, StatusChunk):
            request.extents[event.context_id] = event.extents
        elif isinstance(event, ErrorChunk) and not request.text:
            request.text = event.text if event.offset is None else f"{event.text} (at offset {event.offset})"

    def _finish(self, request: Request, done: Done) -> None:
        del self._requests[done.cookie]
        if request.into is not None and request.length >= LARGE_READ_BYTES:
            self._large_reads -= 1
        request.error = done.error
        if done.error == errno.ESHUTDOWN and self._keeps_refused:
            self._refused.append(request)
            self.leaving = True
            return
        if not done.error:
            # Counted here and not when the caller wakes up: the connection may be lost in between.
            if request.volatile:
                self._durability.answered += 1
            elif request.command is Command.FLUSH:
                self._durability.flush_answered(request.answered_before)
        if request.sent_at > self._sent_bytes:
            # The payload is the caller's again once this is answered, so it has to leave first.
            self._answered_early.append(request)
        else:
            request.settle(self.name)

    def _settle_answered_early(self) -> None:
        waiting, self._answered_early = self._answered_early, []
        for request in waiting:
            if request.sent_at > self._sent_bytes:
                self._answered_early.append(request)
            else:
                request.settle(self.name)

    # --- the end --------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> None:
        if self._closed:
            return
        self._close_socket()
        for request in self._answered_early:
            request.settle(self.name)
        unanswered = [*self._refused, *self._requests.values()]
        self._requests.clear()
        for request in unanswered:
            request.text, request.error = "", 0
            request.extents = {}
        self._durability.connection_lost()
        self._lost(self, reason, unanswered)

    def _close_socket(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()

    def close(self) -> None:
        """Say goodbye and close the socket. Nothing should be in flight; what is, fails with ESHUTDOWN."""
        if self._closed:
            return
        try:
            _, buffers = self._transmission.request(Command.DISC)
            self._socket.sendmsg(buffers)
        except (OSError, RemoteProtocolError, LocalProtocolError):
            pass  # a server that is gone needs no goodbye
        self._close_socket()
        for request in [*self._answered_early, *self._refused, *self._requests.values()]:
            request.fail(errno.ESHUTDOWN, f"{self.name}: {request}: the node was closed")


def fill_zeroes(into: memoryview, start: int, length: int) -> None:
    """Make a part of a buffer zero."""
    end = start + length
    while start < end:
        size = min(end - start, len(ZEROES))
        into[start : start + size] = ZEROES[:size]
        start += size
