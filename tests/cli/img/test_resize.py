"""`pynbd img resize` beside qemu-img's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.img.chains import qemu, qemu_io
from tests.cli.img.side_by_side import img, ok, qemu_img, same
from tests.peers import pynbd_serve

MIB = 1 << 20


@pytest.mark.parametrize(
    "words",
    [
        ("disk.raw", "20M"),
        ("disk.raw", "+1M"),
        ("disk.raw", "-2M"),
        ("--shrink", "disk.raw", "-2M"),
        ("disk.raw", "--shrink", "-2M"),
        ("--shrink", "disk.raw", "1234"),
        ("-q", "disk.raw", "20M"),
        ("disk.raw", "1M"),
        ("--preallocation=falloc", "disk.raw", "+1M"),
        ("disk.raw", "--preallocation=full", "+1M"),
        ("--preallocation=metadata", "disk.raw", "+1M"),
        ("--preallocation=nonsense", "disk.raw", "+1M"),
        ("--preallocation=full", "--shrink", "disk.raw", "100"),
        ("disk.raw", "-100M"),
        ("disk.raw", "0"),
        ("disk.raw", "+0"),
        ("disk.raw", "nonsense"),
        ("1M", "disk.raw"),
        ("disk.raw",),
        ("missing.raw", "1M"),
        (),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    """What is said, the exit status, and what is left in the file."""
    content = disk.read_bytes()
    theirs = qemu_img("resize", "-f", "raw", *words)
    expected, blocks = disk.read_bytes(), disk.stat().st_blocks
    with disk.open("wb") as file:
        file.truncate(10 * MIB)
        for offset, length in ((MIB, 196 << 10), (5 * MIB, 64 << 10)):
            file.seek(offset)
            file.write(content[offset : offset + length])
    ours = img("resize", "-f", "raw", *words)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    assert disk.read_bytes() == expected
    assert disk.stat().st_blocks == blocks


def test_relative_to_whole_sectors(odd: Path) -> None:
    ok("resize", "-f", "raw", odd, "+1k")
    assert odd.stat().st_size == 2048


def test_a_guessed_format_is_warned_of(disk: Path) -> None:
    same("resize", disk, "20M")
    assert "-f raw" in img("resize", disk, "30M").err


def test_export_that_is_served_meanwhile(disk: Path, tmp_path: Path) -> None:
    """Where the configuration says `resize`; the file is as qemu-img leaves it."""
    config = tmp_path / "pynbd.toml"
    config.write_text(f'[export.open]\ndisk = "{disk}"\nformat = "raw"\nresize = true\n')
    with pynbd_serve("--config", config) as peer:
        ok("resize", "-f", "raw", peer.uri("open"), "+2M")
        assert disk.stat().st_size == 12 * MIB
        refused = img("resize", "-f", "raw", peer.uri("open"), "1M")
        assert (refused.status, disk.stat().st_size) == (1, 12 * MIB)
    with pynbd_serve("-f", "raw", disk) as peer:
        closed = img("resize", "-f", "raw", peer.uri(), "+2M")
    assert "the server does not offer RESIZE" in closed.err
    assert (closed.status, disk.stat().st_size) == (1, 12 * MIB)


def test_a_difference_behind_two_dashes(folder: Path) -> None:
    """As qemu-img's manual writes it."""
    for image in ("ours.raw", "theirs.raw"):
        (folder / image).write_bytes(bytes(2 << 20))
    words = ("resize", "-f", "raw", "--shrink")
    ours, theirs = img(*words, "ours.raw", "--", "-1M"), qemu_img(*words, "theirs.raw", "--", "-1M")
    assert ours == theirs
    assert ok("resize", "-f", "raw", "--shrink", "--", "ours.raw", "-512k") == "Image resized.\n"
    assert (folder / "ours.raw").stat().st_size == 512 << 10
    assert (folder / "theirs.raw").stat().st_size == 1 << 20


@pytest.mark.parametrize("backing", ["8M", "12300k", "30M"])
@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended_l2", ["off", "on"])
def test_preallocation_over_a_backing_file(backing: str, preallocation: str, extended_l2: str, folder: Path) -> None:
    """What was added reads as zeroes, whatever the backing file has there, and has its clusters."""
    qemu("create", "-q", "-f", "qcow2", "below.qcow2", backing)
    qemu_io("below.qcow2", f"write -q -P 5 0 {backing}")
    options = f"extended_l2={extended_l2}"
    qemu("create", "-q", "-f", "qcow2", "-o", options, "-b", "below.qcow2", "-F", "qcow2", "theirs.qcow2", "8200k")
    qemu_io("theirs.qcow2", "write -q -P 7 8000k 64k")
    shutil.copyfile("theirs.qcow2", "ours.qcow2")
    words = ("resize", "-q", f"--preallocation={preallocation}")
    assert qemu_img(*words, "theirs.qcow2", "20M").status == 0
    ok(*words, "ours.qcow2", "20M")
    assert qemu_img("check", "ours.qcow2").status == 0
    assert qemu_img("compare", "theirs.qcow2", "ours.qcow2").status == 0
    first = 8256 << 10
    extents = json.loads(qemu_img("map", "--output=json", "ours.qcow2").out)
    added = [extent for extent in extents if extent["start"] + extent["length"] > first]
    assert all("offset" in extent and not extent["depth"] for extent in added), added
    assert added[-1]["start"] + added[-1]["length"] == 20 * MIB


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_preallocation_in_a_data_file(preallocation: str, raw: str, folder: Path) -> None:
    """As many blocks are taken in it, and the same is told of what was added."""
    for side in ("theirs", "ours"):
        options = f"data_file={side}.data,data_file_raw={raw}"
        qemu("create", "-q", "-f", "qcow2", "-o", options, f"{side}.qcow2", "1M")
    words = ("resize", "-q", f"--preallocation={preallocation}")
    assert qemu_img(*words, "theirs.qcow2", "8M").status == 0
    ok(*words, "ours.qcow2", "8M")
    assert qemu_img("check", "ours.qcow2").status == 0
    theirs, ours = (qemu_img("map", "--output=json", f"{side}.qcow2").out for side in ("theirs", "ours"))
    assert json.loads(ours) == json.loads(theirs)
    # In whole MiB: the file system may need a block for its list of extents.
    took = [(folder / f"{side}.data").stat().st_blocks >> 11 for side in ("theirs", "ours")]
    assert took[0] == took[1]
