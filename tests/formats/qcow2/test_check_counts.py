"""Counts of clusters are those of a dictionary, however they are kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.formats.qcow2 import check_counts
from pynbd.formats.qcow2.check_counts import MANY, PART_CLUSTERS, Counts, block_of, small_counts
from pynbd.formats.qcow2.refcounts import unpack

CLUSTERS = 2 * PART_CLUSTERS
RUNS = st.tuples(st.integers(0, CLUSTERS - 300), st.integers(1, 300), st.sampled_from([1, 1, 2, 100, 254, 255, 70000]))


@given(st.lists(RUNS, max_size=20), st.integers(0, 6))
def test_counts_are_those_of_a_dictionary(runs: list[tuple[int, int, int]], order: int) -> None:
    most = (1 << (1 << order)) - 1
    counts, model = Counts("image", most), Counter[int]()
    for first, count, by in runs:
        lost = 0
        for cluster in range(first, first + count):
            lost += max(model[cluster] + by - most, 0)
            model[cluster] = min(model[cluster] + by, most)
        assert counts.add(first, count, by) == lost
    for first, count, _ in runs:
        assert [counts.get(cluster) for cluster in range(first, first + count)] == [
            model[cluster] for cluster in range(first, first + count)
        ]
        assert counts.slice(first, count) == bytes(min(model[cluster], MANY) for cluster in range(first, first + count))
        value = model[first]
        assert counts.are_all(first, count, value) == all(model[first + at] == value for at in range(count))
    for per_block in (64, PART_CLUSTERS, CLUSTERS):
        assert counts.used_blocks(per_block) == {cluster // per_block for cluster in +model}
    free = counts.free_run(5, 400)
    assert free >= 5
    assert not any(model[cluster] for cluster in range(free, free + 400))
    for start in (0, PART_CLUSTERS):
        block = block_of(counts, start, PART_CLUSTERS, order)
        expected = [model[cluster] for cluster in range(start, start + PART_CLUSTERS)]
        assert unpack(block, order).tolist() == expected
        small, exact = small_counts(block, order)
        assert list(small) == [min(value, MANY) for value in expected]
        assert not exact or exact.tolist() == expected


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_counts, "MAX_COUNT_BYTES", 3 * PART_CLUSTERS)
    counts = Counts("image", 65535)
    counts.add(0, 3 * PART_CLUSTERS)
    with pytest.raises(OSError, match="takes more than 24576 bytes of memory"):
        counts.add(1 << 40, 1)
