"""What a check found is mended, so that a crash at any time leaves the image no worse than it was.

Entries that are wrong go first, then counts that are too low are raised, then those that are too high are lowered, and
at last the flags that depend on counts are set right, with a barrier after each. Where refcount structures can't be
used, new ones are written to clusters that nothing refers to, and the header, in one sector, changes over to them.
"""

import errno
from array import array
from collections.abc import Iterable, Mapping, Sequence

from pynbd.block.errors import io_error
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.check_counts import MANY, block_of
from pynbd.formats.qcow2.check_examination import Examination
from pynbd.formats.qcow2.check_l2 import Mend
from pynbd.formats.qcow2.check_scan import Scan
from pynbd.formats.qcow2.header import build_fixed
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import COPIED
from pynbd.formats.qcow2.refcounts import pack, unpack
from pynbd.formats.qcow2.tables import to_disk


async def mend_entries(image: Image, found: Examination) -> bool:
    """Put L1 and L2 entries right that can be without a loss; gives whether there were any."""
    scan = found.scan
    await _write_l1(image, scan, scan.l1_mends)
    await _write_l2(image, scan, scan.mends)
    if scan.l1_mends or scan.mends:
        await image.file.flush()
        return True
    return False


async def mend_flags(image: Image, found: Examination) -> int:
    """Set the flags right that depend on counts, which are right; gives how many."""
    scan, base = found.scan, image.header.l1_table_offset
    entries = [(base + 8 * index, scan.l1[index] ^ COPIED) for index in found.wrong_l1]
    done = await _write_l1(image, scan, entries) + await _write_l2(image, scan, found.wrong_l2)
    if done:
        await image.file.flush()
    return done


async def mend_counts(image: Image, found: Examination, *, up: bool, down: bool) -> None:
    """Write the number of references into refcount blocks.

    Args:
        image: the image.
        found: what is wrong.
        up: raise counts that are too low.
        down: lower counts that are too high.
    """
    for raising in (True, False):
        if not (up if raising else down):
            continue
        for offset, index in sorted(found.wrong_blocks.items()):
            block = unpack(bytes(await image.read_bytes(offset, image.cluster_size)), found.order)
            if _change(found, block, index * found.per_block, raising=raising):
                await image.file.write(offset, memoryview(pack(block, found.order)), 0)
        await image.file.flush()


def _change(found: Examination, block: "array[int]", first: int, *, raising: bool) -> bool:
    references, changed = found.scan.references, False
    expected = references.slice(first, min(len(block), found.scan.clusters - first))
    for at, wanted in enumerate(expected):
        if wanted == MANY:
            wanted = references.get(first + at)
        if block[at] != wanted and (block[at] < wanted) == raising:
            block[at], changed = wanted, True
    return changed


# --- tables ----------------------------------------------------------------------------------------------------------


def _is_only(scan: Scan, offset: int, times: int) -> bool:
    """Whether the cluster at an offset is in the file, and nothing but `times` pointers to a table refer to it."""
    cluster = offset >> scan.bits
    return cluster < scan.file_clusters and scan.references.get(cluster) == times and not scan.is_overfull(cluster)


async def _write_l1(image: Image, scan: Scan, entries: Iterable[tuple[int, int]]) -> int:
    done = 0
    for offset, entry in entries:
        if _is_only(scan, offset, 1):
            await image.file.write(offset, memoryview(entry.to_bytes(8)), 0)
            done += 1
    return done


async def _write_l2(image: Image, scan: Scan, tables: Mapping[int, Sequence[Mend]]) -> int:
    """Change entries of L2 tables, where nothing else lies; gives how many, counted as the check does."""
    done, width = 0, 8 * image.header.l2_entry_words
    for offset, mends in sorted(tables.items()):
        if offset & (image.cluster_size - 1) or offset >> scan.bits in scan.not_tables:
            continue
        if not _is_only(scan, offset, scan.tables[offset]):
            continue
        data = await image.read_bytes(offset, image.cluster_size)
        for mend in mends:
            data[mend.at * width : (mend.at + 1) * width] = mend.entry.to_bytes(8) + mend.bitmap.to_bytes(width - 8)
        await image.file.write(offset, memoryview(data), 0)
        table = scan.active.get(offset)
        done += len(mends) * (table.times if table is not None else 1)
    return done


# --- new refcount structures -----------------------------------------------------------------------------------------


class _Plan:
    """Where new refcount structures go: clusters that neither the old ones nor anything else refers to."""

    def __init__(self, found: Examination) -> None:
        self.references = found.scan.references
        self.per_block = found.per_block
        self.cluster = found.header.cluster_size
        self.image = found.image.name
        self.blocks: dict[int, int] = {}
        """Number of a refcount block → the cluster where it goes."""
        self._at = 1
        self._add_blocks()
        while True:
            entries = max(self.blocks) + 1
            self.table_clusters = -(-entries * 8 // self.cluster)
            if self.table_clusters > max(layout.MAX_REFCOUNT_TABLE_BYTES // self.cluster, 1):
                raise io_error(errno.EFBIG, self.image, f"a refcount table of {self.table_clusters} clusters")
            self.table = self._take(self.table_clusters)
            self._add_blocks()
            if (max(self.blocks) + 1) * 8 <= self.table_clusters * self.cluster:
                break
            self.references.drop(self.table, self.table_clusters)

    def _take(self, count: int) -> int:
        first = self.references.free_run(self._at, count)
        if count == 1:
            self._at = first + 1
        self.references.add(first, count)
        return first

    def _add_blocks(self) -> None:
        """A block for each part of the file that is in use, also by the new blocks."""
        while missing := self.references.used_blocks(self.per_block) - self.blocks.keys():
            for index in sorted(missing):
                self.blocks[index] = self._take(1)


async def rebuild(image: Image, found: Examination) -> None:
    """Write new refcount structures, and let the header point to them; the old ones are free then.

    Raises:
        OSError: they can't be written; the header points to the old ones.
    """
    scan, header, order = found.scan, image.header, found.order
    if scan.uncounted:
        # What seems to leak may be what a wrong entry once referred to: it stays counted, as far as it was.
        scan.references.raise_to(found.counts)
    plan = _Plan(found)
    for first, count in scan.refcount_places:
        scan.references.drop(first, count)
    table = array("Q", [0]) * (plan.table_clusters * header.cluster_size // 8)
    for index, cluster in sorted(plan.blocks.items()):
        table[index] = cluster << header.cluster_bits
        first = index * found.per_block
        data = block_of(scan.references, first, found.per_block, order)
        await image.file.write(table[index], memoryview(data), 0)
    await image.file.write(plan.table << header.cluster_bits, memoryview(to_disk(table)), 0)
    await image.file.flush()
    header.refcount_table_offset = plan.table << header.cluster_bits
    header.refcount_table_clusters = plan.table_clusters
    await image.file.write(48, memoryview(build_fixed(header)[48:60]), 0)
    await image.file.flush()
