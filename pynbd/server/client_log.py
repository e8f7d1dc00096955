"""`ClientLog`: what clients did wrong or were refused, told in a way that no client can flood the log with."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from pynbd.server import events
from pynbd.server.events import about

log = logging.getLogger(__name__)

WINDOW_S = 60.0
"""For how long lines are counted."""

MAX_LINES_OF_A_CLIENT = 10
MAX_LINES = 100
"""What is told in that time of one client, and of all; of what is left out the number is told at the end of it."""

MAX_CLIENTS_COUNTED = 100
"""Of so many clients it is told one by one how much was left out; the others are counted together."""

MAX_LINE_CHARS = 1000
OTHERS = "other clients"


class ClientLog:
    """Lines about clients.

    Args:
        later: calls a function so many seconds later (`loop.call_later`).
    """

    def __init__(self, later: Callable[[float, Callable[[], None]], asyncio.TimerHandle]) -> None:
        self._later = later
        self._told: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._lines = 0
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, key: str, text: str, extra: Mapping[str, object] | None = None) -> None:
        """Log a line, unless there were too many of late.

        Args:
            key: whom it is counted under.
            text: the line; what is not printable in it is escaped.
            extra: what it is about.
        """
        if self._timer is None:
            self._timer = self._later(WINDOW_S, self.end_window)
        if self._lines < MAX_LINES and self._told[key] < MAX_LINES_OF_A_CLIENT:
            self._lines += 1
            self._told[key] += 1
            log.warning("%s", printable(text), extra=extra)
            return
        known = key in self._left_out or len(self._left_out) < MAX_CLIENTS_COUNTED
        self._left_out[key if known else OTHERS] += 1

    def end_window(self) -> None:
        """Tell how much was left out, and begin anew."""
        left_out = dict(self._left_out)
        self._told.clear()
        self._left_out.clear()
        self._lines = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for key, count in left_out.items():
            log.warning(
                "%s: %d more lines like these within %g s were left out",
                printable(key),
                count,
                WINDOW_S,
                extra=about(events.LEFT_OUT, client=printable(key), lines=count),
            )


def printable(text: str) -> str:
    """A text on one line, with everything escaped that could move a cursor or pretend to be another line."""
    shown = text[:MAX_LINE_CHARS] + ("…" if len(text) > MAX_LINE_CHARS else "")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
