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
from array import array
from collections.abc import Iterable

from pynbd.formats.qcow2.counts_writing import write_counts
from pynbd.formats.qcow2.given_up import Cause, GivenUp
from pynbd.formats.qcow2.header import Header
from pynbd.formats.qcow2.header_file import Storage
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK
from pynbd.formats.qcow2.loaded_tables import LoadedTables
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import Run
from pynbd.formats.qcow2.tables import SECTOR, Table, joined, to_disk, whole_sectors

MAX_DIRTY_TABLES = 256
"""L2 tables that are changed and not written, at most; then they are, without anybody's flush."""


class Image(LoadedTables):
    """One image, opened.

    Args:
        file: where it lies.
        header: what `read_header` gave.
        name: for messages.
        l2_cache, refcount_cache: bytes of tables that are kept in memory.
        l2_slice_bytes: see `LoadedTables`.
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
        l2_slice_bytes: int = 0,
        data_file: Storage | None = None,
        for_check: bool = False,
    ) -> None:
        super().__init__(
            file,
            header,
            name,
            l2_cache=l2_cache,
            refcount_cache=refcount_cache,
            l2_slice_bytes=l2_slice_bytes,
            for_check=for_check,
        )
        self.data_file = data_file
        self.dirty_l1: set[int] = set()
        self.given_up = GivenUp(self)
        self.lazy = False
        """Counts are written when the image is closed; until then it is marked dirty."""
        self.commit_lock = asyncio.Lock()
        """Held by whoever writes tables: nobody else changes what they are on disk meanwhile."""

    # --- L2 tables to be changed -------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether so many L2 tables are changed that they must be written before another one is."""
        return len(self.l2.dirty) >= MAX_DIRTY_TABLES or len(self.l2.dirty) >= self.l2.most // 2 + 1

    async def writable_l2(self, number: int) -> Table:
        """A slice of an L2 table, which is made or copied if need be, so that it may be changed.

        Only what is done before the next `await` is sure to change it.
        """
        l1_index = number // self.slices
        while True:
            if self.is_full:
                await self.commit()
            entry = self.l1[l1_index]
            if entry & COPIED and entry & OFFSET_MASK:
                return await self.l2_slice(number)
            words = (await self.l2_words(l1_index))[:] if entry & OFFSET_MASK else array("Q", bytes(self.cluster_size))
            offset = await self._new_table(words)
            if self.l1[l1_index] == entry:
                break
            await self.release_metadata(offset, self.cluster_size)  # somebody else was quicker
        if entry & OFFSET_MASK:
            self.forget_l2(l1_index)
            self.given_up.add(entry & OFFSET_MASK, self.cluster_size, Cause.OTHER, structure=True)
        each = self.slice_bytes // 8
        self.l1[l1_index] = offset | COPIED
        self.dirty_l1.add(l1_index)
        for part, at in enumerate(self.l2_slices(l1_index)):
            table = Table(offset + 8 * each * part, words[each * part : each * (part + 1)], is_new=True)
            self.l2.add(at, table)
            self.l2.mark(at, 0, each)
        return self.l2.tables[number]

    async def _new_table(self, words: "array[int]") -> int:
        """Write a new L2 table, which nothing points to yet, so that there is room for it when it is needed.

        Otherwise data could fill the disk, and be lost with the table that tells of them.

        Returns:
            its offset in the file.

        Raises:
            OSError: there is no room; the cluster is given back.
        """
        offset = await self.allocate_metadata(Kind.ACTIVE_L2, self.cluster_size)
        try:
            await self.write_metadata(Kind.ACTIVE_L2, offset, to_disk(words))
        except BaseException:
            await self.release_metadata(offset, self.cluster_size)
            raise
        return offset

    def drop_l2(self, l1_index: int) -> None:
        """An L1 entry leads to no L2 table any more; what that led to was given up before."""
        self.given_up.add(self.l1[l1_index] & OFFSET_MASK, self.cluster_size, Cause.OTHER, structure=True)
        self.l1[l1_index] = 0
        self.dirty_l1.add(l1_index)
        self.forget_l2(l1_index)

    # --- clusters ----------------------------------------------------------------------------------------

    async def allocate(self, most: int) -> tuple[Run, bool]:
        """Take clusters for data.

        Returns:
            (the clusters, whether they are known to read as zeroes).
        """
        run = await self.refcounts.allocate(most)
        fresh = run.first >= self.fresh_from
        self.fresh_from = max(self.fresh_from, run.first + run.clusters)
        return run, fresh

    async def release_rest(self, run: Run, used: int, touched: int, *, fresh: bool) -> None:
        """Give back the clusters of a run behind the first `used`.

        Args:
            run: what `allocate` gave.
            used: how many of them are needed.
            touched: behind so many of them nothing was written.
            fresh: what `allocate` said of them: otherwise somebody else may have written there before.
        """
        if used == run.clusters:
            return
        if fresh and self.fresh_from == run.first + run.clusters:
            self.fresh_from = run.first + touched  # as long as nobody else can have them
        await self.release(Run(run.first + used, run.clusters - used))

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

    async def allocate_metadata(self, kind: Kind, length: int) -> int:
        """Take consecutive clusters for `length` bytes of a structure; gives their offset."""
        run = await self.refcounts.allocate(-(-length // self.cluster_size), all_of_it=True)
        self.fresh_from = max(self.fresh_from, run.first + run.clusters)
        self.metadata.note_clusters(kind, range(run.first, run.first + run.clusters))
        return run.first << self.cluster_bits

    async def release_metadata(self, offset: int, length: int) -> None:
        """Give back clusters of `allocate_metadata` that nothing has ever pointed to."""
        first, clusters = offset >> self.cluster_bits, -(-length // self.cluster_size)
        if clusters:
            await self.release(Run(first, clusters))
            self.metadata.forget(first, clusters)

    # --- writing tables ----------------------------------------------------------------------------------

    @property
    def is_clean(self) -> bool:
        """Whether everything is on disk."""
        return not (
            self.l2.dirty
            or self.dirty_l1
            or self.given_up
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
            freed = self.given_up.take()
            tables = self.l2.take_dirty()
            entries, self.dirty_l1 = self.dirty_l1, set()
            # What is written in the third step is what the tables say now: later changes may point to data that
            # the barrier does not cover.
            pieces = [
                (table.offset + start, to_disk(table.words[start // 8 : stop // 8]))
                for _, table, first, last in tables
                if not table.is_new
                for start, stop in (whole_sectors(first, last, 8, self.slice_bytes),)
            ]
            new = [(table, to_disk(table.words)) for _, table, _, _ in tables if table.is_new]
            l1_pieces = self._l1_pieces(entries)
            written = False
            try:
                if not self.lazy:
                    await write_counts(self)
                await self._write_pieces(Kind.ANY_L2, [(table.offset, data) for table, data in new])
                if pieces or l1_pieces or new:
                    await self.barrier()
                    for table, _ in new:
                        table.is_new = False
                    await self._write_pieces(Kind.ANY_L2, pieces)
                    await self._write_pieces(Kind.ACTIVE_L1, l1_pieces)
                written = True
            finally:
                self.l2.give_back(tables, written=written)
                if not written:
                    self.dirty_l1 |= entries
                    self.given_up.put_back(freed)
            await self.given_up.give_back(freed)

    async def write_counts_now(self) -> None:
        """Make the counts of all clusters that were taken durable, also those that would be written late."""
        async with self.commit_lock:
            await self.write_counts_locked()

    async def write_counts_locked(self) -> None:
        """The same for whoever holds `commit_lock`."""
        if self.lazy:
            await self.set_dirty(on=True)
        else:
            await write_counts(self)
        await self.barrier()

    async def commit_all(self) -> None:
        """Write everything, also what the writing itself changes; nobody else is at work.

        Whoever holds places in the file loses them.
        """
        self.given_up.end_holds()
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

    async def _write_pieces(self, kind: Kind, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in joined(pieces):
            await self.write_metadata(kind, offset, data)

    async def write_metadata(self, kind: Kind, offset: int, data: bytes) -> None:
        """Write bytes of a structure, if it is known to lie there, and nothing else that is looked after.

        Raises:
            OSError: EIO, something else lies there: the image is corrupt. Or it can't be written.
        """
        self.check_fence()
        own, kinds, checked = int(kind), self.metadata.kinds, self.metadata.checked
        for cluster in range(offset >> self.cluster_bits, ((offset + len(data) - 1) >> self.cluster_bits) + 1):
            here = kinds.get(cluster, 0)
            if not here & own:
                what = f"{kind.text} is about to be written where it never was"
                raise await self.corrupted(what, offset, writing=True)
            if here & ~own & checked:
                what = f"{kind.text} is about to be written over {Kind(here & ~own & checked).text}"
                raise await self.corrupted(what, cluster << self.cluster_bits, writing=True)
        await self.file.write(offset, memoryview(data), 0)
