"""One L2 table under a check: what it refers to, and what is wrong with its entries.

Most tables of most images are plain: clusters of data and nothing else. These are seen through as a whole, with
operations on one number of all their bits; the others entry by entry.
"""

from array import array
from operator import ne
from typing import NamedTuple

import msgspec

from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_ALL_ALLOCATED,
    SUBCLUSTERS_ALL_ZERO,
    ZERO,
)
from pynbd.formats.qcow2.mapping import ClusterMapping
from pynbd.formats.qcow2.tables import from_disk, to_disk


class Mend(NamedTuple):
    """What an entry of an L2 table should be instead; `at` is its number."""

    at: int
    entry: int
    bitmap: int


class Contents(msgspec.Struct):
    """What one L2 table holds.

    Args:
        runs: (first, count) of host clusters that hold data, in no order.
        places: (offset, bytes) in the file that it refers to beside them: compressed data, wrong offsets.
        allocated, fragmented, compressed: entries, as QEMU counts them.
        problems: a line for each entry that is wrong, and for each thing that is wrong with it.
        mends: entries that can be put right without a loss.
        copied: whether all entries that refer to something say that they alone do, or that they do not; None if it
            takes another look to tell.
        uncounted: entries refer to something that can't be told.
    """

    runs: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0
    problems: list[str] = []
    mends: list[Mend] = []
    copied: bool | None = None
    uncounted: bool = False


class L2Reader:
    """Looks through L2 tables of one image.

    Args:
        image: the image.
    """

    def __init__(self, image: Image) -> None:
        header = image.header
        self.map = ClusterMapping(image)
        self.bits, self.cluster = header.cluster_bits, header.cluster_size
        self.extended, self.has_data_file = header.extended_l2, header.has_data_file
        self.zero_flag = 0 if self.extended else ZERO
        count = header.l2_entries
        self._nothing = bytes(self.cluster)
        # One number with a field of 64 bits for each entry; what is added or masked is the same in all of them.
        ones = int.from_bytes((1).to_bytes(8) * count)
        self._odd = ones * ((1 << 64) - 1 - (COPIED | OFFSET_MASK & ~(self.cluster - 1)))
        self._steps = (ones >> 64) * self.cluster

    def read(self, data: bytes) -> Contents:
        """What a table holds.

        Args:
            data: all of it.
        """
        if data == self._nothing:
            return Contents()
        entries, bitmaps = self.entries(data)
        if bitmaps is not None and bitmaps.count(SUBCLUSTERS_ALL_ALLOCATED) != len(bitmaps):
            return self._one_by_one(entries, bitmaps)
        plain = self._plain(data if bitmaps is None else to_disk(entries), entries)
        return self._one_by_one(entries, bitmaps) if plain is None else plain

    def entries(self, data: bytes) -> "tuple[array[int], array[int] | None]":
        """(entries, bitmaps) of a table; no bitmaps if entries are not extended."""
        words = from_disk(data)
        return (words[0::2], words[1::2]) if self.extended else (words, None)

    def _plain(self, data: bytes, entries: "array[int]") -> Contents | None:
        """What a table of nothing but data clusters holds; None if it is another one."""
        if int.from_bytes(data) & self._odd:
            return None
        first = entries[0]
        if first and int.from_bytes(data[8:]) == int.from_bytes(data[:-8]) + self._steps:
            offset, count = first & OFFSET_MASK, len(entries)
            if not offset:
                return None
            return Contents([(offset >> self.bits, count)], allocated=count, copied=bool(first & COPIED))
        used = list(filter(None, entries))
        # An entry without an offset, and runs that only some may write in place, want a closer look.
        if COPIED in used or (min(used) < COPIED) == (max(used) >= COPIED):
            return None
        following = [entry + self.cluster for entry in used]
        fragmented = sum(map(ne, used[1:], following[:-1]))
        return Contents(self._runs(sorted(used)), allocated=len(used), fragmented=fragmented, copied=used[0] >= COPIED)

    def _runs(self, entries: list[int]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        start = expected = entries[0]
        for entry in entries:
            if entry != expected:
                found.append(((start & OFFSET_MASK) >> self.bits, (expected - start) >> self.bits))
                start = entry
            expected = entry + self.cluster
        found.append(((start & OFFSET_MASK) >> self.bits, (expected - start) >> self.bits))
        return found

    # --- entry by entry ------------------------------------------------------------------------------------

    def refers(self, entry: int) -> bool:
        """Whether an entry refers to a cluster that is not compressed."""
        if entry & COMPRESSED:
            return False
        if entry & OFFSET_MASK:
            return True
        # In another file the first cluster may be the guest's as well.
        return self.has_data_file and bool(entry & COPIED) and not entry & self.zero_flag

    def _one_by_one(self, entries: "array[int]", bitmaps: "array[int] | None") -> Contents:
        found = Contents()
        following = 0
        for index, entry in enumerate(entries):
            bitmap = bitmaps[index] if bitmaps is not None else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                self._compressed(found, index, entry, bitmap)
                continue
            if entry & L2_RESERVED:
                found.problems.append(f"L2 entry {index} is {entry:#x}: reserved bits are set")
                found.mends.append(Mend(index, entry & ~L2_RESERVED, bitmap))
            if not self.refers(entry):
                if bitmap & SUBCLUSTERS_ALL_ALLOCATED:
                    what = f"L2 entry {index} has no cluster, but allocated subclusters (bitmap {bitmap:#x})"
                    found.problems.append(what)
                    found.uncounted = True
                continue
            offset = entry & OFFSET_MASK
            both = bitmap >> SUBCLUSTERS & bitmap
            if both:
                what = f"L2 entry {index}: subclusters are allocated and zero at once (bitmap {bitmap:#x})"
                found.problems.append(what)
                # Nobody can read these subclusters; all others stay.
                found.mends.append(Mend(index, entry & ~L2_RESERVED, bitmap & ~both))
            if offset & (self.cluster - 1):
                self._unaligned(found, index, entry, bitmap)
            found.allocated += 1
            if following and offset != following:
                found.fragmented += 1
            following = offset + self.cluster
            if not self.has_data_file:
                self._add(found, offset)
        return found

    def _add(self, found: Contents, offset: int) -> None:
        if offset & (self.cluster - 1):
            found.places.append((offset, self.cluster))
            return
        cluster = offset >> self.bits
        if found.runs and sum(found.runs[-1]) == cluster:
            found.runs[-1] = (found.runs[-1][0], found.runs[-1][1] + 1)
        else:
            found.runs.append((cluster, 1))

    def _unaligned(self, found: Contents, index: int, entry: int, bitmap: int) -> None:
        offset = entry & OFFSET_MASK
        what = f"L2 entry {index} is {entry:#x}: its cluster lies at {offset}, expected a multiple of {self.cluster}"
        found.problems.append(what)
        holds_data = bitmap & SUBCLUSTERS_ALL_ALLOCATED if self.extended else not entry & ZERO
        if holds_data:
            found.uncounted = True
        else:
            # Reserved for later writes, and zero until then: nothing is lost with it.
            found.mends.append(Mend(index, 0, SUBCLUSTERS_ALL_ZERO) if self.extended else Mend(index, ZERO, 0))

    def _compressed(self, found: Contents, index: int, entry: int, bitmap: int) -> None:
        good = entry & ~COPIED
        if entry & COPIED:
            found.problems.append(f"L2 entry {index} is {entry:#x}: compressed, and yet to be written in place")
            found.mends.append(Mend(index, good, 0))
        if self.has_data_file:
            found.problems.append(f"L2 entry {index} is {entry:#x}: compressed, but data are in another file")
            found.uncounted = True
            return
        if bitmap:
            found.problems.append(f"L2 entry {index} is {entry:#x}: compressed, but has subclusters ({bitmap:#x})")
            found.mends.append(Mend(index, good, 0))
            found.uncounted = True
            return
        found.places.append(self.map.compressed_place(good))
        found.allocated += 1
        found.compressed += 1
        found.fragmented += 1
