"""`pynbd img bitmap` beside qemu-img's, where no bitmap can be kept; for qcow2 see `test_qcow2_bitmaps.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import ok, qemu_img, same


@pytest.mark.parametrize(
    "words",
    [
        ("disk.raw", "b0"),
        ("--add", "-f", "raw", "disk.raw"),
        ("--add", "-f", "raw", "disk.raw", "b0"),
        ("--remove", "-f", "raw", "disk.raw", "b0"),
        ("--clear", "-f", "raw", "disk.raw", "b0"),
        ("--enable", "-f", "raw", "disk.raw", "b0"),
        ("--merge", "b1", "-f", "raw", "disk.raw", "b0"),
        ("--clear", "-g", "64k", "-f", "raw", "disk.raw", "b0"),
        ("--add", "-g", "nonsense", "-f", "raw", "disk.raw", "b0"),
        ("--add", "-b", "disk.raw", "-f", "raw", "disk.raw", "b0"),
        ("--merge", "b1", "-F", "raw", "-f", "raw", "disk.raw", "b0"),
        ("--add", "missing.raw", "b0"),
        (),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    same("bitmap", *words)


def test_an_image_whose_backing_file_is_missing(folder: Path) -> None:
    made = qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "missing.raw", "-F", "raw", "a.qcow2", "1M")
    assert made.status == 0, made
    ok("bitmap", "--add", "a.qcow2", "ours")
    assert qemu_img("bitmap", "--remove", "a.qcow2", "ours").status == 0
