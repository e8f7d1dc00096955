"""What an image refers to: every structure of it is looked through once, and each host cluster counted.

An L2 table that many L1 entries point to (of snapshots, or of a hostile image) is looked through once and counted as
often, so that the work is bounded by the length of the file.
"""

import errno
import struct
from array import array
from collections import Counter
from collections.abc import Iterator

import construct
import msgspec

from pynbd.block.alignment import round_up
from pynbd.block.errors import io_error
from pynbd.block.families import CheckResult, Progress
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.check_counts import Counts
from pynbd.formats.qcow2.check_l2 import Contents, L2Reader, Mend
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import L1_RESERVED, OFFSET_MASK, Autoclear, BitmapFlag
from pynbd.formats.qcow2.tables import from_disk

MAX_MESSAGES = 1000
"""Lines of one check; what more there is, is counted."""

MAX_TABLE_WORDS = 1 << 28
"""Entries of L1 and bitmap tables of one image that are looked at: 2 GiB of them."""

MAX_UNALIGNED_TABLES = 4096
"""L2 tables that lie at wrong offsets and are looked at: each may overlap a thousand others."""

MAX_MENDS = 1 << 20
"""Entries of L2 tables that are mended at a time."""

MAX_METADATA_CLUSTERS = 1 << 24
"""Clusters of one image that hold its own structures, beside L2 tables."""

MAX_OVERFULL_CLUSTERS = 1 << 20
"""Clusters that have more references than a count can tell of and are kept in mind; with more, none is sure not to."""

KEPT_RUNS = 16
"""Of an L2 table that are kept, so that it need not be read again."""

WINDOW_BYTES = 1 << 20
"""Of a table that is longer than that, what is read at a time."""


SNAPSHOT_FIELDS = struct.Struct(">QIHH20xI")
"""Of `layout.SNAPSHOT`, what tells where things lie: there may be 65536 of them."""

LEAST_EXTRA = layout.SNAPSHOT_EXTRA_SIZES.sizeof()


class Findings:
    """What is wrong: counts, and a line for each, up to a limit.

    Args:
        result: where both go.
    """

    def __init__(self, result: CheckResult) -> None:
        self.result = result
        self.unsaid = 0

    def corruption(self, text: str, times: int = 1) -> None:
        """Something is wrong."""
        self.result.corruptions += times
        self.say(text)

    def error(self, text: str, times: int = 1) -> None:
        """Something can't be looked at."""
        self.result.check_errors += times
        self.say(text)

    def leak(self, text: str) -> None:
        """A cluster is in use for nothing."""
        self.result.leaks += 1
        self.say(text)

    @property
    def is_full(self) -> bool:
        """Whether no more lines are taken."""
        return len(self.result.messages) >= MAX_MESSAGES

    def count(self, *, corruptions: int, leaks: int) -> None:
        """The same without a line for each."""
        self.result.corruptions += corruptions
        self.result.leaks += leaks
        self.unsaid += corruptions + leaks

    def say(self, text: str) -> None:
        """Add a line."""
        if not self.is_full:
            self.result.messages.append(text)
        else:
            self.unsaid += 1

    def end(self) -> None:
        """Tell of what was left out."""
        if self.unsaid:
            self.result.messages.append(f"… and {self.unsaid} more")


class L1Place(msgspec.Struct, frozen=True):
    """Where an L1 table lies: offset in bytes, number of entries."""

    offset: int
    size: int


class ActiveTable(msgspec.Struct):
    """An L2 table that the active L1 table points to, `times` times; `contents` if they need not be read again."""

    times: int
    contents: Contents | None = None


class Scan:
    """One look at everything that an image refers to.

    Args:
        image: the image; its tables are read from the file.
        progress: told while it works.
    """

    def __init__(self, image: Image, progress: Progress) -> None:
        header = image.header
        self.image = image
        self.header = header
        self.progress = progress
        self.bits, self.cluster = header.cluster_bits, header.cluster_size
        self.file_length = round_up(image.file.size, 512)
        self.file_clusters = self.clusters = -(-self.file_length // self.cluster)
        """Clusters of the file, and those that are referred to; the last one may end behind it."""
        self.result = CheckResult(total_clusters=-(-round_up(header.size, 512) // self.cluster))
        self.findings = Findings(self.result)
        self.references = Counts(image.name, (1 << header.refcount_bits) - 1)
        self.l1: array[int] = array("Q")
        self.active: dict[int, ActiveTable] = {}
        """By offset."""
        self.tables: Counter[int] = Counter()
        """How many L1 entries point to an L2 table, by its offset."""
        self.mends: dict[int, list[Mend]] = {}
        """By the offset of the L2 table."""
        self.l1_mends: list[tuple[int, int]] = []
        """(offset in the file, right entry) of L1 entries."""
        self.not_tables: set[int] = {0}
        """Clusters that hold something that is no L2 table."""
        self._overfull: set[int] | None = set()
        """Clusters with more references than a count can tell of; None: too many to keep."""
        self.refcount_places: list[tuple[int, int]] = []
        """(first, count) of clusters that were counted for the refcount structures."""
        self.refcount_table: array[int] = array("Q")
        self.unusable = False
        """The refcount structures must be made anew."""
        self.uncounted = False
        """Something wrong may refer to clusters that seem to leak: none must be given up."""
        self.wrong_snapshots = self.wrong_bitmaps = False
        """The snapshot table, or what belongs to bitmaps, must be written anew."""
        self._words_left = MAX_TABLE_WORDS
        self._mends_left = MAX_MENDS

    async def run(self) -> None:
        """Look at everything.

        Raises:
            OSError: it can't be read, or would take too much memory or time.
        """
        header = self.header
        self.count(0, self.cluster, "the header")
        await self._mapping()
        self._structure(header.refcount_table_offset, header.refcount_table_clusters << self.bits, "the refcount table")
        if header.crypto is not None:
            self._metadata(header.crypto.offset, header.crypto.length, "the encryption header")
        if header.bitmaps is not None and Autoclear.BITMAPS in header.autoclear:
            await self._bitmaps(header.bitmaps.directory_offset, header.bitmaps.directory_size)
        await self._refcount_blocks()

    # --- counting ------------------------------------------------------------------------------------------

    def count(self, offset: int, length: int, what: str, times: int = 1) -> bool:
        """Something refers to bytes of the file; False if they lie behind its end."""
        if length <= 0:
            return True
        # The last cluster of a file need not be there in full.
        if offset + length - self.file_length >= self.cluster:
            self.uncounted = True
            self.findings.corruption(
                f"{what} refers to offset {offset}, {length} bytes, but the file ends at {self.file_length}", times
            )
            return False
        first = offset >> self.bits
        count = (offset + length - 1 >> self.bits) + 1 - first
        self.clusters = max(self.clusters, first + count)
        self._overflow(self.references.add(first, count, times), first, count)
        return True

    def is_overfull(self, cluster: int) -> bool:
        """Whether a cluster has, or may have, more references than are counted."""
        return self._overfull is None or cluster in self._overfull

    def _overflow(self, lost: int, first: int, count: int) -> None:
        if lost:
            if self._overfull is not None and len(self._overfull) + count <= MAX_OVERFULL_CLUSTERS:
                self._overfull.update(range(first, first + count))
            else:
                self._overfull = None
            where = f"clusters {first} to {first + count - 1}" if count > 1 else f"cluster {first}"
            most = self.references.most
            self.findings.corruption(f"{where}: more references than a count can tell of ({most})", lost)

    def _metadata(self, offset: int, length: int, what: str, times: int = 1) -> bool:
        """A structure of the image's own refers to bytes that hold no L2 table."""
        good = self.count(offset, length, what, times)
        if good and length > 0:
            self.not_tables.update(range(offset >> self.bits, (offset + length - 1 >> self.bits) + 1))
            if len(self.not_tables) > MAX_METADATA_CLUSTERS:
                what = f"{what}: more than {MAX_METADATA_CLUSTERS} clusters of metadata"
                raise io_error(errno.EFBIG, self.image.name, what)
        return good

    def _structure(self, offset: int, length: int, what: str) -> bool:
        """The same for refcount structures."""
        good = self._metadata(offset, length, what)
        if good and length > 0:
            self.refcount_places.append((offset >> self.bits, length >> self.bits))
        return good

    def _words(self, count: int, what: str) -> None:
        self._words_left -= count
        if self._words_left < 0:
            raise io_error(errno.EFBIG, self.image.name, f"{what}: more than {MAX_TABLE_WORDS} table entries in all")

    # --- L1 and L2 tables ----------------------------------------------------------------------------------

    async def _mapping(self) -> None:
        """All L1 tables, and what they point to."""
        header = self.header
        self._metadata(header.l1_table_offset, header.l1_size * 8, "the L1 table")
        self.l1 = await self._l1_table(L1Place(header.l1_table_offset, header.l1_size), "the L1 table", 1)
        active = _pointers(self.l1)
        self.active = {offset: ActiveTable(times) for offset, times in active.items()}
        tables = self.tables = active.copy()
        for place, (name, times) in (await self._snapshot_places()).items():
            words = await self._l1_table(place, name, times)
            for offset, often in _pointers(words).items():
                tables[offset] += often * times
        reader = L2Reader(self.image)
        unaligned = 0
        for done, (offset, times) in enumerate(sorted(tables.items())):
            self.progress(done, len(tables))
            if offset & (self.cluster - 1):
                self.uncounted = True
                self.findings.corruption(
                    f"an L1 entry points to an L2 table at {offset}, expected a multiple of {self.cluster}", times
                )
                unaligned += 1
                if unaligned > MAX_UNALIGNED_TABLES:
                    what = f"more than {MAX_UNALIGNED_TABLES} L2 tables at wrong offsets"
                    raise io_error(errno.EFBIG, self.image.name, what)
            self.count(offset, self.cluster, "an L1 entry", times)
            contents = reader.read(bytes(await self.image.read_bytes(offset, self.cluster)))
            self._take(offset, contents, times)
        self.progress(len(tables), len(tables))

    async def _l1_table(self, place: L1Place, what: str, times: int) -> "array[int]":
        if place.offset >= self.file_length:
            return array("Q")
        words = from_disk(await self.image.read_bytes(place.offset, place.size * 8))
        wrong = {entry for entry in set(words) if entry & L1_RESERVED}
        for index, entry in enumerate(words if wrong else ()):
            if entry in wrong:
                what_entry = f"{what}: entry {index} is {entry:#x}: reserved bits are set"
                self.findings.corruption(what_entry, times)
                if len(self.l1_mends) < MAX_MENDS:
                    self.l1_mends.append((place.offset + 8 * index, entry & ~L1_RESERVED))
        return words

    def _take(self, offset: int, contents: Contents, times: int) -> None:
        """Count what an L2 table refers to."""
        where = f"the L2 table at {offset}"
        for problem in contents.problems:
            self.findings.corruption(f"{where}: {problem}", times)
        self.uncounted = self.uncounted or contents.uncounted
        if contents.mends and not offset & (self.cluster - 1) and self._mends_left > 0:
            self._mends_left -= len(contents.mends)
            self.mends[offset] = contents.mends
        if not self.header.has_data_file:
            for first, count in contents.runs:
                self._count_run(first, count, where, times)
        for place, length in contents.places:
            self.count(place, length, where, times)
        table = self.active.get(offset)
        if table is not None:
            result = self.result
            result.allocated_clusters += contents.allocated * table.times
            result.fragmented_clusters += contents.fragmented * table.times
            result.compressed_clusters += contents.compressed * table.times
            if not contents.allocated or (contents.copied is not None and len(contents.runs) <= KEPT_RUNS):
                table.contents = contents

    def _count_run(self, first: int, count: int, where: str, times: int) -> None:
        inside = min(count, max(self.file_clusters - first, 0))
        if inside:
            self._overflow(self.references.add(first, inside, times), first, inside)
        if inside < count:
            self.uncounted = True
            offset = (first + inside) << self.bits
            self.findings.corruption(
                f"{where} refers to {count - inside} clusters from offset {offset} on, "
                f"but the file ends at {self.file_length}",
                times * (count - inside),
            )

    # --- snapshots -----------------------------------------------------------------------------------------

    async def _snapshot_places(self) -> dict[L1Place, tuple[str, int]]:
        """The L1 tables of snapshots → (a name for messages, how many snapshots have it)."""
        header, found = self.header, dict[L1Place, tuple[str, int]]()
        if not header.nb_snapshots:
            return found
        if header.has_data_file:
            self.findings.corruption(f"{header.nb_snapshots} snapshots, but data are in another file")
        at, window, window_at = header.snapshots_offset, b"", header.snapshots_offset
        for number in range(header.nb_snapshots):
            if at - header.snapshots_offset > layout.MAX_SNAPSHOT_TABLE_BYTES:
                self.findings.error(f"the snapshot table is longer than {layout.MAX_SNAPSHOT_TABLE_BYTES} bytes")
                self.uncounted = True
                break
            if at + layout.SNAPSHOT_BYTES > window_at + len(window):
                window, window_at = bytes(await self.image.read_bytes(at, WINDOW_BYTES >> 4)), at
            place_at, size, id_size, name_size, extra = SNAPSHOT_FIELDS.unpack_from(window, at - window_at)
            at = round_up(at + layout.SNAPSHOT_BYTES + extra + id_size + name_size, 8)
            what = f"the L1 table of snapshot {number}"
            if not LEAST_EXTRA <= extra <= layout.MAX_SNAPSHOT_EXTRA_BYTES:
                wanted = f"{LEAST_EXTRA} to {layout.MAX_SNAPSHOT_EXTRA_BYTES}"
                problem = f"entry {number} of the snapshot table has {extra} bytes of extra data, expected {wanted}"
                self.findings.corruption(problem)
                self.uncounted = True  # what follows may be no entry
                self.wrong_snapshots = True
            place = L1Place(place_at, size)
            if place.offset & (self.cluster - 1):
                self.uncounted = True
                self.findings.corruption(f"{what} lies at {place.offset}, expected a multiple of {self.cluster}")
            elif place.size > layout.MAX_L1_BYTES // 8:
                self.uncounted = True
                self.findings.corruption(f"{what} has {place.size} entries, at most {layout.MAX_L1_BYTES // 8}")
            else:
                found[place] = (what, found.get(place, (what, 0))[1] + 1)
        self._metadata(header.snapshots_offset, at - header.snapshots_offset, "the snapshot table")
        for place, (what, times) in found.items():
            self._words(place.size, what)
            self._metadata(place.offset, place.size * 8, what, times)
        return found

    # --- bitmaps -------------------------------------------------------------------------------------------

    async def _bitmaps(self, offset: int, length: int) -> None:
        """The bitmap directory, the tables, and the bitmaps' bits."""
        if not self._metadata(offset, length, "the bitmap directory"):
            self.uncounted = self.wrong_bitmaps = True
            return
        directory = bytes(await self.image.read_bytes(offset, length))
        places: Counter[L1Place] = Counter()
        for _, place in self._bitmap_places(directory):
            places[place] += 1
        for place, times in places.items():
            self._words(place.size, "bitmap tables")
            if self._metadata(place.offset, place.size * 8, "a bitmap table", times):
                await self._bitmap_table(place, times)
            else:
                self.wrong_bitmaps = True

    def _bitmap_places(self, directory: bytes) -> Iterator[tuple[int, L1Place]]:
        """Where the tables of bitmaps lie."""
        assert self.header.bitmaps is not None
        at, number = 0, 0
        while at < len(directory):
            try:
                fields = layout.parsed(layout.BITMAP, directory, at)
            except construct.ConstructError:
                break
            place = L1Place(fields.bitmap_table_offset, fields.bitmap_table_size)
            end = at + layout.BITMAP_BYTES + fields.extra_data_size + fields.name_size
            if (
                not 0 < place.size <= layout.MAX_BITMAP_TABLE_ENTRIES
                or not place.offset
                or place.offset & (self.cluster - 1)
                or fields.type != layout.BITMAP_TYPE_DIRTY_TRACKING
                or not layout.MIN_GRANULARITY_BITS <= fields.granularity_bits <= layout.MAX_GRANULARITY_BITS
                or not 1 <= fields.name_size <= layout.MAX_BITMAP_NAME_BYTES
                or fields.flags & ~sum(BitmapFlag)
                or end > len(directory)
            ):
                break
            yield number, place
            at, number = round_up(end, 8), number + 1
        if at < len(directory) or number != self.header.bitmaps.nb_bitmaps:
            expected = self.header.bitmaps.nb_bitmaps
            self.findings.corruption(
                f"the bitmap directory tells of {number} bitmaps in {min(at, len(directory))} bytes, "
                f"expected {expected} in {len(directory)}"
            )
            self.uncounted = self.wrong_bitmaps = True

    async def _bitmap_table(self, place: L1Place, times: int) -> None:
        end = place.offset + 8 * place.size
        for start in range(place.offset, end, WINDOW_BYTES):
            data = await self.image.read_bytes(start, min(WINDOW_BYTES, end - start))
            words = from_disk(data) if data.count(0) != len(data) else array("Q")
            for index, entry in enumerate(words):
                if entry <= layout.BITMAP_ALL_ONES:
                    continue
                offset = entry & OFFSET_MASK
                if entry & layout.BITMAP_TABLE_RESERVED or entry & 1 or offset & (self.cluster - 1):
                    self.uncounted = self.wrong_bitmaps = True
                    where = start + 8 * index
                    self.findings.corruption(f"the entry of a bitmap table at {where} is {entry:#x}", times)
                    continue
                if self.count(offset, self.cluster, "a bitmap table", times):
                    self.not_tables.add(offset >> self.bits)
                else:
                    self.wrong_bitmaps = True

    # --- refcounts -----------------------------------------------------------------------------------------

    async def _refcount_blocks(self) -> None:
        """Where the refcount table says that blocks lie."""
        header = self.header
        length = header.refcount_table_clusters << self.bits
        if header.refcount_table_offset >= self.file_length:
            length = 0
        self.refcount_table = from_disk(await self.image.read_bytes(header.refcount_table_offset, length))
        for index, entry in enumerate(self.refcount_table):
            if not entry:
                continue
            problem = self._problem_of_block(entry)
            if not problem:
                offset = entry & layout.REFCOUNT_BLOCK_MASK
                self._structure(offset, self.cluster, f"entry {index} of the refcount table")
                references = self.references.get(offset >> self.bits)
                if self.is_overfull(offset >> self.bits):
                    problem = "several references to this block, expected one"
                elif references != 1:
                    problem = f"{references} references to this block, expected one"
            if problem:
                self.findings.corruption(f"entry {index} of the refcount table is {entry:#x}: {problem}")
                self.unusable = True

    def _problem_of_block(self, entry: int) -> str:
        """What is wrong with an entry of the refcount table."""
        if entry & ~layout.REFCOUNT_BLOCK_MASK:
            return "reserved bits are set"
        if entry & (self.cluster - 1):
            return f"expected a multiple of {self.cluster}"
        if entry >> self.bits >= self.clusters:
            return f"behind the end of the file ({self.file_length})"
        return ""


def _pointers(words: "array[int]") -> Counter[int]:
    """How many entries of an L1 table point to each L2 table, by its offset."""
    found: Counter[int] = Counter()
    for entry, times in Counter(words).items():
        if entry:
            found[entry & OFFSET_MASK] += times
    return found
