"""`TlsSocket`: TLS on a non-blocking socket, for who never waits and moves much at a time.

It stands between memory BIOs and the socket: one system call brings up to `RECEIVE_BYTES` of records, and one takes
`CHUNK_BYTES` of them away, where Python's own `SSLSocket` makes two for each record that comes and one for each that
goes. The rest is a socket's: `recv_into`, `send` and `sendmsg` raise BlockingIOError where they would have to wait.
"""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import cast

RECORD_BYTES = 16 << 10
"""The most that one record of TLS carries."""

CHUNK_BYTES = 4 * RECORD_BYTES
"""What is encrypted and sent in one go: more would not stay in the processor's cache between the two."""

RECEIVE_BYTES = 64 << 10
"""What is taken from the socket in one go, still encrypted."""

MAX_BYTES_A_CALL = 1 << 20
"""What one `sendmsg` encrypts before others have their turn."""

Buffer = bytes | bytearray | memoryview


class TlsFailure(OSError):
    """The handshake failed, or what came is no TLS; the connection is of no further use."""


class TlsSocket:
    """One end of TLS. Until `handshake` has returned nothing else may be called but `close`.

    Args:
        sock: connected, non-blocking; it is closed with this.
        context: who we are, and whom we believe.
        server_side: which end we are.
        hostname: the name that the server's certificate must bear, None if any will do.
        identify: gives the name of who is at the other end, at the end of the handshake; or raises TlsFailure.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        hostname: str | None = None,
        identify: Callable[[ssl.SSLObject], str] = lambda _: "",
    ) -> None:
        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=hostname or None
        )
        # With a buffer it gives how much it has read, whatever its annotation says.
        self._read = cast(Callable[[int, memoryview], int], self._ssl.read)
        self._identify = identify
        self._unsent = memoryview(b"")  # records that the socket has not taken yet
        self._begun_bytes = 0  # how much of what the caller sends is in them; it counts as sent when they have left
        self._at_end = False
        self.identity = ""
        """Who is at the other end: a distinguished name, or the user of a key; "" if nobody was asked."""
        self.more = False
        """Whether there may be something to receive of which the socket does not know: it was taken already."""

    @property
    def version(self) -> str:
        """What was agreed on: `TLSv1.3`."""
        return self._ssl.version() or "no TLS"

    def fileno(self) -> int:
        """The socket's descriptor, to be watched."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close at once. The other end is told, if the socket takes that."""
        with contextlib.suppress(OSError, ValueError):  # SSLError is an OSError
            self._ssl.unwrap()
        with contextlib.suppress(OSError):
            self._push()
        self._socket.close()

    # --- before the data path: who wants to wait may wait -----------------------------------------------------

    async def handshake(self) -> None:
        """Come to an agreement with the other end.

        Raises:
            TlsFailure: there is none, and the other end was told why; EACCES if it is not believed, else EPROTO.
            OSError: the connection is lost.
        """
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                await self._push_all()
                await self._fetch_some()
            except ssl.SSLError as problem:
                with contextlib.suppress(OSError):
                    await self._push_all()
                raise failure("the TLS handshake failed", problem, at_end=self._at_end) from problem
            else:
                break
        self.identity = self._identify(self._ssl)
        await self._push_all()

    async def receive(self, limit: int) -> bytes:
        """What is there, waiting until something is; empty at the end.

        Raises:
            TlsFailure, OSError: the connection is lost.
        """
        buffer = bytearray(limit)
        while True:
            try:
                return bytes(buffer[: self.recv_into(memoryview(buffer))])
            except BlockingIOError:
                await self._fetch_some()
                self.more = True

    async def send_all(self, data: bytes) -> None:
        """Send everything, waiting until it has left.

        Raises:
            TlsFailure, OSError: the connection is lost.
        """
        self._encrypt([memoryview(data)])
        await self._push_all()

    async def _fetch_some(self) -> None:
        self._take(await asyncio.get_running_loop().sock_recv(self._socket, RECEIVE_BYTES))

    async def _push_all(self) -> None:
        records = bytes(self._unsent) + self._outgoing.read()
        self._unsent = memoryview(b"")
        if records:
            await asyncio.get_running_loop().sock_sendall(self._socket, records)

    # --- in ---------------------------------------------------------------------------------------------------

    def recv_into(self, into: memoryview) -> int:
        """Receive as much as is there and has room: its length, 0 at the end.

        Raises:
            BlockingIOError: nothing is there now.
            TlsFailure, OSError: the connection is lost.
        """
        filled, room = 0, len(into)
        is_empty = False if self.more else self._fetch()
        ended = False
        while filled < room:
            try:
                count = self._read(room - filled, into[filled:])
            except ssl.SSLWantReadError:
                if is_empty:
                    break
                is_empty = self._fetch()
                continue
            except ssl.SSLError as problem:
                if not self._at_end:
                    with contextlib.suppress(OSError):
                        self._push()  # the other end is told why
                    raise failure("receiving failed", problem) from problem
                count = 0  # it hung up without a goodbye, as most do
            if not count:
                ended = True
                break
            filled += count
        self.more = filled == room or (ended and filled > 0)
        if self._outgoing.pending and not self._unsent:
            with contextlib.suppress(OSError):
                self._push()  # the protocol's own answers, to a change of keys for example
        if not filled and not ended:
            raise BlockingIOError(errno.EAGAIN, "nothing to receive")
        return filled

    def _fetch(self) -> bool:
        """Take records from the socket; whether it is empty then."""
        try:
            received = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        self._take(received)
        return len(received) < RECEIVE_BYTES

    def _take(self, received: bytes) -> None:
        if received:
            self._incoming.write(received)
        elif not self._at_end:
            self._at_end = True
            self._incoming.write_eof()

    # --- out --------------------------------------------------------------------------------------------------

    def send(self, data: Buffer) -> int:
        """As `sendmsg`, of one buffer."""
        return self.sendmsg((data,))

    @property
    def begun(self) -> bool:
        """Whether something was encrypted, and not told as sent yet."""
        return bool(self._begun_bytes)

    def send_begun(self) -> int:
        """Send what was begun with, without being given it again: how many bytes that were.

        Raises:
            BlockingIOError: it can't be sent now.
            OSError: the connection is lost.
        """
        self._push()
        begun, self._begun_bytes = self._begun_bytes, 0
        return begun

    def sendmsg(self, buffers: Sequence[Buffer], ancillary: Sequence[object] = (), flags: int = 0) -> int:
        """Send what can be sent: how many bytes that were.

        What was encrypted and has not left yet does not count: the caller sends it again, the same bytes at the
        beginning, and is told of them then. With MSG_MORE a few bytes count as sent already, and leave with the next.

        Raises:
            BlockingIOError: none can be sent now.
            TlsFailure, OSError: the connection is lost.
        """
        if self._unsent:
            self._push()
        elif flags & socket.MSG_MORE and not self._begun_bytes and sum(map(len, buffers)) < RECORD_BYTES:
            return self._encrypt([memoryview(buffer) for buffer in buffers])
        sent, self._begun_bytes = self._begun_bytes, 0
        for chunk in chunks(buffers, sent):
            size = self._encrypt(chunk)
            try:
                self._push()
            except BlockingIOError:
                self._begun_bytes = size
                if not sent:
                    raise
                break
            sent += size
            if sent >= MAX_BYTES_A_CALL:
                break
        return sent

    def _encrypt(self, chunk: Sequence[memoryview]) -> int:
        """Make records of a chunk; its size."""
        size = sum(map(len, chunk))
        if len(chunk) > 1 and size <= CHUNK_BYTES and max(map(len, chunk)) < RECORD_BYTES:
            chunk = (memoryview(b"".join(chunk)),)  # a record for each of many small ones would cost more
        try:
            for piece in chunk:
                if piece:
                    self._ssl.write(piece)
        except ssl.SSLError as problem:
            raise failure("sending failed", problem) from problem
        return size

    def _push(self) -> None:
        """Give records to the socket.

        Raises:
            BlockingIOError: it has not taken all of them.
        """
        records = self._unsent or memoryview(self._outgoing.read())
        try:
            while records:
                records = records[self._socket.send(records) :] or memoryview(self._outgoing.read())
        except (BlockingIOError, InterruptedError):
            raise BlockingIOError(errno.EAGAIN, "the socket is full") from None
        finally:
            self._unsent = records


def chunks(buffers: Sequence[Buffer], skip: int) -> Iterator[list[memoryview]]:
    """Everything behind the first `skip` bytes, in chunks of up to `CHUNK_BYTES`."""
    chunk: list[memoryview] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        start, end = skip, len(buffer)
        if start >= end:
            skip -= end
            continue
        skip = 0
        view = memoryview(buffer)
        while start < end:
            piece = view[start : start + room]
            chunk.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk


def failure(what: str, problem: ssl.SSLError, *, at_end: bool = False) -> TlsFailure:
    """What OpenSSL says, as an OSError that people understand; its own errno means something else."""
    if isinstance(problem, ssl.SSLCertVerificationError):
        return TlsFailure(errno.EACCES, f"{what}: the certificate is not accepted: {problem.verify_message}")
    if at_end and isinstance(problem, ssl.SSLEOFError):
        return TlsFailure(errno.ECONNRESET, f"{what}: the other end hung up")
    reason = (problem.reason or str(problem)).replace("_", " ").lower()
    return TlsFailure(errno.EPROTO, f"{what}: {reason}")


async def receive(sock: socket.socket | TlsSocket, limit: int) -> bytes:
    """What is there, from a socket of either kind, waiting until something is; empty at the end.

    Raises:
        OSError: the connection is lost.
    """
    if isinstance(sock, TlsSocket):
        return await sock.receive(limit)
    return await asyncio.get_running_loop().sock_recv(sock, limit)


async def send_all(sock: socket.socket | TlsSocket, data: bytes) -> None:
    """Send everything, on a socket of either kind, waiting until it has left.

    Raises:
        OSError: the connection is lost.
    """
    if isinstance(sock, TlsSocket):
        await sock.send_all(data)
    else:
        await asyncio.get_running_loop().sock_sendall(sock, data)
