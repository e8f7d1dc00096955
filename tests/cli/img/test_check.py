"""`pynbd img check`: what it says, and its exit statuses, beside qemu-img's."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from pynbd.block.families import CheckResult
from pynbd.cli.img import qemu_json
from pynbd.cli.img.check import facts_of, human_text, status_of
from tests.cli.img.chains import make_chain, qemu
from tests.cli.img.side_by_side import img, qemu_img, same


@pytest.mark.parametrize(
    "words",
    [
        ("disk.raw",),
        ("-f", "raw", "--output=json", "disk.raw"),
        ("-q", "disk.raw"),
        ("-r", "nonsense", "disk.raw"),
        ("missing.raw",),
        (),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    same("check", *words)


def damaged(name: str, counts: dict[int, int]) -> str:
    """A copy of `base.qcow2` with other reference counts for some clusters, counted from its end."""
    content = bytearray(Path("base.qcow2").read_bytes())
    (table,) = struct.unpack_from(">Q", content, 48)
    (block,) = struct.unpack_from(">Q", content, table)
    clusters = len(content) >> 16
    for number, count in counts.items():
        struct.pack_into(">H", content, block + 2 * (clusters + number), count)
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize("case", ["sound", "leaked", "corrupt", "both", "empty", "compressed", "mended"])
def test_reports_are_those_of_qemu(case: str, folder: Path) -> None:
    """Given the numbers that qemu-img found, what is told of them, in both forms, is what qemu-img tells."""
    make_chain()
    Path("padding").write_bytes(bytes(1 << 16))
    name = damaged("image.qcow2", {})
    repair: tuple[str, ...] = ()
    if case in ("leaked", "mended"):
        with Path(name).open("ab") as image:
            image.write(bytes(1 << 16))
        Path(name).write_bytes(_counted(Path(name).read_bytes(), 1))
        repair = ("-r", "leaks") if case == "mended" else ()
    elif case == "corrupt":
        damaged(name, {-1: 0})
    elif case == "both":
        damaged(name, {-1: 0, 0: 1})
    elif case == "empty":
        qemu("create", "-q", "-f", "qcow2", name, "0")
    elif case == "compressed":
        qemu("convert", "-c", "-O", "qcow2", "top.qcow2", name)
    kept = Path(name).read_bytes()
    told = qemu_img("check", *repair, "--output=json", name)
    Path(name).write_bytes(kept)
    spoken = qemu_img("check", *repair, name)
    found = json.loads(told.out)
    counts = {key.replace("-", "_"): count for key, count in found.items() if key not in ("filename", "format")}
    result = CheckResult(**counts)
    assert status_of(result) == told.status == spoken.status
    assert qemu_json.pretty(facts_of(result, name, "qcow2")) + "\n" == told.out
    assert spoken.out.endswith(human_text(result))
    if not repair:
        assert human_text(result) == spoken.out


@pytest.mark.parametrize("mark", [0, 1, 2])
@pytest.mark.parametrize(
    ("counts", "repair"),
    [
        (counts, repair)
        for counts in ({}, {0: 2}, {-1: 2}, {-2: 0}, {-2: 0, 0: 2})
        for repair in ("", "leaks", "all")
        # There qemu-img gives up where a cluster that is in use counts as free.
        if -2 not in counts or repair != "leaks"
    ],
)
def test_images_are_checked_as_by_qemu(counts: dict[int, int], repair: str, mark: int, folder: Path) -> None:
    """Leaks, corruptions and both, in images that are marked as dirty or corrupt or not."""
    make_chain()
    name = damaged("image.qcow2", counts)
    content = bytearray(Path(name).read_bytes() + bytes(1 << 16))
    content[79] = mark
    endings = []
    for tool in (qemu_img, img):
        Path(name).write_bytes(content)
        found = tool("check", *(("-r", repair) if repair else ()), "--output=json", name)
        facts = json.loads(found.out)
        if repair:
            del facts["image-end-offset"]  # qemu-img makes new refcount structures more often
        endings.append((found.status, facts, tool("check", "-q", name).status))
    assert endings[1] == endings[0]


def _counted(content: bytes, count: int) -> bytes:
    """The same image with a reference count for its last cluster."""
    changed = bytearray(content)
    (table,) = struct.unpack_from(">Q", changed, 48)
    (block,) = struct.unpack_from(">Q", changed, table)
    struct.pack_into(">H", changed, block + 2 * ((len(changed) >> 16) - 1), count)
    return bytes(changed)


def test_statuses() -> None:
    assert status_of(CheckResult()) == 0
    assert status_of(CheckResult(leaks=1)) == 3
    assert status_of(CheckResult(leaks=1, corruptions=1)) == 2
    assert status_of(CheckResult(leaks=1, corruptions=1, check_errors=1)) == 1


@pytest.mark.parametrize("output", [(), ("--output=json",), ("-q",), ("-q", "--output=json")])
@pytest.mark.parametrize("case", ["sound", "leaked", "corrupt", "marked", "compressed"])
def test_qcow2(case: str, output: tuple[str, ...], folder: Path) -> None:
    """The same is found, and the same is told."""
    make_chain()
    name = damaged("image.qcow2", {"leaked": {-1: 2}, "corrupt": {-1: 0}}.get(case, {}))
    if case == "marked":
        content = bytearray(Path(name).read_bytes())
        content[79] |= 2
        Path(name).write_bytes(content)
    elif case == "compressed":
        qemu("convert", "-c", "-O", "qcow2", "top.qcow2", name)
    same("check", *output, name)


@pytest.mark.parametrize("output", [(), ("--output=json",)])
@pytest.mark.parametrize(("case", "repair"), [("leaked", "leaks"), ("leaked", "all"), ("marked", "all")])
def test_repairs(case: str, repair: str, output: tuple[str, ...], folder: Path) -> None:
    """The same is told, and afterwards qemu-img finds nothing wrong."""
    make_chain()
    name = damaged("image.qcow2", {-1: 2} if case == "leaked" else {})
    content = bytearray(Path(name).read_bytes())
    content[79] |= 2 if case == "marked" else 0
    Path(name).write_bytes(content)
    theirs = qemu_img("check", "-r", repair, *output, name)
    Path(name).write_bytes(content)
    ours = img("check", "-r", repair, *output, name)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    qemu("check", "-q", name)
