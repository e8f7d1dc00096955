"""What a service manager is told: that clients can connect, what is going on, and that the event loop still turns.

Source: sd_notify(3), sd_watchdog_enabled(3). Lines of text in a datagram to the socket that `NOTIFY_SOCKET` names.
"""

import asyncio
import logging
import select
import socket
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Final

from pynbd.block.errors import BlockError

if TYPE_CHECKING:
    from pynbd.server.server import NbdServer

log = logging.getLogger(__name__)

VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

SEND_LIMIT_S: Final = 2.0
"""How long the manager may take to make room for what it has to know."""

STATUS_INTERVAL_S: Final = 1.0
"""Clients may come and go quickly; that is told so often at most."""

MAX_STATUS_CHARACTERS: Final = 1000
"""What is shown of a status is a line."""

MAX_WATCHDOG_USEC: Final = 2**63
"""A number of 64 bits, as the manager itself takes it."""


class ServiceManager:
    """The one who has started us, if it wants to be told anything.

    Args:
        place: the name of its socket, `/path` or `@abstract`; "" if there is none, and then nobody is told anything.
        watchdog_s: it takes us for dead when it has not heard of the event loop for so long; 0: it does not mind.

    Raises:
        BlockError: the socket has a name of another kind.
        OSError: nobody is at that socket.
    """

    def __init__(self, place: str = "", watchdog_s: float = 0.0) -> None:
        self._watchdog_s = watchdog_s
        self._sock: socket.socket | None = None
        self._server: NbdServer | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if not place:
            return
        if place[0] not in "/@" or len(place) == 1:
            raise BlockError(f"NOTIFY_SOCKET: {place!r} is neither an absolute path nor @ and an abstract name")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        try:
            # Once and for all: names may be out of reach when privileges have been given up.
            self._sock.connect("\0" + place[1:] if place[0] == "@" else place)
        except OSError as problem:
            self._sock.close()
            raise OSError(problem.errno, f"NOTIFY_SOCKET: {place}: {problem.strerror or problem}") from None

    @classmethod
    def of(cls, environment: MutableMapping[str, str], pid: int) -> "ServiceManager":
        """The one that the environment tells of. To be called before the process forks.

        Args:
            environment: of the process; the variables are removed, since they are not for those whom we start.
            pid: ours.

        Raises:
            BlockError, OSError: it says something that can't be, or nobody is there.
        """
        told = {name: environment.pop(name, "") for name in VARIABLES}
        watchdog_usec = _number("WATCHDOG_USEC", told["WATCHDOG_USEC"] or "0")
        if told["WATCHDOG_PID"] and _number("WATCHDOG_PID", told["WATCHDOG_PID"]) != pid:
            watchdog_usec = 0
        return cls(told["NOTIFY_SOCKET"], watchdog_usec / 1e6)

    # --- what is told -------------------------------------------------------------------------------------------

    def ready(self, main_pid: int | None = None) -> None:
        """Clients can connect; or what was to be read again has been.

        Args:
            main_pid: which process serves, if it is not the one that was started.
        """
        self._tell("READY=1", *([f"MAINPID={main_pid}"] if main_pid is not None else []), self._status())

    def reloading(self) -> None:
        """Files are read again; `ready` says when that is done."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._stop_timers()
        self._tell("STOPPING=1", "STATUS=flushing and closing the disks")
        self._beat()

    def failed(self, text: str, errno: int | None) -> None:
        """It was all in vain.

        Args:
            text: why, in one line.
            errno: the error's number, if it has one.
        """
        self._tell(f"STATUS={text[:MAX_STATUS_CHARACTERS]}", *([f"ERRNO={errno}"] if errno else []))

    # --- what goes on -------------------------------------------------------------------------------------------

    def follow(self, server: "NbdServer") -> None:
        """Tell of a server's clients as they come and go, and, by a timer of the event loop, that this turns."""
        self._server = server
        if self._sock is None:
            return
        server.on_client_come.append(self._clients_changed)
        server.on_client_gone.append(self._clients_changed)
        self._beat()

    def _beat(self) -> None:
        if self._sock is None or not self._watchdog_s:
            return
        # Twice in the time that it has: what comes a little late is in time all the same.
        self._timers["watchdog"] = asyncio.get_running_loop().call_later(self._watchdog_s / 2, self._beat)
        self._tell("WATCHDOG=1", urgent=False)

    def _clients_changed(self) -> None:
        if "status" not in self._timers:
            self._timers["status"] = asyncio.get_running_loop().call_later(STATUS_INTERVAL_S, self._tell_status)

    def _tell_status(self) -> None:
        del self._timers["status"]
        self._tell(self._status(), urgent=False)

    def _status(self) -> str:
        if self._server is None:
            return "STATUS=ready"
        clients, exports = self._server.using, len(self._server.exports)
        return f"STATUS=exports: {exports}, clients: {clients}, served so far: {self._server.served}"

    def _tell(self, *lines: str, urgent: bool = True) -> None:
        """Send lines. What is not urgent is left out when the manager has no room for it."""
        if self._sock is None:
            return
        text = "\n".join(" ".join(line.split()) for line in lines)
        try:
            if urgent:
                select.select([], [self._sock], [], SEND_LIMIT_S)
            self._sock.send(text.encode(errors="replace"))
        except OSError as problem:
            # It can do without, and our clients as well; if it can't, it will start us again.
            log.log(
                logging.WARNING if urgent else logging.DEBUG, "the service manager can't be told %r: %s", text, problem
            )

    def _stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def close(self) -> None:
        """Tell nothing any more."""
        self._stop_timers()
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _number(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < MAX_WATCHDOG_USEC):
        raise BlockError(f"{variable}: {text!r} is no number")
    return int(text)
