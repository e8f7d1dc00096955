"""A qcow2 image as a file: its header, its tables in memory, and the order in which they are written.

`Image` knows nothing of guests and requests. Everything that changes an image (writes, snapshots, bitmaps, a resize)
changes tables in memory; `commit` writes them so that whatever part of the writes reaches the disk, in whatever order,
the image is sound, and at worst clusters leak:

1. counts of clusters that were taken, and tables that nothing points to yet;
2. a barrier, which also makes the guest's data durable;
3. L2 and L1 entries, which point to all that;
4. if clusters were given up, another barrier, after which they may be used again.

An entry is changed in memory only when the data that it points to was written, so that the barrier covers it.
"""

import asyncio
import errno
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError, io_error
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.header import PEEK_BYTES, Header, build_fixed, build_header, parse_header, peek_cluster_size
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK, Autoclear, Incompatible
from pynbd.formats.qcow2.refcounts import Refcounts, Run, pack, unpack
from pynbd.formats.qcow2.tables import SECTOR, Table, TableCache, from_disk, to_disk, whole_sectors

log = logging.getLogger(__name__)

MAX_DIRTY_TABLES = 256
"""L2 tables that are changed and not written, at most; then they are, without anybody's flush."""

Taken = list[tuple[int, Table, int, int]]


class Storage(Protocol):
    """Where an image lies: a `Child`, or a `BlockBackend`."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        """Fill `into`."""

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        """Put `data` there; past the end it grows."""

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make a range zero."""

    async def discard(self, offset: int, length: int) -> None:
        """A range is not needed."""

    async def flush(self) -> None:
        """Make all writes durable."""


async def read_header(file: Storage, image: str, *, for_check: bool = False) -> Header:
    """The header of an image.

    Args:
        file: where it lies.
        image: its name for messages.
        for_check: see `parse_header`.

    Raises:
        ImageError: it is none, or a wrong one.
        OSError: it can't be read.
    """
    head = bytearray(min(PEEK_BYTES, file.size))
    await file.read(0, memoryview(head), 0)
    first = bytearray(min(peek_cluster_size(bytes(head), image), file.size))
    await file.read(0, memoryview(first), 0)
    return parse_header(bytes(first), image, for_check=for_check)


class Image:
    """One image, opened.

    Args:
        file: where it lies.
        header: what `read_header` gave.
        name: for messages.
        l2_cache, refcount_cache: bytes of tables that are kept in memory.
        data_file: where the guest's bytes lie, if not here.
        for_check: tables that lie behind the end of the file are no error yet.
    """

    def __init__(
        self,
        file: Storage,
        header: Header,
        name: str,
        *,
        l2_cache: int = 32 << 20,
        refcount_cache: int = 4 << 20,
        data_file: Storage | None = None,
        for_check: bool = False,
    ) -> None:
        self.file = file
        self.header = header
        self.name = name
        self.data_file = data_file
        self.for_check = for_check
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.l1: array[int] = array("Q")
        self.l2 = TableCache(l2_cache // self.cluster_size, self.read_table)
        self.blocks = TableCache(refcount_cache // self.cluster_size, self._read_block)
        self.refcounts = Refcounts(header, array("Q"), self.blocks, name, self._may_use)
        self.metadata: set[int] = {0}
        """The numbers of all clusters that hold the image's own structures, as far as they are known."""
        self.dirty_l1: set[int] = set()
        self.freed: list[Run] = []
        """Clusters that lose a reference once what pointed to them is gone from the disk as well."""
        self.fence: str | None = None
        """Why nothing is written any more: the image is corrupt, or its header can't be written."""
        self.lazy = False
        """Counts are written when the image is closed; until then it is marked dirty."""
        self.marked = False
        """It was marked as dirty here, not by somebody before."""
        self.discard_freed = False
        """The file below hears of clusters that are free."""
        self._waiting: list[tuple[int, list[Run]]] = []
        self._epoch = 0
        self._readers: dict[int, int] = {}
        self.commit_lock = asyncio.Lock()
        """Held by whoever writes tables: nobody else changes what they are on disk meanwhile."""
        self.fresh_from = 0
        """Host clusters from here on were never written since the file ends here: they read as zeroes."""

    # --- opening -------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the tables that are kept whole: L1 and the refcount table.

        Raises:
            ImageError: they are not where the header says. OSError: they can't be read.
        """
        header = self.header
        self.l1 = await self.read_words(header.l1_table_offset, header.l1_size, "the L1 table")
        entries = header.refcount_table_clusters * self.cluster_size // 8
        table = await self.read_words(header.refcount_table_offset, entries, "the refcount table")
        self.refcounts.table[:] = table
        self.fresh_from = -(-self.file.size // self.cluster_size)
        self._note_metadata()

    async def reload(self) -> None:
        """Forget all tables in memory, which are written, and read them again: they were changed in the file."""
        for cache in (self.l2, self.blocks):
            cache.tables.clear()
        self.refcounts.first_free, self.refcounts.packing = 0, -1
        self.metadata = {0}
        await self.load()

    def _note_metadata(self) -> None:
        header, bits = self.header, self.cluster_bits
        for offset, length in (
            (header.l1_table_offset, header.l1_size * 8),
            (header.refcount_table_offset, header.refcount_table_clusters << bits),
        ):
            self.note_metadata(offset, length)
        for entries, mask in ((self.l1, OFFSET_MASK), (self.refcounts.table, layout.REFCOUNT_BLOCK_MASK)):
            if any(entries):
                self.metadata.update((entry & mask) >> bits for entry in entries if entry)
        if header.crypto is not None:
            self.note_metadata(header.crypto.offset, header.crypto.length)

    def recount(self, entries: "array[int]", clusters: int) -> None:
        """The counts lie elsewhere, perhaps with another width: these are the entries of their table."""
        self.blocks = TableCache(self.blocks.most, self._read_block)
        table = array("Q", bytes(clusters * self.cluster_size))
        table[: len(entries)] = entries
        self.refcounts = Refcounts(self.header, table, self.blocks, self.name, self._may_use)

    def note_metadata(self, offset: int, length: int) -> None:
        """These bytes of the file belong to the image's own structures."""
        self.metadata.update(range(offset >> self.cluster_bits, -(-(offset + length) // self.cluster_size)))

    def _may_use(self, cluster: int) -> bool:
        return cluster not in self.metadata

    async def read_words(self, offset: int, count: int, what: str) -> "array[int]":
        """A table of 64-bit words from the file.

        Raises:
            ImageError: it does not lie inside the file.
        """
        if offset + count * 8 > round_up(self.file.size, self.cluster_size) and not self.for_check:
            problem = f"{what} has {count * 8} bytes here, but the file ends at {self.file.size}"
            raise ImageError(self.name, problem, offset)
        return from_disk(await self.read_bytes(offset, count * 8))

    async def read_bytes(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; those behind its end are zero."""
        data = bytearray(length)
        inside = min(length, self.file.size - offset)
        if inside > 0:
            await self.file.read(offset, memoryview(data)[:inside], 0)
        return data

    async def read_table(self, offset: int) -> "array[int]":
        """The entries of an L2 table, as they are in the file.

        Raises:
            OSError: it can't be read, or is not where it should be.
        """
        if offset & (self.cluster_size - 1):
            what = f"an L1 table points to an L2 table here, expected a multiple of {self.cluster_size}"
            raise await self.corrupted(what, offset)
        if offset + self.cluster_size > round_up(self.file.size, self.cluster_size):
            raise await self.corrupted(f"an L2 table lies here, but the file ends at {self.file.size}", offset)
        return from_disk(await self.read_bytes(offset, self.cluster_size))

    async def _read_block(self, offset: int) -> "array[int]":
        if offset + self.cluster_size > round_up(self.file.size, self.cluster_size):
            raise await self.corrupted(f"a refcount block lies here, but the file ends at {self.file.size}", offset)
        return unpack(bytes(await self.read_bytes(offset, self.cluster_size)), self.refcounts.order)

    # --- corruption ----------------------------------------------------------------------------------------

    async def corrupted(self, problem: str, offset: int | None = None, *, writing: bool = False) -> OSError:
        """Something in the image is wrong: mark it, write no more, and give the error to raise.

        Args:
            problem: what is wrong.
            offset: where in the file.
            writing: only what was about to be written shows that; then the image is marked as corrupt. A reader goes
                on reading what is good.
        """
        error = ImageError(self.name, problem, offset)
        if writing and self.fence is None:
            self.fence = str(error)
            log.error("%s; nothing is written to it any more", error)
            if self.header.version >= 3 and Incompatible.CORRUPT not in self.header.incompatible:
                self.header.incompatible |= Incompatible.CORRUPT
                try:
                    await self.write_features()
                except OSError as second:
                    log.error("%s: it can't be marked as corrupt: %s", self.name, second)
        return OSError(errno.EIO, str(error))

    def check_fence(self) -> None:
        """May the image be written to?

        Raises:
            OSError: EIO, it may not: the text says why.
        """
        if self.fence is not None:
            raise OSError(errno.EIO, f"{self.fence} (nothing is written to the image any more)")

    # --- the header ----------------------------------------------------------------------------------------

    async def write_features(self) -> None:
        """Write the feature bits of the header, and make them durable."""
        await self.write_fields(layout.V2_HEADER_BYTES, layout.V2_HEADER_BYTES + 24)

    async def write_fields(self, first: int, last: int) -> None:
        """Write the bytes [first, last) of the header's fixed part, which are of one sector, and make them durable.

        The backing file's place (bytes 8 to 20) is not to be among them.
        """
        await self.file.write(first, memoryview(build_fixed(self.header)[first:last]), 0)
        await self.file.flush()

    async def change_fields(self, first: int, last: int, **fields: int) -> None:
        """Change some fields of the header, which lie in the bytes [first, last) of its fixed part, in one write.

        Raises:
            OSError: it failed; they are as they were. Where nobody can tell what is on the disk, nothing is written to
                the image any more.
        """
        old = {name: getattr(self.header, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(self.header, name, value)
            await self.write_fields(first, last)
        except BaseException:
            for name, value in old.items():
                setattr(self.header, name, value)
            try:
                await self.write_fields(first, last)
            except OSError as second:
                self.fence = f"{self.name}: the header can't be written: {second}"
                log.error("%s; nothing is written to the image any more", self.fence)
            raise

    async def write_header(self) -> None:
        """Write the whole header, and make it durable: its first sector, which all else hangs on, last.

        Raises:
            ImageError: it does not fit. OSError: it can't be written.
        """
        data = build_header(self.header, self.name)
        rest = data[SECTOR:].ljust(min(self.cluster_size, 2 * layout.MAX_HEADER_BYTES) - SECTOR, b"\0")
        if rest:
            await self.file.write(SECTOR, memoryview(rest), 0)
            await self.file.flush()
        await self.file.write(0, memoryview(data[:SECTOR].ljust(SECTOR, b"\0")), 0)
        await self.file.flush()

    async def begin_writing(self) -> None:
        """Clear what a writer must clear: autoclear features that are not known."""
        unknown = self.header.unknown_autoclear
        if unknown:
            self.header.autoclear &= ~Autoclear(unknown)
            await self.write_features()

    async def set_dirty(self, *, on: bool) -> None:
        """Mark the image: its counts are not to be believed (or are again). Version 3 only."""
        self.marked = on
        wanted = Incompatible.DIRTY if on else Incompatible(0)
        if self.header.incompatible & Incompatible.DIRTY != wanted:
            self.header.incompatible = self.header.incompatible & ~Incompatible.DIRTY | wanted
            await self.write_features()

    async def mark_sound(self) -> None:
        """A check found nothing wrong: the image is neither dirty nor corrupt."""
        marks = Incompatible.DIRTY | Incompatible.CORRUPT
        if self.header.incompatible & marks:
            self.header.incompatible &= ~marks
            await self.write_features()

    # --- tables --------------------------------------------------------------------------------------------

    async def l2_table(self, l1_index: int) -> Table:
        """The L2 table of an L1 entry that has one.

        Raises:
            OSError: it can't be read, or is not where it should be.
        """
        return await self.l2.load(l1_index, self.l1[l1_index] & OFFSET_MASK)

    @property
    def is_full(self) -> bool:
        """Whether so many L2 tables are changed that they must be written before another one is."""
        return len(self.l2.dirty) >= MAX_DIRTY_TABLES or len(self.l2.dirty) >= self.l2.most // 2 + 1

    async def writable_l2(self, l1_index: int) -> Table:
        """The L2 table of an L1 entry, made or copied if need be, so that it may be changed.

        Only what is done before the next `await` is sure to change this table.
        """
        while True:
            if self.is_full:
                await self.commit()
            entry = self.l1[l1_index]
            table = await self.l2_table(l1_index) if entry & OFFSET_MASK else None
            if entry & COPIED and table is not None:
                return table
            run = await self.refcounts.allocate(1)
            if self.l1[l1_index] != entry or (table is not None and self.l2.get(l1_index) is not table):
                await self.refcounts.change(run.first, 1, -1)  # somebody else was quicker
                continue
            words = table.words[:] if table is not None else array("Q", bytes(self.cluster_size))
            if table is not None:
                self.l2.forget(l1_index)
                self.freed.append(Run(table.offset >> self.cluster_bits, 1))
            new = Table(run.first << self.cluster_bits, words, is_new=True)
            self.metadata.add(run.first)
            self.l2.add(l1_index, new)
            self.l2.mark(l1_index, 0, len(words))
            self.l1[l1_index] = new.offset | COPIED
            self.dirty_l1.add(l1_index)
            return new

    # --- clusters ------------------------------------------------------------------------------------------

    async def allocate(self, most: int) -> tuple[Run, bool]:
        """Take clusters for data.

        Returns:
            (the clusters, whether they are known to read as zeroes).
        """
        run = await self.refcounts.allocate(most)
        fresh = run.first >= self.fresh_from
        self.fresh_from = max(self.fresh_from, run.first + run.clusters)
        return run, fresh

    def allocate_now(self) -> int:
        """Take a cluster that is known to read as zeroes, if that can be done at once; gives its offset, else 0."""
        cluster = self.refcounts.take_now()
        if cluster < 0:
            return 0
        if cluster < self.fresh_from:
            self.refcounts.put_back(cluster)
            return 0
        self.fresh_from = cluster + 1
        return cluster << self.cluster_bits

    async def release(self, run: Run) -> None:
        """Give back clusters that nothing has ever pointed to."""
        await self.refcounts.change(run.first, run.clusters, -1)

    async def allocate_metadata(self, length: int) -> int:
        """Take consecutive clusters for `length` bytes of the image's own; gives their offset."""
        run = await self.refcounts.allocate(-(-length // self.cluster_size), all_of_it=True)
        self.fresh_from = max(self.fresh_from, run.first + run.clusters)
        self.metadata.update(range(run.first, run.first + run.clusters))
        return run.first << self.cluster_bits

    @property
    def given_up_bytes(self) -> int:
        """How much waits for the next commit to be given up."""
        return sum(run.clusters for run in self.freed) << self.cluster_bits

    def give_up(self, offset: int, length: int) -> None:
        """Clusters lose a reference, as soon as nothing on disk points to them any more.

        Args:
            offset: in the file.
            length: bytes; all clusters that they touch are meant.
        """
        first = offset >> self.cluster_bits
        count = -(-(offset + length) // self.cluster_size) - first
        last = self.freed[-1] if self.freed else None
        if last is not None and last.first + last.clusters == first:
            self.freed[-1] = Run(last.first, last.clusters + count)
        else:
            self.freed.append(Run(first, count))

    def begin_read(self) -> int:
        """Somebody is going to read where the tables say now; what lies there stays until `end_read`."""
        epoch = self._epoch
        self._readers[epoch] = self._readers.get(epoch, 0) + 1
        return epoch

    def end_read(self, epoch: int) -> None:
        """The opposite of `begin_read`, with what it gave."""
        left = self._readers[epoch] - 1
        if left:
            self._readers[epoch] = left
        else:
            del self._readers[epoch]

    # --- writing tables ------------------------------------------------------------------------------------

    @property
    def is_clean(self) -> bool:
        """Whether everything is on disk."""
        return not (
            self.l2.dirty
            or self.dirty_l1
            or self.freed
            or self._waiting
            or ((self.blocks.dirty or self.refcounts.dirty_entries or self.refcounts.table_moved) and not self.lazy)
        )

    async def barrier(self) -> None:
        """Make everything that was written durable."""
        if self.data_file is not None:
            await self.data_file.flush()
        await self.file.flush()

    async def commit(self) -> None:
        """Write everything that has changed; see the module's text. What comes meanwhile is for the next one.

        Raises:
            OSError: something can't be written; it counts as changed, still.
        """
        if self.is_clean:
            return
        self.check_fence()
        async with self.commit_lock:
            if self.lazy:
                await self.set_dirty(on=True)
            freed, self.freed = self.freed, []
            tables = self.l2.take_dirty()
            entries, self.dirty_l1 = self.dirty_l1, set()
            # What is written in the third step is what the tables say now: later changes may point to data that
            # the barrier does not cover.
            pieces = [
                (table.offset + start, to_disk(table.words[start // 8 : stop // 8]))
                for _, table, first, last in tables
                if not table.is_new
                for start, stop in (whole_sectors(first, last, 8, self.cluster_size),)
            ]
            new = [(table, to_disk(table.words)) for _, table, _, _ in tables if table.is_new]
            pieces += self._l1_pieces(entries)
            written = False
            try:
                if not self.lazy:
                    await self._write_counts()
                await self._write_pieces((table.offset, data) for table, data in new)
                if pieces or new:
                    await self.barrier()
                    for table, _ in new:
                        table.is_new = False
                    await self._write_pieces(pieces)
                written = True
            finally:
                self.l2.give_back(tables, written=written)
                if not written:
                    self.dirty_l1 |= entries
                    self.freed = freed + self.freed
            await self._give_back(freed)

    async def write_counts_now(self) -> None:
        """Make the counts of all clusters that were taken durable, also those that would be written late."""
        async with self.commit_lock:
            await self.write_counts_locked()

    async def write_counts_locked(self) -> None:
        """The same for whoever holds `commit_lock`."""
        if self.lazy:
            await self.set_dirty(on=True)
        else:
            await self._write_counts()
        await self.barrier()

    async def commit_all(self) -> None:
        """Write everything, also what the writing itself changes; nobody else is at work."""
        while not self.is_clean:
            await self.commit()

    async def settle(self) -> None:
        """Write everything, with counts that were left for later: the file is as it would be if this were closed."""
        late = self.lazy
        try:
            await self.close()
        finally:
            self.lazy = late

    async def close(self) -> None:
        """Write everything, with counts that were left for later."""
        if self.marked and self.fence is None:
            await self.commit_all()
            self.lazy = False
            await self.commit_all()
            await self.barrier()
            await self.set_dirty(on=False)
        else:
            await self.commit_all()

    def _l1_pieces(self, entries: Iterable[int]) -> list[tuple[int, bytes]]:
        per_sector = SECTOR // 8
        base = self.header.l1_table_offset
        return [
            (base + sector * SECTOR, to_disk(self.l1[sector * per_sector : (sector + 1) * per_sector]))
            for sector in sorted({entry // per_sector for entry in entries})
        ]

    async def _write_pieces(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            await self.write_metadata(offset, data)

    async def write_metadata(self, offset: int, data: bytes) -> None:
        """Write bytes of the image's own structures, if they are known to lie there."""
        self.check_fence()
        first, last = offset >> self.cluster_bits, (offset + len(data) - 1) >> self.cluster_bits
        if not all(cluster in self.metadata for cluster in range(first, last + 1)):
            raise await self.corrupted("metadata is about to be written where none was", offset, writing=True)
        await self.file.write(offset, memoryview(data), 0)

    async def _write_counts(self) -> None:
        """Write the refcount blocks, and what points to them."""
        counts = self.refcounts
        taken = self.blocks.take_dirty()
        written = False
        try:
            for _, block, first, last in taken:
                self.metadata.add(block.offset >> self.cluster_bits)
                if block.is_new or counts.order < 3:
                    await self.write_metadata(block.offset, pack(block.words, counts.order))
                else:
                    width = (1 << counts.order) // 8
                    start, stop = whole_sectors(first, last, width, self.cluster_size)
                    data = pack(block.words[start // width : stop // width], counts.order)
                    await self.write_metadata(block.offset + start, data)
            written = True
        finally:
            self.blocks.give_back(taken, written=written)
        if counts.table_moved or counts.dirty_entries:
            await self.barrier()
            for _, block, _, _ in taken:
                block.is_new = False
            await self._write_refcount_table()

    async def _write_refcount_table(self) -> None:
        counts, header = self.refcounts, self.header
        if counts.table_moved:
            await self._move_refcount_table()
            return
        entries, counts.dirty_entries = counts.dirty_entries, set()
        per_sector = SECTOR // 8
        try:
            for sector in sorted({entry // per_sector for entry in entries}):
                data = to_disk(counts.table[sector * per_sector : (sector + 1) * per_sector])
                await self.write_metadata(header.refcount_table_offset + sector * SECTOR, data)
        except BaseException:
            counts.dirty_entries |= entries
            raise

    async def _move_refcount_table(self) -> None:
        """Write the refcount table to another place, where there is room for all its entries."""
        counts, header = self.refcounts, self.header
        while True:
            length = len(counts.table) * 8
            offset = await self.allocate_metadata(length)
            if len(counts.table) * 8 == length:
                break
            await self.release(Run(offset >> self.cluster_bits, length >> self.cluster_bits))
        counts.table_moved = False
        taken = self.blocks.take_dirty()
        written = False
        try:
            for _, block, _, _ in taken:
                self.metadata.add(block.offset >> self.cluster_bits)
                await self.write_metadata(block.offset, pack(block.words, counts.order))
            entries, counts.dirty_entries = counts.dirty_entries, set()
            await self.write_metadata(offset, to_disk(counts.table))
            await self.barrier()
            old = header.refcount_table_offset, header.refcount_table_clusters
            header.refcount_table_offset, header.refcount_table_clusters = offset, length >> self.cluster_bits
            await self.write_fields(48, 60)
            written = True
        finally:
            self.blocks.give_back(taken, written=written)
            if not written:
                counts.table_moved = True
        for _, block, _, _ in taken:
            block.is_new = False
        self.freed.append(Run(old[0] >> self.cluster_bits, old[1]))
        self.metadata.difference_update(range(old[0] >> self.cluster_bits, (old[0] >> self.cluster_bits) + old[1]))
        del entries

    async def _give_back(self, freed: Sequence[Run]) -> None:
        """Nothing on disk points to these clusters any more, once another barrier has passed."""
        if freed:
            try:
                await self.barrier()
            except BaseException:
                self.freed = [*freed, *self.freed]
                raise
            self._waiting.append((self._epoch, list(freed)))
            self._epoch += 1
        while self._waiting and not any(epoch <= self._waiting[0][0] for epoch in self._readers):
            _, runs = self._waiting.pop(0)
            for run in runs:
                await self.drop_references(run)

    async def drop_references(self, run: Run) -> None:
        """Clusters lose a reference: nothing on disk points to them any more (see `give_up` for those where it does).

        Raises:
            OSError: counts can't be read, or the image is corrupt.
        """
        try:
            if self.discard_freed:
                # While they still count as used: who takes them next must not have his bytes discarded.
                for free in await self.refcounts.used_once(run):
                    await self._discard(free)
            unused = await self.refcounts.change(run.first, run.clusters, -1)
        except ImageError as problem:
            raise await self.corrupted(problem.problem, problem.offset, writing=True) from problem
        for free in unused:
            self.metadata.difference_update(range(free.first, free.first + free.clusters))

    async def _discard(self, run: Run) -> None:
        offset = run.first << self.cluster_bits
        length = min(run.clusters << self.cluster_bits, self.file.size - offset)
        try:
            if length > 0:
                await self.file.discard(offset, length)
        except OSError as problem:
            # A hint that was not followed; the clusters are free all the same.
            log.debug("%s: discard at %d for %d bytes: %s", self.name, offset, length, problem)

    def no_space(self, what: str) -> OSError:
        """The error of a file that is full."""
        return io_error(errno.ENOSPC, self.name, what)
