"""The persistent dirty bitmaps that `convert --bitmaps` copies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.block.bitmaps import DirtyBitmap
    from pynbd.block.graph import Graph
    from pynbd.block.node import Node


def bitmaps_of(source: Node, *, skip_broken: bool) -> list[DirtyBitmap]:
    """What is to be copied.

    Args:
        source: the image, or a snapshot of it: the bitmaps are those of the image, as for QEMU.
        skip_broken: leave out those that are inconsistent, each with a warning.

    Raises:
        BlockError: the format keeps none, or one is inconsistent, so that nobody knows what is dirty.
    """
    from pynbd.block.errors import BlockError
    from pynbd.block.families import PersistentBitmaps

    image = source.children["file"].node if source.driver.name == "qcow2-snapshot" else source
    if not isinstance(image.driver, PersistentBitmaps):
        raise BlockError(f"{image.filename()}: --bitmaps: format {image.driver.name!r} keeps no bitmaps")
    found = []
    for bitmap in image.bitmaps.values():
        if not bitmap.persistent:
            continue
        if not bitmap.inconsistent:
            found.append(bitmap)
        elif skip_broken:
            print(f"warning: {image.filename()}: bitmap {bitmap.name!r} is inconsistent: left out", file=sys.stderr)
        else:
            raise BlockError(
                f"{image.filename()}: bitmap {bitmap.name!r} is inconsistent: it can't be copied "
                "(--skip-broken-bitmaps leaves it out, `bitmap --remove` removes it)"
            )
    return found


def check_target(target: Node, bitmaps: Sequence[DirtyBitmap]) -> None:
    """Whether an image can keep these bitmaps as well; asked before anything is copied into it.

    Raises:
        BlockError: it can't.
    """
    from pynbd.block.errors import BlockError
    from pynbd.block.families import PersistentBitmaps

    if not isinstance(target.driver, PersistentBitmaps):
        raise BlockError(f"{target.filename()}: --bitmaps: format {target.driver.name!r} can't keep bitmaps")
    for bitmap in bitmaps:
        if bitmap.name in target.bitmaps:
            raise BlockError(f"{target.filename()}: there is a bitmap {bitmap.name!r} already")
        target.driver.can_store_bitmap(bitmap.name, bitmap.granularity)
        if bitmap.size != target.size:
            raise BlockError(
                f"{target.filename()}: bitmap {bitmap.name!r} is of a disk of {bitmap.size} bytes, "
                f"it can't be copied into one of {target.size}"
            )


async def copy_bitmaps(graph: Graph, bitmaps: Sequence[DirtyBitmap], target: Node) -> None:
    """Give an image bitmaps of the same names, which say the same; what was written to it before does not count.

    Raises:
        BlockError: there are more than can be.
    """
    for bitmap in bitmaps:
        copy = await graph.add_bitmap(target, bitmap.name, bitmap.granularity)
        copy.persistent = True
        copy.enabled = bitmap.enabled
        copy.merge(bitmap)
