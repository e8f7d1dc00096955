"""Where the guest's clusters lie: what the L2 entries say (sections "L2 table entry", "Extended L2 Entries")."""

from array import array
from enum import IntEnum
from typing import NamedTuple

from pynbd.block.driver import Finder, Location
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO
from pynbd.formats.qcow2.tables import Table


class Kind(IntEnum):
    """What an image knows of some bytes of the disk."""

    NOWHERE = 0  # nothing: the backing file has them
    ZERO = 1  # they read as zeroes
    DATA = 2  # they lie in the file
    COMPRESSED = 3  # they lie there compressed, a whole cluster
    INVALID = 4  # the entry breaks the rules


NOWHERE, ZEROES, DATA, PACKED, INVALID = Kind.NOWHERE, Kind.ZERO, Kind.DATA, Kind.COMPRESSED, Kind.INVALID


class Piece(NamedTuple):
    """Some bytes that are all alike.

    Args:
        kind: what they are.
        stop: where they end.
        host: of `DATA`, where they lie; of `COMPRESSED`, the descriptor; of `ZERO` and `NOWHERE`, see `allocated`.
        own: of `DATA`, whether nothing else points to the clusters, so that they may be written in place.
        allocated: of `ZERO` and `NOWHERE`, whether they have a place all the same: `host`.
    """

    kind: int
    stop: int
    host: int = 0
    own: bool = False
    allocated: bool = False


class ClusterMapping:
    """The L2 tables of an image, asked for bytes of the disk.

    Args:
        image: the image.
    """

    def __init__(self, image: Image) -> None:
        header = image.header
        self.image = image
        self._slices = image.l2.tables
        self.bits = header.cluster_bits
        self.cluster = header.cluster_size
        self.extended = header.extended_l2
        self.words = header.l2_entry_words
        self.has_data_file = header.has_data_file
        self.unit = self.cluster // SUBCLUSTERS if self.extended else self.cluster
        """What can be allocated by itself: a cluster, or a subcluster."""
        self.reach = header.l2_entries << self.bits
        """Bytes of the disk that one L2 table tells of."""
        self.reach_bits = self.reach.bit_length() - 1
        self.slice_reach = self.reach // image.slices
        """Bytes of the disk that one slice of an L2 table tells of: what is kept in memory by itself."""
        self.slice_bits = self.slice_reach.bit_length() - 1
        self.index_mask = header.l2_entries // image.slices - 1
        self.header_changed()

    def header_changed(self) -> None:
        """Take from the header what may become another while the image is open: its version."""
        header = self.image.header
        self.zero_flag = ZERO if header.version >= 3 and not self.extended else 0
        self.never = ZERO if header.version < 3 else 0
        """What no entry has, unless it is compressed: version 2 knows no clusters of zeroes."""
        self.not_plain = COMPRESSED | self.zero_flag | self.never | OFFSET_MASK & (self.cluster - 1)
        # In another file the first cluster may be the guest's as well: there a place is known by the flag.
        self.host_mask = OFFSET_MASK | COPIED if header.has_data_file else OFFSET_MASK

    def lookup(self, offset: int, end: int) -> Piece | None:
        """What the bytes from `offset` on are, as far as they are alike, and at most up to `end`.

        Returns:
            None if the slice of the L2 table is not at hand: `load` it, and ask again.
        """
        image, number = self.image, offset >> self.slice_bits
        base = number << self.slice_bits
        end = min(end, base + self.slice_reach)
        table = image.l2.get(number)
        if table is None:
            l1_index = offset >> self.reach_bits
            if l1_index >= len(image.l1):
                return Piece(INVALID, end)
            return None if image.l1[l1_index] & OFFSET_MASK else Piece(NOWHERE, end)
        if self.extended:
            return self._lookup_units(table, base, offset, end)
        words = table.words
        index = (offset - base) >> self.bits
        last = ((end - 1 - base) >> self.bits) + 1
        entry = words[index]
        kind = INVALID if self.has_data_file and self.is_displaced(entry, offset) else self.kind(entry)
        following = index + 1
        if kind == DATA:
            expected, step = entry + self.cluster, self.cluster
            while following < last and words[following] == expected:
                following += 1
                expected += step
            stop = min(end, base + (following << self.bits))
            return Piece(DATA, stop, (entry & OFFSET_MASK) + (offset & (self.cluster - 1)), bool(entry & COPIED))
        if kind in (PACKED, INVALID):
            return Piece(kind, min(end, base + (following << self.bits)), entry)
        if entry & OFFSET_MASK:
            expected = entry + self.cluster
            while following < last and words[following] == expected:
                following += 1
                expected += self.cluster
            host = (entry & OFFSET_MASK) + (offset & (self.cluster - 1))
            return Piece(kind, min(end, base + (following << self.bits)), host, allocated=True)
        while following < last and (
            words[following] == entry or (self.kind(words[following]) == kind and not words[following] & OFFSET_MASK)
        ):
            following += 1
        return Piece(kind, min(end, base + (following << self.bits)))

    def without_tables(self, offset: int, end: int) -> int:
        """Up to where in [offset, end) there is no L2 table: `offset` if its own is there."""
        l1, index = self.image.l1, offset >> self.reach_bits
        last = min(len(l1), ((end - 1) >> self.reach_bits) + 1)
        while index < last and not l1[index] & OFFSET_MASK:
            index += 1
        return max(offset, min(end, index << self.reach_bits))

    def host_of(self, offset: int, length: int) -> int:
        """Where bytes within one cluster lie in the file, if that is known at once: 0 if not, -1 if nowhere.

        What `lookup` would say for most requests, in a third of the time.
        """
        table = self._slices.get(offset >> self.slice_bits)
        if table is None or self.extended:
            return 0
        cluster = self.cluster
        within = offset & (cluster - 1)
        if within + length > cluster:
            return 0
        entry = table.words[offset >> self.bits & self.index_mask]
        if not entry:
            return -1
        host = entry & OFFSET_MASK
        # Neither zero nor compressed, aligned, and something.
        if entry & self.not_plain or not host or (self.has_data_file and host != offset - within):
            return 0
        table.used = True
        return host + within

    def finder(self, size: int, file: Location, below: Finder | None) -> Finder | None:
        """`host_of` for many short reads: what is the same for all is looked up here. See `Driver.finder`.

        Args:
            size: of the disk, in bytes.
            file: all of the file that the clusters lie in.
            below: the same for what lies nowhere here.
        """
        if self.extended:
            return None
        slice_of, slice_bits, bits, index_mask = self._slices.get, self.slice_bits, self.bits, self.index_mask
        cluster, within_mask, not_plain = self.cluster, self.cluster - 1, self.not_plain
        fd, shift, file_size, flags, _ = file
        has_data_file = self.has_data_file

        def find(offset: int, length: int) -> tuple[int, int, int] | None:
            table = slice_of(offset >> slice_bits)
            within = offset & within_mask
            if table is None or within + length > cluster or offset + length > size:
                return None
            entry = table.words[offset >> bits & index_mask]
            if not entry:
                return None if below is None else below(offset, length)
            host = (entry & OFFSET_MASK) + within
            # Zero, compressed or not aligned; in no place; or behind the end of the file.
            if entry & not_plain or host < cluster or host + length > file_size:
                return None
            if has_data_file and host != offset:
                return None
            table.used = True
            return fd, shift + host, flags

        return find

    def owned_host_of(self, offset: int, length: int) -> int:
        """The same, if the cluster may be written in place."""
        table = self._slices.get(offset >> self.slice_bits)
        if table is None or self.extended:
            return 0
        within = offset & (self.cluster - 1)
        entry = table.words[offset >> self.bits & self.index_mask]
        if not entry & COPIED or within + length > self.cluster or entry & self.not_plain or not entry & OFFSET_MASK:
            return 0
        if self.has_data_file and self.is_displaced(entry, offset):
            return 0
        table.used = True
        return (entry & OFFSET_MASK) + within

    def owned_run_at(self, offset: int, length: int) -> int:
        """The same for bytes of several clusters, if these follow each other in the file."""
        if length <= self.cluster - (offset & (self.cluster - 1)):
            return 0
        found = self.lookup(offset, offset + length)
        if found is None or found.kind != DATA or not found.own or found.stop < offset + length:
            return 0
        return found.host

    def is_displaced(self, entry: int, offset: int) -> bool:
        """Whether an entry has a place in the data file, but not the one of the disk's bytes at `offset`."""
        base = offset & -self.cluster
        return bool(entry & self.host_mask and not entry & COMPRESSED and entry & OFFSET_MASK != base)

    def kind(self, entry: int) -> int:
        """What an L2 entry says, if it is not extended."""
        if entry & COMPRESSED:
            return PACKED
        if entry & self.never or entry & OFFSET_MASK & (self.cluster - 1):
            return INVALID
        if entry & self.zero_flag:
            return ZEROES
        return DATA if entry & self.host_mask else NOWHERE

    # --- extended entries ----------------------------------------------------------------------------------

    def unit_kind(self, entry: int, bitmap: int, number: int) -> int:
        """What an extended L2 entry says of one subcluster."""
        if entry & COMPRESSED:
            return PACKED
        allocated, zero = bitmap >> number & 1, bitmap >> (SUBCLUSTERS + number) & 1
        if entry & OFFSET_MASK & (self.cluster - 1) or (allocated and (zero or not entry & self.host_mask)):
            return INVALID
        return DATA if allocated else ZEROES if zero else NOWHERE

    def _lookup_units(self, table: Table, base: int, offset: int, end: int) -> Piece:
        words, unit = table.words, self.unit
        index, number = (offset - base) >> self.bits, (offset & (self.cluster - 1)) // unit
        entry, bitmap = words[2 * index], words[2 * index + 1]
        kind = self.unit_kind(entry, bitmap, number)
        stop = offset - offset % unit + unit
        if self.has_data_file and self.is_displaced(entry, offset):
            return Piece(INVALID, min(stop, end), entry)
        if kind == PACKED:
            return Piece(kind, min(end, base + (index + 1 << self.bits)), entry)
        host, own = (entry & OFFSET_MASK) + (offset & (self.cluster - 1)), bool(entry & COPIED)
        expected, placed = entry, bool(entry & self.host_mask)
        while stop < end:
            number += 1
            if number == SUBCLUSTERS:
                number, index, expected = 0, index + 1, expected + self.cluster
                entry, bitmap = words[2 * index], words[2 * index + 1]
                if entry != expected if placed else entry & self.host_mask:
                    break
            if self.unit_kind(entry, bitmap, number) != kind:
                break
            stop += unit
        if kind == INVALID or not placed:
            return Piece(kind, min(stop, end), entry)
        return Piece(kind, min(stop, end), host, own and kind == DATA, kind != DATA)

    # --- entries -------------------------------------------------------------------------------------------

    async def load(self, offset: int) -> Table | None:
        """See to it that the slice of the L2 table for a byte of the disk is at hand; None if there is none."""
        l1_index = offset >> self.reach_bits
        if l1_index >= len(self.image.l1) or not self.image.l1[l1_index] & OFFSET_MASK:
            return None
        return await self.image.l2_slice(offset >> self.slice_bits)

    async def piece(self, offset: int, end: int) -> Piece:
        """`lookup`, and the table is loaded if need be."""
        while (found := self.lookup(offset, end)) is None:
            await self.load(offset)
        if found.kind == INVALID:
            raise await self._broken(found.host, offset)
        return found

    async def _broken(self, entry: int, offset: int) -> OSError:
        """The error of who comes across an entry that can't be true."""
        rule = "which breaks the format's rules"
        if self.has_data_file and self.is_displaced(entry, offset):
            rule = f"but in a data file they lie at {offset & -self.cluster}"
        return await self.image.corrupted(f"the L2 entry of the disk's bytes at {offset} is {entry:#x}, {rule}")

    async def entry(self, offset: int) -> tuple[int, int]:
        """(entry, bitmap) of the cluster that a byte of the disk is in; the bitmap is 0 if entries are not extended.

        Raises:
            OSError: it can't be read, or is wrong.
        """
        table = await self.load(offset)
        if table is None:
            return 0, 0
        at = (offset >> self.bits & self.index_mask) * self.words
        entry = table.words[at]
        if self.has_data_file and self.is_displaced(entry, offset):
            raise await self._broken(entry, offset)
        return entry, table.words[at + 1] if self.extended else 0

    async def writable(self, offset: int) -> tuple[Table, int]:
        """(slice of an L2 table, index of the first word) of a cluster, to be changed before the next `await`."""
        table = await self.image.writable_l2(offset >> self.slice_bits)
        return table, (offset >> self.bits & self.index_mask) * self.words

    def mark(self, offset: int, first: int, last: int) -> None:
        """The words [first, last) of the slice for a byte of the disk were changed."""
        self.image.l2.mark(offset >> self.slice_bits, first, last)

    def compressed_place(self, descriptor: int) -> tuple[int, int]:
        """(offset, bytes) of compressed data, in the file; they may end earlier."""
        shift = 62 - (self.bits - 8)
        offset = descriptor & ((1 << shift) - 1)
        sectors = (descriptor & (COMPRESSED - 1)) >> shift
        return offset, (sectors + 1) * 512 - (offset & 511)

    def compressed_entry(self, offset: int, length: int) -> int:
        """The descriptor of compressed data."""
        shift = 62 - (self.bits - 8)
        sectors = (offset + length - 1) // 512 - offset // 512
        return COMPRESSED | sectors << shift | offset

    def put(self, words: "array[int]", at: int, entry: int, bitmap: int) -> bool:
        """Set an entry; False if it is so already."""
        if self.extended:
            if words[at] == entry and words[at + 1] == bitmap:
                return False
            words[at], words[at + 1] = entry, bitmap
            return True
        if words[at] == entry:
            return False
        words[at] = entry
        return True
