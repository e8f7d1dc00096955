"""Runs in L2 tables: entries whose host clusters follow each other, found with operations on one number of all bits.

A loop over the entries of a large disk takes seconds; a table is one number here, in which each entry has a field.
"""

import sys
from array import array
from collections.abc import Iterator
from itertools import compress

from pynbd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK

KIND_AND_PLACE = COPIED | COMPRESSED | OFFSET_MASK


def number_of(words: "array[int]") -> int:
    """All words as one number, the first with the lowest bits (or the last, where bytes go the other way)."""
    return int.from_bytes(memoryview(words).cast("B"), sys.byteorder)


def words_of(number: int, count: int) -> "array[int]":
    """The opposite."""
    return array("Q", number.to_bytes(8 * count, sys.byteorder))


def repeated(word: int, count: int, step: int = 1) -> int:
    """A number with the same word in all entries, each of which has `step` words, whose others are 0."""
    each = word.to_bytes(8, sys.byteorder) + bytes(8 * (step - 1))
    return int.from_bytes(each * count, sys.byteorder)


class RunFinder:
    """Finds runs in tables, or in slices of tables, of one image.

    Args:
        step: words of an entry.
        cluster: bytes of a cluster.
    """

    def __init__(self, step: int, cluster: int) -> None:
        self.step = step
        self.cluster = cluster
        self._known: dict[int, tuple[int, int, int]] = {}

    def _numbers(self, count: int) -> tuple[int, int, int]:
        """What is the same for all tables of so many entries: numbers with a word in each."""
        found = self._known.get(count)
        if found is None:
            words = (KIND_AND_PLACE, self.cluster, COMPRESSED)
            found = self._known[count] = tuple(repeated(word, count) for word in words)  # type: ignore[assignment]
        assert found is not None
        return found

    def entries(self, words: "array[int]") -> "array[int]":
        """The first words of all entries."""
        return words[:: self.step] if self.step > 1 else words

    def compressed(self, words: "array[int]") -> list[int]:
        """All entries that are compressed."""
        entries = self.entries(words)
        _, _, flags = self._numbers(len(entries))
        if not number_of(entries) & flags:
            return []
        return [entry for entry in entries if entry & COMPRESSED]

    def data_runs(self, words: "array[int]") -> Iterator[tuple[int, int, int]]:
        """(index, clusters, entry) of all runs of entries with a place, which are not compressed, and whose host
        clusters follow each other, with the same COPIED flag; the entry is the first one, without other flags.
        """
        entries = self.entries(words)
        count = len(entries)
        mask, steps, _ = self._numbers(count)
        # An entry and a cluster more: no field overflows, since none has the bits between place and flags.
        places = number_of(entries) & mask
        kept = words_of(places, count)
        expected = words_of(places + steps, count)
        if kept[1:] == expected[:-1]:
            begins = [0]
        else:
            differs = words_of(number_of(kept[1:]) ^ number_of(expected[:-1]), count - 1)
            begins = [0, *compress(range(1, count), differs)]
        for begin, end in zip(begins, [*begins[1:], count], strict=True):
            if not kept[begin] & OFFSET_MASK:
                begin += 1  # nothing, and what follows it is the first cluster
            if begin < end and not kept[begin] & COMPRESSED:
                yield begin, end - begin, kept[begin]
