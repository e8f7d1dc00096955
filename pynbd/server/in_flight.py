"""What one client has in flight on all of its connections together, and which of these wait until it is less.

Each connection counts for itself, and tells its sums when its turn ends: no request pays for it. Who finds no room
waits in line, and is woken when what it has asked for fits. So nobody overtakes, and nobody is woken in vain.
"""

from collections.abc import Callable


class InFlight:
    """The sums of one client.

    Args:
        max_requests: how many may be in flight; 0 is no limit.
        max_bytes: of payloads, and of answers that it has not taken, whether they lie in memory or in a file; 0 is no
            limit. One request is always served.
    """

    __slots__ = ("bytes", "line", "max_bytes", "max_requests", "requests")

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.bytes = 0
        self.line: dict[Part, int] = {}
        """Who waits, first come first, and for how many bytes."""

    def fits(self, length: int) -> bool:
        """Whether one request more may begin, with so many bytes."""
        return not self.requests or (
            (not self.max_requests or self.requests < self.max_requests)
            and (not self.max_bytes or self.bytes + length <= self.max_bytes)
        )

    def wake(self) -> None:
        """Let the first in line try again, if that is worth it."""
        for part, length in self.line.items():
            if self.fits(length):
                part.wake()
            return


class Part:
    """What one connection has in flight of the client's.

    Args:
        whole: the client's.
        wake: called when it is worth trying again; it may be more often, and must not try from within that call.
    """

    __slots__ = ("_bytes", "_requests", "_whole", "wake")

    def __init__(self, whole: InFlight, wake: Callable[[], None]) -> None:
        self._whole = whole
        self._requests = 0
        self._bytes = 0
        self.wake = wake

    @property
    def pressed(self) -> bool:
        """Whether the client has more bytes in flight than it may: no more of them may wait to be taken."""
        return 0 < self._whole.max_bytes < self._whole.bytes

    @property
    def keeps_others_waiting(self) -> bool:
        """Whether other connections of the client wait in line, and this one has requests in flight."""
        return self._requests > 0 and any(part is not self for part in self._whole.line)

    def count(self, requests: int, length: int) -> None:
        """Say how much it is now: so many requests, and bytes of payloads and answers."""
        whole = self._whole
        whole.requests += requests - self._requests
        whole.bytes += length - self._bytes
        self._requests, self._bytes = requests, length
        # Also where it is no less than before: what began and ended within a turn was never told of.
        whole.wake()

    def has_room(self, length: int) -> bool:
        """Whether the client may begin one request more, with so many bytes; if not, the connection waits in line."""
        whole = self._whole
        first = next(iter(whole.line), self)
        if first is self and whole.fits(length):
            whole.line.pop(self, None)
            return True
        whole.line[self] = length
        return False

    def leave_line(self) -> None:
        """It wants nothing any more, or something else stands in its way; whoever is next may try."""
        whole = self._whole
        whole.line.pop(self, None)
        whole.wake()

    def close(self) -> None:
        """Nothing is in flight, and nothing will be."""
        self.leave_line()
        self.count(0, 0)
