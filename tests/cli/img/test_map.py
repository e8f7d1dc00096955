"""`pynbd img map` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.side_by_side import failure, qemu_img, same
from tests.conftest import DiskMaker


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
@pytest.mark.parametrize("name", ["disk.raw", "odd.raw", "hole.raw", "empty.raw"])
def test_raw(output: str, name: str, disk: Path, odd: Path, make_disk: DiskMaker) -> None:
    make_disk(0, name="empty.raw")
    make_disk(1000, extents=[], name="hole.raw")
    same("map", output, name)


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
@pytest.mark.parametrize(
    "window",
    [
        ("--start-offset=1M", "--max-length=100k"),
        ("-s", "1100k", "-l", "4M"),
        ("--start-offset=700",),
        ("--max-length=0",),
        ("--start-offset=20M",),
        ("--start-offset=nonsense",),
        ("--max-length=-1",),
    ],
)
def test_a_part(output: str, window: tuple[str, ...], disk: Path) -> None:
    same("map", output, *window, disk)


def test_a_part_of_a_file(disk: Path) -> None:
    """Offsets are those in the file."""
    for output in ("--output=human", "--output=json"):
        same("map", output, "--image-opts", "driver=raw,offset=64k,file.driver=file,file.filename=disk.raw")


def test_what_has_no_place_in_a_file(folder: Path) -> None:
    key = ("--object", "secret,id=s,data=abc")
    created = qemu_img("create", *key, "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "64k")
    assert created.status == 0, created
    image = "driver=luks,key-secret=s,file.driver=file,file.filename=a.luks"
    assert "compressed, encrypted" in failure("map", *key, "--image-opts", image)
    same("map", "--output=json", *key, "--image-opts", image)
