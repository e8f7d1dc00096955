"""Guest data that an image sends into its own structures: refused, marked and fenced, as `overlap-check` says."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK, Incompatible
from pynbd.formats.qcow2.overlap import CACHED, CONSTANT, Kind, OverlapOptions, checked_kinds
from tests.formats.qcow2.damage import Image, qemu_io, read_header
from tests.formats.qcow2.workload import in_file, made
from tests.peers import COMMAND_LIMIT_S, require_tool, run

CLUSTER = 1 << 16
SIZE = 4 << 20
AT = 2 << 20
"""Where on the disk the wrong entry is."""


def inactive_l1(image: Image) -> int:
    return image.get(image.header.snapshots_offset)


def bitmap_directory(image: Image) -> int:
    assert image.header.bitmaps is not None
    return image.header.bitmaps.directory_offset


def bitmap_table(image: Image) -> int:
    return image.get(bitmap_directory(image))


PLACES: dict[Kind, Callable[[Image], int]] = {
    Kind.MAIN_HEADER: lambda image: 0,
    Kind.ACTIVE_L1: lambda image: image.header.l1_table_offset,
    Kind.ACTIVE_L2: lambda image: image.l2_tables()[0],
    Kind.REFCOUNT_TABLE: lambda image: image.header.refcount_table_offset,
    Kind.REFCOUNT_BLOCK: lambda image: image.refcount_blocks()[0],
    Kind.SNAPSHOT_TABLE: lambda image: image.header.snapshots_offset,
    Kind.INACTIVE_L1: inactive_l1,
    Kind.INACTIVE_L2: lambda image: image.get(inactive_l1(image)) & OFFSET_MASK,
    Kind.BITMAP_DIRECTORY: bitmap_directory,
}
"""Where a structure of each kind lies."""

OPTIONS = {kind: str(kind.name).lower().replace("_", "-") for kind in PLACES}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that has structures of all kinds."""
    path = made(tmp_path_factory.mktemp("overlap"), "", SIZE)
    image = require_tool("qemu-img")
    qemu_io(path, [f"write -P 1 0 {CLUSTER}"])
    run(image, "snapshot", "-c", "first", path)
    run(image, "bitmap", "--add", path, "one")
    qemu_io(path, [f"write -P 2 0 {CLUSTER}"])
    return path


def misled(sound: Path, tmp_path: Path, kind: Kind, flags: int = COPIED) -> tuple[Path, int]:
    """A copy with an entry that calls a structure data, and where that lies; COPIED, so that it is written in place."""
    path = tmp_path / "image.qcow2"
    shutil.copyfile(sound, path)
    image = Image(path)
    place = PLACES[kind](image)
    # A first cluster that nobody may point to: an entry of 0 is none, but one with the flag alone is data for QEMU.
    image.put(image.l2_tables()[0] + AT // CLUSTER * 8, place | flags)
    return path, place


async def written(path: Path, overlap: Any = "all", length: int = 4096) -> OSError | None:
    """Write with pynbd where the wrong entry is, then elsewhere; gives the error of the first."""
    graph = Graph()
    try:
        node = await graph.open(in_file(path, **{"overlap-check": overlap}))
        driver = cast(Qcow2, node.driver)
        try:
            await driver.write(AT, memoryview(b"\xaa" * length), 0)
        except OSError as problem:
            with pytest.raises(OSError, match="nothing is written") as second:
                await driver.write(0, memoryview(bytes(512)), 0)
            assert second.value.errno == errno.EIO
            return problem
        assert not driver.image.fence
        return None
    finally:
        await graph.close_all()


def refused_by_qemu(path: Path, overlap: str = "all", length: int = 4096) -> bool:
    """Whether QEMU refuses the same write."""
    options = f"driver=qcow2,overlap-check={overlap},file.driver=file,file.filename={path}"
    command = [require_tool("qemu-io"), "--image-opts", options, "-c", f"write -P 170 {AT} {length}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    return "Input/output error" in done.stdout + done.stderr


def is_marked(path: Path) -> bool:
    return Incompatible.CORRUPT in read_header(path).incompatible


TWINS = [kind for kind in PLACES if kind is not Kind.MAIN_HEADER]
"""An entry can't point to the first cluster, where the header is."""


@pytest.mark.parametrize("template", ["constant", "cached", "all"])
@pytest.mark.parametrize("kind", TWINS, ids=OPTIONS.get)
async def test_the_same_writes_are_refused_as_by_qemu(sound: Path, tmp_path: Path, kind: Kind, template: str) -> None:
    path, place = misled(sound, tmp_path, kind)
    twin = Path(shutil.copyfile(path, tmp_path / "twin.qcow2"))
    problem = await written(path, template)
    assert refused_by_qemu(twin, template) == (problem is not None)
    assert is_marked(path) == is_marked(twin) == (problem is not None)
    if problem is not None:
        assert problem.errno == errno.EIO
        assert f"at offset {place}: guest data are about to be written over {kind.text}" in str(problem)
        assert b"\xaa" * 16 not in path.read_bytes()[place : place + CLUSTER]
    assert (problem is not None) == bool(checked_kinds(cast(Any, template)) & kind)


@pytest.mark.parametrize("kind", TWINS, ids=OPTIONS.get)
async def test_each_kind_is_looked_after_by_itself(sound: Path, tmp_path: Path, kind: Kind) -> None:
    """With all others off it is refused, with it alone off it is not."""
    path, _ = misled(sound, tmp_path, kind)
    only = {"template": "none", OPTIONS[kind]: "on"}
    assert (await written(path, only)) is not None
    path, place = misled(sound, tmp_path, kind)
    assert (await written(path, {OPTIONS[kind]: "off"}, 512)) is None
    assert b"\xaa" * 256 in path.read_bytes()[place : place + 512]  # counts changed among it, where these are


async def test_a_long_write_is_refused_where_it_would_begin_to_overlap(sound: Path, tmp_path: Path) -> None:
    path, place = misled(sound, tmp_path, Kind.ACTIVE_L1)
    image = Image(path)
    image.put(image.l2_tables()[0] + AT // CLUSTER * 8, place - CLUSTER | COPIED)
    image.put(image.l2_tables()[0] + AT // CLUSTER * 8 + 8, place | COPIED)
    problem = await written(path, "constant", 2 * CLUSTER)
    assert f"at offset {place}: " in str(problem)


async def test_a_bitmap_goes_with_the_directory(sound: Path, tmp_path: Path) -> None:
    path, _ = misled(sound, tmp_path, Kind.BITMAP_DIRECTORY)
    image = Image(path)
    image.put(image.l2_tables()[0] + AT // CLUSTER * 8, bitmap_table(image) | COPIED)
    assert "over a bitmap" in str(await written(path))


@pytest.mark.parametrize("kind", [Kind.ACTIVE_L2, Kind.REFCOUNT_BLOCK], ids=OPTIONS.get)
async def test_a_structure_is_not_freed_as_data(sound: Path, tmp_path: Path, kind: Kind) -> None:
    """A discard of the wrong entry would free it, and then anything might be written there."""
    path, place = misled(sound, tmp_path, kind)
    graph = Graph()
    node = await graph.open(in_file(path))
    driver = cast(Qcow2, node.driver)
    await driver.discard(AT, CLUSTER)
    with pytest.raises(OSError, match=f"at offset {place}: guest data were given up here, where {kind.text}"):
        await driver.flush_to_os()
    with pytest.raises(OSError, match="nothing is written"):
        await graph.close_all()
    assert is_marked(path)


async def test_a_structure_is_not_written_over_another(sound: Path, tmp_path: Path) -> None:
    """The L1 entry of a second table points to the refcount block: what changes there is not written."""
    path = made(tmp_path, "", 1 << 30)
    qemu_io(path, ["write 0 64k", "write 512M 64k"])
    image = Image(path)
    block = image.refcount_blocks()[0]
    image.put(image.header.l1_table_offset + 8, block | COPIED)
    # All counts of the block are read as entries: those of unused clusters are free ones.
    graph = Graph()
    node = await graph.open(in_file(path))
    driver = cast(Qcow2, node.driver)
    await driver.write((512 << 20) + 100 * CLUSTER, memoryview(b"x" * 512), 0)
    with pytest.raises(
        OSError, match=f"at offset {block}: a refcount block is about to be written over an active L2 table"
    ):
        await driver.flush_to_os()
    with pytest.raises(OSError, match="nothing is written"):
        await graph.close_all()
    assert is_marked(path)


def test_templates_and_their_changes() -> None:
    assert CONSTANT & ~CACHED == 0
    assert checked_kinds("none") == 0
    assert checked_kinds("cached") & Kind.INACTIVE_L2 == 0
    assert checked_kinds(OverlapOptions(template="none", active_l2=True)) == Kind.ACTIVE_L2
    assert checked_kinds(OverlapOptions(template="cached", inactive_l2=True)) == checked_kinds("all")
    assert checked_kinds(OverlapOptions(main_header=False)) & (Kind.MAIN_HEADER | Kind.ENCRYPTION_HEADER) == 0


async def test_wrong_choices_are_refused(sound: Path, graph: Graph) -> None:
    with pytest.raises(OptionError, match="overlap-check: 'some' is not one of 'all', 'cached', 'constant', 'none'"):
        await graph.open(in_file(sound, **{"overlap-check": "some"}))
    with pytest.raises(OptionError, match=r"overlap-check\.active-l3: driver 'qcow2' has no such option"):
        await graph.open(in_file(sound, **{"overlap-check": {"active-l3": "on"}}))
    with pytest.raises(OptionError, match=r"overlap-check\.active-l2: 'maybe' is neither 'on' nor 'off'"):
        await graph.open(in_file(sound, **{"overlap-check": {"active-l2": "maybe"}}))
    with pytest.raises(OptionError, match="is given as a value and as a group"):
        await graph.open(f"driver=qcow2,overlap-check=none,overlap-check.active-l2=on,file.filename={sound}")
