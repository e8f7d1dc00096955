"""`NbdServer`: listening sockets, the clients that come, and an orderly end."""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nbd_protocol.constants import TransmissionFlag
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.server_negotiation import ServerNegotiation
from pynbd.block.errors import OptionError
from pynbd.crypto.tls_socket import TlsFailure, TlsSocket
from pynbd.server import events
from pynbd.server.access import AccessList
from pynbd.server.budget import DEFAULT_POOL_BYTES, PayloadBudget
from pynbd.server.client_log import ClientLog
from pynbd.server.connection import Connection
from pynbd.server.events import about
from pynbd.server.export import Export
from pynbd.server.handshake import Negotiated, negotiate
from pynbd.server.inline import InlineStarter
from pynbd.server.limits import NO_LIMITS, ClientLimits, Clients, Presence
from pynbd.server.offer import Offer
from pynbd.server.scratch import Scratch
from pynbd.server.tls_wire import TlsWire
from pynbd.server.visitor import Refused, Visitor, visitor_at
from pynbd.server.wire import PlainWire, tune

if TYPE_CHECKING:
    from pynbd.server.tls import ServerTls
    from pynbd.server.workers import Workers

log = logging.getLogger(__name__)

ANY_VSOCK_PORTS = range(49152, 65536)
"""Where port 0 of vsock is looked for."""

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""

MAX_ACCEPTS = 8
"""Clients that are accepted in a row: those who are served already have their turn between."""

DEFAULT_MAX_CLIENTS = 1024
"""Clients at one time, where nobody says otherwise: each costs a descriptor and some memory."""

GRACE_S = 10.0
"""How long requests in flight may take to end when the server stops."""

ABORT_GRACE_S = 2.0
"""How long requests may still take once their clients were given up."""

STALL_CHECK_S = 5.0
PRESSED_CHECK_S = 1.0
"""How often clients are looked at for progress: usually, and while somebody waits for memory."""

MIN_PROGRESS_BYTES = 64 << 10
"""A client that holds payload memory which others wait for must move so much in every check, or go."""

STALL_CHECKS = 12
"""Checks without a byte after which a connection is closed: for an unfinished payload, whether or not others wait, and
for any request in flight, if other connections of the client can't begin theirs before."""


class NbdServer:
    """Serves exports to any number of clients.

    Args:
        exports: what there is to serve; may be added to and removed from while it runs.
        max_clients: clients at one time, 0 for `DEFAULT_MAX_CLIENTS`; further ones wait in the kernel.
        payload_pool: memory for payloads of all clients together, beyond a small reserve for each, in bytes.
        structured, extended: whether these framings are offered.
        tls: how clients may or must use TLS; None: there is none.
        limits: what one client may take.
        access: who may connect at all, by address or as a user of this machine; None: everybody.
    """

    def __init__(
        self,
        exports: list[Export],
        *,
        max_clients: int = 0,
        payload_pool: int = DEFAULT_POOL_BYTES,
        structured: bool = True,
        extended: bool = True,
        tls: "ServerTls | None" = None,
        limits: ClientLimits = NO_LIMITS,
        access: AccessList | None = None,
    ) -> None:
        self.exports: dict[str, Export] = {}
        for export in exports:
            self.add_export(export)
        self.max_clients = max_clients or DEFAULT_MAX_CLIENTS
        self.connections: set[Connection] = set()
        self.workers: Workers | None = None
        """Other processes that serve the clients who come here."""
        self.on_client_come: list[Callable[[], None]] = []
        self.on_client_gone: list[Callable[[], None]] = []
        self.on_handshake_ended: list[Callable[[], None]] = []
        self.served = 0
        self._access = access or AccessList()
        self.limits = limits
        self.handshake_timeout_s = limits.handshake_timeout
        self._clients = Clients(limits)
        self._structured = structured
        self._extended = extended
        self.tls = tls
        self._loop = asyncio.get_running_loop()
        # Those who wait for memory are woken by the loop, never from within another client's request.
        self.budget = PayloadBudget(payload_pool, self._loop.call_soon)
        self._client_log = ClientLog(self._loop.call_later)
        self._starter = InlineStarter(self._loop)
        self._scratch = Scratch()
        self._listeners: list[socket.socket] = []
        self._unlink: list[tuple[Path, int]] = []
        self._accepting = False
        self._handshakes: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._somebody_left = asyncio.Event()
        self._progress: dict[Connection, tuple[int, int]] = {}
        self._idle: dict[Connection, tuple[int, float]] = {}
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- exports ------------------------------------------------------------------------------------------

    def add_export(self, export: Export) -> None:
        """Serve one more disk.

        Raises:
            OptionError: there is one of that name.
        """
        if export.name in self.exports:
            raise OptionError(f"there are two exports named {export.name!r}")
        self.exports[export.name] = export

    async def remove_export(self, name: str) -> Export:
        """Serve a disk no longer; its clients are sent away when what they began has ended.

        Raises:
            KeyError: there is none of that name.
        """
        export = self.exports.pop(name)
        users = [connection for connection in self.connections if connection.export is export]
        await self._send_away(users, GRACE_S)
        return export

    def change_rules(self, limits: ClientLimits, access: AccessList) -> None:
        """Other rules for clients that come from now on; those who are there keep theirs, but for the idle timeout."""
        self.limits = limits
        self.handshake_timeout_s = limits.handshake_timeout
        self._clients.change(limits)
        self._access = access

    # --- listening ----------------------------------------------------------------------------------------

    async def listen_tcp(self, host: str, port: int) -> list[tuple[str, int]]:
        """Listen on all addresses that a host name stands for ("" means every address).

        Returns:
            the addresses, with the port that was taken if `port` was 0.

        Raises:
            OSError: an address can't be resolved or is in use.
        """
        found = await self._loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
        bound: list[tuple[str, int]] = []
        for family, _, _, _, address in dict.fromkeys(found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address if port or not bound else (address[0], bound[0][1], *address[2:]))
                self.listen_on(sock)
            except OSError as problem:
                sock.close()
                raise OSError(problem.errno, f"can't listen on {host or '*'}:{port}: {problem.strerror}") from problem
            bound.append(sock.getsockname()[:2])
        return bound

    def listen_unix(self, path: str) -> None:
        """Listen on a Unix socket. One that a dead server left behind is replaced; a live one is not.

        Raises:
            OSError: the path is in use by a live server, or can't be made.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            remove_dead_socket(path)
            sock.bind(path)
            self.listen_on(sock)
        except OSError as problem:
            sock.close()
            raise OSError(problem.errno, f"can't listen on {path}: {problem.strerror or problem}") from problem
        self._unlink.append((Path(path), Path(path).stat().st_ino))

    def listen_vsock(self, cid: int | None, port: int) -> socket.socket:
        """Listen to virtual machines, or as one to its host.

        Args:
            cid: which of this machine's numbers must be meant; None: any. 1 is for this machine alone.
            port: 0 takes any free one.

        Returns:
            the socket; it is closed with the server.

        Raises:
            OSError: the kernel has no vsock, or the number is not this machine's, or the port is in use.
        """
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        except OSError as problem:
            raise OSError(problem.errno, f"can't listen on vsock: {problem.strerror}") from problem
        try:
            bind_vsock(sock, socket.VMADDR_CID_ANY if cid is None else cid, port)
            self.listen_on(sock)
        except OSError as problem:
            sock.close()
            where = f"vsock:{'' if cid is None else cid}:{port}"
            raise OSError(problem.errno, f"can't listen on {where}: {problem.strerror}") from problem
        return sock

    def listen_on(self, sock: socket.socket) -> None:
        """Listen at a socket that is bound; it is closed with the server."""
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._listeners.append(sock)
        self._watch_listeners()

    def _has_room(self) -> bool:
        if self.workers is None:
            return len(self.connections) + len(self._handshakes) < self.max_clients
        return self.workers.clients < self.max_clients and self.workers.have_room

    def _watch_listeners(self) -> None:
        """Accept clients while there is room for more."""
        room = not self._stopping and self._has_room()
        for sock in self._listeners:
            if room:
                self._loop.add_reader(sock, self._accept, sock)
            else:
                self._loop.remove_reader(sock)
        self._accepting = room

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS):
            if not self._has_room():
                break
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as problem:
                # Out of descriptors, most likely. Clients wait in the kernel until some of ours are free.
                log.error("can't accept a client: %s", problem)
                self._loop.remove_reader(listener)
                self._loop.call_later(1.0, self._watch_listeners)
                return
            self.receive(sock, address)
        self._watch_listeners()

    def receive(self, sock: socket.socket, address: object) -> None:
        """Begin with a client that has connected, or send it away at once; its socket is closed when it has gone."""
        if self.workers is not None:
            self.workers.take(sock, address)
            return
        try:
            visitor = visitor_at(sock, address)
        except (OSError, ValueError) as problem:
            log.error("can't tell who a client is: %s", problem)
            sock.close()
            return
        try:
            decision = self._access.decide(visitor)
            if decision.policy == "deny":
                raise Refused(decision.why)
            presence = Presence(self._clients, visitor)
        except Refused as refusal:
            self._tell(visitor, events.CLIENT_REFUSED, None, f"refused: {refusal}")
            sock.close()
            return
        task = self._loop.create_task(self._welcome(sock, visitor, presence))
        self._handshakes.add(task)
        task.add_done_callback(self._handshake_ended)

    def _tell(self, visitor: Visitor, event: str, export: str | None, text: str) -> None:
        extra = about(event, client=visitor.label, name=visitor.name or None, export=export, reason=text)
        self._client_log.tell(visitor.key, f"{visitor}: {text}", extra)

    async def until_idle(self) -> None:
        """Wait until there is no client, neither one that chooses an export nor one that uses it."""
        while self.connections or self._handshakes or (self.workers is not None and self.workers.clients):
            self._somebody_left.clear()
            await self._somebody_left.wait()

    # --- clients ------------------------------------------------------------------------------------------

    async def _welcome(self, sock: socket.socket, visitor: Visitor, presence: Presence) -> None:
        """The handshake with a client, and what comes of it."""
        begun = False
        failed = functools.partial(self._tell, visitor, events.CLIENT_FAILED, None)
        refused = functools.partial(self._tell, visitor, events.CLIENT_REFUSED, None)
        try:
            tune(sock)
            async with asyncio.timeout(self.handshake_timeout_s or None):
                negotiation = ServerNegotiation(
                    tls="off" if self.tls is None else self.tls.policy,
                    structured=self._structured,
                    extended=self._extended,
                    resize=True,
                )
                offer = Offer(self.exports, visitor, refused, presence.named)
                result = await negotiate(sock, offer, negotiation, self.tls)
            if result is not None:
                self._begin(visitor, presence, result)
                begun = True
        except TimeoutError:
            failed(f"no export was chosen within {self.handshake_timeout_s:g} s")
        except RemoteProtocolError as problem:
            failed(str(problem))
        except TlsFailure as problem:
            refused(f"refused: {problem.strerror}")
        except Refused as refusal:
            refused(f"refused: {refusal}")
        except OSError as problem:
            log.debug("%s: connection lost in the handshake: %s", visitor, problem)
        except Exception:
            log.exception("%s: handshake failed", visitor)
        finally:
            if not begun:
                presence.leave()
                sock.close()

    def _handshake_ended(self, task: "asyncio.Task[None]") -> None:
        self._handshakes.discard(task)
        self._somebody_left.set()
        self._accept_again()
        for tell in list(self.on_handshake_ended):
            tell()

    def _begin(self, visitor: Visitor, presence: Presence, result: Negotiated) -> None:
        sock, peer = result.sock, visitor.label

        def gone(connection: Connection) -> None:
            presence.leave()
            self._gone(connection)

        def make_wire(connection: Connection) -> PlainWire:
            told = (connection.on_readable, connection.on_sent, connection.on_lost, self._scratch.passing)
            if isinstance(sock, TlsSocket):
                return TlsWire(self._loop, sock, *told)
            return PlainWire(self._loop, sock, *told)

        connection = Connection(
            result.ready,
            result.export,
            self.budget.account(),
            self._starter,
            self._scratch,
            peer,
            make_wire,
            gone,
            presence.in_flight,
            presence.pace,
            functools.partial(self._tell, visitor, events.CLIENT_FAILED, result.export.name),
            functools.partial(self._tell, visitor, events.REQUEST_FAILED, result.export.name),
        )
        secure = f", {sock.version}, {sock.identity!r}" if isinstance(sock, TlsSocket) else ""
        read_only = ", read-only" if result.ready.info.flags & TransmissionFlag.READ_ONLY else ""
        log.info(
            "%s: uses export %r (%s%s%s)",
            peer,
            result.export.name,
            result.ready.mode.value,
            read_only,
            secure,
            extra=about(
                events.CLIENT_COME,
                client=peer,
                name=visitor.name or None,
                export=result.export.name,
                framing=result.ready.mode.value,
                read_only=bool(read_only),
                tls=sock.version if isinstance(sock, TlsSocket) else None,
            ),
        )
        self.connections.add(connection)
        self.served += 1
        result.export.clients += 1
        connection.begin(result.trailing)
        if self._stopping or self.exports.get(result.export.name) is not result.export:
            connection.shut_down()
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(self._stall_check_s, self._check_stalls)
        for tell in list(self.on_client_come):
            tell()

    def _gone(self, connection: Connection) -> None:
        log.info(
            "%s: gone",
            connection.peer,
            extra=about(events.CLIENT_GONE, client=connection.peer, export=connection.export.name),
        )
        self.connections.discard(connection)
        if not self.connections:
            self._scratch.buffers.clear()
        self._progress.pop(connection, None)
        self._idle.pop(connection, None)
        connection.export.clients -= 1
        self._accept_again()
        self._somebody_left.set()
        for tell in list(self.on_client_gone):
            tell()

    def workers_changed(self, *, come: int, gone: bool) -> None:
        """A worker has told of its clients, or has ended.

        Args:
            come: how many have begun to use an export.
            gone: whether some who did are gone.
        """
        self.served += come
        self._accept_again()
        self._somebody_left.set()
        for tell in [*(self.on_client_come if come else ()), *(self.on_client_gone if gone else ())]:
            tell()

    @property
    def using(self) -> int:
        """Clients that use an export."""
        return len(self.connections) if self.workers is None else self.workers.using

    @property
    def handshakes(self) -> int:
        """Clients that have not chosen an export yet."""
        return len(self._handshakes)

    def _accept_again(self) -> None:
        """A client has gone: whoever waits in the kernel may come in."""
        if not self._accepting and not self._stopping:
            self._watch_listeners()

    @property
    def _stall_check_s(self) -> float:
        return min(PRESSED_CHECK_S, STALL_CHECK_S) if self.budget.waiting else STALL_CHECK_S

    def _check_stalls(self) -> None:
        """Close clients that hold memory others wait for, and do not move; and payloads that never end."""
        self._stall_timer = None
        if self.limits.idle_timeout:
            self._check_idle(self.limits.idle_timeout)
        for connection in list(self.connections):
            if not connection.holding_back:
                self._progress.pop(connection, None)
                continue
            moved, checks = self._progress.get(connection, (-MIN_PROGRESS_BYTES, -1))
            now = connection.wire.moved
            still = now == moved
            self._progress[connection] = (now, checks + 1 if still else 0)
            too_slow = bool(self.budget.waiting) and now - moved < MIN_PROGRESS_BYTES and connection.account.held
            stands_still = still and checks >= STALL_CHECKS
            if too_slow and checks >= 0:
                connection.warn("stalled, and others wait for its memory")
                connection.abort()
            elif stands_still and (connection.payload_open or connection.keeps_others_waiting):
                connection.warn("stalled")
                connection.abort()
        if self.connections:
            self._stall_timer = self._loop.call_later(self._stall_check_s, self._check_stalls)

    def _check_idle(self, timeout_s: float) -> None:
        """Close clients that have not asked for anything for too long."""
        now = self._loop.time()
        for connection in list(self.connections):
            moved, since = self._idle.get(connection, (-1, now))
            if not connection.idle or connection.wire.moved != moved:
                self._idle[connection] = (connection.wire.moved, now)
            elif now - since >= timeout_s:
                connection.warn(f"closed, for it was idle for {timeout_s:g} s")
                connection.abort()

    # --- the end ------------------------------------------------------------------------------------------

    async def close(self, grace_s: float = GRACE_S) -> None:
        """Stop: no new clients; what is in flight ends (within `grace_s` seconds) and is answered; then all is closed.

        The exports' nodes stay open: they are the caller's.
        """
        self._stopping = True
        for sock in self._listeners:
            self._loop.remove_reader(sock)
            sock.close()
        self._listeners.clear()
        self.unlink_sockets()
        for task in list(self._handshakes):
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        await self._send_away(list(self.connections), grace_s)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._client_log.end_window()

    @property
    def socket_paths(self) -> list[Path]:
        """The Unix sockets that `unlink_sockets` removes."""
        return [path for path, _ in self._unlink]

    def unlink_sockets(self) -> None:
        """Remove the Unix sockets of this server, unless another one has taken their places."""
        for path, inode in self._unlink:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()
        self._unlink.clear()

    async def _send_away(self, connections: list[Connection], grace_s: float) -> None:
        """Shut connections down, and wait until their last requests have ended."""
        for connection in connections:
            connection.shut_down()
        left = await self._gone_within(connections, grace_s)
        parked = [connection for connection in left if connection.backend.parked]
        for connection in left:
            log.warning("%s: %d requests did not end within %g s", connection.peer, connection.in_flight, grace_s)
            connection.backend.shutdown()
        # What was parked ends now, and its clients are told; nothing else will.
        await self._gone_within(parked, ABORT_GRACE_S)
        left = [connection for connection in left if connection in self.connections]
        for connection in left:
            connection.abort()
        for connection in await self._gone_within(left, ABORT_GRACE_S):
            log.error("%s: %d requests are still in flight", connection.peer, connection.in_flight)

    async def _gone_within(self, connections: list[Connection], timeout_s: float) -> list[Connection]:
        """Wait until connections are gone; returns those that are not when the time is over."""
        deadline = self._loop.time() + timeout_s
        while left := [connection for connection in connections if connection in self.connections]:
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                break
            self._somebody_left.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(remaining):
                    await self._somebody_left.wait()
        return left


def remove_dead_socket(path: str) -> None:
    """Remove a Unix socket that nobody listens on any more.

    Raises:
        OSError: somebody does, or it is no socket.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(17, "a file of that name exists, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise OSError(98, "another server listens there")


def bind_vsock(sock: socket.socket, cid: int, port: int) -> None:
    """Bind to a port; 0: to any free one that a URI can tell (libxml2, which libnbd uses, refuses large numbers).

    Raises:
        OSError: as `bind`.
    """
    for any_port in random.sample(ANY_VSOCK_PORTS, 64):
        try:
            sock.bind((cid, port or any_port))
        except OSError as problem:
            if port or problem.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
