"""What of the clusters that become free is discarded in the file: by their cause, as QEMU does it."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from pynbd.block.driver import Preallocation
from pynbd.block.graph import Graph
from pynbd.formats.qcow2.driver import Qcow2
from tests.formats.qcow2.damage import Image, qemu_io
from tests.formats.qcow2.recorder import RECORDER, recorder
from tests.formats.qcow2.workload import UNMAP, Workload, in_file, is_sound, made
from tests.peers import require_tool, run

SIZE = 8 << 20
CLUSTER = 1 << 16
LENGTH = 16 * CLUSTER


class Cell(NamedTuple):
    """One way of giving clusters up.

    Args:
        option: what it depends on; "" for always, or never.
        default: without that option, and with discard=unmap.
        clusters: how many become free.
        work: what is done to a disk whose first bytes hold data.
    """

    option: str
    default: bool
    clusters: int
    work: Callable[[Workload], Awaitable[object]]


async def discard(work: Workload) -> None:
    await work.backend.discard(0, LENGTH)
    await work.backend.flush()


async def unmap(work: Workload) -> None:
    await work.backend.write_zeroes(0, LENGTH, UNMAP)
    await work.backend.flush()


async def delete_snapshot(work: Workload) -> None:
    """Of the snapshot, and of nothing else, are its data, its L1 table and the old snapshot table."""
    await work.driver.snapshot_create("first")
    await work.put(0, b"2" * LENGTH)
    recorder(work.node.children["file"].node).discards.clear()
    await work.driver.snapshot_delete("first")


async def go_back(work: Workload) -> None:
    await work.driver.snapshot_create("first")
    await work.put(0, b"2" * LENGTH)
    recorder(work.node.children["file"].node).discards.clear()
    await work.driver.snapshot_goto("first")


async def copy_a_table(work: Workload) -> None:
    """It is free when the snapshot that shared it is gone."""
    await work.driver.snapshot_create("first")
    await work.put(0, b"2" * 512)
    await work.backend.flush()
    recorder(work.node.children["file"].node).discards.clear()
    await work.driver.snapshot_delete("first")


async def overwrite(work: Workload) -> None:
    """What is compressed is written elsewhere."""
    cluster = memoryview(b"c" * CLUSTER)
    await work.driver.writer.packing.write(4 << 20, cluster)
    await work.put(4 << 20, b"3" * CLUSTER)
    await work.backend.flush()


async def make_shorter(work: Workload) -> None:
    await work.driver.truncate(LENGTH // 2, Preallocation.OFF, exact=True)


CELLS = [
    Cell("pass-discard-request", True, 16, discard),
    Cell("pass-discard-request", True, 16, unmap),
    Cell("pass-discard-snapshot", True, 18, delete_snapshot),
    Cell("pass-discard-snapshot", True, 16, go_back),
    Cell("pass-discard-other", False, 1, copy_a_table),
    Cell("", False, 1, overwrite),
    Cell("", True, 8, make_shorter),
]

OTHERS = {"pass-discard-request", "pass-discard-snapshot", "pass-discard-other"}


async def discarded(graph: Graph, path: Path, cell: Cell, options: dict[str, Any]) -> int:
    """Clusters that the file was told of."""
    storage = await graph.open({"driver": RECORDER, "discard": "unmap"})
    recorder(storage).begin(path.read_bytes())
    work = await Workload.opened(graph, {"driver": "qcow2", "file": storage.name, **options}, bytes(SIZE), seed=1)
    await cell.work(work)
    found = sum(length for _, length in recorder(storage).discards) // CLUSTER
    await work.close()
    path.write_bytes(recorder(storage).data)
    assert is_sound(path)
    return found


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = made(tmp_path, "", SIZE)
    qemu_io(path, [f"write -P 1 0 {LENGTH}"])
    return path


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.work.__name__)
async def test_each_cause_has_its_option(graph: Graph, filled: Path, cell: Cell) -> None:
    all_others = dict.fromkeys(OTHERS - {cell.option}, "off")
    before = filled.read_bytes()
    assert await discarded(graph, filled, cell, all_others) == (cell.clusters if cell.default else 0)
    for switch in ("on", "off") if cell.option else ():
        filled.write_bytes(before)
        expected = cell.clusters if switch == "on" else 0
        assert await discarded(graph, filled, cell, {**all_others, cell.option: switch}) == expected
    if cell.option:
        found = []
        for switch in ("on", "off"):
            filled.write_bytes(before)
            found.append(await discarded(graph, filled, cell, {**dict.fromkeys(OTHERS, "on"), cell.option: switch}))
        assert found[0] - found[1] == cell.clusters


async def test_requests_follow_the_option_discard(graph: Graph, filled: Path) -> None:
    """Without discard=unmap they end in the node itself; with the option alone they come as far as the image."""
    storage = await graph.open({"driver": RECORDER, "discard": "unmap"})
    recorder(storage).begin(filled.read_bytes())
    options = {"discard": "ignore", "pass-discard-snapshot": "off"}
    node = await graph.open({"driver": "qcow2", "file": storage.name, **options})
    await cast(Qcow2, node.driver).discard(0, LENGTH)
    await node.flush()
    assert recorder(storage).discards == []


async def test_a_data_file_hears_of_it_as_well(graph: Graph, tmp_path: Path) -> None:
    for switch, expected in (("on", 0), ("off", LENGTH)):
        data_file = tmp_path / "data.raw"
        path = made(tmp_path, f"data_file={data_file}", SIZE)
        qemu_io(path, [f"write -P 1 0 {LENGTH}"])
        node = await graph.open(in_file(path, **{"discard": "unmap", "pass-discard-request": switch}))
        await node.path.discard(0, LENGTH)
        await node.flush()
        await graph.close(node)
        assert allocated(data_file) == expected


def allocated(path: Path) -> int:
    """Bytes that a file takes on its disk."""
    return path.stat().st_blocks * 512


def described(path: Path, **options: str) -> str:
    words = [f"{name}={value}" for name, value in options.items()]
    return ",".join(["driver=qcow2", *words, "file.driver=file", f"file.filename={path}"])


PEERS = [
    {"discard": "unmap"},
    {"discard": "ignore"},
    {"discard": "unmap", "pass-discard-request": "off"},
    {"discard": "unmap", "pass-discard-snapshot": "off"},
]


@pytest.mark.parametrize("options", PEERS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
async def test_the_file_shrinks_as_with_qemu(graph: Graph, filled: Path, options: dict[str, str]) -> None:
    """Data that is discarded, and data that only a deleted snapshot kept: what both leave of the file's blocks."""
    run(require_tool("qemu-img"), "snapshot", "-c", "first", filled)
    qemu_io(filled, [f"write -P 2 0 {LENGTH}", f"write -P 3 {4 << 20} {LENGTH}"])
    twin = filled.with_name("twin.qcow2")
    shutil.copyfile(filled, twin)
    freed = []
    for path in (filled, twin):
        before = allocated(path)
        if path is twin:
            run(
                require_tool("qemu-io"), "--image-opts", described(path, **options), "-c", f"discard {4 << 20} {LENGTH}"
            )
        else:
            node = await graph.open(described(path, **options))
            await node.path.discard(4 << 20, LENGTH)
            await graph.close(node)
        between = allocated(path)
        if path is twin:
            run(require_tool("qemu-img"), "snapshot", "-d", "first", "--image-opts", described(path, **options))
        else:
            node = await graph.open(described(path, **options))
            await cast(Qcow2, node.driver).snapshot_delete("first")
            await graph.close(node)
        assert is_sound(path)
        assert not Image(path).header.nb_snapshots
        freed.append((before - between >= LENGTH, between - allocated(path) >= LENGTH))
    assert freed[0] == freed[1]
    requests, snapshots = options["discard"] == "unmap", options.get("pass-discard-snapshot") != "off"
    assert freed[0] == (requests and options.get("pass-discard-request") != "off", snapshots)
