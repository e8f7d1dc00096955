"""`WorkerEnd`: a worker's end of what it has with its server; see `pynbd.server.workers`."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from pynbd.block.errors import BlockError
from pynbd.server.server import NbdServer
from pynbd.server.worker_messages import (
    MAX_ORDER_BYTES,
    MAX_TEXT_CHARACTERS,
    Failed,
    Order,
    Ready,
    Tally,
    encode,
)

log = logging.getLogger(__name__)


class WorkerEnd:
    """What a worker is told, and tells. To be made on its event loop.

    Args:
        sock: non-blocking; closed at the end by whoever made it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.begun = asyncio.Event()
        """The disks can be opened."""
        self.stopped = asyncio.Event()
        """It is to end in order: it was told so, or the server is gone."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._server: NbdServer | None = None
        self._read_again: Callable[[str], None] | None = None
        self._opening: asyncio.Task[Any] | None = None
        self._received = 0
        self._tally_due = False
        self._loop.add_reader(sock, self._read)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let what is done inside be broken off when it is to end, or the server is gone: opening may wait for long.

        Raises:
            BlockError: it was.
        """
        self._opening = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            raise BlockError("stopped before clients could connect") from None
        finally:
            self._opening = None

    def serve(self, server: NbdServer, read_again: Callable[[str], None]) -> None:
        """All is open: tell so, and serve whoever is handed over.

        Args:
            server: with the exports.
            read_again: reads files again; it is told their name.
        """
        self._server, self._read_again = server, read_again
        for hooks in (server.on_client_come, server.on_client_gone, server.on_handshake_ended):
            hooks.append(self._tell_soon)
        exports = [(export.backend.size, export.read_only) for export in server.exports.values()]
        self._sock.send(encode(Ready(exports)))

    def fail(self, text: str, errno: int | None) -> None:
        """Tell why it ends."""
        with contextlib.suppress(OSError):
            self._sock.send(encode(Failed(text[:MAX_TEXT_CHARACTERS], errno)))

    # --- what it is told ----------------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            try:
                raw, descriptors, _, _ = socket.recv_fds(self._sock, MAX_ORDER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                raw, descriptors = b"", []
            if not raw:
                self._loop.remove_reader(self._sock)
                self._stop()
                return
            self._obey(raw, descriptors)

    def _obey(self, raw: bytes, descriptors: list[int]) -> None:
        if raw == Order.CLIENT.value:
            self._receive(descriptors)
        elif raw == Order.BEGIN.value:
            self.begun.set()
        elif raw == Order.STOP.value:
            self._stop()
        elif raw == Order.END.value:
            os._exit(1)
        elif raw.startswith(Order.RELOAD.value) and self._read_again is not None:
            self._read_again(raw.removeprefix(Order.RELOAD.value).decode())

    def _stop(self) -> None:
        self.begun.set()
        self.stopped.set()
        if self._opening is not None:
            self._opening.cancel()

    def _receive(self, descriptors: list[int]) -> None:
        self._received += 1
        self._tell_soon()
        if not descriptors:
            log.error("can't take a client: there is no descriptor left for it")
            return
        sock = socket.socket(fileno=descriptors[0])
        try:
            address = sock.getpeername()
        except OSError:
            sock.close()  # it is gone already
            return
        assert self._server is not None
        self._server.receive(sock, address)

    # --- what it tells ------------------------------------------------------------------------------------

    def _tell_soon(self) -> None:
        """Tell of the clients, once for all that happens in this turn of the loop."""
        if not self._tally_due:
            self._tally_due = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        server = self._server
        assert server is not None
        tally = Tally(self._received, server.handshakes, len(server.connections), server.served)
        try:
            self._sock.send(encode(tally))
        except BlockingIOError:
            # The server has not read what was told before; when it has, it is told how things are then.
            self._loop.add_writer(self._sock, self._tell)
            return
        except OSError:
            pass  # it is gone
        self._loop.remove_writer(self._sock)
        self._tally_due = False
