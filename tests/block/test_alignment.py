"""Ranges cut at multiples of an alignment."""

from __future__ import annotations

import ctypes
import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.alignment import aligned_buffer, pieces, round_down, round_up, split_by_alignment

OFFSETS = st.integers(0, 1 << 63)
LENGTHS = st.integers(0, 100_000)
ALIGNMENTS = st.integers(1, 5000) | st.sampled_from([512, 4096, 65536])


@given(value=OFFSETS, alignment=ALIGNMENTS)
def test_rounding(value: int, alignment: int) -> None:
    down, up = round_down(value, alignment), round_up(value, alignment)
    assert down % alignment == up % alignment == 0
    assert down <= value <= up
    assert up - down == (0 if value % alignment == 0 else alignment)


@given(offset=OFFSETS, length=LENGTHS, alignment=ALIGNMENTS, more=st.integers(0, 9000))
def test_pieces(offset: int, length: int, alignment: int, more: int) -> None:
    """They follow one another, none is too large, and they end on multiples of the alignment."""
    largest = alignment + more
    cut = list(pieces(offset, length, largest, alignment))
    assert sum(size for _, size in cut) == length
    for start, size in cut:
        assert start == offset
        assert 0 < size <= largest
        offset += size
    assert all((start + size) % alignment == 0 for start, size in cut[:-1])
    assert len(cut) <= 2 + length // max(largest - alignment, alignment)


@given(offset=OFFSETS, length=LENGTHS)
def test_one_piece_without_a_limit(offset: int, length: int) -> None:
    assert list(pieces(offset, length, 0, 512)) == ([(offset, length)] if length else [])


def test_a_piece_that_can_not_be() -> None:
    with pytest.raises(AssertionError, match="no piece of 100 bytes can end on a multiple of 512"):
        list(pieces(0, 1000, 100, 512))


@given(offset=OFFSETS, length=LENGTHS, alignment=ALIGNMENTS)
def test_head_middle_tail(offset: int, length: int, alignment: int) -> None:
    head, middle, tail = split_by_alignment(offset, length, alignment)
    assert head + middle + tail == length
    assert min(head, middle, tail) >= 0
    assert head < alignment
    assert tail < alignment
    if middle:
        assert (offset + head) % alignment == middle % alignment == 0
    if head and (middle or tail):
        assert (offset + head) % alignment == 0
    # Neither end leaves its block.
    if head:
        assert round_down(offset, alignment) == round_down(offset + head - 1, alignment)
    if tail:
        start = offset + head + middle
        assert round_down(start, alignment) == round_down(offset + length - 1, alignment)


@pytest.mark.parametrize("alignment", [1, 2, 512, mmap.PAGESIZE])
@pytest.mark.parametrize("length", [0, 1, 512, 100_000])
def test_aligned_buffers(alignment: int, length: int) -> None:
    buffer = aligned_buffer(length, alignment)
    assert len(buffer) == length
    assert not any(buffer)
    if length:
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % alignment == 0
        buffer[-1] = 1
