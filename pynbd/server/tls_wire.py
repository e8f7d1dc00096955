"""`TlsWire`: the bytes of a connection through TLS."""

from asyncio import AbstractEventLoop
from collections.abc import Callable

from pynbd.crypto.tls_socket import TlsSocket
from pynbd.server.wire import PlainWire


class TlsWire(PlainWire):
    """A `TlsSocket` after its handshake. What differs: files can't be sent, and it may have more than the socket knows.

    Args:
        loop, on_readable, on_sent, on_lost: as those of `PlainWire`.
        sock: closed with the wire.
    """

    sends_files = False
    _sock: TlsSocket

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: TlsSocket,
        on_readable: Callable[[], None],
        on_sent: Callable[[], None],
        on_lost: Callable[[OSError], None],
    ) -> None:
        super().__init__(loop, sock, on_readable, on_sent, on_lost)
        self._call_due = False

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
