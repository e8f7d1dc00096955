"""`Workers`: processes that serve the clients of a server, for whom one processor is not enough.

The server forks them before it has an event loop or a thread. It opens the disks, holds the locks, listens and accepts;
the workers open the same disks, and each client that comes is handed to one of them. They share nothing but the disks
themselves, so what a driver must be able to is said by `Driver.several_processes`, and looked at here.

    server                     worker
    open disks
      ── begin ──────────────▶ open the same disks
      ◀────────────── ready ──
    listen, accept
      ── client + socket ────▶ serve it
      ◀────────────── tally ── whenever a client has come or gone
      ── stop ───────────────▶ send clients away, flush, close

A worker of a server that is gone reads the end of its socket, and stops as if it had been told to.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from pynbd.block.errors import BlockError, OptionError
from pynbd.block.node import Node
from pynbd.server.worker_messages import MAX_REPORT_BYTES, Failed, Order, Ready, Report, Tally, decoder

if TYPE_CHECKING:
    from pynbd.server.export import Export
    from pynbd.server.server import NbdServer
    from pynbd.server.service import Service

log = logging.getLogger(__name__)

MAX_UNREAD: Final = 64
"""Clients that a worker was handed and has not looked at: with more it gets none. The kernel keeps some hundred."""


class Worker:
    """One worker, as the server sees it.

    Args:
        pid: its process.
        sock: our end.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.handle = -1
        """Readable when it has ended (pidfd_open(2))."""
        self.ready: asyncio.Future[Ready] | None = None
        self.handed = 0
        self.turn = 0
        self.tally = Tally()
        self.failed: Failed | None = None

    @property
    def unread(self) -> int:
        """Clients on their way to it."""
        return self.handed - self.tally.received

    @property
    def clients(self) -> int:
        """All that it has."""
        return self.unread + self.tally.handshakes + self.tally.connections

    def tell(self, order: Order, what: bytes = b"") -> bool:
        """Give an order; whether it was taken: one that has ended, or reads nothing, takes none."""
        try:
            self.sock.send(order.value + what)
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """Let it end in order."""
        if not self.tell(Order.STOP):
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)  # which it finds behind all that it has not read

    def reap(self) -> str:
        """Release what is kept for it, once it has ended; how it did."""
        _, status = os.waitpid(self.pid, 0)
        self.sock.close()
        if self.handle >= 0:
            os.close(self.handle)
        code = os.waitstatus_to_exitcode(status)
        return f"ended by signal {-code}" if code < 0 else f"exit status {code}"


class Workers:
    """The workers of a server."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._server: NbdServer | None = None
        self._turns = 0
        self._stopping = False
        self._failure: Exception | None = None
        self._none_left = asyncio.Event()

    def add(self, pid: int, sock: socket.socket) -> None:
        """Another one, that has just been forked.

        Args:
            pid: its process, a child of this one.
            sock: what it is told, and tells, things by; non-blocking.
        """
        self._workers.append(Worker(pid, sock))

    # --- the beginning ------------------------------------------------------------------------------------

    async def begin(self, service: "Service") -> None:
        """Let all of them open the disks that a service has opened, and then serve its clients.

        Raises:
            OptionError: these are no disks for several processes.
            OSError, BlockError: one of the workers could not open them.
        """
        check_shareable(service.graph.nodes.values())
        exports = service.server.exports.values()
        for export in exports:
            check_alignment(export)
        loop = asyncio.get_running_loop()
        waiting = []
        for worker in self._workers:
            worker.handle = os.pidfd_open(worker.pid)
            worker.ready = loop.create_future()
            waiting.append(worker.ready)
            loop.add_reader(worker.sock, self._read, worker)
            loop.add_reader(worker.handle, self._ended, worker)
            worker.tell(Order.BEGIN)
        for answer in await asyncio.gather(*waiting):
            if answer.exports != [(export.backend.size, export.read_only) for export in exports]:
                raise BlockError("disks have changed while they were opened: a worker has found other sizes")
        self._server = service.server
        service.server.workers = self

    # --- clients ------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        """Clients that they have, those included that have not chosen an export yet."""
        return sum(worker.clients for worker in self._workers)

    @property
    def using(self) -> int:
        """Clients that use an export."""
        return sum(worker.tally.connections for worker in self._workers)

    @property
    def have_room(self) -> bool:
        """Whether one of them looks at clients who come."""
        return any(worker.unread < MAX_UNREAD for worker in self._workers)

    def take(self, sock: socket.socket, address: object) -> None:
        """Hand a client to the worker with the fewest; they take turns where there are several of those.

        Args:
            sock: the client's; closed here.
            address: where it is, for the log.
        """
        with sock:
            for worker in sorted(self._workers, key=lambda one: (one.clients, one.turn)):
                try:
                    socket.send_fds(worker.sock, [Order.CLIENT.value], [sock.fileno()])
                except OSError:
                    continue  # it has just ended, or reads nothing
                self._turns += 1
                worker.turn = self._turns
                worker.handed += 1
                return
        log.error("%s: sent away, for no worker takes it", address or "a client")

    def reload(self, name: str) -> None:
        """Let them read again what this process has read again."""
        for worker in self._workers:
            if not worker.tell(Order.RELOAD, name.encode()):
                log.error("worker process %d was not told to read the %s again", worker.pid, name)

    def _read(self, worker: Worker) -> None:
        """All that a worker has told."""
        while True:
            try:
                raw = worker.sock.recv(MAX_REPORT_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                raw = b""
            if not raw:
                asyncio.get_running_loop().remove_reader(worker.sock)
                return
            self._told(worker, decoder.decode(raw))

    def _told(self, worker: Worker, report: Report) -> None:
        match report:
            case Ready():
                assert worker.ready is not None
                if not worker.ready.done():  # who waited for it may have been told to stop
                    worker.ready.set_result(report)
            case Failed():
                worker.failed = report
            case Tally():
                before, worker.tally = worker.tally, report
                gone = report.served - report.connections > before.served - before.connections
                if self._server is not None:
                    self._server.workers_changed(come=report.served - before.served, gone=gone)

    # --- the end ------------------------------------------------------------------------------------------

    def _ended(self, worker: Worker) -> None:
        """A worker is no more, for whatever reason."""
        loop = asyncio.get_running_loop()
        self._read(worker)
        loop.remove_reader(worker.sock)
        loop.remove_reader(worker.handle)
        self._workers.remove(worker)
        how = worker.reap()
        problem = what_ended(worker, how)
        if worker.ready is not None and not worker.ready.done():
            worker.ready.set_exception(problem)
        elif not self._stopping:
            log.error("%s; clients: %d are gone, %d workers are left", problem, worker.clients, len(self._workers))
        elif worker.failed is not None or how != "exit status 0":
            self._failure = self._failure or problem
        if self._server is not None:
            self._server.workers_changed(come=0, gone=bool(worker.tally.connections))
        if not self._workers:
            self._none_left.set()

    async def until_none_is_left(self) -> None:
        """Wait until the last one has ended."""
        await self._none_left.wait()

    @property
    def are_lost(self) -> bool:
        """Whether all of them have ended without having been told to."""
        return not self._workers and not self._stopping

    async def stop(self) -> Exception | None:
        """Let them end in order, and wait until they have. What is in flight may take as long as it may there.

        Returns:
            what went wrong, if anything did.
        """
        self._stopping = True
        for worker in self._workers:
            worker.stop()
        if self._workers:
            await self._none_left.wait()
        return self._failure

    def end_at_once(self) -> None:
        """Whatever they are doing. For the very end, where it does not wait for anything."""
        while self._workers:
            worker = self._workers.pop()
            worker.tell(Order.END)
            try:
                os.kill(worker.pid, signal.SIGKILL)
            except PermissionError:
                continue  # a process that is confined may signal none; it has read that it is to end
            worker.reap()


def what_ended(worker: Worker, how: str) -> Exception:
    """Why a worker has ended, as an error."""
    failed = worker.failed
    if failed is None:
        return BlockError(f"worker process {worker.pid}: {how}")
    return BlockError(failed.text) if failed.errno is None else OSError(failed.errno, failed.text)


def check_shareable(nodes: Iterable[Node]) -> None:
    """Check that several processes may have nodes open.

    Raises:
        OptionError: which one they may not, and why.
    """
    for node in nodes:
        can, place = node.driver.several_processes, f"{node.describe()} (driver {node.driver.name})"
        if can == "never":
            raise OptionError(f"{place} is for one process: it can't be had with several workers")
        if can == "reading" and not node.read_only:
            raise OptionError(f"{place} is for one process where it is written: with several workers it is read-only")
        if node.write_guard is not None:
            raise OptionError(
                f"{place}: its format was guessed, and one process watches what is written to its start: with several "
                "workers say its format (-f raw)"
            )


def check_alignment(export: "Export") -> None:
    """Check that no request of clients makes a process read a block, change a part of it, and write it back.

    Raises:
        OptionError: some do: what another process has written meanwhile would be lost.
    """
    if export.read_only:
        return
    unit = block_bytes(export.backend.node)
    if unit and export.min_block % unit == 0 and export.backend.size % unit == 0:
        return
    hint = f"say min-block = {unit} (and have a size that is a multiple of it), or " if unit else ""
    raise OptionError(
        f"export {export.name!r}: of a block that a client writes in part, all would be read and written back, which "
        f"several workers must not do at one time: {hint}serve it without cache=none"
    )


def block_bytes(node: Node) -> int | None:
    """The blocks that are written as a whole, at multiples of their size; None where they begin elsewhere."""
    own = node.driver.limits.request_alignment
    if "file" in node.children and node.driver.passes("write"):
        inner = block_bytes(node.children["file"].node)
        return inner and max(own, inner)
    inside = (block_bytes(child.node) for child in node.children.values())
    return own if all(unit == 1 for unit in inside) else None
