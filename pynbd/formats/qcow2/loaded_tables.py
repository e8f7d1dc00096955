"""The tables of an image in memory: L1 and the refcount table whole, the others as they are asked for."""

from array import array

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.header import Header
from pynbd.formats.qcow2.header_file import HeaderFile, Storage
from pynbd.formats.qcow2.layout import OFFSET_MASK
from pynbd.formats.qcow2.overlap import Kind, Metadata
from pynbd.formats.qcow2.refcounts import Refcounts, unpack
from pynbd.formats.qcow2.tables import Table, TableCache, from_disk


class LoadedTables(HeaderFile):
    """A file with a header, and the tables that it leads to.

    Args:
        file, header, name: see `HeaderFile`.
        l2_cache, refcount_cache: bytes of tables that are kept in memory.
        l2_slice_bytes: pieces in which L2 tables are read and kept; 0 for whole tables.
        for_check: tables that lie behind the end of the file are no error yet.
    """

    def __init__(
        self,
        file: Storage,
        header: Header,
        name: str,
        *,
        l2_cache: int,
        refcount_cache: int,
        l2_slice_bytes: int,
        for_check: bool,
    ) -> None:
        super().__init__(file, header, name)
        self.for_check = for_check
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.l1: array[int] = array("Q")
        self.slice_bytes = l2_slice_bytes or self.cluster_size
        self.slices = self.cluster_size // self.slice_bytes
        """Of each L2 table."""
        self.l2 = TableCache(l2_cache // self.slice_bytes, self._read_slice)
        """Slices of L2 tables: those of the table of the first L1 entry, then those of the second …"""
        self.blocks = TableCache(refcount_cache // self.cluster_size, self._read_block)
        self.refcounts = Refcounts(header, array("Q"), self.blocks, name, self._may_use)
        self.metadata = Metadata(self.cluster_bits)
        """All clusters that hold the image's own structures, as far as they are known."""
        self.fresh_from = 0
        """Host clusters from here on were never written since the file ends here: they read as zeroes."""

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
        self.metadata.clear()
        await self.load()

    def recount(self, entries: "array[int]", clusters: int) -> None:
        """The counts lie elsewhere, perhaps with another width: these are the entries of their table."""
        self.blocks = TableCache(self.blocks.most, self._read_block)
        table = array("Q", bytes(clusters * self.cluster_size))
        table[: len(entries)] = entries
        self.refcounts = Refcounts(self.header, table, self.blocks, self.name, self._may_use)

    # --- what belongs to the image itself ----------------------------------------------------------------

    def _note_metadata(self) -> None:
        header, bits, note = self.header, self.cluster_bits, self.metadata.note
        note(Kind.ACTIVE_L1, header.l1_table_offset, header.l1_size * 8)
        note(Kind.REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters << bits)
        for kind, entries, mask in (
            (Kind.ACTIVE_L2, self.l1, OFFSET_MASK),
            (Kind.REFCOUNT_BLOCK, self.refcounts.table, layout.REFCOUNT_BLOCK_MASK),
        ):
            if any(entries):
                self.metadata.note_clusters(kind, {(entry & mask) >> bits for entry in entries if entry})
        if header.crypto is not None:
            note(Kind.ENCRYPTION_HEADER, header.crypto.offset, header.crypto.length)

    def _may_use(self, cluster: int) -> bool:
        return cluster not in self.metadata.kinds

    # --- reading -----------------------------------------------------------------------------------------

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
        await self._check_table(offset)
        return from_disk(await self.read_bytes(offset, self.cluster_size))

    async def _check_table(self, offset: int) -> None:
        if offset & (self.cluster_size - 1):
            what = f"an L1 table points to an L2 table here, expected a multiple of {self.cluster_size}"
            raise await self.corrupted(what, offset)
        if offset + self.cluster_size > round_up(self.file.size, self.cluster_size):
            raise await self.corrupted(f"an L2 table lies here, but the file ends at {self.file.size}", offset)

    async def _read_slice(self, offset: int) -> "array[int]":
        return from_disk(await self.read_bytes(offset, self.slice_bytes))

    async def _read_block(self, offset: int) -> "array[int]":
        if offset + self.cluster_size > round_up(self.file.size, self.cluster_size):
            raise await self.corrupted(f"a refcount block lies here, but the file ends at {self.file.size}", offset)
        return unpack(bytes(await self.read_bytes(offset, self.cluster_size)), self.refcounts.order)

    async def l2_slice(self, number: int) -> Table:
        """A slice of an L2 table of the disk, which must have that table.

        Raises:
            OSError: it can't be read, or is not where it should be.
        """
        table = self.l2.get(number)
        if table is not None:
            return table
        l1_index, part = divmod(number, self.slices)
        offset = self.l1[l1_index] & OFFSET_MASK
        await self._check_table(offset)
        return await self.l2.load(number, offset + part * self.slice_bytes)

    def l2_slices(self, l1_index: int) -> range:
        """The numbers of all slices of an L1 entry's table."""
        return range(l1_index * self.slices, (l1_index + 1) * self.slices)

    async def l2_words(self, l1_index: int) -> "array[int]":
        """All entries of an L2 table of the disk, which must have that table: not to be changed.

        Raises:
            OSError: it can't be read, or is not where it should be.
        """
        if self.slices == 1:
            return (await self.l2_slice(l1_index)).words
        words = await self.read_table(self.l1[l1_index] & OFFSET_MASK)
        each = self.slice_bytes // 8
        for part, number in enumerate(self.l2_slices(l1_index)):
            if (table := self.l2.get(number)) is not None:
                words[part * each : (part + 1) * each] = table.words
        return words

    def forget_l2(self, l1_index: int) -> None:
        """Drop an L2 table from memory, changed or not."""
        for number in self.l2_slices(l1_index):
            self.l2.forget(number)
