"""New images, other lengths, and other names of backing files: QEMU agrees about all of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pynbd.block import options as opt
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Preallocation
from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2.creation import Qcow2CreationOptions
from pynbd.formats.qcow2.driver import Qcow2
from tests.formats.qcow2.workload import OPTIONS, Workload, in_file, is_sound, made, read_by_qemu
from tests.peers import require_tool, run


def parsed(text: str, size: int) -> Qcow2CreationOptions:
    tree = opt.parse_dotted(text) if text else {}
    return opt.convert({**tree, "size": size}, Qcow2CreationOptions, driver="qcow2")


async def create(graph: Graph, path: Path, text: str, size: int) -> None:
    """A new image of ours."""
    options = parsed(text, size)
    path.touch()
    backends = []
    for name in (path, Path(options.data_file) if options.data_file else None):
        if name is not None:
            name.touch()
            backend = BlockBackend("creation")
            node = await graph.open({"driver": "file", "filename": str(name)})
            graph.attach(backend, node, Permission.ALL)
            backends.append(backend)
    try:
        await Qcow2.create_image(backends[0], options, data_file=backends[1] if len(backends) > 1 else None)
    finally:
        for backend in backends:
            node = backend.node
            graph.detach(backend)
            await graph.close(node)


def told(path: Path) -> dict[str, Any]:
    """What qemu-img info says, without what differs between any two files."""
    said: dict[str, Any] = json.loads(run(require_tool("qemu-img"), "info", "-U", "--output=json", path))
    for name in ("filename", "actual-size", "full-backing-filename", "children"):
        said.pop(name, None)
    return said


KINDS = [
    *OPTIONS,
    "compat=v2,preallocation=full",
    "preallocation=falloc,cluster_size=16k",
    "preallocation=metadata,refcount_bits=1,cluster_size=512",
    "extended_l2=on,preallocation=metadata",
]


@pytest.mark.parametrize(
    ("options", "size"),
    [*((kind, (20 << 20) + 512) for kind in KINDS), *((kind, size) for kind in KINDS[:3] for size in (0, 512))],
)
async def test_new_images_are_as_qemu_makes_them(graph: Graph, tmp_path: Path, options: str, size: int) -> None:
    path = tmp_path / "ours.qcow2"
    await create(graph, path, options, size)
    assert is_sound(path)
    theirs = made(tmp_path, options, size)
    assert told(path) == told(theirs)
    assert not any(read_by_qemu(path))
    work = await Workload.opened(graph, in_file(path), bytes(size), seed=size)
    for _ in range(20 if size > 512 else 0):
        await work.round(4)
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model


async def test_a_new_image_with_a_data_file(graph: Graph, tmp_path: Path) -> None:
    path, data_file = tmp_path / "ours.qcow2", tmp_path / "data.raw"
    await create(graph, path, f"data_file={data_file},data_file_raw=on", 1 << 20)
    assert is_sound(path)
    work = await Workload.opened(graph, in_file(path), bytes(1 << 20), seed=1)
    for _ in range(20):
        await work.round(4)
    await work.close()
    assert read_by_qemu(path) == work.model == data_file.read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("cluster_size=1000", "cluster_size"),
        ("cluster_size=4M", "cluster_size"),
        ("refcount_bits=3", "refcount_bits"),
        ("compat=0.10,refcount_bits=8", "needs compat"),
        ("extended_l2=on,cluster_size=4k", "extended_l2"),
        ("data_file_raw=on", "data_file_raw needs data_file"),
        ("backing_fmt=raw", "backing_file"),
        ("backing_file=a,preallocation=full", "preallocation"),
        ("cluster_size=512,size=1P", "too many"),
        ("encrypt.format=luks", "key-secret"),
    ],
)
async def test_options_that_do_not_go_together(graph: Graph, tmp_path: Path, options: str, said: str) -> None:
    path = tmp_path / "ours.qcow2"
    size = 1 << 50 if "1P" in options else 1 << 20
    with pytest.raises(OptionError, match=said):
        await create(graph, path, options.removesuffix(",size=1P"), size)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on", "preallocation=full", "refcount_bits=1"])
@pytest.mark.parametrize("size", [0, 1, 5 << 30, 64 << 40])
async def test_measured_as_by_qemu(options: str, size: int) -> None:
    if size == 64 << 40 and "512" in options:
        size = 100 << 30
    extra = ["-o", options] if options else []
    command = (require_tool("qemu-img"), "measure", "--output=json", "-O", "qcow2", *extra, "--size", str(size))
    said = json.loads(run(*command))
    found = await Qcow2.measure(parsed(options, size), None)
    assert (found.required, found.fully_allocated) == (said["required"], said["fully-allocated"])


@pytest.mark.parametrize("bitmaps", [0, 1, 2])
async def test_a_disk_is_measured_as_by_qemu(graph: Graph, tmp_path: Path, bitmaps: int) -> None:
    path = made(tmp_path, "", 10 << 20)
    run(require_tool("qemu-io"), "-c", "write 100k 200k", "-c", "write 5M 3M", path)
    for name, granularity in (("one", "64k"), ("another", "512"))[:bitmaps]:
        run(require_tool("qemu-img"), "bitmap", "--add", "-g", granularity, path, name)
    said = json.loads(run(require_tool("qemu-img"), "measure", "--output=json", "-O", "qcow2", path))
    node = await graph.open({**in_file(path), "read-only": True})
    backend = BlockBackend("measure")
    graph.attach(backend, node)
    found = await Qcow2.measure(parsed("", 0), backend)
    graph.detach(backend)
    expected = (said["required"], said["fully-allocated"], said["bitmaps"])
    assert (found.required, found.fully_allocated, found.bitmaps) == expected


# --- resize ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "backed"), [*((kind, False) for kind in OPTIONS), *((kind, True) for kind in OPTIONS[:3])]
)
async def test_resized_both_ways(graph: Graph, tmp_path: Path, options: str, backed: bool) -> None:
    size = 1 << 20
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(3 << 20))
    path = made(tmp_path, options, size, base if backed else None)
    below = base.read_bytes()[:size] if backed else bytes(size)
    work = await Workload.opened(graph, in_file(path), below, seed=len(options))
    for step in range(12):
        new = work.random.choice([512, size // 2, size + 1024, 2 * size - 512, 3 * size]) // 512 * 512
        await work.backend.truncate(new)
        del work.model[new:]
        work.model.extend(bytes(new - len(work.model)))
        for _ in range(5):
            await work.round(3)
        if step % 4 == 3:
            await work.check()
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model


@pytest.mark.parametrize("kind", list(Preallocation))
async def test_what_is_added_may_be_preallocated(graph: Graph, tmp_path: Path, kind: Preallocation) -> None:
    path = made(tmp_path, "cluster_size=4k", 64 << 10)
    work = await Workload.opened(graph, in_file(path), bytes(64 << 10), seed=1)
    await work.backend.write(60 << 10, memoryview(b"x" * 4096))
    await work.backend.truncate(8 << 20, kind)
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == bytes(60 << 10) + b"x" * 4096 + bytes((8 << 20) - (64 << 10))
    allocated = json.loads(run(require_tool("qemu-img"), "map", "--output=json", path))
    added = [extent for extent in allocated if extent["start"] >= 64 << 10]
    assert added
    assert all(("offset" in extent) is (kind is not Preallocation.OFF) for extent in added)


async def test_a_large_disk_grows_past_its_l1_table(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "cluster_size=512", 1 << 20)
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    await work.backend.write(0, memoryview(b"first"))
    await work.backend.truncate(1 << 30)
    await work.backend.write((1 << 30) - 5, memoryview(b"last!"))
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == b"first".ljust((1 << 30) - 5, b"\0") + b"last!"


# --- emptied, rebased --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "extended_l2=on", "compat=0.10", "lazy_refcounts=on"])
async def test_an_emptied_image_shows_what_lies_below(graph: Graph, tmp_path: Path, options: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(1).randbytes(1 << 20))
    path = made(tmp_path, options, 1 << 20, base)
    work = await Workload.opened(graph, in_file(path), base.read_bytes(), seed=2)
    for _ in range(30):
        await work.round(4)
    await work.driver.make_empty()
    work.model[:] = base.read_bytes()
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == base.read_bytes()


async def test_the_name_of_the_backing_file_is_changed(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path)
    node = await graph.open(in_file(path))
    driver = node.driver
    assert isinstance(driver, Qcow2)
    for name, kind in (("base.raw", "raw"), ("b" * 1000, "qcow2"), ("", "")):
        await driver.change_backing_file(name, kind)
        assert driver.backing_name() == (name, kind)
        said = told(path) if not name.startswith("bbb") else {"backing-filename": name}
        assert said.get("backing-filename", "") == name
    with pytest.raises(Exception, match="at most 1023"):
        await driver.change_backing_file("b" * 1024, "raw")
    assert driver.backing_name() == ("", "")
