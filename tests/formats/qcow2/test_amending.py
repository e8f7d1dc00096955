"""Options of images are changed; QEMU finds them sound, as it would have made them, and with the same content."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.errors import BlockError, OptionError
from pynbd.block.graph import Graph
from pynbd.formats.qcow2 import amending
from tests.cli.pynbd_command import PYNBD
from tests.formats.qcow2.test_creation import told
from tests.formats.qcow2.workload import Workload, in_file, is_sound, made, read_by_qemu, snapshot_by_qemu
from tests.peers import require_tool, run

SIZE = 1 << 20


async def amended(graph: Graph, path: Path, model: bytes, changes: dict[str, Any]) -> bytes:
    """Change options of an image between random work on it; gives its content."""
    work = await Workload.opened(graph, in_file(path), model, seed=9)
    for _ in range(30):
        await work.round(4)
    await work.driver.amend(changes)
    await work.check()
    for _ in range(30):
        await work.round(4)
    await work.check()
    await work.close()
    return bytes(work.model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("compat=0.10", "compat=1.1"),
        ("compat=1.1", "compat=0.10"),
        ("lazy_refcounts=off", "lazy_refcounts=on"),
        ("lazy_refcounts=on", "lazy_refcounts=off"),
        ("refcount_bits=16,cluster_size=4k", "refcount_bits=64"),
        ("refcount_bits=64,cluster_size=512", "refcount_bits=8"),
        ("refcount_bits=8", "refcount_bits=32"),
        ("lazy_refcounts=on,refcount_bits=16", "lazy_refcounts=off,compat=v2"),
        ("compat=v2", "compat=v3,lazy_refcounts=on,refcount_bits=32"),
    ],
)
@pytest.mark.parametrize("backed", [False, True])
async def test_changed_and_sound(graph: Graph, tmp_path: Path, before: str, after: str, backed: bool) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(2).randbytes(SIZE // 2))
    path = made(tmp_path, before, SIZE, base if backed else None)
    below = (base.read_bytes() if backed else b"").ljust(SIZE, b"\0")
    changes = dict(word.split("=") for word in after.split(","))
    content = await amended(graph, path, below, changes)
    assert is_sound(path)
    assert read_by_qemu(path) == content
    twin = made(tmp_path, before, SIZE, base if backed else None)
    run(require_tool("qemu-img"), "amend", "-o", after, twin)
    ours, theirs = told(path), told(twin)
    assert ours == theirs


@pytest.mark.parametrize("backed", [False, True])
async def test_snapshots_are_kept_in_an_image_of_the_old_version(graph: Graph, tmp_path: Path, backed: bool) -> None:
    """With their zero clusters: those that have a place, which may be another one's data, and those that have none."""
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(2).randbytes(SIZE))
    path = made(tmp_path, "cluster_size=4k", SIZE, base if backed else None)
    qemu_io, qemu_img = require_tool("qemu-io"), require_tool("qemu-img")
    run(qemu_io, "-c", "write -P 1 0 64k", "-c", "write -z 8k 8k", "-c", "write -z 256k 8k", path)
    run(qemu_img, "snapshot", "-c", "s0", path)
    run(qemu_io, "-c", "write -z 32k 8k", "-c", "write -z -u 48k 4k", path)
    for name in ("s1", "s2"):
        run(qemu_img, "snapshot", "-c", name, path)
    run(qemu_io, "-c", "write -P 2 8k 1k", "-c", "discard 256k 4k", "-c", "write -z 2k 4k", path)
    held = {name: snapshot_by_qemu(path, name) for name in ("s0", "s1", "s2")}
    content = read_by_qemu(path)
    assert await amended(graph, path, content, {"compat": "0.10"}) != content  # it was written to
    assert is_sound(path)
    assert told(path)["format-specific"]["data"]["compat"] == "0.10"
    assert {name: snapshot_by_qemu(path, name) for name in held} == held
    run(qemu_img, "snapshot", "-a", "s1", path)
    assert is_sound(path)
    assert read_by_qemu(path) == held["s1"]
    for name in held:
        run(qemu_img, "snapshot", "-d", name, path)
        assert is_sound(path)


async def test_snapshots_that_the_old_version_can_not_tell_of(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    run(require_tool("qemu-img"), "resize", "-q", path, "2M")
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    with pytest.raises(OptionError, match="'one' is of a disk of 1048576 bytes"):
        await work.driver.amend({"compat": "0.10"})
    await work.close()
    assert is_sound(path)


async def test_another_compression_goes_where_nothing_is_compressed(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "compression_type=zstd", SIZE)
    run(require_tool("qemu-io"), "-c", "write -c -P 1 0 64k", path)
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    with pytest.raises(OptionError, match="compression"):
        await work.driver.amend({"compat": "0.10"})
    await work.backend.discard(0, 65536)
    await work.driver.amend({"compat": "0.10"})
    await work.close()
    assert is_sound(path)
    assert told(path)["format-specific"]["data"]["compat"] == "0.10"


async def test_size_and_backing_file(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    await work.driver.amend({"size": "2M", "backing_file": "other.raw", "backing_fmt": "raw"})
    assert work.node.size == 2 << 20
    await work.close()
    said = told(path)
    assert (said["virtual-size"], said["backing-filename"], said["backing-filename-format"]) == (
        2 << 20,
        "other.raw",
        "raw",
    )


@pytest.mark.parametrize(
    ("before", "changes", "said"),
    [
        ("", {"cluster_size": "4k"}, "cluster_size"),
        ("", {"refcount_bits": "3"}, "power of two"),
        ("extended_l2=on", {"compat": "0.10"}, "extended l2"),
        ("refcount_bits=8", {"compat": "0.10"}, "refcount_bits=16"),
        ("", {"data_file": "x"}, "keeps its data in itself"),
        ("", {"encrypt": {"state": "active"}}, "key slots"),
        ("", {"backing_fmt": "raw"}, "needs backing_file"),
    ],
)
async def test_what_cannot_be_changed(
    graph: Graph, tmp_path: Path, before: str, changes: dict[str, Any], said: str
) -> None:
    path = made(tmp_path, before)
    old = path.read_bytes()
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    with pytest.raises(OptionError, match=said):
        await work.driver.amend(changes)
    await work.close()
    assert path.read_bytes() == old


async def test_counts_that_do_not_fit_stay_as_they_are(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path)
    run(require_tool("qemu-io"), "-c", "write 0 64k", path)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    with pytest.raises(OptionError, match="2 references, at most 1"):
        await work.driver.amend({"refcount_bits": "1"})
    await work.driver.amend({"refcount_bits": "2"})
    await work.close()
    assert is_sound(path)


def full_of_counts(path: Path, bits: int, size_mib: int) -> Path:
    """An image with so many counts that their table takes hundreds of clusters, and is full."""
    options = f"cluster_size=512,refcount_bits={bits},preallocation=metadata"
    run(*PYNBD, "img", "create", "-q", "-f", "qcow2", "-o", options, path, f"{size_mib}M")
    return path


@pytest.mark.parametrize(("before", "after", "size_mib"), [(64, 32, 160), (64, 8, 200)])
async def test_what_is_taken_while_counts_get_room(
    graph: Graph, tmp_path: Path, before: int, after: int, size_mib: int
) -> None:
    """The old table moves, to a longer place, when the new one gets its own."""
    path = full_of_counts(tmp_path / "disk.qcow2", before, size_mib)
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    await work.driver.amend({"refcount_bits": str(after)})
    await work.close()
    assert told(path)["format-specific"]["data"]["refcount-bits"] == after
    assert is_sound(path)


async def test_no_room_for_counts(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amending, "MAX_TRIES", 1)
    path = full_of_counts(tmp_path / "disk.qcow2", 64, 160)
    work = await Workload.opened(graph, in_file(path), b"", seed=1)
    with pytest.raises(BlockError, match="no room was found"):
        await work.driver.amend({"refcount_bits": "32"})
    await work.close()
    assert told(path)["format-specific"]["data"]["refcount-bits"] == 64
    assert is_sound(path)
