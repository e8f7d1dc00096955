"""Whether calls that should be quick are still made in place, or given to a thread for a while."""

import asyncio

SLOW_S = 0.004
"""A call in place that takes longer has kept everybody waiting. A shorter one may just have lost the processor to
somebody else for a time slice, and a thread would not have been quicker then."""

SLOW_FLUSH_S = 0.001
"""The same for a flush, which waits for the disk by its nature."""

FIRST_PAUSE_S = 0.008
LONGEST_PAUSE_S = 0.25
"""How long threads make the calls after a slow one. A single slow call says little (the machine may have been busy):
the pause is short at first, and doubles as long as slow calls follow each other."""

FORGET_S = 1.0
"""After so long without a slow call the next one counts as the first again."""


class InPlace:
    """Watches one kind of call on one file.

    Args:
        never: the calls always wait (direct I/O), and are never made in place.
    """

    __slots__ = ("_pause_s", "_slow_at", "paused_until")

    def __init__(self, *, never: bool = False) -> None:
        self.paused_until = float("inf") if never else 0.0
        """No call in place before this time (`perf_counter`). A plain attribute: it is looked at for every request."""
        self._pause_s = FIRST_PAUSE_S
        self._slow_at = float("-inf")

    def was_slow(self, now: float) -> None:
        """A call in place took more than `SLOW_S`, and ended now."""
        recently = now - self._slow_at < FORGET_S
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S) if recently else FIRST_PAUSE_S
        self._slow_at = now
        self.paused_until = now + self._pause_s


def keeps_others_waiting() -> bool:
    """Whether anybody else waits while a call in place does: the loop says so that serves one client."""
    return not getattr(asyncio.get_running_loop(), "has_one_client", False)
