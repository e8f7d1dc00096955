"""Asking what lies where."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extents import Extent
from pynbd.cli.walk import ASKED_BYTES, walk


class Disk:
    """Runs of bytes, and how often it was asked about them.

    Args:
        lengths: of its runs; each has its number as its status.
        most: it tells of so many at a time.
    """

    def __init__(self, lengths: Sequence[int], most: int) -> None:
        self.lengths, self.most = lengths, most
        self.asked: list[tuple[int, int]] = []

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """What lies there."""
        self.asked.append((offset, length))
        found: list[Extent] = []
        end = offset + length
        for number, stop in enumerate(accumulate(self.lengths)):
            if offset < min(stop, end) and len(found) < self.most:
                found.append(Extent(min(stop, end) - offset, number))
                offset = min(stop, end)
        return found


def walked(disk: Disk, start: int, end: int) -> list[tuple[int, int]]:
    """(length, status) of all that is told, with what is told in parts put together again."""

    async def walk_it() -> list[tuple[int, int]]:
        told: list[tuple[int, int]] = []
        async for extent in walk(disk.block_status, start, end):
            if told and told[-1][1] == extent.status:
                told[-1] = (told[-1][0] + extent.length, extent.status)
            else:
                told.append((extent.length, extent.status))
        return told

    return asyncio.run(walk_it())


@given(
    lengths=st.lists(st.one_of(st.integers(1, 1 << 20), st.integers(1, 1 << 34)), min_size=1, max_size=20),
    most=st.integers(1, 5),
    data=st.data(),
)
def test_all_is_told_once(lengths: list[int], most: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, sum(lengths)))
    end = data.draw(st.integers(start, sum(lengths)))
    expected = [
        (min(stop, end) - max(stop - length, start), number)
        for number, (length, stop) in enumerate(zip(lengths, accumulate(lengths), strict=True))
        if min(stop, end) > max(stop - length, start)
    ]
    disk = Disk(lengths, most)
    assert walked(disk, start, end) == expected
    assert all(start <= offset and offset + length <= end for offset, length in disk.asked)


def test_a_few_questions_for_a_long_run() -> None:
    disk = Disk([1 << 62], 1)
    assert walked(disk, 0, 1 << 62) == [(1 << 62, 0)]
    assert [length for _, length in disk.asked[:3]] == [ASKED_BYTES, 2 * ASKED_BYTES, 4 * ASKED_BYTES]
    assert len(disk.asked) == 33


def test_small_steps_where_there_is_much_to_tell() -> None:
    disk = Disk([1 << 34, 512, 1 << 20, 1 << 34], 1)
    walked(disk, 0, sum(disk.lengths))
    offsets_behind = [length for offset, length in disk.asked if (1 << 34) < offset < (1 << 34) + (2 << 20)]
    assert offsets_behind[0] == ASKED_BYTES
