"""What is dirty in the bitmaps of a qcow2 image, as pynbd and as QEMU tell it."""

from __future__ import annotations

import json
from pathlib import Path

from pynbd.block.bitmaps import DirtyBitmap
from tests.peers import qemu_nbd, require_tool, run


def dirty_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    """(offset, end) of all that QEMU finds dirty."""
    with qemu_nbd(path, "-f", "qcow2", "-r", "-B", name) as peer:
        return dirty_over_nbd(peer.uri(), name)


def dirty_over_nbd(uri: str, name: str) -> list[tuple[int, int]]:
    """(offset, end) of all that a server tells is dirty."""
    told = json.loads(run(require_tool("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
    return [(extent["offset"], extent["offset"] + extent["length"]) for extent in told if extent["type"] == 1]


def dirty(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    """The same of a bitmap here."""
    found, at = [], 0
    for length, is_dirty in bitmap.extents(0, bitmap.size):
        if is_dirty:
            found.append((at, at + length))
        at += length
    return found


def told_by_qemu(path: Path) -> dict[str, tuple[int, list[str]]]:
    """name → (granularity, flags) of the bitmaps that QEMU finds."""
    told = json.loads(run(require_tool("qemu-img"), "info", "--output=json", path))
    bitmaps = told["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: (bitmap["granularity"], bitmap["flags"]) for bitmap in bitmaps}
