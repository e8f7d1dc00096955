"""`pynbd img bitmap` beside qemu-img's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.families import BitmapInfo
from pynbd.formats.raw import Raw
from tests.cli.img.side_by_side import failure, img, ok, same


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


class Keeper(Raw):
    """Raw disks whose bitmaps are kept for as long as the test lasts."""

    name = "keeper"
    kept: dict[str, DirtyBitmap]

    def stored_bitmaps(self) -> Sequence[BitmapInfo]:
        return [BitmapInfo(name=bitmap.name, granularity=bitmap.granularity) for bitmap in self.kept.values()]

    def can_store_bitmap(self, name: str, granularity: int) -> None:
        return None

    async def open(self) -> None:
        await super().open()
        self.node.bitmaps.update(self.kept)

    async def close(self) -> None:
        self.kept.clear()
        self.kept.update({name: bitmap for name, bitmap in self.node.bitmaps.items() if bitmap.persistent})
        await super().close()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, DirtyBitmap]:
    """What is kept of the bitmaps of every raw disk."""
    found: dict[str, DirtyBitmap] = {}
    monkeypatch.setattr(Keeper, "kept", found, raising=False)
    monkeypatch.setattr("pynbd.formats.raw.Raw", Keeper)
    return found


def test_actions_in_their_order(disk: Path, kept: dict[str, DirtyBitmap]) -> None:
    ok("bitmap", "-f", "raw", "--add", "-g", "32k", "--disable", disk, "b0")
    ok("bitmap", "-f", "raw", "--add", disk, "b1")
    assert [(name, bitmap.granularity, bitmap.enabled) for name, bitmap in kept.items()] == [
        ("b0", 32768, False),
        ("b1", 65536, True),
    ]
    kept["b1"].mark(100_000, 1)
    ok("bitmap", "-f", "raw", "--merge", "b1", "--enable", disk, "b0")
    assert (kept["b0"].count, kept["b0"].enabled, kept["b1"].count) == (65536, True, 65536)
    ok("bitmap", "-f", "raw", "--clear", disk, "b1")
    assert (kept["b0"].count, kept["b1"].count) == (65536, 0)
    ok("bitmap", "-f", "raw", "--remove", "--add", "-g", "4k", disk, "b1")
    assert kept["b1"].granularity == 4096
    ok("bitmap", "-f", "raw", "--remove", disk, "b0")
    assert list(kept) == ["b1"]


def test_what_can_not_be(disk: Path, kept: dict[str, DirtyBitmap]) -> None:
    ok("bitmap", "-f", "raw", "--add", disk, "b0")
    assert "already" in failure("bitmap", "-f", "raw", "--add", disk, "b0")
    assert "granularity" in failure("bitmap", "-f", "raw", "--add", "-g", "3", disk, "b1")
    assert "'b9'" in failure("bitmap", "-f", "raw", "--merge", "b9", disk, "b0")
    assert img("bitmap", "-f", "raw", "--add", disk, "").status == 1
    assert list(kept) == ["b0"]
