"""The snapshot table and the bitmap directory are mended: they are written anew, elsewhere, and then the header, in one
sector, changes over. Reference counts are right before, as far as they can be; what lay in the old place leaks until
they are mended again.
"""

import os

from pynbd.block.errors import ImageError
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.bitmap_directory import (
    StoredBitmap,
    build_directory,
    parse_entry,
    read_table,
    split_directory,
)
from pynbd.formats.qcow2.check_examination import Examination
from pynbd.formats.qcow2.header import BitmapsPointer
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import Autoclear, BitmapFlag
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.snapshot_table import Snapshot, build_table, read_snapshots

MAX_LOST_BITMAPS = 1024
"""Bitmaps that are kept by their names alone; each takes a cluster."""


async def mend_lists(image: Image, found: Examination) -> bool:
    """Mend what an examination found wrong with them; gives whether something was changed.

    Raises:
        OSError: they can't be written; the header points to the old ones.
    """
    scan = found.scan
    if scan.unusable or not (scan.wrong_snapshots or scan.wrong_bitmaps):
        return False
    await image.reload()
    snapshots = await _snapshots(image) if scan.wrong_snapshots else None
    if snapshots is not None:
        await _write_snapshots(image, snapshots)
    if scan.wrong_bitmaps:
        await _write_bitmaps(image)
    await image.commit_all()
    return snapshots is not None or scan.wrong_bitmaps


# --- snapshots -------------------------------------------------------------------------------------------------------


async def _snapshots(image: Image) -> list[Snapshot] | None:
    """All snapshots, if only the size of their extra data is wrong: then the entries behind that are good as well."""
    try:
        snapshots = await read_snapshots(image, any_extra=True)
    except ImageError:
        return None
    for snapshot in snapshots:
        if not snapshot.id or snapshot.l1_table_offset + 8 * snapshot.l1_size > image.file.size:
            return None
    return snapshots


async def _write_snapshots(image: Image, snapshots: list[Snapshot]) -> None:
    data = build_table(snapshots)
    offset = await image.allocate_metadata(Kind.SNAPSHOT_TABLE, len(data))
    await image.write_metadata(Kind.SNAPSHOT_TABLE, offset, data)
    await image.write_counts_now()
    await image.change_fields(60, 72, snapshots_offset=offset)


# --- bitmaps ---------------------------------------------------------------------------------------------------------


async def _write_bitmaps(image: Image) -> None:
    """Write a directory of all bitmaps whose names can be read; one that is damaged is there as an inconsistent one."""
    header = image.header
    assert header.bitmaps is not None
    start, length = header.bitmaps.directory_offset, header.bitmaps.directory_size
    data = bytes(await image.read_bytes(start, length)) if start + length <= image.file.size else b""
    entries: dict[str, StoredBitmap] = {}
    lost = 0
    for at, raw in split_directory(data):
        name, entry = os.fsdecode(raw), await _good(image, data, at, start)
        if name not in entries and entry is None and lost < MAX_LOST_BITMAPS:
            entry, lost = await _inconsistent(image, name), lost + 1
        if entry is not None:
            entries.setdefault(name, entry)
    directory = build_directory(entries.values())
    pointer = None
    if directory:
        offset = await image.allocate_metadata(Kind.BITMAP_DIRECTORY, len(directory))
        await image.write_metadata(Kind.BITMAP_DIRECTORY, offset, directory)
        pointer = BitmapsPointer(len(entries), len(directory), offset)
    await image.write_counts_now()
    header.autoclear &= ~Autoclear.BITMAPS
    await image.write_features()
    header.bitmaps = pointer
    if pointer is not None:
        header.autoclear |= Autoclear.BITMAPS
    await image.write_header()


async def _good(image: Image, data: bytes, at: int, start: int) -> StoredBitmap | None:
    """An entry of the directory, if nothing is wrong with it and its table."""
    try:
        entry = parse_entry(data, at, start, image)
        if entry.table_offset + 8 * entry.table_size > image.file.size:
            return None
        table = await read_table(image, entry)
    except ImageError:
        return None
    blocks = -(-image.header.size >> entry.granularity_bits)
    if entry.is_consistent and entry.table_size * image.cluster_size * 8 < blocks:
        return None
    end = image.file.size + image.cluster_size
    return entry if all((word & layout.OFFSET_MASK) + image.cluster_size <= end for word in table) else None


async def _inconsistent(image: Image, name: str) -> StoredBitmap:
    """A bitmap that says nothing, and that nobody believes: its user learns that it was lost."""
    offset = await image.allocate_metadata(Kind.BITMAP, 8)
    await image.write_metadata(Kind.BITMAP, offset, bytes(8))
    return StoredBitmap(
        name=name,
        table_offset=offset,
        table_size=1,
        flags=BitmapFlag.IN_USE,
        granularity_bits=layout.MAX_GRANULARITY_BITS,  # so that it takes no memory
    )
