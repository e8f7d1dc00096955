"""`pynbd img commit` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.chains import make_chain, qemu, qemu_io, shown
from tests.cli.img.side_by_side import failure, ok, qemu_img, same


@pytest.mark.parametrize(
    "words",
    [
        ("disk.raw",),
        ("base.qcow2",),
        ("-b", "missing", "top.qcow2"),
        ("missing.qcow2",),
        ("-r", "nonsense", "top.qcow2"),
        (),
    ],
)
def test_what_can_not_be(words: tuple[str, ...], disk: Path) -> None:
    make_chain()
    same("commit", *words)


@pytest.mark.parametrize(
    "options", [(), ("-q",), ("-d",), ("-b", "mid.qcow2"), ("-b", "base.qcow2"), ("-r", "1G"), ("-t", "none")]
)
def test_the_disk_is_the_same(options: tuple[str, ...], folder: Path) -> None:
    """As before, and in each image of the chain what it holds after qemu-img has done the same."""
    content = make_chain()
    theirs = qemu_img("commit", *options, "top.qcow2")
    expected = {name: shown(f"{name}.qcow2") for name in ("top", "mid", "base")}
    places = qemu("map", "top.qcow2")
    make_chain()
    assert ok("commit", *options, "top.qcow2") == theirs.out
    assert shown("top.qcow2") == content
    if options[:1] == ("-b",):
        # qemu-img leaves images between the two as they are; what the base holds is what counts.
        assert shown(options[1]) == expected[options[1].removesuffix(".qcow2")]
    else:
        assert {name: shown(f"{name}.qcow2") for name in ("top", "mid", "base")} == expected
        assert [line.split()[::3] for line in qemu("map", "top.qcow2").splitlines()] == [
            line.split()[::3] for line in places.splitlines()
        ]


def test_into_raw(disk: Path) -> None:
    """A base that is shorter grows."""
    qemu("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2", "12M")
    qemu("bench", "-q", "-f", "qcow2", "-w", "-c", "2", "-o", "11M", "--pattern=7", "top.qcow2")
    content = shown("top.qcow2")
    assert ok("commit", "top.qcow2") == "Image committed.\n"
    assert disk.read_bytes() == content
    assert shown("top.qcow2") == content


def test_a_wrong_rate_is_found_before_the_base_changes(folder: Path) -> None:
    make_chain()
    before = (folder / "mid.qcow2").read_bytes()
    same("commit", "-r", "10X", "top.qcow2")
    assert (folder / "mid.qcow2").read_bytes() == before


def test_a_base_under_another_name(folder: Path) -> None:
    content = make_chain()
    ok("commit", "-b", "./mid.qcow2", "top.qcow2")
    assert shown("mid.qcow2") == content


def test_a_relative_base_starts_from_the_image_above(folder: Path) -> None:
    """As it does inside that image, not from where the command is given: another image may have that name there."""
    Path("below").mkdir()
    qemu("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    qemu("create", "-q", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", "below/base.qcow2")
    qemu("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "below/top.qcow2")
    qemu_io("below/top.qcow2", "write -P 5 0 64k")
    before = Path("base.qcow2").read_bytes()
    assert "is not among the backing files" in failure("commit", "-b", "below/base.qcow2", "below/top.qcow2")
    ok("commit", "-b", "base.qcow2", "below/top.qcow2")
    assert Path("base.qcow2").read_bytes() == before
    assert shown("below/base.qcow2")[: 64 << 10] == b"\5" * (64 << 10)


def test_a_base_by_the_name_that_stands_in_the_image(folder: Path) -> None:
    """Also where that is no path."""
    qemu("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    name = f"file:{folder / 'base.qcow2'}"
    qemu("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", "top.qcow2")
    for letter, commit in ((b"\5", ok), (b"\6", same)):
        qemu_io("top.qcow2", f"write -P {letter[0]} 0 64k")
        commit("commit", "-q", "-b", name, "top.qcow2")
        assert shown("base.qcow2")[: 64 << 10] == letter * (64 << 10)
