"""`TlsWire`: the bytes of a connection through TLS."""

import os
from asyncio import AbstractEventLoop
from collections.abc import Callable

from pynbd.crypto.tls_socket import CHUNK_BYTES, TlsSocket
from pynbd.server.wire import PlainWire


class TlsWire(PlainWire):
    """A `TlsSocket` after its handshake.

    What differs: it may have more than the socket knows of; and what is sent from files is read into a small buffer, so
    that it is encrypted while the processor's cache still has it, and no memory is needed for long answers.

    Args:
        loop, on_readable, on_sent, on_lost, passing: as those of `PlainWire`.
        sock: closed with the wire.
    """

    _sock: TlsSocket
    kernel_receives = False
    late_piece_bytes = CHUNK_BYTES

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: TlsSocket,
        on_readable: Callable[[], None],
        on_sent: Callable[[], None],
        on_lost: Callable[[OSError], None],
        passing: memoryview,
    ) -> None:
        super().__init__(loop, sock, on_readable, on_sent, on_lost, passing)
        self._call_due = False

    def copies_files(self) -> bool:
        return True

    def _send_from_file(self, fd: int, offset: int, length: int) -> int:
        if self._sock.begun:
            return self._sock.send_begun()
        chunk = self._passing[: min(length, CHUNK_BYTES)]
        read = os.preadv(fd, [chunk], offset)
        return self._sock.send(chunk[:read])

    def _send_passing(self, header: bytes, data: memoryview) -> bool:
        # Of what is encrypted a part may have to wait, and must be there still: as any answer it is queued.
        self._queue.appendleft(b"".join((header, data)))
        self.unsent += len(header) + len(data)
        return True

    def receive_into(self, into: memoryview) -> int:
        received = super().receive_into(into)
        if self._sock.more:
            self._call_soon()
        return received

    def resume_reading(self) -> None:
        super().resume_reading()
        if self._sock.more:
            self._call_soon()

    def _call_soon(self) -> None:
        """Nothing will be readable at the socket because of what was taken from it already."""
        if not self._call_due:
            self._call_due = True
            self._loop.call_soon(self._call)

    def _call(self) -> None:
        self._call_due = False
        if self._reading and self._sock.more:
            self._on_readable()
