"""`Holds`: what lies in files and must not move until a client has fetched it from its socket.

What is sent straight from a file is not copied: the client finds what lies there when it fetches it. Where bytes may
move, as in an image, their place must not get others before.
"""

from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable

from pynbd.block.holding import Release

LOOK_S = 0.05
"""How often it is looked whether a client that gets nothing new has fetched what it was sent."""

LONGEST_S = 30.0
"""A client that has not fetched its bytes for so long may never do. Then the space of what was discarded while it was
about to read it is used again, and it may get what was written there: what is discarded may read as anything."""


class Holds:
    """Those of one connection.

    Args:
        loop: the event loop.
        fetched: tells up to where the client has fetched what was sent to it, in bytes since the beginning.
        stuck: called when what is being sent has been so for `LONGEST_S`; it is to be sent from elsewhere.
    """

    __slots__ = ("_fetched", "_held", "_loop", "_sending", "_stuck", "_timer")

    def __init__(self, loop: AbstractEventLoop, fetched: Callable[[], int], stuck: Callable[[], None]) -> None:
        self._loop = loop
        self._fetched = fetched
        self._stuck = stuck
        self._sending: tuple[float, Release] | None = None
        self._held: deque[tuple[int, float, Release]] = deque()
        self._timer: TimerHandle | None = None

    def begin(self, release: Release) -> None:
        """Something is going to be sent from where it lies, until `end`."""
        self._sending = self._loop.time() + LONGEST_S, release
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def end(self, position: int) -> None:
        """It was sent, and is held until the client has fetched all up to a position."""
        if self._sending is not None:
            self._held.append((position, *self._sending))
            self._sending = None

    def _look(self) -> None:
        now, held, fetched = self._loop.time(), self._held, self._fetched()
        while held and (held[0][0] <= fetched or held[0][1] <= now):
            held.popleft()[2]()
        if self._sending is not None and self._sending[0] <= now:
            _, release = self._sending
            self._sending = None
            self._stuck()
            release()
        self._timer = self._loop.call_later(LOOK_S, self._look) if held or self._sending is not None else None

    def close(self) -> None:
        """The connection has ended, and so have all holds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _, _, release in self._held:
            release()
        self._held.clear()
        if self._sending is not None:
            self._sending[1]()
            self._sending = None
