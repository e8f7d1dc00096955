"""Several ranges of a disk at once, beside sets of bytes."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.ranges import Ranges, end_of, first_bytes, other_bytes, reach, total_bytes, without


@st.composite
def rising(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ranges as they may be, also empty ones, and none at all."""
    steps = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=8))
    ends = list(accumulate(gap + length for gap, length in steps))
    return [(end - length, length) for end, (_, length) in zip(ends, steps, strict=True)]


def bytes_of(ranges: Ranges) -> list[int]:
    return [byte for offset, length in ranges for byte in range(offset, offset + length)]


@given(rising(), st.integers(-2, 80))
def test_the_first_bytes_and_the_others(ranges: Ranges, count: int) -> None:
    expected = bytes_of(ranges)
    assert total_bytes(ranges) == len(expected)
    first, others = list(first_bytes(ranges, count)), list(other_bytes(ranges, count))
    assert bytes_of(first) == expected[: max(count, 0)]
    assert bytes_of(others) == expected[max(count, 0) :]
    assert all(length for _, length in others)
    if ranges:
        assert end_of(ranges) == ranges[-1][0] + ranges[-1][1]


@given(rising(), rising(), st.integers(0, 80))
def test_what_is_left_out(ranges: Ranges, left_out: Ranges, count: int) -> None:
    """Counted in bytes of the ranges, wherever these lie; and how far one has come with those that are not."""
    gaps = set(bytes_of(left_out))
    everything = bytes_of(ranges)
    kept = [(position, byte) for position, byte in enumerate(everything) if position not in gaps]
    found = list(without(ranges, left_out))
    assert bytes_of(found) == [byte for _, byte in kept]
    assert all(length for _, length in found)
    positions = [position for position in range(200) if position not in gaps]
    assert reach(left_out, count) == (positions[count - 1] + 1 if count else 0)
