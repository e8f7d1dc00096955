"""Several ranges of a disk at once."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

Ranges = Sequence[tuple[int, int]]
"""(offset, length) of each, in bytes: from the first one up, and none touches what another one holds."""


def total_bytes(ranges: Ranges) -> int:
    """How long they are together."""
    return sum(length for _, length in ranges)


def end_of(ranges: Ranges) -> int:
    """Where the last one ends."""
    offset, length = ranges[-1]
    return offset + length


def first_bytes(ranges: Iterable[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """What holds the first `count` bytes of them."""
    for offset, length in ranges:
        if count <= 0:
            break
        yield offset, min(length, count)
        count -= length


def other_bytes(ranges: Ranges, count: int) -> Iterator[tuple[int, int]]:
    """What holds all but the first `count` bytes of them."""
    for offset, length in ranges:
        passed = min(max(count, 0), length)
        if passed < length:
            yield offset + passed, length - passed
        count -= passed


def without(ranges: Ranges, left_out: Ranges) -> Iterator[tuple[int, int]]:
    """What holds all but some bytes of them.

    Args:
        ranges: the ranges.
        left_out: (how many of their bytes come before, how many are left out), from the first ones on.
    """
    gaps = deque(left_out)
    end = 0
    for offset, length in ranges:
        at, end = end, end + length
        while gaps and gaps[0][0] < end:
            gap, size = gaps[0]
            if gap > at:
                yield offset + length - (end - at), gap - at
            at = max(at, min(gap + size, end))
            if gap + size > end:
                break  # it goes on in the next range
            gaps.popleft()
        if at < end:
            yield offset + length - (end - at), end - at


def reach(left_out: Ranges, count: int) -> int:
    """How many bytes lie behind us when `count` do that are not left out; see `without`."""
    for start, length in left_out:
        if start >= count:
            break
        count += length
    return count
