"""`pynbd img rebase` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.chains import make_chain, qemu, qemu_io, shown
from tests.cli.img.side_by_side import ok, same


def _other_base() -> None:
    qemu("create", "-q", "-f", "qcow2", "other.qcow2", "3M")
    qemu_io("other.qcow2", "write -P 1 0 512k", "write -P 9 2M 64k")


@pytest.mark.parametrize(
    "words",
    [
        ("-b", "", "disk.raw"),
        ("-u", "-b", "base.qcow2", "-F", "qcow2", "disk.raw"),
        ("top.qcow2",),
        ("-u", "-b", "base.qcow2", "top.qcow2"),
        ("-b", "base.qcow2", "top.qcow2"),
        ("-b", "missing.qcow2", "-F", "qcow2", "top.qcow2"),
        ("-b", "base.qcow2", "-F", "nonsense", "top.qcow2"),
        ("-T", "nonsense", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"),
        ("-b", "a", "b", "c"),
        (),
    ],
)
def test_what_can_not_be(words: tuple[str, ...], disk: Path) -> None:
    make_chain()
    same("rebase", *words)


@pytest.mark.parametrize(
    ("backing", "options"),
    [
        ("other.qcow2", ()),
        ("base.qcow2", ()),
        ("./base.qcow2", ("-q",)),
        ("mid.qcow2", ("-t", "none")),
        ("", ()),
    ],
)
def test_the_disk_stays_the_same(backing: str, options: tuple[str, ...], folder: Path) -> None:
    content = make_chain()
    _other_base()
    format_of = ("-F", "qcow2") if backing else ()
    assert ok("rebase", *options, "-b", backing, *format_of, "top.qcow2") == ""
    assert shown("top.qcow2") == content
    assert ("backing file: " in same("info", "top.qcow2")) == bool(backing)
    if backing in ("base.qcow2", "mid.qcow2"):
        # What lies below the new backing file already is not copied.
        assert "base.qcow2" in same("map", "top.qcow2")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_from_none(compat: str, folder: Path) -> None:
    """An image that had no backing file shows nothing of its new one, also where it can't note zeroes."""
    make_chain()
    qemu("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "alone.qcow2", "4M")
    qemu_io("alone.qcow2", "write -P 5 100k 64k")
    before = shown("alone.qcow2")
    assert any(before)
    ok("rebase", "-b", "base.qcow2", "-F", "qcow2", "alone.qcow2")
    assert shown("alone.qcow2") == before
    qemu("check", "alone.qcow2")


def test_huge_disks_with_little_in_them(folder: Path) -> None:
    """Where both backing files read as zeroes nothing has to be compared."""
    for name in ("old.qcow2", "new.qcow2"):
        qemu("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", name, "1P")
    qemu("create", "-q", "-f", "qcow2", "-b", "old.qcow2", "-F", "qcow2", "-o", "cluster_size=2M", "top.qcow2")
    qemu_io("old.qcow2", "write -P 1 10T 1M", "write -P 2 20T 64k")
    qemu_io("new.qcow2", "write -P 3 20T 64k", "write -P 4 30T 4M")
    qemu_io("top.qcow2", "write -P 5 40T 64k")
    qemu("convert", "-O", "qcow2", "-o", "cluster_size=2M", "top.qcow2", "before.qcow2")
    ok("rebase", "-b", "new.qcow2", "-F", "qcow2", "top.qcow2")
    qemu("compare", "top.qcow2", "before.qcow2")
    assert ok("compare", "top.qcow2", "before.qcow2") == "Images are identical.\n"
    qemu("check", "top.qcow2")


@pytest.mark.parametrize("sizes", [("4M", "2M", "4M"), ("2M", "4M", "4M"), ("3M", "1M", "4M"), ("1M", "4M", "3M")])
def test_zeroes_behind_the_ends_of_backing_files(sizes: tuple[str, str, str], folder: Path) -> None:
    old, new, top = sizes
    for number, (name, size) in enumerate((("old.qcow2", old), ("new.qcow2", new)), 1):
        qemu("create", "-q", "-f", "qcow2", name, size)
        qemu_io(name, f"write -P {number} 64k 200k", f"write -P {number} 900k 100k", "write -z 320k 256k")
        if size != "1M":
            qemu_io(name, f"write -P {number} {int(size[0]) - 1}M {100 * number}k")
    qemu("create", "-q", "-f", "qcow2", "-b", "old.qcow2", "-F", "qcow2", "top.qcow2", top)
    qemu_io("top.qcow2", "write -P 5 128k 64k")
    before = shown("top.qcow2")
    ok("rebase", "-b", "new.qcow2", "-F", "qcow2", "top.qcow2")
    assert shown("top.qcow2") == before
    qemu("check", "top.qcow2")


def test_the_name_only(folder: Path) -> None:
    """With -u, whatever the new one holds, and whether it is there or not."""
    make_chain()
    for backing in (("-b", "missing", "-F", "raw"), (), ("-b", "mid.qcow2", "-F", "qcow2")):
        assert ok("rebase", "-u", *backing, "top.qcow2") == ""
        same("info", "--output=json", "top.qcow2")
