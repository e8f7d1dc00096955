"""The power goes at any moment: the image opens, holds all that was flushed, and at worst clusters leak.

`CRASH_WORKLOADS=5000` in the environment runs so many workloads of each kind instead of a few.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from pynbd.block.graph import Graph
from tests.formats.qcow2.recorder import RECORDER, SECTOR, recorder
from tests.formats.qcow2.workload import COMPRESSED, UNMAP, Workload, made
from tests.peers import require_tool

WORKLOADS = int(os.environ.get("CRASH_WORKLOADS", "3"))
CRASHES = 10
"""Of one workload, at most."""

KINDS = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=1k,refcount_bits=1",
    "cluster_size=2k,compat=0.10",
    "extended_l2=on,cluster_size=16k",
    "cluster_size=1k,lazy_refcounts=on",
]
SIZE = 96 << 10


class Crashing(Workload):
    """A workload that knows what each sector of the disk may hold after a crash."""

    def begin_versions(self) -> None:
        """All that was written is durable now."""
        self.flushed = bytes(self.model)
        self.versions: dict[int, set[bytes]] = {}

    def _may_become(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), SECTOR):
            self.versions.setdefault((offset + start) // SECTOR, set()).add(data[start : start + SECTOR])
        self.model[offset : offset + len(data)] = data

    async def change(self, offset: int, length: int) -> None:
        """A change of whole sectors."""
        kind, cluster = self.random.random(), self.driver.header.cluster_size
        start, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
        if kind < 0.55:
            data = self.random.randbytes(length)
            self._may_become(offset, data)
            await self.put(offset, data)
        elif kind < 0.7:
            self._may_become(offset, bytes(length))
            await self.backend.write_zeroes(offset, length, self.random.choice([0, UNMAP]))
        elif kind < 0.85 and start < end and self.driver.header.version >= 3:
            self._may_become(start, bytes(end - start))
            await self.backend.discard(start, end - start)
        elif start < end and cluster >= 1024:
            data = self.random.randbytes(16) * (cluster // 16)
            self._may_become(start, data)
            await self.backend.write(start, memoryview(data), COMPRESSED)

    async def changes(self) -> None:
        """Several at once, on sectors of their own."""
        at, running = self.random.randrange(SIZE // SECTOR) * SECTOR, []
        for _ in range(self.random.randint(1, 6)):
            length = self.random.choice([1, 1, 2, 8, 16]) * SECTOR
            if at + length > SIZE:
                break
            running.append(self.change(at, length))
            at += length + self.random.choice([0, 0, 4]) * SECTOR
        await asyncio.gather(*running)

    async def flush(self) -> None:
        """Make all durable, and know that."""
        await self.backend.flush()
        self.begin_versions()

    def state(self, image: bytes) -> State:
        """What the file may hold after a crash, and with it what the disk may hold."""
        return State(image, self.flushed, {sector: set(found) for sector, found in self.versions.items()})


class State(NamedTuple):
    """A crash: what is in the file, what was flushed, and what else each sector may hold."""

    image: bytes
    flushed: bytes
    versions: dict[int, set[bytes]]

    def fits(self, found: bytes) -> None:
        """Whether a disk may hold this after the crash."""
        for sector in range(SIZE // SECTOR):
            piece = found[sector * SECTOR : (sector + 1) * SECTOR]
            if piece != self.flushed[sector * SECTOR : (sector + 1) * SECTOR]:
                assert piece in self.versions.get(sector, ()), f"sector {sector} holds what was never written there"


async def content(path: Path) -> bytes:
    """What pynbd finds on the disk, opened read-only."""
    graph = Graph()
    node = await graph.open({"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(path)}})
    found = bytearray(node.size)
    await node.path.read(0, memoryview(found), 0)
    await graph.close(node)
    return bytes(found)


def checked(path: Path, *, repair: bool) -> None:
    """qemu-img finds no corruption (after a repair, if that is what the format is about)."""
    tool = require_tool("qemu-img")
    if repair:
        subprocess.run([tool, "check", "-q", "-r", "all", path], capture_output=True, check=False)
    done = subprocess.run([tool, "check", path], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr


async def judge(state: State, path: Path, *, lazy: bool) -> None:
    """The image is what it may be after a crash."""
    path.write_bytes(state.image)
    state.fits(await content(path))
    checked(path, repair=lazy)
    state.fits(await content(path))


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("options", KINDS)
async def test_nothing_that_was_flushed_is_lost(graph: Graph, tmp_path: Path, options: str, backed: bool) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE * 2 // 3))
    empty = made(tmp_path, options, SIZE, base if backed else None).read_bytes()
    below = (base.read_bytes() if backed else b"").ljust(SIZE, b"\0")
    crashed = tmp_path / "crashed.qcow2"
    for number in range(WORKLOADS):
        seed = hash((options, backed, number)) if WORKLOADS > 3 else number
        how = random.Random(seed)
        storage = await graph.open({"driver": RECORDER, "seed": number})
        recorder(storage).begin(empty)
        backing = {"backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}} if backed else {}
        node = await graph.open({"driver": "qcow2", "file": storage.name, "discard": "unmap", **backing})
        work = Crashing(graph, node, bytearray(below), number)
        work.begin_versions()
        states: list[State] = []
        recorder(storage).on_write = partial(maybe_crash, work, states, how)
        for _ in range(16):
            if how.random() < 0.5:
                await work.flush()
            await work.changes()
        recorder(storage).on_write = None
        for state in how.sample(states, min(len(states), CRASHES)):
            await judge(state, crashed, lazy="lazy" in options)
        await work.close()


def maybe_crash(work: Crashing, states: list[State], how: random.Random) -> None:
    """After one write of four: keep what a crash at this moment would leave."""
    if how.random() < 0.25:
        states.append(work.state(recorder(work.node.children["file"].node).after_crash(how)))
