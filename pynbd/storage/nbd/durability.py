"""Which writes a server has answered but not been made to keep: what is lost with it, if it is lost.

A server that restarts may have forgotten every write that it answered and that no flush came after. Nobody would
notice: the next flush, on the new connection, succeeds. So that flush must fail, once, as a disk's would.
"""


class Durability:
    """Counts of one export, over all connections to it."""

    __slots__ = ("answered", "flushed", "lost")

    def __init__(self) -> None:
        self.answered = 0
        """Writes without FUA that were answered."""
        self.flushed = 0
        """How many of those a flush has made durable."""
        self.lost = False
        """Whether a server went away that had answered more than was flushed, and no flush has failed for it yet."""

    @property
    def unflushed(self) -> bool:
        """Whether a flush has anything to do."""
        return self.answered > self.flushed

    def flush_answered(self, answered_before: int) -> None:
        """A flush succeeded that was sent when so many writes had been answered."""
        self.flushed = max(self.flushed, answered_before)

    def connection_lost(self) -> None:
        """A connection broke; behind it may be a server that has forgotten."""
        self.lost = self.lost or self.unflushed

    def told(self) -> None:
        """A flush has failed: whoever needed those writes knows it."""
        self.lost = False
        self.flushed = self.answered
