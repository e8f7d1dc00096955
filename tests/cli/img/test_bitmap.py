"""`pynbd img bitmap` beside qemu-img's, where no bitmap can be kept; for qcow2 see `test_qcow2_bitmaps.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import same


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
