"""Runs of L2 tables, found at once, against a loop that looks at one entry after the other."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from pynbd.formats.qcow2.runs import RunFinder, number_of, repeated, words_of

CLUSTER = 1 << 16

PIECES = st.lists(
    st.tuples(
        st.one_of(
            st.just(0),
            st.integers(0, 40).map(lambda number: number * CLUSTER),
            st.integers(0, (1 << 64) - 1),
            st.sampled_from([OFFSET_MASK, OFFSET_MASK & ~(CLUSTER - 1), COPIED, COMPRESSED | COPIED, (1 << 64) - 1]),
        ),
        st.sampled_from([0, COPIED, COMPRESSED, COPIED | COMPRESSED, ZERO, ZERO | COPIED]),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=8,
)


def table_of(pieces: list[tuple[int, int, int]]) -> list[int]:
    """Entries that begin runs of some length."""
    return [(first + number * CLUSTER | flags) % (1 << 64) for first, flags, count in pieces for number in range(count)]


def one_by_one(entries: list[int]) -> list[tuple[int, int, int]]:
    found: list[list[int]] = []
    for index, entry in enumerate(entries):
        place = entry & (COPIED | OFFSET_MASK)
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            continue
        if found and sum(found[-1][:2]) == index and place == found[-1][2] + found[-1][1] * CLUSTER:
            found[-1][1] += 1
        else:
            found.append([index, 1, place])
    return [(index, count, entry) for index, count, entry in found]


@settings(max_examples=300)
@given(pieces=PIECES, step=st.sampled_from([1, 2]))
def test_runs_are_those_of_a_loop(pieces: list[tuple[int, int, int]], step: int) -> None:
    entries = table_of(pieces)
    words = array("Q", [word for entry in entries for word in (entry, (1 << 64) - 1)[:step]])
    before = words[:]
    finder = RunFinder(step, CLUSTER)
    assert list(finder.data_runs(words)) == one_by_one(entries)
    assert finder.compressed(words) == [entry for entry in entries if entry & COMPRESSED]
    assert words == before


@given(words=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20))
def test_a_number_and_its_words(words: list[int]) -> None:
    assert words_of(number_of(array("Q", words)), len(words)) == array("Q", words)


@pytest.mark.parametrize("step", [1, 2])
def test_a_word_in_each_entry(step: int) -> None:
    expected = [7, 0, 7, 0, 7, 0] if step == 2 else [7, 7, 7]
    assert words_of(repeated(7, 3, step), 3 * step) == array("Q", expected)
