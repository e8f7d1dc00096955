"""`WarmRegions`: which parts of files were in the page cache a moment ago, and had no holes.

To ask the kernel that of a read takes as long as to send its bytes from there. So larger regions are asked for, and the
answer is believed for a while: what was read just now is the last thing the kernel would drop. If it does all the
same, one read waits for the disk, and no byte is wrong.
"""

from time import monotonic_ns

from pynbd.block.driver import Location
from pynbd.server.spans import is_whole
from pynbd.storage import linux

REGION_BYTES = 1 << 20

BELIEVED_NS = 500_000_000

MAX_REGIONS = 16384
"""Those that are remembered, in 2 MiB of memory; when there are more, all are forgotten."""

REGION_BITS = 44
"""Those of the number of a region: no file is longer than 8 EiB."""


class WarmRegions:
    """Those of all files that one loop reads."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        """By descriptor and number of the region: until when it is believed to be warm, or, negative, not to be."""

    def hold(self, fd: int, offset: int, length: int) -> bool:
        """Whether all regions that a range touches were warm when they were last asked for, lately.

        Args:
            fd: the file; where it is another one than lately, the answer may be that for the former.
            offset, length: the range, in bytes.
        """
        first, last = offset // REGION_BYTES, (offset + length - 1) // REGION_BYTES
        if first != last:
            starts = range(first * REGION_BYTES, offset + length, REGION_BYTES)
            return all(self.hold(fd, start, REGION_BYTES) for start in starts)
        known, now, key = self._known, monotonic_ns(), fd << REGION_BITS | first
        until = known.get(key, 0)
        if abs(until) < now:
            if len(known) >= MAX_REGIONS:
                known.clear()
            until = (now + BELIEVED_NS) * (1 if _is_warm(fd, first * REGION_BYTES) else -1)
            known[key] = until
        return until > 0

    def reach(self, fd: int, offset: int, length: int) -> int:
        """How much of a range, from its beginning on, lies in regions that are warm as `hold` says."""
        position, end = offset, offset + length
        while position < end and self.hold(fd, position, 1):
            position += REGION_BYTES - position % REGION_BYTES
        return min(position, end) - offset


def _is_warm(fd: int, offset: int) -> bool:
    """One that reaches past the end of the file is not."""
    try:
        readable = linux.readable_at_once(fd, offset, REGION_BYTES)
    except OSError:
        return False
    return readable and is_whole(Location(fd, offset, REGION_BYTES))
