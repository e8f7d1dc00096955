"""`Holds`: what lies in files and must not move until a client has fetched it from its socket.

What is sent straight from a file is not copied: the client finds what lies there when it fetches it. Where bytes may
move, as in an image, their place must not get others before. Only a Unix socket can tell what was fetched, and of a
client that hands it on without looking (`splice`), it tells too early: that one may then get what another request has
written, for a read of what was discarded or made zero before it had its answer.
"""

from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable

from pynbd.block.holding import Release

LOOK_S = 0.05
"""How often it is looked whether a client that gets nothing new has fetched what it was sent."""


class Holds:
    """Those of one connection.

    Args:
        loop: the event loop.
        fetched: tells up to where the client has fetched what was sent to it, in bytes since the beginning.
        copy: called when what is being sent can't be held any longer; it is to be sent from elsewhere.
        ended: called when the client has fetched all.
    """

    __slots__ = ("_copy", "_ended", "_fetched", "_held", "_loop", "_sending", "_timer")

    def __init__(
        self,
        loop: AbstractEventLoop,
        fetched: Callable[[], int],
        copy: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._fetched = fetched
        self._copy = copy
        self._ended = ended
        self._sending: Release | None = None
        self._held: deque[tuple[int, Release]] = deque()
        self._timer: TimerHandle | None = None

    def begin(self, release: Release) -> None:
        """Something is going to be sent from where it lies, until `end`."""
        self._sending = release
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def end(self, position: int) -> None:
        """It was sent, and is held until the client has fetched all up to a position."""
        if self._sending is not None:
            self._held.append((position, self._sending))
            self._sending = None

    def revoke(self) -> None:
        """The bytes may move from now on. What is in the socket can't be taken back; what is not is sent as a copy."""
        release, self._sending = self._sending, None
        if release is not None:
            try:
                self._copy()
            finally:
                release()

    def any_left(self) -> bool:
        """Whether the client has not fetched all yet."""
        held = self._held
        if held:
            fetched = self._fetched()
            while held and held[0][0] <= fetched:
                held.popleft()[1]()
        return bool(held) or self._sending is not None

    def _look(self) -> None:
        self._timer = None
        if self.any_left():
            self._timer = self._loop.call_later(LOOK_S, self._look)
        else:
            self._ended()

    def close(self) -> None:
        """The connection has ended, and so have all holds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _, release in self._held:
            release()
        self._held.clear()
        if self._sending is not None:
            self._sending()
            self._sending = None
