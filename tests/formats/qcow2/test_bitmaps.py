"""Persistent dirty bitmaps: QEMU reads ours, and we read QEMU's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError, ImageError
from pynbd.block.families import PersistentBitmaps
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.driver import Qcow2
from tests.formats.qcow2.dirty_extents import dirty, dirty_by_qemu, dirty_over_nbd, told_by_qemu
from tests.formats.qcow2.workload import Workload, in_file, is_sound, made, read_by_qemu
from tests.peers import CommandError, pynbd_serve, require_tool, run
from tests.restless import RESTLESS, restless

SIZE = (3 << 20) + 1536
OPTIONS = ["", "cluster_size=512", "extended_l2=on,cluster_size=16k", "cluster_size=2M", "lazy_refcounts=on"]


def with_bitmaps(tmp_path: Path, options: str = "", **granularities: str) -> Path:
    """An image of QEMU's with bitmaps."""
    path = made(tmp_path, options, SIZE)
    for name, granularity in granularities.items():
        run(require_tool("qemu-img"), "bitmap", "--add", "-g", granularity, path, name)
    return path


async def reopened(graph: Graph, path: Path, **options: Any) -> Node:
    return await graph.open(in_file(path, **options))


@pytest.mark.parametrize("options", OPTIONS)
async def test_bitmaps_go_back_and_forth(graph: Graph, tmp_path: Path, options: str) -> None:
    path = with_bitmaps(tmp_path, options, fine="512", coarse="64k", still="32k")
    qemu_img, qemu_io = require_tool("qemu-img"), require_tool("qemu-io")
    run(qemu_io, "-c", "write 5k 3k", "-c", "write 1M 70k", path)
    run(qemu_img, "bitmap", "--disable", path, "still")
    work = await Workload.opened(graph, in_file(path), read_by_qemu(path), seed=1)
    assert isinstance(work.driver, PersistentBitmaps)
    bitmaps = work.node.bitmaps
    assert {name: (b.granularity, b.enabled, b.persistent) for name, b in bitmaps.items()} == {
        "fine": (512, True, True),
        "coarse": (65536, True, True),
        "still": (32768, False, True),
    }
    assert dirty(bitmaps["fine"]) == [(5 << 10, 8 << 10), (1 << 20, (1 << 20) + (70 << 10))]
    assert dirty(bitmaps["coarse"]) == [(0, 65536), (1 << 20, (1 << 20) + (128 << 10))]
    for _ in range(10):
        await work.round(4)
    bitmaps["still"].merge(bitmaps["fine"])
    await graph.remove_bitmap(work.node, "coarse")
    work.driver.can_store_bitmap("new", 4096)
    (await graph.add_bitmap(work.node, "new", 4096)).persistent = True
    await graph.add_bitmap(work.node, "in memory only")
    await work.backend.write(SIZE - 10, memoryview(b"0123456789"))
    kept = {name: dirty(b) for name, b in bitmaps.items() if b.persistent}
    await work.close()
    assert is_sound(path)
    assert told_by_qemu(path) == {"fine": (512, ["auto"]), "still": (32768, []), "new": (4096, ["auto"])}
    for name, expected in kept.items():
        assert dirty_by_qemu(path, name) == expected
    # QEMU goes on with them.
    run(qemu_img, "bitmap", "--merge", "new", "--enable", path, "still")
    run(qemu_img, "bitmap", "--clear", path, "fine")
    run(qemu_io, "-c", "write 2M 1k", path)
    assert is_sound(path)
    node = await reopened(graph, path, **{"read-only": True})
    assert dirty(node.bitmaps["fine"]) == [(2 << 20, (2 << 20) + 1024)]
    for name in ("fine", "still", "new"):
        assert dirty(node.bitmaps[name]) == dirty_by_qemu(path, name)


async def test_bitmaps_follow_the_size(graph: Graph, tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path, "cluster_size=512", b0="512")
    for size in (5 << 20, 1 << 20):
        node = await reopened(graph, path)
        backend = BlockBackend("user")
        graph.attach(backend, node, Permission.ALL)
        await backend.write(size // 2 + 100, memoryview(bytes(3000)))
        await backend.truncate(size)
        expected = dirty(node.bitmaps["b0"])
        graph.detach(backend)
        await graph.close(node)
        assert is_sound(path)
        assert dirty_by_qemu(path, "b0") == expected
    run(require_tool("qemu-img"), "resize", "-q", path, "9M")
    node = await reopened(graph, path)
    assert (node.bitmaps["b0"].size, dirty(node.bitmaps["b0"])) == (9 << 20, expected)


async def test_an_image_that_is_not_closed_has_bitmaps_that_nobody_believes(graph: Graph, tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path, "", b0="64k", b1="64k")
    storage = await graph.open({"driver": RESTLESS, "size": 0, "node-name": "storage"})
    restless(storage).data[:] = path.read_bytes()
    work = await Workload.opened(graph, {"driver": "qcow2", "file": "storage"}, bytes(SIZE), seed=1)
    await work.round(4)
    await work.backend.flush()
    path.write_bytes(restless(storage).data)
    await work.close()
    assert is_sound(path, leaks=True)
    assert told_by_qemu(path) == {"b0": (65536, ["in-use", "auto"]), "b1": (65536, ["in-use", "auto"])}
    node = await reopened(graph, path)
    assert all(bitmap.inconsistent and not bitmap.enabled for bitmap in node.bitmaps.values())
    with pytest.raises(BlockError, match="inconsistent"):
        node.bitmaps["b0"].merge(node.bitmaps["b1"])
    with pytest.raises(BlockError, match="already"):
        driver_of(node).can_store_bitmap("b0", 65536)
    await graph.remove_bitmap(node, "b1")
    await graph.close(node)
    assert told_by_qemu(path) == {"b0": (65536, ["in-use", "auto"])}
    assert is_sound(path, leaks=True)
    with pytest.raises(CommandError, match="inconsistent"), pynbd_serve("-B", "b0", path):
        pass


def driver_of(node: Node) -> Qcow2:
    assert isinstance(node.driver, Qcow2)
    return node.driver


async def test_bitmaps_that_are_out_of_date_are_dropped(graph: Graph, tmp_path: Path) -> None:
    """Whoever does not know them clears the autoclear bit."""
    path = with_bitmaps(tmp_path, "", b0="64k")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, 88, 0)
    path.write_bytes(data)
    node = await reopened(graph, path, **{"read-only": True})
    assert node.bitmaps == {}
    await graph.close(node)
    assert path.read_bytes() == data
    node = await reopened(graph, path)
    assert (node.bitmaps, driver_of(node).header.bitmaps) == ({}, None)
    await graph.close(node)
    assert told_by_qemu(path) == {}
    assert is_sound(path, leaks=True)


async def test_unknown_extra_data(graph: Graph, tmp_path: Path) -> None:
    """It is kept; the bitmap is used only where its entry says that this is no harm."""
    for flag, used in ((layout.BitmapFlag.EXTRA_DATA_COMPATIBLE, True), (layout.BitmapFlag(0), False)):
        path = with_bitmaps(tmp_path, "", b0="64k")
        run(require_tool("qemu-io"), "-c", "write 64k 64k", path)
        data = bytearray(path.read_bytes())
        at = directory_of(data)
        entry = layout.parsed(layout.BITMAP, bytes(data), at)
        entry.flags |= flag
        entry.extra_data_size = 16
        entry_bytes = layout.BITMAP.build(entry) + b"something unknow" + b"b0".ljust(8, b"\0")
        data[at : at + len(entry_bytes)] = entry_bytes
        grown = bytes(data).replace(struct.pack(">Q", 32) + struct.pack(">Q", at), struct.pack(">QQ", 48, at), 1)
        path.write_bytes(grown)
        node = await reopened(graph, path)
        assert list(node.bitmaps) == (["b0"] if used else [])
        (await graph.add_bitmap(node, "b1")).persistent = True
        with pytest.raises(BlockError, match="already"):
            driver_of(node).can_store_bitmap("b0", 65536)
        await graph.close(node)
        node = await reopened(graph, path, **{"read-only": True})
        stored = {entry.name: entry for entry in driver_of(node).bitmaps.entries}
        assert stored["b0"].extra == b"something unknow"
        assert stored["b0"].is_consistent == used
        if used:
            assert dirty(node.bitmaps["b0"]) == [(65536, 131072)]
        await graph.close(node)


def directory_of(data: bytes | bytearray) -> int:
    """Where the directory of an image lies."""
    at = data.index(struct.pack(">I", layout.ExtensionType.BITMAPS)) + 8
    offset: int = layout.parsed(layout.BITMAPS_EXTENSION, bytes(data), at).bitmap_directory_offset
    return offset


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("type", 2, "bitmap type 2"),
        ("flags", 0x10, "bitmap flags are 0x10"),
        ("granularity_bits", 8, "granularity_bits is 8"),
        ("bitmap_table_offset", 100, "bitmap_table_offset is 100"),
        ("bitmap_table_offset", 1 << 40, "the table of bitmap 'b0'"),
        ("bitmap_table_size", 1 << 31, "bitmap_table_size is"),
        ("name_size", 0, "name has 0 bytes"),
        ("name_size", 900, "ends within an entry"),
        ("extra_data_size", 1 << 31, "ends within an entry"),
    ],
)
async def test_wrong_directories_are_refused(
    graph: Graph, tmp_path: Path, field: str, value: int, problem: str
) -> None:
    path = with_bitmaps(tmp_path, "", b0="64k")
    data = bytearray(path.read_bytes())
    at = directory_of(data)
    entry = layout.parsed(layout.BITMAP, bytes(data), at)
    entry[field] = value
    data[at : at + layout.BITMAP_BYTES] = layout.BITMAP.build(entry)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=problem):
        await graph.open(in_file(path))
    assert path.read_bytes() == data


async def test_an_image_of_the_old_version_loses_them(graph: Graph, tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path, "", b0="512", b1="64k")
    run(require_tool("qemu-io"), "-c", "write 64k 64k", path)
    node = await reopened(graph, path)
    await driver_of(node).amend({"compat": "0.10"})
    await graph.close(node)
    assert is_sound(path)
    assert told_by_qemu(path) == {}
    node = await reopened(graph, path, **{"read-only": True})
    assert (driver_of(node).header.version, node.bitmaps) == (2, {})


async def test_what_can_not_be_kept(graph: Graph, tmp_path: Path) -> None:
    node = await reopened(graph, made(tmp_path, "compat=0.10", SIZE))
    with pytest.raises(BlockError, match=r"compat 0\.10"):
        driver_of(node).can_store_bitmap("b0", 65536)
    node = await reopened(graph, made(tmp_path, "", 64 << 40))
    driver_of(node).can_store_bitmap("b0", 65536)
    with pytest.raises(BlockError, match="larger granularity"):
        driver_of(node).can_store_bitmap("b0", 512)
    with pytest.raises(BlockError, match="granularity"):
        driver_of(node).can_store_bitmap("b0", 100)


async def test_failures_while_they_are_stored(graph: Graph, tmp_path: Path) -> None:
    """Whatever fails as an image is closed: it is sound, and its bitmaps are right, in use or gone."""
    seen = set()
    for seed in range(25):
        path = with_bitmaps(tmp_path, "cluster_size=512", b0="512")
        storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": seed, "node-name": f"storage{seed}"})
        below = restless(storage)
        below.data[:] = path.read_bytes()
        work = await Workload.opened(graph, {"driver": "qcow2", "file": storage.name}, bytes(SIZE), seed=seed)
        await work.round(8)
        await work.backend.flush()
        expected = dirty(work.node.bitmaps["b0"])
        below.fails = 0.04
        try:
            await work.close()
        except (OSError, BlockError):
            seen.add("failed")
        path.write_bytes(below.data)
        assert is_sound(path, leaks=True)
        told = told_by_qemu(path)
        if told.get("b0") == (512, ["auto"]):
            seen.add("stored")
            assert dirty_by_qemu(path, "b0") == expected
        else:
            assert told in ({}, {"b0": (512, ["in-use", "auto"])})
    assert seen == {"failed", "stored"}


@pytest.mark.parametrize("words", [(), ("--filter", "nofilter")])
def test_serve_shows_bitmaps_of_the_image(tmp_path: Path, words: tuple[str, ...]) -> None:
    path = with_bitmaps(tmp_path, "", b0="64k")
    qemu_io = require_tool("qemu-io")
    run(qemu_io, "-c", "write 64k 64k", path)
    with pynbd_serve("-B", "b0", *words, path) as peer:
        assert dirty_over_nbd(peer.uri(), "b0") == [(65536, 131072)]
        run(qemu_io, "-f", "raw", "-c", "write 1M 1k", peer.uri())
        assert dirty_over_nbd(peer.uri(), "b0") == [(65536, 131072), (1 << 20, (1 << 20) + 65536)]
        options = f"driver=nbd,path={peer.endpoint.socket_path},x-dirty-bitmap=qemu:dirty-bitmap:b0"
        told = json.loads(run(require_tool("qemu-img"), "map", "--image-opts", "--output=json", options))
        assert [(e["start"], e["length"]) for e in told if not e["data"]] == [(65536, 65536), (1 << 20, 65536)]
    assert is_sound(path)
    assert dirty_by_qemu(path, "b0") == [(65536, 131072), (1 << 20, (1 << 20) + 65536)]
