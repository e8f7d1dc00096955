"""Bitmaps that qcow2 images keep, by `bitmap` and `convert --bitmaps`, beside qemu-img on a copy of the same image."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.img.chains import qemu, qemu_io, shown
from tests.cli.img.side_by_side import img, ok, qemu_img, same
from tests.cli.pynbd_command import PYNBD
from tests.formats.qcow2.dirty_extents import dirty_over_nbd, told_by_qemu
from tests.peers import qemu_nbd, require_tool

Found = dict[str, tuple[tuple[int, list[str]], list[tuple[int, int]] | None]]

SIZE = (3 << 20) + 1536


@pytest.fixture
def image(folder: Path) -> Path:
    """`a.qcow2`, with bitmaps that note what is written and one that does not; `b.qcow2` with others, `small.qcow2`."""
    for name, size in (("a.qcow2", SIZE), ("b.qcow2", SIZE), ("small.qcow2", 1 << 20)):
        qemu("create", "-q", "-f", "qcow2", name, str(size))
        qemu("bitmap", "--add", "-g", "512", name, "fine")
        qemu("bitmap", "--add", name, "coarse")
        qemu("bitmap", "--add", "--disable", "-g", "32k", name, "still")
    qemu_io("a.qcow2", "write -P 1 5k 3k", "write -P 2 1M 70k", f"write -P 3 {SIZE - 512} 512")
    qemu_io("b.qcow2", "write -P 1 2M 1k")
    return Path("a.qcow2")


def found(path: Path | str) -> Found:
    """name → (granularity and flags, what is dirty) as QEMU finds it; the image must be sound."""
    qemu("check", "-q", str(path))
    told = told_by_qemu(Path(path))
    good = [name for name, (_, flags) in told.items() if "in-use" not in flags]
    with qemu_nbd(path, "-f", "qcow2", "-r", *(word for name in good for word in ("-B", name))) as peer:
        dirty = {name: dirty_over_nbd(peer.uri(), name) for name in good}
    return {name: (facts, dirty.get(name)) for name, facts in told.items()}


def abandoned(path: str) -> None:
    """Let the image be written to by somebody who does not get to the end: its bitmaps are inconsistent."""
    command = [require_tool("qemu-io", package="qemu-utils"), "-c", "write 0 512", "-c", "flush", "-c", "abort", path]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    qemu("check", "-q", "-r", "all", path)


def beside_qemu(*words: str, status: int) -> Found:
    """Both do the same with a copy of `a.qcow2`, and end so; what bitmaps there are then in either."""
    results = []
    for run in (qemu_img, img):
        shutil.copy("a.qcow2", "copy.qcow2")
        ending = run(*[word.replace("a.qcow2", "copy.qcow2") for word in words])
        assert (ending.status, ending.out, bool(ending.err)) == (status, "", status != 0), ending
        results.append(found("copy.qcow2"))
        assert shown("copy.qcow2") == shown("a.qcow2")
    assert results[0] == results[1]
    return results[1]


@pytest.mark.parametrize(
    "words",
    [
        ("--add", "a.qcow2", "new"),
        ("--add", "--disable", "-g", "2M", "a.qcow2", "new"),
        ("--add", "-g", "0", "a.qcow2", "new"),
        ("--add", "-g", "512", "--merge", "coarse", "a.qcow2", "new"),
        ("--add", "-g", "64k", "--merge", "fine", "a.qcow2", "new"),
        ("--add", "-g", "1G", "--merge", "fine", "a.qcow2", "new"),
        ("--add", "a.qcow2", "ä" * 511),
        ("--remove", "a.qcow2", "fine"),
        ("--remove", "--add", "a.qcow2", "fine"),
        ("--clear", "a.qcow2", "fine"),
        ("--disable", "a.qcow2", "fine"),
        ("--disable", "--enable", "--clear", "a.qcow2", "coarse"),
        ("--enable", "a.qcow2", "still"),
        ("--merge", "fine", "a.qcow2", "still"),
        ("--merge", "fine", "--merge", "coarse", "--enable", "a.qcow2", "still"),
        ("--merge", "fine", "a.qcow2", "fine"),
        ("--merge", "fine", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "fine"),
        ("--merge", "fine", "-b", "b.qcow2", "a.qcow2", "coarse"),
        ("--clear", "--merge", "coarse", "-b", "b.qcow2", "-f", "qcow2", "a.qcow2", "fine"),
    ],
    ids=" ".join,
)
def test_actions(words: tuple[str, ...], image: Path) -> None:
    beside_qemu("bitmap", *words, status=0)


@pytest.mark.parametrize(
    "words",
    [
        ("--add", "a.qcow2", "fine"),
        ("--add", "-g", "1000", "a.qcow2", "new"),
        ("--add", "-g", "256", "a.qcow2", "new"),
        ("--add", "-g", "4G", "a.qcow2", "new"),
        ("--add", "a.qcow2", ""),
        ("--add", "a.qcow2", "x" * 1024),
        ("--remove", "a.qcow2", "new"),
        ("--clear", "a.qcow2", "new"),
        ("--enable", "a.qcow2", "new"),
        ("--merge", "new", "a.qcow2", "fine"),
        ("--merge", "fine", "a.qcow2", "new"),
        ("--merge", "fine", "-b", "small.qcow2", "-F", "qcow2", "a.qcow2", "fine"),
        ("--merge", "fine", "-b", "missing.qcow2", "-F", "qcow2", "a.qcow2", "fine"),
        ("--merge", "fine", "-b", "b.qcow2", "-F", "raw", "a.qcow2", "fine"),
        ("--merge", "new", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "fine"),
        ("--clear", "--merge", "new", "a.qcow2", "fine"),
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_actions_that_fail(words: tuple[str, ...], image: Path) -> None:
    """What was done before the one that failed stays done."""
    beside_qemu("bitmap", *words, status=1)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("--remove", "a.qcow2", "fine"), 0),
        (("--remove", "--add", "a.qcow2", "fine"), 0),
        (("--clear", "a.qcow2", "fine"), 1),
        (("--enable", "a.qcow2", "fine"), 1),
        (("--disable", "a.qcow2", "fine"), 1),
        (("--merge", "coarse", "a.qcow2", "fine"), 1),
        (("--add", "--merge", "fine", "a.qcow2", "new"), 1),
        (("--add", "a.qcow2", "new"), 0),
    ],
    ids=str,
)
def test_inconsistent_bitmaps(words: tuple[str, ...], status: int, image: Path) -> None:
    abandoned("a.qcow2")
    beside_qemu("bitmap", *words, status=status)


def test_an_image_that_keeps_none(folder: Path) -> None:
    qemu("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M")
    for words in (("--add",), ("--remove",), ("--merge", "b1")):
        same("bitmap", *words, "old.qcow2", "b0")


def converted(*words: str, target: str, status: int = 0) -> list[Path]:
    """Both make a copy of `a.qcow2`, and end so; `theirs` and `ours`, as far as they are there."""
    paths = []
    for run, name in ((qemu_img, "theirs"), (img, "ours")):
        path = Path(f"{name}.{target}")
        ending = run("convert", "--bitmaps", *words, path)
        assert (ending.status, ending.out, bool(ending.err)) == (status, "", status != 0), ending
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-c",),
        ("-W", "-o", "cluster_size=512"),
        ("-o", "extended_l2=on,lazy_refcounts=on"),
        ("-o", "data_file=d.raw"),
        ("-l", "s0"),
        ("-B", "b.qcow2", "-F", "qcow2"),
        ("--skip-broken-bitmaps",),
    ],
    ids=" ".join,
)
def test_convert(options: tuple[str, ...], image: Path) -> None:
    """The copy has the same bitmaps, enabled or not, and goes on noting what is written."""
    if "-B" in options:
        qemu("rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2")
    qemu("snapshot", "-c", "s0", "a.qcow2")
    expected = found("a.qcow2")
    theirs, ours = converted("-O", "qcow2", *options, "a.qcow2", target="qcow2")
    assert found(theirs) == found(ours) == expected
    assert shown("ours.qcow2") == shown("a.qcow2")
    same("compare", theirs, ours)
    qemu_io("ours.qcow2", "write 2M 1k")
    assert (2 << 20, (2 << 20) + 1024) in (found(ours)["fine"][1] or [])


def test_convert_into_an_image_that_is_there(image: Path) -> None:
    """Bitmaps that it has note what is copied; those that come do not."""
    for name in ("theirs.qcow2", "ours.qcow2"):
        qemu("create", "-q", "-f", "qcow2", name, str(SIZE))
        qemu("bitmap", "--add", "-g", "64k", name, "here")
    theirs, ours = converted("-n", "-O", "qcow2", "a.qcow2", target="qcow2")
    expected = found("a.qcow2")
    assert {name: facts for name, facts in found(ours).items() if name != "here"} == expected
    assert {name: facts for name, facts in found(theirs).items() if name != "here"} == expected
    assert found(ours)["here"] == found(theirs)["here"]
    # Again, they are there already. qemu-img copies the data before it finds that out.
    converted("-n", "-O", "qcow2", "a.qcow2", target="qcow2", status=1)
    assert found(ours)["fine"] == expected["fine"]


@pytest.mark.parametrize(
    "words",
    [
        ("-O", "raw", "a.qcow2"),
        ("-O", "qcow2", "-o", "compat=0.10", "a.qcow2"),
        ("-O", "qcow2", "a.qcow2", "b.qcow2"),
        ("-O", "qcow2", "-f", "raw", "a.qcow2"),
        ("-n", "-O", "qcow2", "a.qcow2"),
    ],
    ids=" ".join,
)
def test_bitmaps_that_can_not_be_copied(words: tuple[str, ...], image: Path) -> None:
    """It is an error, before anything is copied."""
    for name in ("theirs.qcow2", "ours.qcow2") if "-n" in words else ():
        qemu("create", "-q", "-f", "qcow2", name, "4M")
    _, ours = converted(*words, target="qcow2", status=1)
    if "-n" in words:
        assert set(shown("ours.qcow2")) == {0}
    else:
        assert not ours.exists()


def test_convert_with_inconsistent_bitmaps(image: Path) -> None:
    """An error, or they are left out, with a warning for each."""
    abandoned("a.qcow2")
    qemu("bitmap", "--add", "a.qcow2", "new")
    converted("-O", "qcow2", "a.qcow2", target="qcow2", status=1)
    for run, name in ((qemu_img, "theirs.qcow2"), (img, "ours.qcow2")):
        ending = run("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "a.qcow2", name)
        assert (ending.status, ending.out, ending.err.count("\n")) == (0, "", 3), ending
        assert found(name) == {"new": ((65536, ["auto"]), [])}
    same("convert", "--skip-broken-bitmaps", "-O", "qcow2", "a.qcow2", "ours.qcow2")


def test_info_tells_of_bitmaps_as_qemu_does(image: Path) -> None:
    ok("bitmap", "--add", "-g", "4k", "a.qcow2", "new")
    same("info", "a.qcow2")
    same("info", "--output=json", "a.qcow2")
    same("measure", "-O", "qcow2", "a.qcow2")


def test_a_name_that_is_no_text(folder: Path) -> None:
    """Names are bytes, to QEMU: others than UTF-8 are told as they are."""
    name = b"b\xff".decode(errors="surrogateescape")
    qemu("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
    qemu("bitmap", "--add", "disk.qcow2", name)
    assert told(*PYNBD, "img") == told(require_tool("qemu-img"))
    ok("map", "disk.qcow2")
    same("measure", "-O", "qcow2", "disk.qcow2")
    ok("convert", "-O", "raw", "disk.qcow2", "disk.raw")
    ok("convert", "-O", "qcow2", "--bitmaps", "disk.qcow2", "copy.qcow2")
    assert b"name: b\xff" in told(require_tool("qemu-img"), image="copy.qcow2")
    ok("bitmap", "--add", "disk.qcow2", f"{name}2")
    ok("bitmap", "--remove", "disk.qcow2", name)
    assert b"name: b\xff2" in told(require_tool("qemu-img"))


def told(*program: str, image: str = "disk.qcow2") -> bytes:
    """What is printed of an image."""
    return subprocess.run([*program, "info", image], capture_output=True, timeout=60, check=True).stdout
