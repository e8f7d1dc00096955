"""Internal snapshots: ours are QEMU's, and QEMU's are ours."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError, ImageError
from pynbd.block.families import Snapshots, VmStates
from pynbd.block.graph import Graph
from pynbd.formats.qcow2 import layout
from tests.formats.qcow2.workload import (
    OPTIONS,
    Workload,
    in_file,
    is_sound,
    made,
    read_by_qemu,
    size_for,
    snapshot_by_qemu,
)
from tests.peers import require_tool, run
from tests.restless import RESTLESS, restless

SIZE = (1 << 20) + 1536
SHARING = [options.replace(",refcount_bits=2", "") for options in OPTIONS if "bits=1" not in options]
"""Images whose clusters can be shared by many."""

SMALL = [options for options in SHARING if "2M" not in options]


def names_by_qemu(path: Path) -> list[str]:
    lines = run(require_tool("qemu-img"), "snapshot", "-l", path).splitlines()
    return [line.split()[1] for line in lines[2:]]


class Kept:
    """A disk with snapshots, and what each must hold."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.models: dict[str, bytes] = {}

    async def create(self, name: str) -> None:
        await self.work.driver.snapshot_create(name)
        self.models[name] = bytes(self.work.model)

    async def goto(self, name: str) -> None:
        await self.work.driver.snapshot_goto(name)
        self.work.model[:] = self.models[name]

    async def delete(self, name: str) -> None:
        await self.work.driver.snapshot_delete(name)
        del self.models[name]

    async def step(self, number: int) -> None:
        """Some requests, then something with a snapshot."""
        for _ in range(8):
            await self.work.round(4)
        chance = self.work.random.random()
        if chance < 0.4 or not self.models:
            await self.create(f"s{number}")
        elif chance < 0.7:
            await self.goto(self.work.random.choice(list(self.models)))
        else:
            await self.delete(self.work.random.choice(list(self.models)))

    async def check(self) -> None:
        await self.work.check()
        assert [snapshot.name for snapshot in self.work.driver.snapshot_list()] == list(self.models)

    def check_by_qemu(self, path: Path) -> None:
        assert is_sound(path)
        assert names_by_qemu(path) == list(self.models)
        assert read_by_qemu(path) == self.work.model
        for name, model in self.models.items():
            assert snapshot_by_qemu(path, name) == model


@pytest.mark.parametrize("options", SHARING)
async def test_snapshots_that_qemu_opens_applies_and_deletes(graph: Graph, tmp_path: Path, options: str) -> None:
    size = size_for(options, SIZE)
    path = made(tmp_path, options, size)
    kept = Kept(await Workload.opened(graph, in_file(path), bytes(size), seed=len(options)))
    assert isinstance(kept.work.driver, Snapshots)
    assert isinstance(kept.work.driver, VmStates)
    for name in ("first", "second", "third"):
        for _ in range(20):
            await kept.work.round(4)
        await kept.create(name)
    for _ in range(20):
        await kept.work.round(4)
    await kept.check()
    await kept.work.close()
    kept.check_by_qemu(path)
    qemu_img = require_tool("qemu-img")
    run(qemu_img, "snapshot", "-d", "second", path)
    assert is_sound(path)
    run(qemu_img, "snapshot", "-a", "first", path)
    del kept.models["second"]
    kept.work.model[:] = kept.models["first"]
    kept.check_by_qemu(path)
    kept.work = await Workload.opened(graph, in_file(path), kept.models["first"], seed=2)
    await kept.check()
    for _ in range(20):
        await kept.work.round(4)
    await kept.goto("third")
    await kept.check()
    await kept.delete("first")
    await kept.delete("third")
    await kept.work.close()
    kept.check_by_qemu(path)


@pytest.mark.parametrize("options", SHARING)
async def test_snapshots_of_qemu(graph: Graph, tmp_path: Path, options: str) -> None:
    size = size_for(options, SIZE)
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(size // 512 * 512 - 1024))
    path = made(tmp_path, options, size, None if "preallocation" in options else base)
    qemu_img, qemu_io = require_tool("qemu-img"), require_tool("qemu-io")
    before: dict[str, bytes] = {}
    for number, name in enumerate(("one", "two")):
        commands = [f"write -P {7 + number} {3 + number}k 40k", f"write -z {90 + number}k 64k"]
        if number == 0 and "preallocation" not in options:
            commands.append("write -c -P 9 2M 2M" if "2M" in options else "write -c -P 9 512k 64k")
        run(qemu_io, *(word for command in commands for word in ("-c", command)), path)
        run(qemu_img, "snapshot", "-c", name, path)
        before[name] = read_by_qemu(path)
    run(qemu_io, "-c", "write -P 77 0 200k", path)
    kept = Kept(await Workload.opened(graph, in_file(path), read_by_qemu(path), seed=3))
    kept.models = before
    await kept.check()
    await kept.goto("one")
    await kept.check()
    for _ in range(20):
        await kept.work.round(4)
    await kept.delete("one")
    await kept.check()
    await kept.goto("two")
    await kept.work.close()
    kept.check_by_qemu(path)


@pytest.mark.parametrize("options", SMALL)
async def test_random_work_with_snapshots(graph: Graph, tmp_path: Path, options: str) -> None:
    """Over storage that lets others run in the middle of everything, with a cache that is too small."""
    size = size_for(options, SIZE)
    path = made(tmp_path, options, size)
    storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": 10, "suspends": 0.3, "node-name": "storage"})
    restless(storage).data[:] = path.read_bytes()
    tiny = {"l2-cache-size": "1k", "refcount-cache-size": "1k"}
    kept = Kept(await Workload.opened(graph, {"driver": "qcow2", "file": "storage", **tiny}, bytes(size), seed=11))
    for number in range(14):
        await kept.step(number)
        await kept.check()
        await kept.work.backend.flush()
        path.write_bytes(restless(storage).data)
        if "lazy" not in options:
            assert is_sound(path)
    await kept.work.close()
    path.write_bytes(restless(storage).data)
    kept.check_by_qemu(path)


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,cluster_size=16k"])
async def test_what_fails_leaves_everything_as_it_was(graph: Graph, tmp_path: Path, options: str) -> None:
    path = made(tmp_path, options, SIZE)
    storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": 10, "suspends": 0.3, "node-name": "storage"})
    below = restless(storage)
    below.data[:] = path.read_bytes()
    kept = Kept(await Workload.opened(graph, {"driver": "qcow2", "file": "storage"}, bytes(SIZE), seed=4))
    failed = 0
    for number in range(60):
        for _ in range(3):
            await kept.work.round(4)
        below.fails = 0.04
        names = list(kept.models)
        try:
            if number % 3 == 0 or not names:
                await kept.create(f"s{number}")
            elif number % 3 == 1:
                await kept.goto(kept.work.random.choice(names))
            else:
                await kept.delete(kept.work.random.choice(names))
        except OSError:
            failed += 1
        below.fails = 0.0
        if kept.work.driver.image.fence is not None:
            await opened_again(graph, kept, path)
            below = restless(graph.nodes["storage"])
        await follow(kept)
    assert failed > 5
    await kept.work.close()
    path.write_bytes(below.data)
    run(require_tool("qemu-img"), "check", "-q", "-r", "leaks", path)
    kept.check_by_qemu(path)


async def opened_again(graph: Graph, kept: Kept, path: Path) -> None:
    """Two writes of the header in a row have failed: nothing more is written until the image is opened anew."""
    below = restless(graph.nodes["storage"])
    unwritten = not kept.work.driver.image.is_clean
    with pytest.raises(OSError, match="the header can't be written") if unwritten else contextlib.nullcontext():
        await kept.work.close()
    path.write_bytes(below.data)
    run(require_tool("qemu-img"), "check", "-q", "-r", "all", path)
    storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": 10, "suspends": 0.3, "node-name": "storage"})
    restless(storage).data[:] = path.read_bytes()
    kept.work = await Workload.opened(graph, {"driver": "qcow2", "file": "storage"}, kept.work.model, seed=5)


async def follow(kept: Kept) -> None:
    """What failed was done or was not, but not by half."""
    now = [snapshot.name for snapshot in kept.work.driver.snapshot_list()]
    for name in set(now) - set(kept.models):
        kept.models[name] = bytes(kept.work.model)
    for name in set(kept.models) - set(now):
        del kept.models[name]
    found = await kept.work.read(0, SIZE)
    assert found in [bytes(kept.work.model), *kept.models.values()]
    kept.work.model[:] = found


async def test_a_crash_at_any_flush_is_repaired_at_worst(graph: Graph, tmp_path: Path) -> None:
    """After each flush of the storage, the image holds the disk and the snapshots that it held before or after."""
    qemu_img = require_tool("qemu-img")
    for options in ("cluster_size=4k", "cluster_size=4k,compat=0.10"):
        path = made(tmp_path, options, SIZE)
        storage = await graph.open({"driver": RESTLESS, "size": 0, "node-name": f"storage{len(options)}"})
        below = restless(storage)
        below.data[:] = path.read_bytes()
        kept = Kept(await Workload.opened(graph, {"driver": "qcow2", "file": storage.name}, bytes(SIZE), seed=4))
        for _ in range(20):
            await kept.work.round(4)
        await kept.create("first")
        for _ in range(20):
            await kept.work.round(4)
        await kept.work.backend.flush()
        images: list[bytes] = []
        flush = storage.calls.flush_to_disk

        async def flush_and_copy() -> None:
            await flush()  # noqa: B023  # called before the loop goes on
            if not images or images[-1] != below.data:  # noqa: B023
                images.append(bytes(below.data))  # noqa: B023

        storage.calls.flush_to_disk = flush_and_copy  # type: ignore[method-assign]  # the storage is the test's
        before = bytes(kept.work.model)
        await kept.create("second")
        await kept.goto("first")
        await kept.delete("second")
        allowed = {before, kept.models["first"]}
        assert len(images) > 8
        for image in images:
            path.write_bytes(image)
            if "0.10" not in options:
                run(qemu_img, "check", "-q", "-r", "all", path)
            else:
                told = run("sh", "-c", '"$0" check -r leaks "$1" 2>&1 || true', qemu_img, path)
                # Flags may be behind the counts; nothing refers to what is not counted.
                assert all("OFLAG_COPIED" in line for line in told.splitlines() if line.startswith("ERROR"))
            assert read_by_qemu(path) in allowed
            assert snapshot_by_qemu(path, "first") == kept.models["first"]
        await kept.work.close()


@pytest.mark.parametrize("bits", [1, 2])
async def test_a_count_that_does_not_fit(graph: Graph, tmp_path: Path, bits: int) -> None:
    path = made(tmp_path, f"cluster_size=512,refcount_bits={bits}", SIZE)
    most = (1 << bits) - 1
    kept = Kept(await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1))
    for _ in range(10):
        await kept.work.round(4)
    for number in range(most - 1):
        await kept.create(f"s{number}")
    # The first L2 tables are the disk's own again, and only the last ones can't be shared any more.
    kept.work.model[: SIZE // 2] = b"w" * (SIZE // 2)
    await kept.work.put(0, b"w" * (SIZE // 2))
    await kept.work.driver.image.commit_all()
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"more than {most} references"):
        await kept.create("too many")
    assert path.read_bytes() == before
    await kept.check()
    await kept.work.close()
    kept.check_by_qemu(path)


async def test_what_can_not_be_kept(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, f"data_file={tmp_path / 'data.raw'}", SIZE)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    with pytest.raises(OSError, match="data file"):
        await work.driver.snapshot_create("one")
    with pytest.raises(OSError, match="data file"):
        await work.driver.save_vmstate(0, memoryview(b"state"))
    await work.close()
    path = made(tmp_path, "", SIZE)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    await work.driver.snapshot_create("one")
    for name, problem in (("one", "already"), ("", "length"), ("x" * 256, "length")):
        with pytest.raises(BlockError, match=problem):
            await work.driver.snapshot_create(name)
    with pytest.raises(BlockError, match="no snapshot of name 'two'; there are: 'one'"):
        await work.driver.snapshot_goto("two")
    await work.close()
    node = await graph.open(in_file(path, **{"read-only": True}))
    driver = node.driver
    assert isinstance(driver, Snapshots)
    assert [(snapshot.id, snapshot.name) for snapshot in driver.snapshot_list()] == [("1", "one")]
    with pytest.raises(OSError, match="Read-only"):
        await driver.snapshot_delete("one")


async def test_a_snapshot_of_another_size(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    qemu_img = require_tool("qemu-img")
    run(require_tool("qemu-io"), "-c", f"write -P 3 0 {SIZE}", path)
    run(qemu_img, "snapshot", "-c", "small", path)
    run(qemu_img, "resize", "-q", path, str(3 * SIZE))
    work = await Workload.opened(graph, in_file(path), (b"\3" * SIZE).ljust(3 * SIZE, b"\0"), seed=1)
    await work.check()
    await work.driver.snapshot_goto("small")
    assert work.backend.size == SIZE
    del work.model[SIZE:]
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model


async def test_bitmaps_hear_of_another_content(graph: Graph, tmp_path: Path) -> None:
    work = await Workload.opened(graph, in_file(made(tmp_path, "", SIZE)), bytes(SIZE), seed=1)
    await work.driver.snapshot_create("one")
    bitmap = await graph.add_bitmap(work.node, "backup")
    await work.driver.snapshot_goto("one")
    assert bitmap.count == SIZE
    await work.close()


@pytest.mark.parametrize("options", SMALL)
async def test_the_state_of_a_machine(graph: Graph, tmp_path: Path, options: str) -> None:
    size = size_for(options, SIZE)
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(4 * size))
    path = made(tmp_path, options, size, None if "preallocation" in options else base)
    below = read_by_qemu(path)
    kept = Kept(await Workload.opened(graph, in_file(path), below, seed=3))
    states: dict[str, bytes] = {}
    for name, length in (("one", 300_001), ("two", 1_234_567)):
        for _ in range(10):
            await kept.work.round(4)
        state = states[name] = kept.work.random.randbytes(length)
        at = 0
        while at < length:
            some = kept.work.random.randrange(1, 100_000)
            await kept.work.driver.save_vmstate(at, memoryview(state)[at : at + some])
            at += some
        await kept.create(name)
        assert kept.work.driver.snapshot_list()[-1].vm_state_size == length
    assert await state_of(kept, 100) == bytes(100)
    for name, state in states.items():
        await kept.goto(name)
        assert await state_of(kept, len(state)) == state
        await kept.check()
    await kept.create("plain")
    assert kept.work.driver.snapshot_list()[-1].vm_state_size == 0
    await kept.goto("one")
    await kept.delete("two")
    assert await state_of(kept, len(states["one"])) == states["one"]
    await kept.work.close()
    kept.check_by_qemu(path)
    # QEMU applies it; the state comes with it.
    run(require_tool("qemu-img"), "snapshot", "-a", "one", path)
    kept.work = await Workload.opened(graph, in_file(path), kept.models["one"], seed=3)
    assert await state_of(kept, len(states["one"]) + 10) == states["one"] + bytes(10)
    await kept.work.close()


async def state_of(kept: Kept, length: int) -> bytes:
    found = bytearray(length)
    await kept.work.driver.load_vmstate(0, memoryview(found))
    return bytes(found)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("extra_data_size", 2000, "2000 bytes of extra data"),
        ("l1_size", 1 << 30, "l1_size is"),
        ("l1_table_offset", 513, "l1_table_offset is 513"),
        ("name_size", 65535, "the file ends at"),
    ],
)
async def test_wrong_tables_are_refused(graph: Graph, tmp_path: Path, field: str, value: int, problem: str) -> None:
    path = made(tmp_path, "cluster_size=4k", SIZE)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    (offset,) = struct.unpack_from(">Q", data, 64)
    entry = layout.parsed(layout.SNAPSHOT, bytes(data), offset)
    entry[field] = value
    data[offset : offset + layout.SNAPSHOT_BYTES] = layout.SNAPSHOT.build(entry)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=problem):
        await graph.open(in_file(path))


async def test_unknown_extra_data_are_kept(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    data = bytearray(path.read_bytes())
    (offset,) = struct.unpack_from(">Q", data, 64)
    entry = layout.parsed(layout.SNAPSHOT, bytes(data), offset)
    at = offset + layout.SNAPSHOT_BYTES + entry.extra_data_size
    name = bytes(data[at : at + 4])
    entry.extra_data_size += 8
    data[offset : offset + layout.SNAPSHOT_BYTES] = layout.SNAPSHOT.build(entry)
    data[at : at + 12] = b"unknown!" + name
    path.write_bytes(data)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    await work.driver.snapshot_create("two")
    await work.close()
    assert names_by_qemu(path) == ["one", "two"]
    assert b"unknown!1one" in path.read_bytes()
    assert is_sound(path)
