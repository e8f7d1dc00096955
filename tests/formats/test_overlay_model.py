"""Chains of overlays against a row of bytes: many requests at once, over drivers that suspend, delay and fail.

A *round* is a set of requests that run together. Those that change something touch no byte that another one touches
(but often the same clusters), so that after the round every byte has one right value. A failed write leaves each of its
bytes old or new, and no other byte changed.
"""

import asyncio
import random
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.requests import RequestFlag
from tests.restless import RESTLESS, restless

CLUSTER = 512
BASE_BYTES = 7 * CLUSTER + 100
MAX_BYTES = 11 * CLUSTER

UNMAP, QUICK = int(RequestFlag.MAY_UNMAP), int(RequestFlag.NO_FALLBACK)


class Step(NamedTuple):
    """One request, or a change of size (which has a round of its own)."""

    what: str
    offset: int
    length: int
    flags: int = 0


places = st.one_of(
    st.integers(0, MAX_BYTES),
    st.builds(lambda cluster, by: max(0, cluster * CLUSTER + by), st.integers(0, 11), st.sampled_from([-1, 0, 1])),
)
requests = st.builds(
    lambda what, start, end, flags: Step(what, min(start, end), abs(end - start), flags),
    st.sampled_from(["write", "write", "write", "read", "zero", "zero", "discard", "status"]),
    places,
    places,
    st.sampled_from([0, UNMAP, QUICK, UNMAP | QUICK]),
)
resizes = st.builds(lambda size: [Step("resize", size, 0)], places)
rounds = st.lists(st.one_of(st.lists(requests, min_size=1, max_size=8), resizes), min_size=1, max_size=6)
layers = st.lists(rounds, min_size=1, max_size=4)
chances = st.sampled_from([0.0, 0.5, 1.0])


async def open_layer(graph: Graph, below: Node, seed: int, suspends: float, alignment: int) -> Node:
    return await graph.open(
        {
            "driver": "overlay",
            "cluster-size": CLUSTER,
            "file": {"driver": RESTLESS, "size": 0, "seed": seed, "suspends": suspends, "alignment": alignment},
            "backing": below.name,
            "discard": "unmap",
        }
    )


class Disk:
    """The top of a chain, and what it should read as."""

    def __init__(self, node: Node, model: bytearray, source: random.Random) -> None:
        self.node = node
        self.model = model
        self.source = source
        self.failures = 0
        # Clusters that this layer holds for sure, and those that a failed request left in doubt.
        self.own: set[int] = set()
        self.doubtful: set[int] = set()

    async def run(self, steps: list[Step]) -> None:
        if steps[0].what == "resize":
            await self._resize(steps[0].offset)
            return
        taken: list[tuple[int, int]] = []
        together = []
        for step in steps:
            start, end = min(step.offset, len(self.model)), min(step.offset + step.length, len(self.model))
            if step.what != "status":
                if any(start < other_end and other_start < end for other_start, other_end in taken):
                    continue
                taken.append((start, end))
            together.append(self._request(step.what, start, end, step.flags))
        await asyncio.gather(*together)

    async def _resize(self, size: int) -> None:
        before = len(self.model)
        try:
            await self.node.truncate(size)
        except OSError:
            self.failures += 1
        after = self.node.size
        assert after in (size, before)
        del self.model[after:]
        self.model.extend(bytes(after - len(self.model)))
        clusters = -(-after // CLUSTER)
        self.own = {cluster for cluster in self.own if cluster < clusters}
        if after > before:
            # What was added is this layer's, zero; but part of the cluster that the disk ended in was there before.
            self.doubtful.add(before // CLUSTER)
            self.own |= set(range(-(-before // CLUSTER), clusters))

    async def _request(self, what: str, start: int, end: int, flags: int) -> None:
        old = bytes(self.model[start:end])
        new, data = old, memoryview(bytes(0))
        touched = set(range(start // CLUSTER, -(-end // CLUSTER))) if start < end else set()
        path = self.node.path
        found = memoryview(bytearray(end - start))
        if what == "write":
            new = self.source.randbytes(end - start)
            data = memoryview(new).toreadonly()
            request = path.write(start, data, 0)
        elif what == "zero":
            new = bytes(end - start)
            request = path.write_zeroes(start, end - start, flags)
        elif what == "discard":
            first = -(-start // CLUSTER) * CLUSTER
            last = end if end == len(self.model) else end // CLUSTER * CLUSTER
            if first < last:
                new = old[: first - start] + bytes(last - first) + old[last - start :]
            touched = set(range(first // CLUSTER, -(-last // CLUSTER)))
            request = path.discard(start, end - start)
        elif what == "read":
            request = path.read(start, found, 0)
        else:
            await self._status(start, end)
            return
        try:
            await request
        except OSError as problem:
            self.failures += 1
            await self._settle(start, old, new, unchanged="take a copy" in str(problem))
            self.doubtful |= touched
            return
        if what == "read":
            assert found == old
            return
        self.model[start:end] = new
        if what == "zero":
            # Whole clusters for sure; parts that read as zeroes already may be left alone.
            self.doubtful |= touched
            touched = {n for n in touched if start <= n * CLUSTER and min((n + 1) * CLUSTER, len(self.model)) <= end}
        self.own |= touched

    async def _settle(self, start: int, old: bytes, new: bytes, *, unchanged: bool) -> None:
        """What a failed write left: each byte is the old or the new one; the model takes over which."""
        found = await self._reread(start, len(old))
        if unchanged:
            assert found == old
        assert all(now in (before, wanted) for now, before, wanted in zip(found, old, new, strict=True))
        self.model[start : start + len(old)] = found

    async def _reread(self, start: int, length: int) -> bytes:
        found = memoryview(bytearray(length))
        while True:
            try:
                await self.node.path.read(start, found, 0)
            except OSError:
                continue
            return bytes(found)

    async def _status(self, start: int, end: int) -> None:
        """Zero in an answer about a range that is being changed may be late; its shape is always right."""
        if start < end:
            extents = await self.node.block_status(start, end - start)
            assert all(extent.length > 0 for extent in extents)
            assert sum(extent.length for extent in extents) <= end - start

    async def check(self) -> None:
        assert self.node.size == len(self.model)
        assert await self._reread(0, len(self.model)) == self.model


def calm(graph: Graph) -> None:
    """From now on nothing fails."""
    for node in graph.nodes.values():
        if hasattr(node.driver, "fails"):
            restless(node).fails = 0.0


async def depths(node: Node) -> list[int]:
    """The depth of every byte, by block_status; every byte that is said to be zero is."""
    found: list[int] = []
    content = memoryview(bytearray(node.size))
    await node.path.read(0, content, 0)
    while len(found) < node.size:
        for extent in await node.block_status(len(found), node.size - len(found)):
            if extent.zero:
                assert not any(content[len(found) : len(found) + extent.length])
            found += [extent.depth] * extent.length
    return found


@settings(max_examples=150, deadline=None)
@given(layers, st.integers(0, 1 << 16), chances, st.sampled_from([0.0, 0.0, 0.1]), st.sampled_from([1, 64]))
def test_chains_of_overlays(
    layers: list[list[list[Step]]], seed: int, suspends: float, fails: float, alignment: int
) -> None:
    asyncio.run(_run_chain(layers, seed, suspends, fails, alignment))


async def _run_chain(layers: list[list[list[Step]]], seed: int, suspends: float, fails: float, alignment: int) -> None:
    graph, source = Graph(), random.Random(seed)
    top = await graph.open({"driver": RESTLESS, "size": BASE_BYTES, "seed": seed, "suspends": suspends})
    model = bytearray(restless(top).data)
    disks: list[Disk] = []
    for number, steps in enumerate(layers):
        top = await open_layer(graph, top, seed + number, suspends, alignment)
        disk = Disk(top, model, source)
        for node in graph.nodes.values():
            if hasattr(node.driver, "fails"):
                restless(node).fails = fails
        for step in steps:
            await disk.run(step)
            await disk.check()
        calm(graph)
        await top.path.flush()
        disks.append(disk)
        _check_depths(await depths(top), disks)
        model = bytearray(model)
    await graph.close_all()


def _check_depths(found: list[int], disks: list[Disk]) -> None:
    """Each byte lies in the topmost layer that holds its cluster, as far as that is known."""
    for position, depth in enumerate(found):
        cluster = position // CLUSTER
        possible = set()
        for number, disk in enumerate(reversed(disks), 1):
            if position >= len(disk.model):
                possible.add(number)  # a short image decides what is read past its end
                break
            if cluster in disk.own:
                possible.add(number)
                break
            if cluster in disk.doubtful:
                possible.add(number)
        else:
            possible.add(len(disks) + 1)
        assert depth in possible, f"byte {position} (cluster {cluster}): depth {depth}, possible: {possible}"
