"""The bitmap directory and the tables that it leads to: read with every doubt (section "Bitmaps").

What an entry has that is not known (extra data) is kept; the bitmap is used only if the entry allows that.
"""

import os
from array import array
from collections.abc import Iterable

import construct
import msgspec

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import BitmapFlag

KNOWN_FLAGS = sum(BitmapFlag)


class StoredBitmap(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the directory.

    Args:
        name: of the bitmap.
        table_offset, table_size: where its table lies, and how many entries that has.
        flags: see `BitmapFlag`.
        granularity_bits: two to the power of this is what a bit stands for, in bytes.
        extra: extra data, of which none are known.
    """

    name: str
    table_offset: int
    table_size: int
    flags: BitmapFlag
    granularity_bits: int
    extra: bytes = b""

    @property
    def is_usable(self) -> bool:
        """Whether what it has beyond what is known may be ignored."""
        return not self.extra or BitmapFlag.EXTRA_DATA_COMPATIBLE in self.flags

    @property
    def is_consistent(self) -> bool:
        """Whether it was stored by whoever used it last."""
        return BitmapFlag.IN_USE not in self.flags


async def read_directory(image: Image) -> list[StoredBitmap]:
    """The bitmap directory of an image, which must have one.

    Raises:
        ImageError: it is not as the format demands, or goes beyond a limit. OSError: it can't be read.
    """
    pointer = image.header.bitmaps
    assert pointer is not None
    start, length = pointer.directory_offset, pointer.directory_size
    if start + length > image.file.size:
        problem = f"the bitmap directory has {length} bytes here, but the file ends at {image.file.size}"
        raise ImageError(image.name, problem, start)
    data = bytes(await image.read_bytes(start, length))
    found: dict[str, StoredBitmap] = {}
    at = 0
    for _ in range(pointer.nb_bitmaps):
        entry, end = _parse_entry(data, at, start, image)
        if entry.name in found:
            raise ImageError(image.name, f"there are two bitmaps named {entry.name!r}", start + at)
        found[entry.name] = entry
        at = end
    if at != length:
        problem = f"the bitmap directory has {length} bytes, its {pointer.nb_bitmaps} entries take {at}"
        raise ImageError(image.name, problem, start)
    return list(found.values())


def split_directory(data: bytes) -> list[tuple[int, bytes]]:
    """(offset in the directory, name) of all its entries, up to the first whose length can't be."""
    found, at = [], 0
    while at + layout.BITMAP_BYTES <= len(data):
        fields = layout.parsed(layout.BITMAP, data, at)
        name_at = at + layout.BITMAP_BYTES + fields.extra_data_size
        end = name_at + fields.name_size
        if end > len(data) or not 1 <= fields.name_size <= layout.MAX_BITMAP_NAME_BYTES:
            break
        found.append((at, data[name_at:end]))
        at = round_up(end, 8)
    return found


def parse_entry(data: bytes, at: int, start: int, image: Image) -> StoredBitmap:
    """The entry that begins at a byte of the directory, which itself begins at `start` in the file.

    Raises:
        ImageError: it is not as the format demands.
    """
    return _parse_entry(data, at, start, image)[0]


def _parse_entry(data: bytes, at: int, start: int, image: Image) -> tuple[StoredBitmap, int]:
    """(entry, where it ends) of an entry that begins at a byte of the directory."""
    offset = start + at
    try:
        fields = layout.parsed(layout.BITMAP, data, at)
    except construct.ConstructError:
        raise ImageError(image.name, "the bitmap directory ends within an entry", offset) from None
    extra_at = at + layout.BITMAP_BYTES
    name_at = extra_at + fields.extra_data_size
    end = name_at + fields.name_size
    if round_up(end, 8) > len(data):
        raise ImageError(image.name, "the bitmap directory ends within an entry", offset)
    _check_entry(fields, offset, image)
    entry = StoredBitmap(
        name=os.fsdecode(data[name_at:end]),
        table_offset=fields.bitmap_table_offset,
        table_size=fields.bitmap_table_size,
        flags=BitmapFlag(fields.flags),
        granularity_bits=fields.granularity_bits,
        extra=data[extra_at:name_at],
    )
    return entry, round_up(end, 8)


def _check_entry(fields: construct.Container, offset: int, image: Image) -> None:
    cluster, least, most = image.cluster_size, layout.MIN_GRANULARITY_BITS, layout.MAX_GRANULARITY_BITS
    table, entries = fields.bitmap_table_offset, fields.bitmap_table_size
    for wrong, problem in (
        (fields.type != layout.BITMAP_TYPE_DIRTY_TRACKING, f"bitmap type {fields.type} is unknown (1 dirty tracking)"),
        (fields.flags & ~KNOWN_FLAGS, f"bitmap flags are {fields.flags:#x}, known are {KNOWN_FLAGS:#x}"),
        (
            not 1 <= fields.name_size <= layout.MAX_BITMAP_NAME_BYTES,
            f"a bitmap's name has {fields.name_size} bytes, expected 1 to {layout.MAX_BITMAP_NAME_BYTES}",
        ),
        (
            not least <= fields.granularity_bits <= most,
            f"granularity_bits is {fields.granularity_bits}, expected {least} to {most}",
        ),
        (
            not 0 < table < layout.MAX_HOST_OFFSET or table % cluster,
            f"bitmap_table_offset is {table}, expected a multiple of {cluster}, and not 0",
        ),
        (
            not 0 < entries <= layout.MAX_BITMAP_TABLE_ENTRIES or entries * cluster > layout.MAX_BITMAP_BYTES + cluster,
            f"bitmap_table_size is {entries}, more than a bitmap of {layout.MAX_BITMAP_BYTES} bytes takes (or none)",
        ),
    ):
        if wrong:
            raise ImageError(image.name, problem, offset)


def build_directory(entries: Iterable[StoredBitmap]) -> bytes:
    """The bytes of a bitmap directory."""
    return b"".join(_build_entry(entry) for entry in entries)


def _build_entry(entry: StoredBitmap) -> bytes:
    name = os.fsencode(entry.name)
    fixed: bytes = layout.BITMAP.build(
        {
            "bitmap_table_offset": entry.table_offset,
            "bitmap_table_size": entry.table_size,
            "flags": int(entry.flags),
            "type": layout.BITMAP_TYPE_DIRTY_TRACKING,
            "granularity_bits": entry.granularity_bits,
            "name_size": len(name),
            "extra_data_size": len(entry.extra),
        }
    )
    data = fixed + entry.extra + name
    return data.ljust(round_up(len(data), 8), b"\0")


async def read_table(image: Image, entry: StoredBitmap) -> "array[int]":
    """The table of a bitmap.

    Raises:
        ImageError: it does not lie inside the file, or breaks the format's rules. OSError: it can't be read.
    """
    table = await image.read_words(entry.table_offset, entry.table_size, f"the table of bitmap {entry.name!r}")
    for index, word in enumerate(table):
        place = word & layout.OFFSET_MASK
        if word & layout.BITMAP_TABLE_RESERVED or place % image.cluster_size or (place and word & 1):
            problem = (
                f"entry {index} of the table of bitmap {entry.name!r} is {word:#x}, which breaks the format's rules"
            )
            raise ImageError(image.name, problem, entry.table_offset + 8 * index)
    return table


async def read_bits(image: Image, table: "array[int]", length: int) -> bytearray:
    """The first bytes of the bits that a table leads to; zeroes where it ends earlier.

    Raises:
        ImageError: something lies behind the end of the file. OSError: it can't be read.
    """
    bits, cluster = bytearray(length), image.cluster_size
    for index, word in enumerate(table):
        start = index * cluster
        if start >= length:
            break
        part = min(cluster, length - start)
        place = word & layout.OFFSET_MASK
        if place:
            if place + part > round_up(image.file.size, cluster):
                raise ImageError(
                    image.name, f"bits of a bitmap lie here, but the file ends at {image.file.size}", place
                )
            bits[start : start + part] = await image.read_bytes(place, part)
        elif word & layout.BITMAP_ALL_ONES:
            bits[start : start + part] = b"\xff" * part
    return bits
