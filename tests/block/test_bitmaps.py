"""Dirty bitmaps: a set of blocks, marked before whatever made them dirty is answered."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.bitmaps import MAX_BITMAP_BYTES, MAX_NAME_BYTES, MIN_GRANULARITY_BYTES, DirtyBitmap
from pynbd.block.errors import BlockError
from pynbd.block.graph import Graph
from pynbd.block.requests import RequestFlag
from tests.block.drivers import attach, driver, model, opened

GRANULARITY = MIN_GRANULARITY_BYTES

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["mark", "mark", "reset", "resize", "clear", "disable", "enable"]),
        st.integers(0, 40_000),
        st.integers(0, 20_000),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(0, 40_000), actions=ACTIONS, ask=st.tuples(st.integers(0, 40_000), st.integers(0, 40_000)))
def test_a_bitmap_is_a_set_of_blocks(size: int, actions: list[tuple[str, int, int]], ask: tuple[int, int]) -> None:
    """Whatever is marked, reset and resized, in any order."""
    bitmap, dirty, enabled = DirtyBitmap("b", size, GRANULARITY), set[int](), True
    for action, offset, length in actions:
        if action == "mark":
            bitmap.mark(offset, length)
            if enabled:
                dirty |= {at // GRANULARITY for at in range(offset, min(offset + length, size))}
        elif action == "reset":
            bitmap.reset(offset, length)
            blocks = range(-(-size // GRANULARITY))
            dirty -= {
                block
                for block in blocks
                if offset <= block * GRANULARITY and min((block + 1) * GRANULARITY, size) <= offset + length
            }
        elif action == "resize":
            size = offset
            bitmap.resize(size)
            dirty = {block for block in dirty if block * GRANULARITY < size}
        elif action == "clear":
            bitmap.clear()
            dirty = set()
        else:
            bitmap.enabled = enabled = action == "enable"
    bits = [at // GRANULARITY in dirty for at in range(size)]
    assert bitmap.size == size
    assert bitmap.count == sum(bits)
    first, length = ask
    found, offset = [], first
    for run, is_dirty in bitmap.extents(first, length):
        assert run > 0
        found.append(is_dirty)
        assert bits[offset : offset + run] == [is_dirty] * run
        offset += run
    assert offset == max(min(first + length, size), first)
    assert all(one != two for one, two in itertools.pairwise(found)), "runs are as long as they can be"
    if size:
        assert bitmap.is_dirty(size - 1) == bits[-1]


def test_a_large_disk_with_little_on_it() -> None:
    """Runs of gigabytes are found without looking at each bit."""
    bitmap = DirtyBitmap("b", 1 << 44, 1 << 16)
    bitmap.mark(1 << 43, 1)
    bitmap.mark((1 << 44) - 1, 1)
    assert bitmap.count == 2 << 16
    assert list(bitmap.extents(0, 1 << 44)) == [
        (1 << 43, False),
        (1 << 16, True),
        ((1 << 43) - (2 << 16), False),
        (1 << 16, True),
    ]
    bitmap.mark(0, 1 << 44)
    assert list(bitmap.extents(5, 1 << 44)) == [((1 << 44) - 5, True)]


@pytest.mark.parametrize("granularity", [0, 256, 513, 3 << 16, 1 << 32])
def test_granularities_that_can_not_be(granularity: int) -> None:
    with pytest.raises(BlockError, match=f"bitmap 'b': granularity {granularity} is no power of two from 512 to"):
        DirtyBitmap("b", 512, granularity)


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME_BYTES + 1), "é" * 512])
def test_names_that_can_not_be(name: str) -> None:
    with pytest.raises(BlockError, match="its length must be 1 to 1023 bytes"):
        DirtyBitmap(name, 512)


def test_memory_is_bounded() -> None:
    largest = MAX_BITMAP_BYTES * 8 * 512
    bitmap = DirtyBitmap("b", 512, 512)
    assert bitmap.can_cover(largest)
    assert not bitmap.can_cover(largest + 1)
    with pytest.raises(BlockError, match=r"bitmap .b.: .* need too much memory"):
        bitmap.resize(largest + 1)


# --- on a node ------------------------------------------------------------------------------------------------

SIZE = 1 << 16


def dirty(bitmap: DirtyBitmap) -> list[int]:
    """The dirty blocks."""
    return [block for block in range(-(-bitmap.size // GRANULARITY)) if bitmap.is_dirty(block * GRANULARITY)]


WRITES: dict[str, Any] = {
    "write": lambda node: node.path.write(1000, memoryview(b"x" * 1000), 0),
    "fua": lambda node: node.path.write(1000, memoryview(b"x" * 1000), RequestFlag.FUA),
    "zeroes": lambda node: node.path.write(1000, memoryview(bytes(1000)), 0),
    "write_zeroes": lambda node: node.path.write_zeroes(1000, 1000, 0),
    "unmap": lambda node: node.path.write_zeroes(1000, 1000, RequestFlag.MAY_UNMAP),
    "discard": lambda node: node.path.discard(1000, 1000),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("layers", [[], ["through"], ["watcher"], ["wallet"]])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("alignment", [1, 512])
async def test_all_that_changes_bytes_is_marked_before_it_is_answered(
    graph: Graph, kind: str, layers: list[str], fails: bool, alignment: int
) -> None:
    """Also if it fails: some of it may have been done."""
    tree: dict[str, Any] = {"driver": "model", "size": SIZE, "discard": "unmap"}
    tree["limits"] = {"request_alignment": alignment}
    for layer in layers:
        tree = {"driver": layer, "file": tree, "discard": "unmap", "detect-zeroes": "on"}
    node = await graph.open(tree)
    if fails:
        model(node).failing = lambda call: call.what in ("write", "write_zeroes", "discard")
    bitmap = await graph.add_bitmap(node, "b", GRANULARITY)
    # The driver's own answer comes before that of the node; there it need not be marked yet.
    if fails and not (kind == "discard" and layers == ["wallet"]):
        with pytest.raises(OSError, match="model"):
            await WRITES[kind](node)
    else:
        await WRITES[kind](node)
    model(node).failing = None
    if kind == "discard":
        assert set(dirty(bitmap)) <= {1, 2, 3}
        assert alignment > 1 or layers == ["wallet"] or dirty(bitmap) == [1, 2, 3]
    else:
        assert dirty(bitmap) == [1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), layers=st.sampled_from([[], ["through"], ["watcher"], ["through", "through"]]))
def test_a_bitmap_that_is_added_under_load_misses_nothing(seed: int, layers: list[str]) -> None:
    """Every write that is answered after `add_bitmap` has returned is in it, also one that began long before."""

    async def law() -> None:
        tree: dict[str, Any] = {"driver": "model", "size": SIZE, "seed": seed, "suspends": 80}
        for layer in layers:
            tree = {"driver": layer, "file": tree}
        async with opened(tree) as (graph, node):
            backend = attach(graph, node)
            late: list[int] = []
            added: list[DirtyBitmap] = []

            async def write(number: int) -> None:
                for _ in range(number % 7):
                    await asyncio.sleep(0)
                await backend.write(number * GRANULARITY, memoryview(b"x"))
                if added:
                    late.append(number)

            async def add() -> None:
                for _ in range(seed % 5):
                    await asyncio.sleep(0)
                added.append(await graph.add_bitmap(node, "b", GRANULARITY))

            await asyncio.gather(*(write(number) for number in range(30)), add())
            assert set(late) <= set(dirty(added[0]))
            await graph.remove_bitmap(node, "b")
            assert not node.bitmaps
            await backend.write(0, memoryview(b"x"))

    asyncio.run(law())


async def test_a_disabled_bitmap_stays_as_it_is(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE})
    bitmap = await graph.add_bitmap(node, "b", GRANULARITY)
    bitmap.enabled = False
    await WRITES["write"](node)
    assert dirty(bitmap) == []


async def test_several_bitmaps(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE})
    await WRITES["write"](node)
    first = await graph.add_bitmap(node, "first", GRANULARITY)
    await node.path.write(0, memoryview(b"x"), 0)
    second = await graph.add_bitmap(node, "second", 4096)
    await node.path.write(SIZE - 1, memoryview(b"x"), 0)
    assert dirty(first) == [0, SIZE // GRANULARITY - 1]
    assert second.count == 4096
    with pytest.raises(BlockError, match="has a bitmap 'first' already"):
        await graph.add_bitmap(node, "first")
    with pytest.raises(BlockError, match="has no bitmap 'third'"):
        await graph.remove_bitmap(node, "third")


async def test_bitmaps_follow_the_disk(graph: Graph) -> None:
    node = await graph.open({"driver": "watcher", "file": {"driver": "model", "size": SIZE, "grows": True}})
    bitmap = await graph.add_bitmap(node, "b", GRANULARITY)
    await node.path.write(SIZE + 5000, memoryview(b"x"), 0)
    assert bitmap.size == SIZE + 5001
    assert dirty(bitmap) == [(SIZE + 5000) // GRANULARITY], "what was added is clean but for the write"
    await node.truncate(SIZE)
    assert bitmap.size == SIZE
    assert dirty(bitmap) == []


async def test_a_disk_does_not_outgrow_its_bitmaps(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE})
    await graph.add_bitmap(node, "b", 512)
    with pytest.raises(OSError, match="resize to") as caught:
        await node.truncate(MAX_BITMAP_BYTES * 8 * 512 + 1)
    assert caught.value.errno == errno.EFBIG
    assert node.size == SIZE
    assert not driver(node).told("truncate")


def test_merging() -> None:
    """What is dirty in either is dirty then, in blocks of the one that is merged into, enabled or not."""
    coarse, fine = DirtyBitmap("coarse", 1 << 20, 65536), DirtyBitmap("fine", 1 << 20, 4096)
    coarse.mark(0, 1)
    coarse.enabled = False
    fine.mark(70000, 1)
    fine.mark((1 << 20) - 1, 1)
    coarse.merge(fine)
    assert list(coarse.extents(0, 1 << 20)) == [(131072, True), (13 * 65536, False), (65536, True)]
    assert fine.count == 2 * 4096
    with pytest.raises(BlockError, match="can't be merged"):
        coarse.merge(DirtyBitmap("other", 1 << 19))
