"""A connection that is made again when it is lost, and the requests that wait for that."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import Enum
from errno import EIO, ESHUTDOWN
from typing import Final

from nbd_protocol.constants import Command
from nbd_protocol.errors import LocalProtocolError
from pynbd.block.errors import BlockError
from pynbd.storage.nbd.connection import Connection, Lost, Request
from pynbd.storage.nbd.durability import Durability

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
"""Before the second attempt to reach a server; a restart of a local one takes about that long …"""

LAST_PAUSE_S = 2.0
"""… and the pauses double up to this, so that a server that is back is found soon."""

Dial = Callable[[Lost], Awaitable[Connection]]
"""Makes a connection. Raises OSError if that may work later, BlockError if this server is of no use."""


class LinkState(Enum):
    """Whether there is a connection, and who does something about it."""

    CONNECTED = "connected"
    CONNECTING = "connecting"
    DOWN = "down"  # the next request tries again
    CLOSED = "closed"


async def dial_until(dial: Dial, lost: Lost, deadline: float | None) -> Connection:
    """Make a connection, with as many attempts as fit before a deadline.

    Args:
        dial: makes one attempt.
        lost: for the connection.
        deadline: in the event loop's time; None is one attempt.

    Raises:
        OSError: the last attempt's error.
        BlockError: the server is of no use; there are no further attempts.
    """
    loop = asyncio.get_running_loop()
    pause = FIRST_PAUSE_S
    failure: OSError | None = None
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                return await dial(lost)
        except OSError as problem:
            # The deadline's own TimeoutError says less than what was wrong before.
            if failure is None or not isinstance(problem, TimeoutError) or problem.errno is not None:
                failure = problem
        if deadline is None or loop.time() + pause >= deadline:
            raise failure
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_S)


class Link:
    """One of a node's connections, for as long as the node is open.

    Args:
        name: whose it is, for messages.
        dial: makes a connection to the same export.
        durability: what the server may have forgotten when it comes back.
        reconnect_delay_s: how long requests wait for a lost server; 0: they fail.
    """

    def __init__(self, name: str, dial: Dial, durability: Durability, reconnect_delay_s: int) -> None:
        self.name: Final = name
        self.state = LinkState.DOWN
        self._dial: Final = dial
        self._durability: Final = durability
        self._reconnect_delay_s: Final = reconnect_delay_s
        self._connection: Connection | None = None
        self._waiting: list[Request] = []
        self._connecting: asyncio.Task[None] | None = None

    async def open(self, timeout_s: int) -> Connection:
        """Connect for the first time, trying for up to `timeout_s` seconds (0: once).

        Raises:
            OSError, BlockError: it did not work; the link stays closed.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s if timeout_s else None
        self._connection = await dial_until(self._dial, self._lost, deadline)
        self.state = LinkState.CONNECTED
        return self._connection

    @property
    def load(self) -> int:
        """Requests that wait for an answer; links that are not connected come last."""
        if self._connection is None:
            return 1 << 30
        return self._connection.outstanding

    @property
    def connection(self) -> Connection | None:
        """The connection, while there is one."""
        return self._connection

    def submit(self, request: Request) -> None:
        """See to it that a request is answered: by the server, or with an error."""
        if request.command is Command.FLUSH and self._durability.lost:
            self._end_flushes([request])
        elif self._connection is not None and not self._connection.leaving:
            self._send(self._connection, request)
        elif request.command is Command.FLUSH and not self._durability.unflushed:
            self._end_flushes([request])
        elif self.state is LinkState.CLOSED:
            request.fail(ESHUTDOWN, f"{self.name}: {request}: the node is closed")
        else:
            self._waiting.append(request)
            if self.state is LinkState.DOWN:
                self._connect(None)

    def _send(self, connection: Connection, request: Request) -> None:
        try:
            connection.submit(request)
        except LocalProtocolError as problem:
            request.fail(EIO, f"{self.name}: {request}: {problem}")

    def _end_flushes(self, requests: Sequence[Request]) -> None:
        """Answer flushes without a server: one that comes back would say yes, whatever it has forgotten."""
        for request in requests:
            if self._durability.lost:
                request.fail(
                    EIO,
                    f"{self.name}: the connection was lost before writes that the server had answered were flushed; "
                    f"they may be lost",
                )
            else:
                request.settle(self.name)  # nothing was written that was not flushed
        if requests:
            self._durability.told()

    def _lost(self, connection: Connection, reason: str, unanswered: list[Request]) -> None:
        """The connection broke: try again with what it has not answered, or fail it."""
        self._connection = None
        log.warning("%s: the connection was lost: %s; not answered yet: %d", self.name, reason, len(unanswered))
        self._end_flushes([request for request in unanswered if request.command is Command.FLUSH])
        unanswered = [request for request in unanswered if request.command is not Command.FLUSH]
        self._waiting = unanswered + self._waiting
        self.state = LinkState.DOWN
        if not self._reconnect_delay_s:
            self._fail_waiting(reason)
        else:
            self._connect(asyncio.get_running_loop().time() + self._reconnect_delay_s)

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            request.fail(EIO, f"{self.name}: {request}: the connection was lost: {reason}")

    def _connect(self, deadline: float | None) -> None:
        self.state = LinkState.CONNECTING
        self._connecting = asyncio.get_running_loop().create_task(
            self._reconnect(deadline), name=f"{self.name} connects"
        )

    async def _reconnect(self, deadline: float | None) -> None:
        try:
            connection = await dial_until(self._dial, self._lost, deadline)
        except (OSError, BlockError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            log.warning("%s: not connected again: %s; failed: %d", self.name, reason, len(self._waiting))
            self.state = LinkState.DOWN
            self._fail_waiting(reason)
            return
        log.info("%s: connected again; waiting: %d", self.name, len(self._waiting))
        self._connection = connection
        self.state = LinkState.CONNECTED
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            if request.command is Command.FLUSH and self._durability.lost:
                self._end_flushes([request])
            else:
                self._send(connection, request)

    async def close(self) -> None:
        """Say goodbye. Nothing may be in flight."""
        self.state = LinkState.CLOSED
        if self._connecting is not None:
            self._connecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._connecting
            self._connecting = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._fail_waiting("the node is closed")
