"""`pynbd img commit` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.chains import make_chain, qemu, shown
from tests.cli.img.side_by_side import ok, qemu_img, same


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
