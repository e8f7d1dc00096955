"""`check` of qcow2 images finds what QEMU finds, and what it mends, QEMU finds sound."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pynbd.block.errors import BlockError
from pynbd.block.families import Checkable, Repair
from pynbd.block.graph import Graph
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK, Incompatible
from tests.formats.qcow2.damage import (
    Image,
    checked,
    checked_by_qemu,
    copied,
    counts,
    filled,
    qemu_io,
    read_header,
)
from tests.formats.qcow2.recorder import RECORDER, recorder
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
from tests.peers import CommandError, require_tool, run

SIZE = 1 << 20


@pytest.mark.parametrize("options", OPTIONS)
async def test_sound_images_are_counted_as_by_qemu(tmp_path: Path, options: str) -> None:
    path = filled(tmp_path, options, size_for(options, SIZE))
    result = await checked(path)
    assert counts(result) == checked_by_qemu(path)
    assert (result.corruptions, result.leaks, result.messages) == (0, 0, [])
    assert result.allocated_clusters > 2


async def test_an_image_with_a_data_file_is_counted_as_by_qemu(tmp_path: Path) -> None:
    path = filled(tmp_path, f"data_file={tmp_path / 'data.raw'}", SIZE, snapshots=False)
    assert counts(await checked(path)) == checked_by_qemu(path)
    image = Image(path)
    at = next(at for at in image.l2_words() if image.get(at) & COPIED and image.get(at) & OFFSET_MASK)
    image.put(at, image.get(at) & ~COPIED)
    found = counts(await checked(path))
    assert found == checked_by_qemu(path)
    assert found["corruptions"]
    assert not (await checked(path, Repair.ALL)).corruptions
    assert is_sound(path)


async def test_an_encrypted_image_is_counted_as_by_qemu(tmp_path: Path) -> None:
    path = tmp_path / "secret.qcow2"
    made_by = (require_tool("qemu-img"), "create", "-q", "--object", "secret,id=key,data=abc", "-f", "qcow2")
    run(*made_by, "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, "1M")
    named = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
    theirs = checked_by_qemu("--object", "secret,id=key,data=abc", "--image-opts", named)
    assert counts(await checked(path)) == theirs


# --- damage, one kind after the other --------------------------------------------------------------------------------


def put_l2(change: Callable[[int], int]) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        at = next(at for at in image.l2_words() if image.get(at) & COPIED)
        image.put(at, change(image.get(at)))

    return damage


def put_l1(change: Callable[[int], int]) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        at = image.header.l1_table_offset
        image.put(at, change(image.get(at)))

    return damage


def put_table(change: Callable[[int], int]) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        at = image.header.refcount_table_offset
        image.put(at, change(image.get(at)))

    return damage


def put_count(change: Callable[[int], int], cluster: int = 5) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        at = image.refcount_blocks()[0] + 2 * cluster
        image.put(at, change(image.get(at, 2)), 2)

    return damage


def free_block(image: Image) -> None:
    """A refcount block that is missing."""
    image.put(image.header.refcount_table_offset, 0)


def extra_count(image: Image) -> None:
    """A count behind the end of what is in use."""
    image.put(image.refcount_blocks()[0] + 2 * (len(image.data) // image.header.cluster_size - 1), 7, 2)


def no_table(image: Image) -> None:
    """No refcount table at all."""
    image.put(56, 0, 4)


DAMAGES: dict[str, tuple[Callable[[Image], None], bool]] = {
    "L1 flag": (put_l1(lambda entry: entry ^ COPIED), True),
    "L1 reserved bit": (put_l1(lambda entry: entry | 1 << 60), True),
    "L1 unaligned": (put_l1(lambda entry: entry + 512), False),
    "L1 past the end": (put_l1(lambda entry: entry | 1 << 50), False),
    "L1 nothing": (put_l1(lambda entry: 0), True),
    "L2 flag": (put_l2(lambda entry: entry ^ COPIED), True),
    "L2 reserved bit": (put_l2(lambda entry: entry | 1 << 57), True),
    "L2 unaligned": (put_l2(lambda entry: entry + 512), False),
    "L2 unaligned zero": (put_l2(lambda entry: entry + 512 | 1), True),
    "L2 past the end": (put_l2(lambda entry: entry | 1 << 50), False),
    "L2 points at the header": (put_l2(lambda entry: entry & ~OFFSET_MASK), True),
    "L2 points at another one's": (put_l2(lambda entry: entry + 65536), True),
    "L2 nothing": (put_l2(lambda entry: 0), True),
    "refcount too low": (put_count(lambda count: count - 1), True),
    "refcount none": (put_count(lambda count: 0), True),
    "refcount too high": (put_count(lambda count: count + 2), True),
    "refcount largest": (put_count(lambda count: 65535), True),
    "leak": (extra_count, True),
    "refcount table unaligned": (put_table(lambda entry: entry + 1024), True),
    "refcount table reserved bit": (put_table(lambda entry: entry + 1), True),
    "refcount table past the end": (put_table(lambda entry: entry | 1 << 40), True),
    "refcount table points at data": (put_table(lambda entry: 0x50000), True),
    "refcount table points at itself": (put_table(lambda entry: entry - 65536), True),
    "refcount block missing": (free_block, True),
    "no refcount table": (no_table, True),
}
"""Kind → (how it is done, whether it can be mended without leaving anything corrupt)."""


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damage_is_found_and_mended(tmp_path: Path, kind: str) -> None:
    damage, mendable = DAMAGES[kind]
    path = filled(tmp_path, "", SIZE)
    snapshot = snapshot_by_qemu(path, "first")
    damage(Image(path))
    try:
        content = read_by_qemu(path)
    except CommandError:
        content = None  # it can't be opened, or read
    found = await checked(path)
    theirs = checked_by_qemu(path)
    assert theirs is not None
    assert counts(found) == theirs
    assert found.corruptions or found.leaks
    assert len(found.messages) >= 1
    mended = await checked(path, Repair.ALL)
    again = await checked(path)
    assert (mended.corruptions, mended.leaks) == (again.corruptions, again.leaks)
    assert counts(again) == checked_by_qemu(path)
    assert bool(again.corruptions) != mendable
    assert mended.corruptions_fixed + mended.leaks_fixed > 0 or not mendable
    if mendable:
        assert is_sound(path)
        if content is not None:
            assert read_by_qemu(path) == content
        assert snapshot_by_qemu(path, "first") == snapshot


@pytest.mark.parametrize("entry", [1 << 62, COPIED, COPIED | 1, COPIED | 0x10000, COPIED | 0x20000, COPIED | 0x30000])
@pytest.mark.parametrize("bits", [1, 2, 16])
async def test_what_is_taken_for_an_l2_table_stays_as_it_is(tmp_path: Path, bits: int, entry: int) -> None:
    """The header, or another structure: small counts can't tell that something else refers to it as well."""
    path = filled(tmp_path, f"refcount_bits={bits}", SIZE, snapshots=False)
    image = Image(path)
    image.put(image.header.l1_table_offset, entry)
    before = path.read_bytes()
    await checked(path, Repair.ALL)
    after = path.read_bytes()
    assert after[:48] == before[:48]
    assert after[60:72] == before[60:72]  # in between, new refcount structures are told
    assert after[80:65536] == before[80:65536]  # and before this, marks
    run(require_tool("qemu-img"), "info", "-f", "qcow2", path)
    l1 = image.header.l1_table_offset
    assert Image(path).get(l1) & OFFSET_MASK == entry & OFFSET_MASK
    assert after[l1 + 8 : l1 + 65536] == before[l1 + 8 : l1 + 65536]


@pytest.mark.parametrize("kind", DAMAGES)
async def test_what_qemu_mended_is_sound(tmp_path: Path, kind: str) -> None:
    # QEMU 7.2 forgets the snapshots of images with bitmaps when it repairs them: there are none here.
    damage, mendable = DAMAGES[kind]
    path = filled(tmp_path, "", SIZE, bitmaps=False)
    damage(Image(path))
    ours = copied(path)
    theirs = checked_by_qemu("-r", "all", path)
    assert theirs is None or counts(await checked(path)) == theirs
    result = await checked(ours, Repair.ALL)
    if mendable:
        assert (result.corruptions, result.leaks) == (0, 0)


async def test_repair_of_leaks_leaves_all_else(tmp_path: Path) -> None:
    path = filled(tmp_path, "", SIZE)
    image = Image(path)
    put_count(lambda count: count - 1)(image)
    extra_count(image)
    found = await checked(path)
    assert found.corruptions
    assert found.leaks
    mended = await checked(path, Repair.LEAKS)
    assert (mended.corruptions, mended.leaks, mended.leaks_fixed) == (found.corruptions, 0, found.leaks)
    assert counts(await checked(path)) == checked_by_qemu(path)


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        # An image with the largest clusters takes a second per flip, on a busy machine several.
        pytest.param(
            options,
            seed,
            marks=[
                pytest.mark.timeout(600 if "2M" in options else 120),
                *([pytest.mark.slow] if seed and (seed > 1 or "2M" in options) else []),
            ],
        )
        for options in OPTIONS
        for seed in range(3)
    ],
)
async def test_flipped_bits(tmp_path: Path, options: str, seed: int) -> None:
    base = filled(tmp_path, options, size_for(options, SIZE))
    choose = random.Random(f"{options} {seed}")
    for kind in Image(base).words():
        path = tmp_path / "flipped.qcow2"
        shutil.copyfile(base, path)
        image = Image(path)
        for word in choose.choices(image.words()[kind], k=choose.choice([1, 1, 3])):
            bit = 1 << choose.randrange(8 * word.length)
            image.put(word.offset, image.get(word.offset, word.length) ^ bit, word.length)
        theirs, found = checked_by_qemu(path), await checked(path)
        if theirs is None:
            assert found.corruptions or found.check_errors, kind
        else:
            assert counts(found) == theirs, kind
        mended = await checked(path, Repair.ALL)
        assert mended.corruptions <= found.corruptions
        theirs = checked_by_qemu(path)
        assert theirs is None or counts(mended) == theirs, kind
        # Nothing is given up for what can't be mended.
        if mended.corruptions and kind in ("l1", "snapshot l1", "snapshot table", "bitmap table"):
            assert not mended.leaks_fixed


# --- opening ---------------------------------------------------------------------------------------------------------


def mark(path: Path, feature: Incompatible) -> None:
    image = Image(path)
    image.put(72, image.get(72) | feature)


async def test_a_dirty_image_is_repaired_when_it_is_opened(graph: Graph, tmp_path: Path) -> None:
    path = filled(tmp_path, "lazy_refcounts=on", SIZE)
    content = read_by_qemu(path)
    image = Image(path)
    block = image.refcount_blocks()[0]
    for cluster in range(6, len(image.data) >> 16):
        image.put(block + 2 * cluster, 0, 2)
    mark(path, Incompatible.DIRTY)
    assert not is_clean(path)
    work = await Workload.opened(graph, in_file(path), content, seed=1)
    for _ in range(20):
        await work.round(3)
    await work.close()
    assert Incompatible.DIRTY not in read_header(path).incompatible
    assert is_sound(path)
    assert read_by_qemu(path) == work.model


def is_clean(path: Path) -> bool:
    found = checked_by_qemu(path)
    return found is not None and not found["corruptions"] and not found["leaks"]


async def test_a_dirty_image_that_is_beyond_repair_is_refused(graph: Graph, tmp_path: Path) -> None:
    path = filled(tmp_path, "lazy_refcounts=on", SIZE)
    put_l2(lambda entry: entry + 512)(Image(path))
    mark(path, Incompatible.DIRTY)
    with pytest.raises(BlockError, match="can't be repaired: 1 corruptions are left"):
        await graph.open(in_file(path))
    assert Incompatible.DIRTY in read_header(path).incompatible
    await graph.open(in_file(path, **{"read-only": True}))


@pytest.mark.parametrize("feature", [Incompatible.DIRTY, Incompatible.CORRUPT])
async def test_a_repair_clears_marks(graph: Graph, tmp_path: Path, feature: Incompatible) -> None:
    path = filled(tmp_path, "", SIZE)
    mark(path, feature)
    assert counts(await checked(path)) == checked_by_qemu(path)
    assert feature in read_header(path).incompatible
    result = await checked(path, Repair.ALL)
    assert (result.corruptions, result.leaks) == (0, 0)
    assert feature not in read_header(path).incompatible
    await graph.open(in_file(path))


async def test_a_corrupt_image_is_not_opened_for_writing(graph: Graph, tmp_path: Path) -> None:
    path = filled(tmp_path, "", SIZE)
    mark(path, Incompatible.CORRUPT)
    with pytest.raises(BlockError, match="marked as corrupt"):
        await graph.open(in_file(path))


async def test_an_open_image_is_checked_with_what_is_in_memory(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "lazy_refcounts=on", SIZE)
    work = await Workload.opened(graph, in_file(path), bytes(SIZE), seed=1)
    for _ in range(10):
        await work.round(3)
    assert isinstance(work.driver, Checkable)
    result = await work.driver.check(Repair.NOTHING)
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert counts(result) == checked_by_qemu(copied(path))
    for _ in range(10):
        await work.round(3)
    assert (await work.driver.check(Repair.ALL)).corruptions == 0
    for _ in range(10):
        await work.round(3)
    await work.check()
    await work.close()
    assert is_sound(path)
    assert read_by_qemu(path) == work.model


async def test_a_read_only_image_is_not_repaired(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    node = await graph.open(in_file(path, **{"read-only": True}), for_check=True)
    assert isinstance(node.driver, Checkable)
    with pytest.raises(OSError, match="opened read-only"):
        await node.driver.check(Repair.LEAKS)


async def test_many_messages_are_cut_short(tmp_path: Path) -> None:
    path = made(tmp_path, "cluster_size=512", SIZE)
    qemu_io(path, [f"write 0 {SIZE}"])
    image = Image(path)
    for index in range(64):
        image.put(image.header.refcount_table_offset + 8 * index, 0)
    result = await checked(path)
    assert counts(result) == checked_by_qemu(path)
    assert result.corruptions > 2000
    assert len(result.messages) == 1001
    assert result.messages[-1] == f"… and {result.corruptions - 1000} more"


@pytest.mark.parametrize(
    "kind",
    [kind for kind, (_, mendable) in DAMAGES.items() if mendable and "nothing" not in kind],
)
async def test_power_may_go_in_the_middle_of_a_repair(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What is left can be repaired as well, and holds what the image held, in the snapshot, too."""
    path = filled(tmp_path, "", SIZE, bitmaps=False)
    snapshot = snapshot_by_qemu(path, "first")
    DAMAGES[kind][0](Image(path))
    storage = await graph.open({"driver": RECORDER, "seed": len(kind)})
    recorder(storage).begin(path.read_bytes())
    node = await graph.open({"driver": "qcow2", "file": storage.name, "backing": None}, for_check=True)
    assert isinstance(node.driver, Checkable)
    how, crashes = random.Random(kind), list[bytes]()

    class Watched:
        """The file, with a look at what a crash would leave before each flush."""

        def __getattr__(self, name: str) -> Any:
            return getattr(storage_edge, name)

        async def flush(self) -> None:
            if recorder(storage).operations:
                crashes.extend(recorder(storage).after_crash(how) for _ in range(3))
            await storage_edge.flush()

    storage_edge = node.children["file"]
    monkeypatch.setattr(cast(Qcow2, node.driver).image, "file", Watched())
    assert not (await node.driver.check(Repair.ALL)).corruptions
    path.write_bytes(recorder(storage).data)
    content = read_by_qemu(path)
    assert crashes
    for image in how.sample(crashes, min(len(crashes), 6)):
        path.write_bytes(image)
        assert (await checked(path, Repair.ALL)).corruptions == 0
        assert is_sound(path)
        assert read_by_qemu(path) == content
        assert snapshot_by_qemu(path, "first") == snapshot
