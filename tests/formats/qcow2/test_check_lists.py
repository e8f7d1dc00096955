"""Damaged snapshot tables and bitmap directories: what can be kept is, and the image can be used again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pynbd.block.drain import drained
from pynbd.block.families import Repair
from pynbd.block.graph import Graph
from pynbd.formats.qcow2 import layout
from tests.formats.qcow2.damage import Image, checked, checked_by_qemu, counts, filled
from tests.formats.qcow2.dirty_extents import dirty, dirty_by_qemu, told_by_qemu
from tests.formats.qcow2.workload import Workload, in_file, is_sound, read_by_qemu, snapshot_by_qemu
from tests.peers import require_tool, run

SIZE = 1 << 20

Damage = Callable[[Image], None]


# --- bitmaps ---------------------------------------------------------------------------------------------------------


def directory_of(image: Image) -> int:
    """Where the directory lies; its first entry is that of the bitmap `two`."""
    assert image.header.bitmaps is not None
    return image.header.bitmaps.directory_offset


def put_entry(at: int, length: int, value: int) -> Damage:
    return lambda image: image.put(directory_of(image) + at, value, length)


def put_table(change: Callable[[int], int]) -> Damage:
    def damage(image: Image) -> None:
        at = image.get(directory_of(image))
        image.put(at, change(image.get(at)))

    return damage


def directory_past_the_end(image: Image) -> None:
    at = bytes(image.data).index(layout.ExtensionType.BITMAPS.to_bytes(4) + (24).to_bytes(4)) + 8
    image.put(at + 16, 1 << 40)


BITMAP_DAMAGES: dict[str, tuple[Damage, bool, bool]] = {
    "table offset": (put_entry(0, 8, 100), True, True),
    "table past the end": (put_entry(0, 8, 1 << 40), True, True),
    "no table": (put_entry(8, 4, 0), True, True),
    "giant table": (put_entry(8, 4, 1 << 31), True, True),
    "flags": (put_entry(12, 4, 1 << 9), True, True),
    "type": (put_entry(16, 1, 2), True, True),
    "granularity": (put_entry(17, 1, 60), True, True),
    "length of the name": (put_entry(18, 2, 900), False, False),
    "extra data": (put_entry(20, 4, 1 << 30), False, False),
    "reserved bit in the table": (put_table(lambda word: word | 1 << 60), True, True),
    "unaligned place in the table": (put_table(lambda word: word + 512 or 512), True, True),
    "place past the end": (put_table(lambda _: 1 << 40), True, True),
    "directory past the end": (directory_past_the_end, False, False),
}
"""Kind → (how it is done, whether the bitmap is still known by its name, whether the other one is as it was)."""


@pytest.mark.parametrize("kind", BITMAP_DAMAGES)
async def test_damaged_bitmaps(graph: Graph, tmp_path: Path, kind: str) -> None:
    """One that is damaged is there as an inconsistent one, if its name is known; qemu-img repairs nothing of this."""
    damage, is_named, is_other_kept = BITMAP_DAMAGES[kind]
    path = filled(tmp_path, "", SIZE)
    content, snapshot = read_by_qemu(path), snapshot_by_qemu(path, "first")
    image = Image(path)
    at = directory_of(image)
    name = bytes(image.data[at + layout.BITMAP_BYTES :][:3]).decode()
    other = {"one": "two", "two": "one"}[name]
    before, expected = told_by_qemu(path)[other], dirty_by_qemu(path, other)
    damage(image)
    found = await checked(path)
    assert found.corruptions
    assert (await checked(path, Repair.LEAKS)).corruptions
    mended = await checked(path, Repair.ALL)
    assert (mended.corruptions, mended.leaks, mended.check_errors) == (0, 0, 0)
    assert mended.corruptions_fixed
    assert is_sound(path)
    assert (read_by_qemu(path), snapshot_by_qemu(path, "first")) == (content, snapshot)
    told = told_by_qemu(path)
    assert ({name: "in-use" in flags for name, (_, flags) in told.items()}.get(name)) == (True if is_named else None)
    if is_other_kept:
        assert (told[other], dirty_by_qemu(path, other)) == (before, expected)
    # Both can use it again, and get rid of what is inconsistent.
    run(require_tool("qemu-io"), "-c", "write 0 64k", path)
    node = await graph.open(in_file(path))
    for bitmap in list(node.bitmaps.values()):
        if bitmap.inconsistent:
            await graph.remove_bitmap(node, bitmap.name)
    await graph.close(node)
    assert is_sound(path)
    assert name not in told_by_qemu(path)


async def test_a_repair_of_an_image_in_use_keeps_its_bitmaps(graph: Graph, tmp_path: Path) -> None:
    path = filled(tmp_path, "cluster_size=4k", SIZE)
    work = await Workload.opened(graph, in_file(path), read_by_qemu(path), seed=1)
    for _ in range(10):
        await work.round(4)
    # Behind its back: a cluster that leaks, and a directory that can't be read.
    await work.backend.flush()
    image = Image(path)
    image.put(image.refcount_blocks()[0] + 2 * (len(image.data) // 4096 + 3), 1, 2)
    image.put(directory_of(image) + 16, 7, 1)
    async with drained(work.node):
        result = await work.driver.check(Repair.ALL)
    assert (result.corruptions, result.check_errors) == (0, 0)
    assert result.corruptions_fixed
    assert result.leaks_fixed
    for _ in range(10):
        await work.round(4)
    expected = {name: dirty(bitmap) for name, bitmap in work.node.bitmaps.items()}
    await work.check()
    await work.close()
    assert is_sound(path)
    assert set(told_by_qemu(path)) == set(expected) == {"one", "two"}
    for name, extents in expected.items():
        assert dirty_by_qemu(path, name) == extents
    assert read_by_qemu(path) == work.model


# --- snapshots -------------------------------------------------------------------------------------------------------


def with_extra(path: Path, number: int, extra: bytes) -> None:
    """Give an entry of the snapshot table other extra data; the table goes to a place of its own."""
    image = Image(path)
    header = image.header
    entries, at = [], header.snapshots_offset
    for _ in range(header.nb_snapshots):
        fields = layout.parsed(layout.SNAPSHOT, bytes(image.data), at)
        length = layout.SNAPSHOT_BYTES + fields.extra_data_size
        names = bytes(image.data[at + length :][: fields.id_size + fields.name_size])
        entries.append((fields, bytes(image.data[at + layout.SNAPSHOT_BYTES : at + length]), names))
        at = -(-(at + length + len(names)) // 8) * 8
    entries[number] = (entries[number][0], extra, entries[number][2])
    table = b""
    for fields, data, names in entries:
        fields.extra_data_size = len(data)
        entry = layout.SNAPSHOT.build(fields) + data + names
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    assert len(table) <= header.cluster_size
    place = header.snapshots_offset
    image.data[place : place + len(table)] = table
    path.write_bytes(image.data)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("extra", [b"", bytes(8), bytes(15), bytes(16) + b"x" * 2000], ids=len)
async def test_extra_data_of_a_wrong_size(graph: Graph, tmp_path: Path, extra: bytes, number: int) -> None:
    """As by qemu-img: what is missing is added, what is too much is cut off, and all snapshots stay."""
    path = filled(tmp_path, "", SIZE, bitmaps=False)
    held = {name: snapshot_by_qemu(path, name) for name in ("first", "second")}
    content = read_by_qemu(path)
    if len(extra) > 16:
        extra = layout.SNAPSHOT_EXTRA_SIZES.build({"vm_state_size_large": 0, "disk_size": SIZE}) + extra[16:]
    with_extra(path, number, extra)
    theirs = path.with_suffix(".theirs.qcow2")
    shutil.copy(path, theirs)
    assert (await checked(path)).corruptions
    mended = await checked(path, Repair.ALL)
    assert (mended.corruptions, mended.leaks, mended.check_errors) == (0, 0, 0)
    assert checked_by_qemu("-r", "all", theirs) is not None
    for image in (path, theirs):
        assert is_sound(image)
        assert read_by_qemu(image) == content
        assert {name: snapshot_by_qemu(image, name) for name in held} == held
    assert counts(await checked(path))["allocated_clusters"] == counts(await checked(theirs))["allocated_clusters"]
    run(require_tool("qemu-img"), "snapshot", "-d", "first", path)
    node = await graph.open(in_file(path))
    await graph.close(node)
    assert is_sound(path)


async def test_a_snapshot_table_that_makes_no_sense_is_left_alone(tmp_path: Path) -> None:
    """Where what follows a wrong entry is none, nobody knows what the table should be: nothing is given up."""
    path = filled(tmp_path, "", SIZE, bitmaps=False)
    held = {name: snapshot_by_qemu(path, name) for name in ("first", "second")}
    at = Image(path).header.snapshots_offset
    right = Image(path).get(at + 36, 4)
    Image(path).put(at + 36, 1 << 20, 4)
    assert (await checked(path, Repair.ALL)).corruptions
    assert Image(path).header.snapshots_offset == at
    Image(path).put(at + 36, right, 4)
    assert (await checked(path, Repair.ALL)).corruptions == 0
    assert is_sound(path)
    assert {name: snapshot_by_qemu(path, name) for name in held} == held
