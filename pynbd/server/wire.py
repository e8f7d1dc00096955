"""`Wire`: how a connection's bytes come and go. One wire is a plain socket, another one is in `tls_wire.py`.

A wire never waits: what can't be sent at once is queued, and goes on when the socket takes more.
"""

import errno
import os
import socket
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from pynbd.crypto.tls_socket import TlsSocket
from pynbd.server.buffers import Buffer
from pynbd.server.holds import Holds
from pynbd.server.late_reads import LateRead
from pynbd.server.loop import ServingLoop
from pynbd.server.spans import Deferred, FileSpan
from pynbd.storage import linux

MAX_VECTORS = 512
"""Buffers of one `sendmsg`; the kernel takes 1024."""

SOCKET_BUFFER_BYTES = 4 << 20
"""What is asked of the kernel for each direction; it gives as much as its limits allow."""

MAX_BYTES_A_TURN = 4 << 20
"""What is sent to one client before the others have their turn: one that reads quickly would never let go."""

PIECE_BYTES = 256 << 10
"""What is sent from a file with one call through a Unix socket."""

BEHIND_BYTES = 256 << 10
"""A client that has so much to fetch still is slower than we are."""

JOINED_ANSWER_BYTES = 32 << 10
"""Answers up to this length together are copied into one buffer: a vectored send costs more for small ones."""

Item = Buffer | Deferred


class Wire(Protocol):
    """What a connection needs of the bytes' way in and out."""

    kernel_receives: bool
    """Whether it is the kernel that puts received bytes where they are to go, and not this program."""
    holds_spans: bool
    """Whether it is known when the peer has fetched what was sent from a file. If not, what may move is not sent so."""
    unsent: int
    """Bytes that are queued in memory (what is deferred counts nothing)."""
    moved: int
    """Bytes that have gone either way since the start: whether a peer makes progress."""

    @property
    def queued(self) -> bool:
        """Whether anything waits to be sent."""

    @property
    def holding(self) -> bool:
        """Whether the peer has not fetched yet what must stay in its place for it."""

    def receive_into(self, into: memoryview) -> int:
        """Receive what is there: its length, 0 at the end, -1 if nothing is there now.

        Raises:
            OSError: the connection is lost.
        """

    def send(self, items: list[Item]) -> None:
        """Send what can be sent, queue the rest.

        Raises:
            OSError: the connection is lost.
        """

    def send_borrowed(self, view: memoryview) -> None:
        """As `send`, for one buffer that is used again at once: what is not sent is copied."""

    def send_borrowed_parts(self, parts: Sequence[Buffer]) -> None:
        """As `send_borrowed`, for several buffers."""

    def copies_files(self) -> bool:
        """Whether bytes of a file had better be read here and sent: the peer is behind, or can't be sent files."""

    def send_with_file(self, view: memoryview, fd: int, offset: int, length: int) -> None:
        """As `send_borrowed`, and then bytes of a file, which are in memory.

        Raises:
            OSError: the connection is lost; or EIO, the file has not so many bytes any more.
        """

    def pause_reading(self) -> None:
        """Do not call `on_readable` until `resume_reading`."""

    def resume_reading(self) -> None:
        """Call `on_readable` whenever there is something to receive."""

    def close(self) -> int:
        """Close at once; what is queued is dropped. Returns how many of it were deferred."""


class PlainWire:
    """A non-blocking socket.

    Args:
        loop: the event loop.
        sock: connected, non-blocking; it is closed with the wire.
        on_readable: there is something to receive, or the peer is gone.
        on_sent: the queue got shorter.
        on_lost: sending failed while nobody was calling.
        passing: a buffer of at least `PIECE_BYTES` that others use, too: nothing stays in it after a call.
    """

    kernel_receives = True
    late_piece_bytes = PIECE_BYTES
    """What is sent of a late read with one call."""

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: socket.socket | TlsSocket,
        on_readable: Callable[[], None],
        on_sent: Callable[[], None],
        on_lost: Callable[[OSError], None],
        passing: memoryview,
    ) -> None:
        self._loop = loop
        self._add_reader: Callable[..., None] = loop.add_reader
        self._remove_reader: Callable[[int], object] = loop.remove_reader
        if isinstance(loop, ServingLoop):
            self._add_reader, self._remove_reader = loop.add_direct_reader, loop.remove_direct_reader
        self._sock = sock
        self._fd = sock.fileno()
        self._recv_into, self._send = sock.recv_into, sock.send  # each is called for every batch
        self._on_readable = on_readable
        self._on_sent = on_sent
        self._on_lost = on_lost
        self._queue: deque[Item] = deque()
        self._passing = passing
        # On one machine, bytes that TCP has acknowledged may lie in their pages still.
        self._is_unix = self.holds_spans = isinstance(sock, socket.socket) and sock.family == socket.AF_UNIX
        self._holds = Holds(loop, self._fetched, self._copy_span, on_sent)
        self._may_be_behind_at = 0
        """Before so many bytes have gone, nobody need ask again whether the client is behind."""
        self._reading = False
        self._writing = False
        self._closed = False
        self.unsent = 0
        self.moved = self._received = 0

    def receive_into(self, into: memoryview) -> int:
        try:
            received = self._recv_into(into)
        except (BlockingIOError, InterruptedError):
            return -1
        self.moved += received
        self._received += received
        return received

    def send(self, items: list[Item]) -> None:
        if self._closed or not items:
            return
        idle = not self._queue
        self._queue.extend(items)
        self.unsent += sum(len(item) for item in items if not isinstance(item, Deferred))
        if idle:
            self._drain()
        self._watch()

    def send_borrowed(self, view: memoryview) -> None:
        if self._closed:
            return
        sent = 0
        if not self._queue:
            # The usual case: one buffer with all answers of a wake-up, and the socket takes it whole.
            try:
                sent = self._send(view)
            except (BlockingIOError, InterruptedError):
                sent = 0
            self.moved += sent
            if sent == len(view):
                return
        self._queue.append(bytes(view[sent:]))
        self.unsent += len(view) - sent
        self._watch()

    def send_borrowed_parts(self, parts: Sequence[Buffer]) -> None:
        self._send_borrowed(parts, 0)

    def _send_borrowed(self, parts: Sequence[Buffer], flags: int) -> None:
        if self._closed:
            return
        sent = 0
        if not self._queue:
            try:
                sent = self._sock.sendmsg(parts, (), flags)
            except (BlockingIOError, InterruptedError):
                sent = 0
            self.moved += sent
        for part in parts:
            if sent < len(part):
                self._queue.append(bytes(part[sent:]))
                self.unsent += len(part) - sent
            sent = max(sent - len(part), 0)
        self._watch()

    def copies_files(self) -> bool:
        if self._queue:
            return True
        if self._is_unix and self.moved >= self._may_be_behind_at:
            unfetched = linux.unfetched_bytes(self._fd)
            if unfetched > BEHIND_BYTES:
                return True
            self._may_be_behind_at = self.moved + BEHIND_BYTES - unfetched
        return False

    def send_with_file(self, view: memoryview, fd: int, offset: int, length: int) -> None:
        end = offset + length
        self._send_borrowed([view], socket.MSG_MORE)
        try:
            while offset < end and not self._queue and not self._closed:
                sent = os.sendfile(self._fd, fd, offset, end - offset)
                if not sent:
                    break
                self.moved += sent
                offset += sent
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError:
            pass  # the socket is full, or this file can't be sent so: the rest is copied
        if offset < end and not self._closed:
            rest = os.pread(fd, end - offset, offset)
            if len(rest) < end - offset:
                raise OSError(errno.EIO, f"the file ends at offset {offset + len(rest)}")
            self._queue.append(rest)
            self.unsent += len(rest)
            self._watch()

    def _watch(self) -> None:
        if self._queue and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._on_writable)

    @property
    def queued(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._queue)

    @property
    def holding(self) -> bool:
        return self._holds.any_left()

    def _on_writable(self) -> None:
        try:
            self._drain()
        except OSError as problem:
            self._on_lost(problem)
            return
        if not self._queue and self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self._on_sent()

    def _drain(self) -> None:
        """Send until the queue is empty, the socket is full, or it is somebody else's turn."""
        end_of_turn = self.moved + MAX_BYTES_A_TURN
        while self._queue and self.moved < end_of_turn:
            try:
                head = self._queue[0]
                if isinstance(head, FileSpan):
                    progress = self._send_span(head)
                elif isinstance(head, LateRead):
                    progress = self._send_late(head)
                else:
                    progress = self._send_vectors()
            except (BlockingIOError, InterruptedError):
                return
            if not progress:
                return

    def _send_vectors(self) -> bool:
        """Send buffers up to the next thing that is deferred; False when the socket did not take all of them."""
        queue = self._queue
        vectors: list[Buffer] = []
        total = 0
        for item in queue:
            if isinstance(item, Deferred) or len(vectors) == MAX_VECTORS:
                break
            vectors.append(item)
            total += len(item)
        more_follows = len(vectors) < len(queue)
        sent = self._sock.sendmsg(vectors, (), socket.MSG_MORE if more_follows else 0)
        self.moved += sent
        self.unsent -= sent
        left = sent
        for _ in vectors:
            head = queue[0]
            if len(head) > left:
                queue[0] = memoryview(head)[left:]  # type: ignore[arg-type]  # only buffers were taken
                break
            left -= len(head)
            queue.popleft()
        return sent == total

    def _send_late(self, read: LateRead) -> bool:
        if read.span is not None:
            return self._send_span(read.span)
        if self.holds_spans and (begun := read.begin_span(self._holds.revoke)) is not None:
            header, release = begun
            self._holds.begin(release)
            self._queue.appendleft(header)
            self.unsent += len(header)
            return True
        piece = read.next_piece(self._passing[: self.late_piece_bytes])
        if not len(read) or piece is None:
            self._queue.popleft()
        if piece is None:
            return True
        header, length = piece
        return self._send_passing(header, self._passing[:length])

    def _send_passing(self, header: bytes, data: memoryview) -> bool:
        """Send both ahead of the queue; what the socket does not take is copied. False when it took only a part."""
        try:
            sent = self._sock.sendmsg((header, data))
        except (BlockingIOError, InterruptedError):
            sent = 0
        self.moved += sent
        total = len(header) + len(data)
        if sent == total:
            return True
        rest = b"".join((header[sent:], data[max(sent - len(header), 0) :]))
        self._queue.appendleft(rest)
        self.unsent += len(rest)
        return False

    def _send_span(self, span: FileSpan) -> bool:
        problem: OSError | None = None
        if span.length:
            try:
                sent = self._send_from_file(span.file.fd, span.offset, span.length)
            except (BlockingIOError, InterruptedError, BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                problem, sent = error, 0
            self.moved += sent
            if sent:
                span.offset += sent
                span.length -= sent
                if span.length:
                    return True
            elif problem is None:
                problem = OSError(errno.EIO, f"the file ends at offset {span.offset}")
        # The header has promised the bytes: what the file can't give is made up, and the end of the reply says so.
        self._replace_span(0, span, bytes(span.length), problem)
        self._holds.end(self.moved - self._received)
        return True

    def _replace_span(self, index: int, span: FileSpan, rest: bytes, problem: OSError | None = None) -> None:
        """Queue bytes instead of what is left of a span, alone or of a late read, at a place in the queue."""
        queue = self._queue
        span.release()
        try:
            end = span.finish(problem)
        except OSError:
            del queue[index]  # nothing of it is left
            raise
        item = queue[index]
        if item is span or not len(item):
            del queue[index]
        for part in (end, rest):
            if len(part):
                queue.insert(index, part)
                self.unsent += len(part)

    def _copy_span(self) -> None:
        """Keep what is left of a late read's span in memory: it may not stay any longer where it lies.

        Seldom needed; it waits for the disk where the kernel has dropped what was in memory when that was asked.
        """
        try:
            self._copy_late_span()
        except (OSError, MemoryError) as problem:
            self._on_lost(problem if isinstance(problem, OSError) else OSError(errno.ENOMEM, str(problem)))
        else:
            self._on_sent()  # more is in memory than before

    def _copy_late_span(self) -> None:
        for index, item in enumerate(self._queue):
            if isinstance(item, LateRead) and (span := item.span) is not None:
                try:
                    rest, problem = os.pread(span.file.fd, span.length, span.offset), None
                except OSError as error:
                    rest, problem = b"", error
                if problem is None and len(rest) < span.length:
                    problem = OSError(errno.EIO, f"the file ends at offset {span.offset + len(rest)}")
                self._replace_span(index, span, rest + bytes(span.length - len(rest)), problem)
                return

    def _fetched(self) -> int:
        """How much of what was sent to a Unix client it has fetched, at the least."""
        return self.moved - self._received - linux.unfetched_bytes(self._fd)

    def _send_from_file(self, fd: int, offset: int, length: int) -> int:
        """Send some of a file's bytes, and say how many; 0 where the file ends.

        Pages that are sent through a Unix socket are copied by the client, out of memory that no cache has: the work
        is all its own. While it keeps up that is best. When it is behind, the copying is done here: then the client
        finds the bytes in the cache, and both processors have something to do.

        Raises:
            OSError: the file or the connection has failed, or the socket is full.
        """
        if not self._is_unix:
            return os.sendfile(self._fd, fd, offset, min(length, MAX_BYTES_A_TURN))
        length = min(length, PIECE_BYTES, MAX_BYTES_A_TURN)
        if linux.unfetched_bytes(self._fd) <= BEHIND_BYTES:
            return os.sendfile(self._fd, fd, offset, length)
        read = os.preadv(fd, [self._passing[:length]], offset)
        return self._sock.send(self._passing[:read]) if read else 0

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._remove_reader(self._fd)

    def resume_reading(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._add_reader(self._fd, self._on_readable)

    def close(self) -> int:
        if self._closed:
            return 0
        self._closed = True
        self._holds.close()
        self.pause_reading()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        deferred = [item for item in self._queue if isinstance(item, Deferred)]
        for item in deferred:
            item.release()
        self._queue.clear()
        self.unsent = 0
        self._sock.close()
        return len(deferred)


def tune(sock: socket.socket) -> None:
    """Make a connected socket ready for block traffic: no delays for small replies, large buffers."""
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return  # TCP tunes its buffers by itself, as long as nobody sets them
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def together(items: list[Item]) -> list[Item]:
    """The same bytes in one buffer, if they are few."""
    if len(items) == 1:
        return items
    total = 0
    for item in items:
        if isinstance(item, Deferred):
            return items
        total += len(item)
    return [b"".join(items)] if total <= JOINED_ANSWER_BYTES else items  # type: ignore[arg-type]  # nothing deferred is among them
