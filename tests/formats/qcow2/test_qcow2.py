"""`qcow2`: what pynbd writes, QEMU reads, and finds sound; and the other way round."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError
from pynbd.block.extents import Status
from pynbd.block.graph import Graph
from tests.formats.qcow2.workload import (
    OPTIONS,
    Workload,
    in_file,
    is_sound,
    made,
    read_by_qemu,
    work_over_restless_storage,
)
from tests.peers import require_tool, run
from tests.restless import RESTLESS, restless

SIZE = (1 << 20) + 1536


def backing_file(tmp_path: Path, size: int) -> tuple[Path, bytes]:
    data = random.Random(size).randbytes(size // 512 * 512)
    path = tmp_path / "base.raw"
    path.write_bytes(data)
    return path, data


# qemu-img makes no preallocated image over a backing file.
@pytest.mark.parametrize(
    ("options", "backed"),
    [*((options, False) for options in OPTIONS), *((o, True) for o in OPTIONS if "preallocation" not in o)],
)
async def test_what_is_written_is_read_by_qemu(graph: Graph, tmp_path: Path, options: str, backed: bool) -> None:
    size = 8 << 20 if "2M" in options else SIZE
    base, below = backing_file(tmp_path, size // 2 + 777) if backed else (None, b"")
    path = made(tmp_path, options, size, base)
    work = await Workload.opened(graph, in_file(path), below[:size].ljust(size, b"\0"), seed=len(options))
    for _ in range(100):
        await work.round(4)
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model
    again = await Workload.opened(graph, in_file(path), work.model, seed=1)
    await again.check()
    await again.close()


@pytest.mark.parametrize(
    ("options", "below"),
    [
        (options, below)
        for options in OPTIONS
        for below in ("", "raw", "qcow2", "data file")
        if not (below in ("raw", "qcow2") and "preallocation" in options)
        and not (below == "data file" and "0.10" in options)
    ],
)
async def test_what_is_found_are_the_bytes(graph: Graph, tmp_path: Path, options: str, below: str) -> None:
    """What a finder says of short reads, `locate` says too, and the bytes lie there, whatever was done to the image."""
    size = 8 << 20 if "2M" in options else SIZE
    base, model = None, bytes(size)
    if below in ("raw", "qcow2"):
        base, data = backing_file(tmp_path, size // 2 + 777)
        model = data.ljust(size, b"\0")
        if below == "qcow2":
            raw, base = base, tmp_path / "base.qcow2"
            run(require_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, base)
    wanted = options + f",data_file={tmp_path / 'data'}" if below == "data file" else options
    path = made(tmp_path, wanted.removeprefix(","), size, base)
    work = await Workload.opened(graph, in_file(path), model, seed=9)
    found = 0
    for _ in range(60):
        await work.round(4)
        find = work.driver.finder()
        if find is None:
            assert "extended_l2" in options or "encrypt" in options
            continue
        for _ in range(20):
            length = work.random.choice([1, 512, 4096])
            offset = work.random.randrange(size - length)
            place = find(offset, length)
            if place is None:
                continue
            fd, host_offset, flags = place
            assert os.pread(fd, length, host_offset) == work.model[offset : offset + length]
            located = work.driver.locate(offset, length)
            assert located is not None
            assert (located.fd, located.host_offset, located.length, located.flags) == (fd, host_offset, length, flags)
            found += 1
        assert find(size - 1, 2) is None
    assert found > 10 or find is None
    await work.close()


@pytest.mark.parametrize("raw", [False, True])
async def test_a_data_file_holds_the_bytes(graph: Graph, tmp_path: Path, raw: bool) -> None:
    data_file = tmp_path / "data.raw"
    path = made(tmp_path, f"data_file={data_file},data_file_raw={'on' if raw else 'off'}", SIZE)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=3)
    for _ in range(100):
        await work.round(4)
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model
    if raw:
        assert data_file.read_bytes()[:SIZE].ljust(SIZE, b"\0") == work.model


@pytest.mark.parametrize("options", OPTIONS)
async def test_requests_that_wait_for_each_other(graph: Graph, tmp_path: Path, options: str) -> None:
    """The same over storage that lets others run in the middle of everything, with a cache that is too small."""
    size = 8 << 20 if "2M" in options else SIZE
    path = made(tmp_path, options, size)
    tiny = {"l2-cache-size": "1k", "refcount-cache-size": "1k"}
    await work_over_restless_storage(graph, path, size, suspends=0.5, requests=12, **tiny)


@pytest.mark.parametrize("options", OPTIONS)
async def test_failures_of_the_storage_leave_the_image_sound(graph: Graph, tmp_path: Path, options: str) -> None:
    """Requests fail now and then; what they did not touch is as before, and the image is without corruption."""
    size = 8 << 20 if "2M" in options else SIZE
    path = made(tmp_path, options, size)
    storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": 6, "suspends": 0.3, "node-name": "storage"})
    below = restless(storage)
    below.data[:] = path.read_bytes()
    work = await Workload.opened(graph, {"driver": "qcow2", "file": "storage"}, bytes(size), seed=8)
    cluster = work.driver.header.cluster_size
    for _ in range(150):
        at = work.random.randrange(size - cluster)
        length = work.random.randrange(1, min(3 * cluster, size - at))
        below.fails = 0.15
        try:
            await work.request(at, length)
        except OSError:
            below.fails = 0.0
            found = await work.read(at, length)
            work.model[at : at + length] = found
    below.fails = 0.0
    await work.check()
    await work.close()
    path.write_bytes(below.data)
    assert is_sound(path, leaks=True)
    assert read_by_qemu(path) == work.model


async def test_images_of_qemu_are_read(graph: Graph, tmp_path: Path) -> None:
    """A chain of three with compressed, zero and partly written clusters, opened by the names in the images."""
    base, below = backing_file(tmp_path, 700_000)
    middle = made(tmp_path, "compression_type=zstd", SIZE, base)
    top = made(tmp_path, "extended_l2=on", SIZE, middle)
    qemu_io = require_tool("qemu-io")
    run(qemu_io, "-c", "write -c -P 7 128k 64k", "-c", "write -z 256k 100k", "-c", "write -P 9 700k 3k", middle)
    run(qemu_io, "-c", "write -P 3 65k 3k", "-c", "write -z 512k 8k", "-c", "discard 576k 64k", top)
    node = await graph.open(in_file(top, **{"read-only": "on"}))
    found = bytearray(node.size)
    await node.path.read(0, memoryview(found), 0)
    assert found == read_by_qemu(top)
    assert below[:1000] == found[:1000]
    status = await node.block_status(0, SIZE)
    assert status[0].depth == 3
    assert status[0].status == Status.DATA | Status.ALLOCATED


async def test_chains_that_come_back_to_themselves_are_refused(graph: Graph, tmp_path: Path) -> None:
    first, second = made(tmp_path), made(tmp_path)
    for path, name in ((first, second), (second, first)):
        run(require_tool("qemu-img"), "rebase", "-u", "-b", name, "-F", "qcow2", path)
    with pytest.raises(BlockError, match="comes back to it"):
        await graph.open(str(first), read_only=True)
    assert graph.nodes == {}


async def test_code_is_never_run_because_an_image_says_so(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path)
    run(require_tool("qemu-img"), "rebase", "-u", "-b", 'json:{"driver": "./evil.py"}', "-F", "qcow2", path)
    with pytest.raises(BlockError, match="can't be named inside an image"):
        await graph.open(in_file(path))
    node = await graph.open(in_file(path, backing=None))
    assert set(node.children) == {"file"}


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on,cluster_size=16k"])
async def test_long_writes_in_place(graph: Graph, tmp_path: Path, options: str) -> None:
    """Clusters that follow each other in the file, and belong to the disk alone, are written at once."""
    cluster = 16 << 10
    path = made(tmp_path, options, SIZE)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)

    def write_now(offset: int, data: bytes) -> bool:
        if not work.backend.write_now(offset, memoryview(data)):
            return False
        work.model[offset : offset + len(data)] = data
        return True

    assert not write_now(0, b"a" * 2 * cluster)  # nothing is there
    for offset in (0, 9 * cluster, 5 * cluster):
        await work.backend.write(offset, memoryview(b"b" * 4 * cluster))
        work.model[offset : offset + 4 * cluster] = b"b" * 4 * cluster
    assert write_now(100, b"c" * 3 * cluster)
    assert write_now(9 * cluster, b"d" * 4 * cluster)
    assert not write_now(3 * cluster, b"e" * 2 * cluster)  # half of it is not there
    assert not write_now(8 * cluster, b"f" * 2 * cluster)  # it lies elsewhere
    await work.check()
    await work.driver.snapshot_create("one")
    assert not write_now(0, b"g" * 2 * cluster)  # it belongs to the snapshot as well
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model
