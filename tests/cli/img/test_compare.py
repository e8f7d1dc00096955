"""`pynbd img compare` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import img, same
from tests.conftest import DiskMaker

MIB = 1 << 20


@pytest.fixture
def images(disk: Path, odd: Path, make_disk: DiskMaker) -> None:
    """Disks that are like `disk.raw`, more or less."""
    content = bytearray(disk.read_bytes())
    Path("full.raw").write_bytes(content)
    Path("longer.raw").write_bytes(content + bytes(2 * MIB))
    Path("more.raw").write_bytes(content + bytes(MIB) + b"\1")
    for offset in (5 * MIB + 65000, 0, 9 * MIB + 513):
        changed = bytearray(content)
        changed[offset] ^= 1
        Path(f"{offset}.raw").write_bytes(changed)
    make_disk(0, name="empty.raw")


@pytest.mark.parametrize("options", [(), ("-s",), ("-q",), ("-U", "-f", "raw", "-F", "raw")])
@pytest.mark.parametrize(
    "other",
    ["disk", "full", "longer", "more", f"{5 * MIB + 65000}", "0", f"{9 * MIB + 513}", "odd", "empty", "missing"],
)
def test_raw(options: tuple[str, ...], other: str, images: None) -> None:
    """What is said, which byte it is about, and the exit status, in both orders."""
    same("compare", *options, "disk.raw", f"{other}.raw")
    same("compare", *options, f"{other}.raw", "disk.raw")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("disk.raw",),
        ("disk.raw", "disk.raw", "disk.raw"),
        ("-f", "nonsense", "disk.raw", "disk.raw"),
        ("-F", "nonsense", "disk.raw", "disk.raw"),
        ("--bad", "disk.raw", "disk.raw"),
        ("-T", "none", "disk.raw", "disk.raw"),
        ("-T", "nonsense", "disk.raw", "disk.raw"),
        ("--image-opts", "driver=raw,file.filename=disk.raw", "driver=raw,file.filename=disk.raw"),
    ],
)
def test_words(words: tuple[str, ...], disk: Path) -> None:
    same("compare", *words)


def test_a_read_that_fails(disk: Path) -> None:
    """Status 4, and which image it was."""
    words = (
        "--image-opts",
        "driver=raw,file.filename=full.raw",
        "driver=raw,file.driver=blkdebug,file.inject-error.0.event=read_aio,file.image.filename=disk.raw",
    )
    Path("full.raw").write_bytes(disk.read_bytes())
    same("compare", *words)
    ending = img("compare", *words)
    assert ending.status == 4
    assert "disk.raw" in ending.err


def test_progress_for_scripts(disk: Path) -> None:
    """Not on a terminal, the numbers are those of qemu-img."""
    out = img("compare", "-p", disk, disk).out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\rImages are identical.\n\n")
    for path in ("zero.raw", "empty.raw"):
        with Path(path).open("wb") as file:
            file.truncate(1 << 20 if path == "zero.raw" else 0)
        same("compare", "-p", path, path)
    same("compare", "-p", "-s", "zero.raw", "empty.raw")
    same("compare", "-p", "-q", "zero.raw", "empty.raw")
    same("compare", "-p", "zero.raw", "missing.raw")
