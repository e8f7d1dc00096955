"""Requests that do not fit a driver's alignment or its largest transfer, cut to pieces that do."""

import mmap
from collections.abc import Iterator

BOUNCE_BYTES = 1 << 20
"""The most that is copied at a time for a request that is not aligned."""


def round_down(value: int, alignment: int) -> int:
    """The next multiple of `alignment` at or below."""
    return value - value % alignment


def round_up(value: int, alignment: int) -> int:
    """The next multiple of `alignment` at or above."""
    return -(-value // alignment) * alignment


def pieces(offset: int, length: int, largest: int, alignment: int = 1) -> Iterator[tuple[int, int]]:
    """A range cut into pieces of at most `largest` bytes, all but the last ending on a multiple of `alignment`.

    Args:
        offset: first byte.
        length: bytes; nothing is yielded for 0.
        largest: the largest piece, 0 for no limit; at least `alignment`.
        alignment: where pieces end.
    """
    end = offset + length
    while offset < end:
        stop = end
        if largest and end - offset > largest:
            stop = round_down(offset + largest, alignment)
            assert stop > offset, f"no piece of {largest} bytes can end on a multiple of {alignment}"
        yield offset, stop - offset
        offset = stop


def split_by_alignment(offset: int, length: int, alignment: int) -> tuple[int, int, int]:
    """(head, middle, tail) lengths of a range: the middle begins and ends on multiples of `alignment`.

    A range inside one block is all head.
    """
    end = offset + length
    start, stop = round_up(offset, alignment), round_down(end, alignment)
    if start > stop:
        return length, 0, 0
    return start - offset, stop - start, end - stop


def aligned_buffer(length: int, alignment: int) -> memoryview:
    """`length` zero bytes whose address is a multiple of `alignment` (which is at most a page, or 1)."""
    if alignment <= 1 or length == 0:
        return memoryview(bytearray(length))
    return memoryview(mmap.mmap(-1, length))
