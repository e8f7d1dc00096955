"""`pynbd img bench` beside qemu-img's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.img.side_by_side import img, qemu_img

SECONDS = re.compile(r"[0-9]+\.[0-9]{3} seconds")


@pytest.mark.parametrize(
    "words",
    [
        ("-c", "100", "disk.raw"),
        ("-f", "raw", "-w", "-c", "100", "disk.raw"),
        ("-f", "raw", "-w", "-c", "100", "-d", "8", "--flush-interval=10", "disk.raw"),
        ("-f", "raw", "-w", "-c", "100", "-d", "8", "--flush-interval=10", "--no-drain", "disk.raw"),
        ("-f", "raw", "-c", "10", "-s", "1M", "-S", "2M", "-o", "1M", "disk.raw"),
        ("-f", "raw", "-c", "0", "disk.raw"),
        ("-f", "raw", "--flush-interval=10", "disk.raw"),
        ("-f", "raw", "-w", "-d", "8", "--flush-interval=3", "disk.raw"),
        ("-f", "raw", "-w", "--pattern=300", "disk.raw"),
        ("-f", "raw", "-w", "--pattern=0xff", "-c", " 0x10", "-d", "010", "disk.raw"),
        ("-f", "raw", "-c", "09", "disk.raw"),
        ("-f", "raw", "-c", "5", "-n", "disk.raw"),
        ("-f", "raw", "-c", "5", "-n", "-t", "none", "disk.raw"),
        ("-f", "raw", "-c", "5", "-i", "native", "-t", "writethrough", "disk.raw"),
        ("-f", "raw", "-c", "5", "-S", "2G", "disk.raw"),
        ("-f", "raw", "-c", "5", "-s", "2G", "disk.raw"),
        ("-f", "raw", "-w", "-c", "30", "-S", "700k", "--pattern=3", "disk.raw"),
        ("-s", "nonsense", "disk.raw"),
        ("missing.raw",),
        (),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    """The same is said, seconds aside, and the same is written."""
    content = disk.read_bytes()
    theirs = qemu_img("bench", *words)
    expected = disk.read_bytes()
    disk.write_bytes(content)
    ours = img("bench", *words)
    assert (ours.status, SECONDS.sub("", ours.out)) == (theirs.status, SECONDS.sub("", theirs.out)), (ours, theirs)
    assert disk.read_bytes() == expected


def test_outside_the_disk(disk: Path, odd: Path) -> None:
    """No request lies behind the end; of a last sector that is not whole all can be read."""
    for words in (("-o", "10M", disk), ("-o", "11M", disk), ("-s", "11M", disk)):
        assert (img("bench", "-f", "raw", *words).status, qemu_img("bench", "-f", "raw", *words).status) == (1, 1)
    for count, size in (("3", "512"), ("0", "1M")):
        ours, theirs = (run("bench", "-f", "raw", "-c", count, "-s", size, odd) for run in (img, qemu_img))
        assert (ours.status, SECONDS.sub("", ours.out)) == (0, SECONDS.sub("", theirs.out))


def test_a_pattern(disk: Path) -> None:
    """Where requests go, and what they write."""
    assert img("bench", "-f", "raw", "-w", "-c", "3", "-S", "8k", "-o", "64k", "--pattern=7", disk).status == 0
    written = {
        offset for offset in range(0, 1 << 20, 4096) if disk.read_bytes()[offset : offset + 4096] == b"\7" * 4096
    }
    assert written == {65536, 73728, 81920}
