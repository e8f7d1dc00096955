"""Counts that are changed in runs are those of a dictionary that is changed one by one."""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import ImageError
from pynbd.formats.qcow2.refcounts import TYPECODES, Refcounts, Run, is_uniform, join
from pynbd.formats.qcow2.tables import TableCache

CLUSTER = 512
BLOCKS = 3

CHANGES = st.tuples(st.integers(0, 240), st.integers(1, 80), st.sampled_from([1, 1, 1, 2, -1, -1, -2]), st.booleans())


def counts_of(order: int) -> Refcounts:
    """Counts of some clusters, in blocks that are there already, and all 0."""
    header = cast(Any, SimpleNamespace(refcount_order=order, cluster_size=CLUSTER, refcount_table_offset=CLUSTER))
    per_block = CLUSTER * 8 >> order

    async def read(offset: int) -> array[int]:
        return array(TYPECODES[order], [0]) * per_block

    table = array("Q", [(1 + index) * CLUSTER for index in range(BLOCKS * 512 // per_block + 1)])
    return Refcounts(header, table, TableCache(len(table), read), "image", lambda _: True)


def runs_of(clusters: list[int]) -> list[Run]:
    found: list[Run] = []
    for cluster in clusters:
        join(found, cluster)
    return found


@given(changes=st.lists(CHANGES, max_size=20), order=st.integers(0, 6))
def test_counts_are_those_of_a_dictionary(changes: list[tuple[int, int, int, bool]], order: int) -> None:
    asyncio.run(compare(changes, order))


async def compare(changes: list[tuple[int, int, int, bool]], order: int) -> None:
    counts, model = counts_of(order), Counter[int]()
    most = (1 << (1 << order)) - 1
    for first, count, by, in_use in changes:
        clusters = range(first, first + count)
        before = [model[cluster] for cluster in clusters]
        once = [cluster for cluster in clusters if model[cluster] == 1]
        assert await counts.used_once(Run(first, count)) == runs_of(once)
        counts.packing, counts.first_free = first + count // 2, first + count // 3
        if by < 0 and min(before) + by < 0:
            with pytest.raises(ImageError, match="nobody counted it as used"):
                await counts.change(first, count, by)
            return  # some were changed
        if by > 0 and in_use and 0 in before:
            with pytest.raises(ImageError, match="nobody counted it"):
                await counts.change(first, count, by, in_use=True)
        elif by > 0 and max(before) + by > most:
            with pytest.raises(OSError, match=f"more than {most} references") as caught:
                await counts.change(first, count, by)
            assert caught.value.errno == errno.EFBIG
        else:
            freed = [cluster for cluster in clusters if model[cluster] + by == 0]
            assert await counts.change(first, count, by, in_use=in_use) == runs_of(freed)
            for cluster in clusters:
                model[cluster] += by
            assert counts.packing == (-1 if first + count // 2 in freed else first + count // 2)
            assert counts.first_free == min([first + count // 3, *freed])
        assert (await counts.counts(0, 400)).tolist() == [model[cluster] for cluster in range(400)]


def test_clusters_join_a_run_that_they_follow() -> None:
    runs: list[Run] = []
    for first, clusters in ((4, 2), (6, 3), (10, 1)):
        join(runs, first, clusters)
    assert runs == [(4, 5), (10, 1)]


@given(counts=st.lists(st.integers(0, 2), min_size=1, max_size=5), count=st.integers(0, 2))
def test_counts_that_are_all_the_same(counts: list[int], count: int) -> None:
    assert is_uniform(array("H", counts), count) == all(each == count for each in counts)
