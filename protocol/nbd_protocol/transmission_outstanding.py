"""What a client remembers of a request until its reply has ended."""

from bisect import bisect_right

from nbd_protocol.constants import Command

__all__ = ["Coverage", "Outstanding"]


class Coverage:
    """Which bytes of a read have been told: disjoint ranges, joined where they touch."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, begin: int, end: int) -> bool:
        """Add [begin, end); False if part of it was there already."""
        starts, ends = self.starts, self.ends
        i = bisect_right(starts, begin)
        if (i and ends[i - 1] > begin) or (i < len(starts) and starts[i] < end):
            return False
        joins_left = i > 0 and ends[i - 1] == begin
        joins_right = i < len(starts) and starts[i] == end
        if joins_left and joins_right:
            ends[i - 1] = ends[i]
            del starts[i], ends[i]
        elif joins_left:
            ends[i - 1] = end
        elif joins_right:
            starts[i] = begin
        else:
            starts.insert(i, begin)
            ends.insert(i, end)
        return True

    def total(self) -> int:
        """How many bytes have been told."""
        return sum(self.ends) - sum(self.starts)


class Outstanding:
    """A request that was sent and is not answered yet, and what has been answered of it."""

    __slots__ = (
        "cookie",
        "coverage",
        "data_chunks",
        "error",
        "error_chunks",
        "flags",
        "length",
        "missing_contexts",
        "offset",
        "type",
    )

    def __init__(
        self, cookie: int, command: int, flags: int, offset: int, length: int, contexts: frozenset[int]
    ) -> None:
        self.cookie = cookie
        self.type = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.missing_contexts = contexts
        self.coverage: Coverage | None = None
        self.data_chunks = 0
        self.error = 0
        self.error_chunks = 0

    def __str__(self) -> str:
        return f"{Command(self.type).name} of {self.length} bytes at {self.offset} (cookie {self.cookie:#x})"
