"""`pynbd img dd` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import img, qemu_img


@pytest.mark.parametrize(
    "words",
    [
        "if=disk.raw of=new.raw",
        "of=new.raw if=disk.raw bs=1M count=2",
        "if=disk.raw of=new.raw bs=1M count=2 skip=1",
        "if=disk.raw of=new.raw bs=1M skip=100",
        "if=disk.raw of=new.raw bs=1000 count=3",
        "if=disk.raw of=new.raw bs=1000 skip=1",
        "if=odd.raw of=new.raw",
        "-U -f raw -O raw bs=3M if=disk.raw of=new.raw",
        "if=disk.raw",
        "of=new.raw",
        "if=disk.raw of=new.raw nonsense=1",
        "if=disk.raw of=new.raw nonsense",
        "if=disk.raw of=new.raw bs=0",
        "if=disk.raw of=new.raw bs=2G",
        "if=disk.raw of=new.raw bs=nonsense",
        "if=disk.raw of=new.raw count=nonsense",
        "if=disk.raw of=new.raw skip=-1",
        "if=missing.raw of=new.raw",
        "-n if=disk.raw of=new.raw",
        "-O nonsense if=disk.raw of=new.raw",
    ],
)
def test_raw(words: str, disk: Path, odd: Path) -> None:
    """The exit status, and every byte of what is made."""
    new = Path("new.raw")
    theirs = qemu_img("dd", *words.split())
    expected = new.read_bytes() if new.exists() else None
    new.unlink(missing_ok=True)
    ours = img("dd", *words.split())
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    assert (new.read_bytes() if new.exists() else None) == expected
