"""Refcount blocks and the table that points to them, written to the file: the first step of a commit."""

from typing import TYPE_CHECKING

from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import pack
from pynbd.formats.qcow2.tables import SECTOR, to_disk, whole_sectors

if TYPE_CHECKING:
    from pynbd.formats.qcow2.image import Image


async def write_counts(image: "Image") -> None:
    """Write the refcount blocks, and what points to them."""
    counts = image.refcounts
    taken = image.blocks.take_dirty()
    written = False
    try:
        for _, block, first, last in taken:
            image.metadata.note(Kind.REFCOUNT_BLOCK, block.offset, image.cluster_size)
            if block.is_new or counts.order < 3:
                await image.write_metadata(Kind.REFCOUNT_BLOCK, block.offset, pack(block.words, counts.order))
            else:
                width = (1 << counts.order) // 8
                start, stop = whole_sectors(first, last, width, image.cluster_size)
                data = pack(block.words[start // width : stop // width], counts.order)
                await image.write_metadata(Kind.REFCOUNT_BLOCK, block.offset + start, data)
        written = True
    finally:
        image.blocks.give_back(taken, written=written)
    if counts.table_moved or counts.dirty_entries:
        await image.barrier()
        for _, block, _, _ in taken:
            block.is_new = False
        await _write_refcount_table(image)


async def _write_refcount_table(image: "Image") -> None:
    counts, header = image.refcounts, image.header
    if counts.table_moved:
        await _move_refcount_table(image)
        return
    entries, counts.dirty_entries = counts.dirty_entries, set()
    per_sector = SECTOR // 8
    try:
        for sector in sorted({entry // per_sector for entry in entries}):
            data = to_disk(counts.table[sector * per_sector : (sector + 1) * per_sector])
            await image.write_metadata(Kind.REFCOUNT_TABLE, header.refcount_table_offset + sector * SECTOR, data)
    except BaseException:
        counts.dirty_entries |= entries
        raise


async def _move_refcount_table(image: "Image") -> None:
    """Write the refcount table to another place, where there is room for all its entries."""
    counts, header = image.refcounts, image.header
    while True:
        length = len(counts.table) * 8
        offset = await image.allocate_metadata(Kind.REFCOUNT_TABLE, length)
        if len(counts.table) * 8 == length:
            break
        await image.release_metadata(offset, length)
    counts.table_moved = False
    taken = image.blocks.take_dirty()
    written = False
    try:
        for _, block, _, _ in taken:
            image.metadata.note(Kind.REFCOUNT_BLOCK, block.offset, image.cluster_size)
            await image.write_metadata(Kind.REFCOUNT_BLOCK, block.offset, pack(block.words, counts.order))
        counts.dirty_entries = set()
        await image.write_metadata(Kind.REFCOUNT_TABLE, offset, to_disk(counts.table))
        await image.barrier()
        old = header.refcount_table_offset, header.refcount_table_clusters
        header.refcount_table_offset, header.refcount_table_clusters = offset, length >> image.cluster_bits
        await image.write_fields(48, 60)
        written = True
    finally:
        image.blocks.give_back(taken, written=written)
        if not written:
            counts.table_moved = True
    for _, block, _, _ in taken:
        block.is_new = False
    image.given_up.add(old[0], old[1] << image.cluster_bits, Cause.OTHER, structure=True)
