"""An event loop for clients who wait for each answer before they ask for more.

For them a request costs more on its way through the loop than in being served. Two things are done about that, both
in the selector, where asyncio's loop waits:

Direct readers. asyncio makes each event a handle, each handle an entry of a queue, and works out anew how long to wait.
Here the selector itself calls whoever reads requests, and goes on waiting if nothing else came of it.

Polling. To sleep and be woken takes tens of microseconds: the processor goes idle and has to come back. What a client
asks for next often comes sooner, so the selector looks for it a while before it sleeps, as long as that was worth it
lately (QEMU's `poll-max-ns` does the same).
"""

import asyncio
import math
import os
import select
import selectors
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

POLL_S = 60e-6
"""How long to poll: about what a client on another processor takes from our answer to its next request."""

MAX_CREDIT = 16
"""Polls in a row that may be in vain before sleeping at once again."""

MAX_EVENTS = 64
"""Events of one wait; of more, the kernel tells the rest first the next time."""

READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT

Ready = list[tuple[selectors.SelectorKey, int]]


class ServingSelector(selectors.EpollSelector):
    """An `EpollSelector` that polls before it sleeps, and calls the readers of some descriptors by itself.

    Each wait that ended within `POLL_S` earns a poll, and each poll in vain costs one: an idle server sleeps, and so
    does one whose clients take their time. Without more processors than processes that serve it always sleeps, for
    clients need one as well.

    Args:
        processes: those that serve.
    """

    def __init__(self, processes: int = 1) -> None:
        super().__init__()
        self.direct: dict[int, Callable[[], None]] = {}
        """Whom to call when there is something to read, by descriptor; all of them are registered as well."""
        self.credit = 0
        """Polls that may be in vain."""
        self.loop: ServingLoop | None = None
        # The class in use keeps its epoll object to itself; another one for the same epoll instance does as well.
        self._epoll = select.epoll.fromfd(os.dup(self.fileno()))
        self._may_poll = len(os.sched_getaffinity(0)) > processes

    def select(self, timeout: float | None = None) -> Ready:
        """As the base class, but return only when there is something for the loop, too."""
        loop = self.loop
        if loop is None or (timeout is not None and timeout <= 0):
            return self._sorted(self._epoll.poll(0, MAX_EVENTS))
        ends = math.inf if timeout is None else perf_counter() + timeout
        timer, direct = loop.first_timer, self.direct
        while True:
            events = self._wait(ends)
            if len(events) == 1 and events[0][1] == READABLE and events[0][0] in direct:
                loop.call(direct[events[0][0]])
            elif (others := self._sorted(events)) or not events:
                return others
            if loop.is_wanted(timer) or (timeout is not None and perf_counter() >= ends):
                return []

    def _wait(self, ends: float) -> list[tuple[int, int]]:
        """The events that come up to a time; none if the time is over."""
        poll = self._epoll.poll
        now = perf_counter()
        if self.credit:
            until = now + POLL_S if now + POLL_S < ends else ends
            while now < until:
                if events := poll(0, MAX_EVENTS):
                    self.credit = MAX_CREDIT
                    return events
                now = perf_counter()
            self.credit -= 1
        # epoll counts milliseconds; as in the base class, rather a little too long than too short.
        wait = -1.0 if ends == math.inf else max(math.ceil((ends - now) * 1e3), 0) * 1e-3
        events = poll(wait, MAX_EVENTS)
        if self._may_poll and events and perf_counter() - now < POLL_S:
            self.credit += 1
        return events

    def _sorted(self, events: list[tuple[int, int]]) -> Ready:
        """Call the direct readers among those who have something, and give what is left for the loop."""
        others: Ready = []
        for descriptor, event in events:
            # A reader that was called before may have removed this one.
            reader = self.direct.get(descriptor) if event == READABLE else None
            if reader is not None and self.loop is not None:
                self.loop.call(reader)
            elif (key := self.get_map().get(descriptor)) is not None:
                ready = selectors.EVENT_WRITE if event & ~READABLE else 0
                ready |= selectors.EVENT_READ if event & ~WRITABLE else 0
                others.append((key, ready & key.events))
        return others

    def close(self) -> None:
        """As the base class."""
        self._epoll.close()
        super().close()


class ServingLoop(asyncio.SelectorEventLoop):
    """asyncio's loop over a `ServingSelector`.

    Args:
        processes: those that serve, of which this is one.
    """

    # Of the base class. A selector that calls has to know whether something came of it; there is no public way to ask.
    _ready: deque[Any]
    _scheduled: list[Any]
    _stopping: bool

    def __init__(self, processes: int = 1) -> None:
        self._serving = ServingSelector(processes)
        super().__init__(self._serving)
        self._serving.loop = self

    def is_wanted(self, timer: object) -> bool:
        """Whether the loop has something to call, or is to stop, or another timer than this one comes next."""
        scheduled = self._scheduled
        return bool(self._ready) or self._stopping or (scheduled[0] if scheduled else None) is not timer

    @property
    def has_one_client(self) -> bool:
        """Whether a call that takes a while keeps nobody waiting but the one client who asked for it."""
        return len(self._serving.direct) == 1

    @property
    def first_timer(self) -> object:
        """The timer that comes next, None if there is none."""
        return self._scheduled[0] if self._scheduled else None

    def call(self, reader: Callable[[], None]) -> None:
        """Call a reader, as a handle would."""
        try:
            reader()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as problem:
            self.call_exception_handler({"message": f"exception in {reader!r}", "exception": problem})

    def add_direct_reader(self, descriptor: int, reader: Callable[[], None]) -> None:
        """As `add_reader`, for a plain function that lets others have their turn by itself."""
        self.add_reader(descriptor, reader)
        self._serving.direct[descriptor] = reader

    def remove_direct_reader(self, descriptor: int) -> None:
        """The opposite of `add_direct_reader`."""
        del self._serving.direct[descriptor]
        self.remove_reader(descriptor)


def serving_loop(processes: int = 1) -> asyncio.AbstractEventLoop:
    """A new loop to serve on; of another kind, if somebody has set a policy for that (uvloop's).

    Args:
        processes: those that serve, of which this is one.
    """
    policy = asyncio.get_event_loop_policy()
    return ServingLoop(processes) if isinstance(policy, asyncio.DefaultEventLoopPolicy) else policy.new_event_loop()
