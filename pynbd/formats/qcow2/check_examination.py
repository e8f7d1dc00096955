"""One examination of an image: a scan that counts references, and the comparison of these counts, and of the flags that
depend on them, with what stands in the image.
"""

from array import array
from collections.abc import Iterator

from pynbd.block.families import CheckResult, Progress, no_progress
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.check_counts import MANY, Counts, small_counts
from pynbd.formats.qcow2.check_l2 import Contents, L2Reader, Mend
from pynbd.formats.qcow2.check_scan import Scan
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK

MAX_HOST_BYTES = (1 << 63) - (1 << 30)
"""Where files end that can be read at all."""

SPAN = 256
"""Counts that are compared at a time."""


class Examination:
    """What is wrong with an image: a scan, and what is found by comparing it.

    Args:
        image: the image; what is in memory of it is written.
        progress: told while it works.
    """

    def __init__(self, image: Image, progress: Progress = no_progress) -> None:
        self.image = image
        self.scan = Scan(image, progress)
        self.result = self.scan.result
        self.findings = self.scan.findings
        self.header = image.header
        self.order = image.header.refcount_order
        self.per_block = image.header.cluster_size * 8 >> self.order
        self.counts = Counts(image.name, self.scan.references.most)
        """As they stand in the image."""
        self.unreadable: set[int] = set()
        """Refcount blocks that can't be looked at."""
        self.wrong_blocks: dict[int, int] = {}
        """Where the block lies → its number, of those with wrong counts."""
        self.needs_blocks = False
        """Clusters are in use that no refcount block tells of."""
        self._end = 0
        """Clusters up to the last one that is in use."""
        self.wrong_l1: list[int] = []
        """Entries of the active L1 table whose flag is wrong."""
        self.wrong_l2: dict[int, list[Mend]] = {}
        """By the offset of the table: entries with the right flag."""
        self.wrong_flags = 0

    async def run(self) -> CheckResult:
        """Look at everything.

        Raises:
            OSError: the image can't be read, or would take too much memory or time.
        """
        await self.scan.run()
        await self._compare()
        await self._flags()
        self.result.image_end_offset = max(self._end, 1) * self.header.cluster_size
        self.findings.end()
        return self.result

    # --- counts --------------------------------------------------------------------------------------------

    async def _compare(self) -> None:
        """Compare all counts with the references."""
        scan, table = self.scan, self.scan.refcount_table
        blocks = {index for index, entry in enumerate(table) if entry & layout.REFCOUNT_BLOCK_MASK}
        for index in sorted(blocks | scan.references.used_blocks(self.per_block)):
            first = index * self.per_block
            count = min(self.per_block, scan.clusters - first)
            if count <= 0:
                break
            entry = table[index] & layout.REFCOUNT_BLOCK_MASK if index < len(table) else 0
            if not entry:
                self.needs_blocks = True
                self._compare_block(first, bytes(count), None)
            elif entry & (self.header.cluster_size - 1) or entry > MAX_HOST_BYTES:
                self.unreadable.add(index)
                what = f"the counts of clusters {first} to {first + count - 1} can't be read: a wrong refcount block"
                self.findings.error(what, count)
            else:
                data = bytes(await self.image.read_bytes(entry, self.header.cluster_size))
                small, exact = small_counts(data, self.order)
                self.counts.put(first, small[:count])
                if self._compare_block(first, small[:count], exact):
                    self.wrong_blocks[entry] = index

    def _compare_block(self, first: int, small: bytes, exact: "array[int] | None") -> bool:
        """Compare some counts; gives whether some are wrong."""
        expected = self.scan.references.slice(first, len(small))
        used = max(len(small.rstrip(b"\0")), len(expected.rstrip(b"\0")))
        self._end = first + used if used else self._end
        if small == expected and MANY not in small:
            return False
        wrong = False
        for at in _differences(small, expected):
            have, want = small[at], expected[at]
            if have == MANY and exact:
                have = exact[at]
            if want == MANY:
                want = self.scan.references.get(first + at)
            if have == want:
                continue
            wrong = True
            if self.findings.is_full:
                # Not a line for each of what may be millions.
                self.findings.count(corruptions=have < want, leaks=have > want)
                continue
            what = f"cluster {first + at}: its refcount is {have}, but there are {want} references"
            if have < want:
                self.findings.corruption(what)
            else:
                self.findings.leak(what)
        return wrong

    # --- flags ---------------------------------------------------------------------------------------------

    async def _flags(self) -> None:
        """Does each active entry say rightly whether it is the only one that refers to its cluster?"""
        scan, bits = self.scan, self.header.cluster_bits
        wrong: dict[int, int] = {}  # entry → refcount
        for entry in set(scan.l1):
            offset = entry & OFFSET_MASK
            if offset and (offset >> bits) // self.per_block not in self.unreadable:
                count = self.counts.get(offset >> bits)
                if (count == 1) != bool(entry & COPIED):
                    wrong[entry] = count
        for index, entry in enumerate(scan.l1 if wrong else ()):
            if entry in wrong:
                self.wrong_flags += 1
                self.wrong_l1.append(index)
                self.findings.corruption(f"L1 entry {index} is {entry:#x}, but the refcount there is {wrong[entry]}")
        reader = L2Reader(self.image)
        for offset, table in sorted(scan.active.items()):
            contents = table.contents
            if not offset or (offset >> bits) // self.per_block in self.unreadable:
                continue
            if contents is not None and self._are_right(contents):
                continue
            data = bytes(await self.image.read_bytes(offset, self.header.cluster_size))
            entries = list(self._wrong_entries(reader, data))
            for mend, count in entries:
                self.wrong_flags += table.times
                what = f"the L2 table at {offset}: the flag of entry {mend.at} is wrong, the refcount is {count}"
                self.findings.corruption(what, table.times)
            if entries:
                self.wrong_l2[offset] = [mend for mend, _ in entries]

    def _are_right(self, contents: Contents) -> bool:
        """Whether all flags of a table are seen to be right without looking at it again."""
        if not contents.allocated:
            return not contents.problems
        if contents.copied is None or self.unreadable:
            return False
        if self.header.has_data_file:
            return contents.copied
        return contents.copied and all(self.counts.are_all(first, count, 1) for first, count in contents.runs)

    def _wrong_entries(self, reader: L2Reader, data: bytes) -> Iterator[tuple[Mend, int]]:
        """(what it should be, refcount) of all entries with a wrong flag."""
        entries, bitmaps = reader.entries(data)
        bits, in_file = self.header.cluster_bits, not self.header.has_data_file
        for index, entry in enumerate(entries):
            if not entry or not reader.refers(entry):
                continue
            cluster = (entry & OFFSET_MASK) >> bits
            if in_file and self.unreadable and cluster // self.per_block in self.unreadable:
                continue
            count = self.counts.get(cluster) if in_file else 1
            if (count == 1) != bool(entry & COPIED):
                yield Mend(index, entry ^ COPIED, bitmaps[index] if bitmaps is not None else 0), count


def _differences(small: bytes, expected: bytes) -> Iterator[int]:
    """Where two rows of counts differ, or may do so."""
    for start in range(0, len(small), SPAN):
        here, there = small[start : start + SPAN], expected[start : start + SPAN]
        if here != there or MANY in here:
            for at, (have, want) in enumerate(zip(here, there, strict=True), start):
                if have != want or have == MANY:
                    yield at
