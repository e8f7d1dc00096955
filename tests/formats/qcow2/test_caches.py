"""What is kept of L2 tables in memory: in which pieces, and for how long."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.tables import joined
from tests.formats.qcow2.damage import Image, qemu_io
from tests.formats.qcow2.workload import (
    Workload,
    in_file,
    is_sound,
    made,
    read_by_qemu,
    snapshot_by_qemu,
    work_over_restless_storage,
)
from tests.peers import COMMAND_LIMIT_S, require_tool

SIZE = 4 << 20

SLICED = [
    "cluster_size=4k",
    "cluster_size=2k,refcount_bits=8",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10,cluster_size=4k",
]
"""Of images with several slices of 512 bytes in use."""


@pytest.mark.parametrize("options", SLICED)
async def test_work_with_slices(graph: Graph, tmp_path: Path, options: str) -> None:
    """Over storage that lets others run in the middle of everything, with room for two slices."""
    path = made(tmp_path, options, SIZE)
    tiny = {"l2-cache-size": "1k", "refcount-cache-size": "1k", "l2-cache-entry-size": 512}
    await work_over_restless_storage(graph, path, SIZE, suspends=0.3, requests=8, **tiny)


@pytest.mark.parametrize("options", SLICED)
async def test_snapshots_with_slices(graph: Graph, tmp_path: Path, options: str) -> None:
    path = made(tmp_path, options, SIZE)
    small = {"l2-cache-size": "4k", "l2-cache-entry-size": 512}
    work = await Workload.opened(graph, in_file(path, **small), bytes(SIZE), seed=3)
    held = {}
    for name in ("first", "second"):
        for _ in range(20):
            await work.round(6)
        await work.driver.snapshot_create(name)
        held[name] = bytes(work.model)
    for _ in range(20):
        await work.round(6)
    await work.check()
    await work.driver.snapshot_goto("first")
    work.model[:] = held["first"]
    for _ in range(20):
        await work.round(6)
    await work.driver.snapshot_delete("first")
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model
    assert snapshot_by_qemu(path, "second") == held["second"]


async def test_a_slice_is_what_is_read_and_kept(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", 1 << 30)
    qemu_io(path, [f"write -P 7 {100 << 20} 64k", f"write -P 8 {300 << 20} 64k"])
    table = Image(path).l2_tables()[0]
    options = {"l2-cache-entry-size": "4k", "l2-cache-size": "64k", "read-only": "on"}
    driver, seen = cast(Qcow2, (await graph.open(in_file(path, **options))).driver), list[tuple[int, int]]()
    read = driver.image.read_bytes

    async def noted(offset: int, length: int) -> bytearray:
        seen.append((offset, length))
        return await read(offset, length)

    driver.image.read_bytes = noted  # type: ignore[method-assign]  # what passes is to be seen
    into = bytearray(512)
    for megabytes, byte in ((100, 7), (300, 8), (101, 0)):
        await driver.read(megabytes << 20, memoryview(into), 0)
        assert into == bytes([byte]) * 512
    # 512 entries in a slice, of 64 KiB each.
    assert seen == [(table + part * 4096, 4096) for part in (3, 9)]
    assert sorted(driver.image.l2) == [3, 9]
    assert driver.image.l2.most == 16


@pytest.mark.parametrize("value", ["256", "512", "513", "1k", "64k", "128k", "0"])
async def test_sizes_are_refused_as_by_qemu(graph: Graph, tmp_path: Path, value: str) -> None:
    path = made(tmp_path, "", SIZE)
    options = f"driver=qcow2,l2-cache-entry-size={value},file.driver=file,file.filename={path}"
    command = [require_tool("qemu-io"), "--image-opts", options, "-c", "read 0 512"]
    done = subprocess.run(command, capture_output=True, timeout=COMMAND_LIMIT_S, check=False)
    if done.returncode == 0:
        await graph.open(options)
    else:
        with pytest.raises(OptionError, match="expected a power of two from 512 to the cluster size"):
            await graph.open(options)


class Timers:
    """Stands for `loop.call_later`: nothing is called before the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> Any:
        self.waiting.append((delay_s, callback))
        return self

    def cancel(self) -> None:
        self.waiting.clear()

    def passes(self) -> None:
        """An interval goes by."""
        delay_s, callback = self.waiting.pop()
        assert delay_s == 5
        callback()
        assert len(self.waiting) == 1


async def test_what_nobody_uses_is_dropped(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "cluster_size=4k", 64 << 20)
    qemu_io(path, ["write 0 64M"])
    timers = Timers(monkeypatch)
    node = await graph.open(in_file(path, **{"cache-clean-interval": 5}))
    driver, into = cast(Qcow2, node.driver), memoryview(bytearray(512))
    image = driver.image
    for table in range(4):
        await driver.read(table << 21, into, 0)
    assert sorted(image.l2) == [0, 1, 2, 3]
    timers.passes()  # all of them were used in this one
    assert sorted(image.l2) == [0, 1, 2, 3]
    await driver.read(1 << 21, into, 0)
    await driver.write_zeroes(2 << 21, 4096, 0)
    timers.passes()
    timers.passes()
    assert sorted(image.l2) == [2]  # nobody has asked for a flush, so it is not on disk yet
    await node.flush()
    timers.passes()
    timers.passes()
    assert sorted(image.l2) == sorted(image.blocks) == []
    await driver.read(3 << 21, into, 0)
    assert bytes(into) == b"\xcd" * 512
    await graph.close(node)
    assert timers.waiting == []


async def test_no_interval_is_no_timer(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timers = Timers(monkeypatch)
    await graph.open(in_file(made(tmp_path), **{"cache-clean-interval": "0"}))
    assert timers.waiting == []
    for value in ("-1", str(1 << 32)):
        with pytest.raises(OptionError, match="cache-clean-interval"):
            await graph.open(in_file(made(tmp_path), **{"cache-clean-interval": value}))


def test_pieces_that_follow_each_other_are_joined() -> None:
    pieces = [(10, b"abc"), (0, b"xy"), (13, b"d"), (2, b"z")]
    random.Random(1).shuffle(pieces)
    assert joined(pieces) == [(0, b"xyz"), (10, b"abcd")]
