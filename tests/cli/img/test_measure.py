"""`pynbd img measure` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import same


@pytest.mark.parametrize("output", [(), ("--output=json",)])
@pytest.mark.parametrize(
    "words",
    [
        ("disk.raw",),
        ("odd.raw",),
        ("--size", "1G"),
        ("--size", "1000"),
        ("-O", "raw", "-f", "raw", "disk.raw"),
        ("--size", "1G", "disk.raw"),
        ("--size", "nonsense"),
        ("-f", "raw", "--size", "1G"),
        ("-O", "nonsense", "disk.raw"),
        ("missing.raw",),
        (),
    ],
)
def test_raw(output: tuple[str, ...], words: tuple[str, ...], disk: Path, odd: Path) -> None:
    same("measure", *output, *words)


def test_luks(folder: Path) -> None:
    """A format whose images are larger than the disk."""
    key = ("--object", "secret,id=s,data=abc")
    same("measure", *key, "-O", "luks", "-o", "key-secret=s,iter-time=10", "--size", "1M")


def test_a_size_among_the_options_counts_less(folder: Path) -> None:
    same("measure", "-O", "qcow2", "-o", "size=2G", "--size", "1G")
