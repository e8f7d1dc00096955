"""Reference counts of host clusters, and with them the allocator (section "Host cluster management").

Counts change here in memory only; `Image.commit` writes them, increments before what refers to the cluster and
decrements after. So a crash leaks clusters at worst.
"""

import errno
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pynbd.block.errors import ImageError, io_error
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.header import Header
from pynbd.formats.qcow2.tables import Table, TableCache, from_disk, to_disk

TYPECODES = ("B", "B", "B", "B", "H", "I", "Q")
"""Of the arrays that hold counts of 1 to 64 bits; those below a byte have a byte each in memory."""


def _unpack_table(bits: int) -> list[bytes]:
    per_byte, mask = 8 // bits, (1 << bits) - 1
    return [bytes(byte >> (i * bits) & mask for i in range(per_byte)) for byte in range(256)]


def unpack(data: bytes, order: int) -> "array[int]":
    """The counts of a refcount block. Those below a byte begin with the least significant bits."""
    if order >= 3:
        return from_disk(data, TYPECODES[order])
    expanded = _unpack_table(1 << order)
    return array("B", b"".join([expanded[byte] for byte in data]))


def pack(counts: "array[int]", order: int) -> bytes:
    """The refcount block that holds some counts."""
    if order >= 3:
        return to_disk(counts)
    bits = 1 << order
    per_byte = 8 // bits
    packed = bytearray(len(counts) // per_byte)
    for i in range(per_byte):
        shift = i * bits
        for at, count in enumerate(counts[i::per_byte]):
            packed[at] |= count << shift
    return bytes(packed)


class Run(NamedTuple):
    """Consecutive host clusters, by number."""

    first: int
    clusters: int


class Refcounts:
    """The counts of all host clusters of one image.

    Args:
        header: the image's.
        table: the refcount table.
        blocks: the refcount blocks, by index in the table.
        image: its name for messages.
        may_use: says whether a free cluster may be given away (see `Image.is_metadata`).
    """

    def __init__(
        self, header: Header, table: "array[int]", blocks: TableCache, image: str, may_use: Callable[[int], bool]
    ) -> None:
        self.header = header
        self.table = table
        self.blocks = blocks
        self.image = image
        self.may_use = may_use
        self.order = header.refcount_order
        self.most = (1 << (1 << self.order)) - 1
        """The largest count that fits."""
        self.per_block = header.cluster_size * 8 >> self.order
        self.first_free = 0
        """All clusters before this one are in use."""
        self.packing = -1
        """The cluster whose rest is free for more compressed data; -1 if there is none."""
        self.dirty_entries: set[int] = set()
        """Entries of the refcount table that are not on disk as they are here."""
        self.table_moved = False
        """The table has no room on disk for its entries any more: it needs another place."""

    # --- looking -------------------------------------------------------------------------------------------

    def block_offset(self, index: int) -> int:
        """Where a refcount block lies, 0 if there is none.

        Raises:
            ImageError: the entry of the table is wrong.
        """
        if index >= len(self.table):
            return 0
        entry = self.table[index]
        if entry & (self.header.cluster_size - 1) or entry >= layout.MAX_HOST_OFFSET:
            raise ImageError(
                self.image,
                f"entry {index} of the refcount table is {entry:#x}, expected a multiple of {self.header.cluster_size}",
                self.header.refcount_table_offset + 8 * index,
            )
        return entry

    async def block(self, index: int) -> Table | None:
        """A refcount block, None if there is none: all its counts are 0."""
        offset = self.block_offset(index)
        return await self.blocks.load(index, offset) if offset else None

    async def get(self, cluster: int) -> int:
        """The count of one cluster."""
        block = await self.block(cluster // self.per_block)
        return block.words[cluster % self.per_block] if block is not None else 0

    def by_block(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(block, first, last) of all pieces of a run of clusters, by block and entries in it."""
        end = first + count
        while first < end:
            index, start = divmod(first, self.per_block)
            stop = min(start + end - first, self.per_block)
            yield index, start, stop
            first += stop - start

    async def counts(self, first: int, count: int) -> "array[int]":
        """The counts of some clusters."""
        found = array(TYPECODES[self.order])
        for index, start, stop in self.by_block(first, count):
            block = await self.block(index)
            found += block.words[start:stop] if block is not None else array(found.typecode, [0]) * (stop - start)
        return found

    async def used_once(self, run: Run) -> list[Run]:
        """Those of some clusters that would be free with one reference less."""
        found: list[Run] = []
        for index, start, stop in self.by_block(run.first, run.clusters):
            block = await self.block(index)
            if block is None:
                continue
            counts, first = block.words[start:stop], index * self.per_block + start
            if is_uniform(counts, counts[0]):
                if counts[0] == 1:
                    join(found, first, stop - start)
                continue
            for at, count in enumerate(counts, first):
                if count == 1:
                    join(found, at)
        return found

    # --- changing ------------------------------------------------------------------------------------------

    async def change(self, first: int, count: int, by: int, *, in_use: bool = False) -> list[Run]:
        """Add to the counts of some clusters.

        Args:
            first, count: the clusters.
            by: what to add.
            in_use: they have a reference already; so it is wrong if nobody counted it.

        Returns:
            those that nobody uses any more.

        Raises:
            OSError: EFBIG if a count would not fit; nothing was changed.
            ImageError: a count would become less than 0: the image is wrong; some were changed. Or they were to be in
                use, and one is not; nothing was changed.
        """
        if by > 0:
            await self._check_room(first, count, by, in_use=in_use)
        freed: list[Run] = []
        for index, start, stop in self.by_block(first, count):
            while await self.block(index) is None:
                if by < 0:
                    raise self._underflow(index * self.per_block + start)
                await self._new_block(index)
            # No await from here on: what follows is of one piece.
            block = self.blocks.get(index)
            assert block is not None
            self.blocks.mark(index, start, stop)
            self._add(block.words, index * self.per_block, start, stop, by, freed)
        if freed:
            self.first_free = min(self.first_free, freed[0].first)
        return freed

    async def _check_room(self, first: int, count: int, by: int, *, in_use: bool) -> None:
        """Whether so many more references can be counted."""
        for index, start, stop in self.by_block(first, count):
            block = await self.block(index)
            counts = block.words[start:stop] if block is not None else array("B", [0])
            same = is_uniform(counts, counts[0])
            if in_use and (not counts[0] if same else 0 in counts):
                offset = (index * self.per_block + start + counts.index(0)) * self.header.cluster_size
                raise ImageError(self.image, "this cluster is in use, but nobody counted it", offset)
            if (counts[0] if same else max(counts)) + by > self.most:
                what = f"more than {self.most} references to a cluster ({1 << self.order} refcount bits)"
                raise io_error(errno.EFBIG, self.image, what)

    def _add(self, counts: "array[int]", base: int, start: int, stop: int, by: int, freed: list[Run]) -> None:
        """Add to the entries [start, stop) of the block whose first cluster is `base`; notes what becomes free."""
        piece = counts[start:stop]
        value = piece[0] + by
        if value >= 0 and is_uniform(piece, piece[0]):
            # Neighbours mostly have the same count; then this is faster by far.
            counts[start:stop] = array(counts.typecode, [value]) * (stop - start)
            if not value:
                join(freed, base + start, stop - start)
                if base + start <= self.packing < base + stop:
                    self.packing = -1
            return
        for at in range(start, stop):
            value = counts[at] + by
            if value < 0:
                raise self._underflow(base + at)
            counts[at] = value
            if not value:
                join(freed, base + at)
                if base + at == self.packing:
                    self.packing = -1

    def _underflow(self, cluster: int) -> ImageError:
        offset = cluster * self.header.cluster_size
        return ImageError(self.image, "this cluster is given up, but nobody counted it as used", offset)

    # --- allocating ----------------------------------------------------------------------------------------

    async def allocate(self, most: int, *, all_of_it: bool = False) -> Run:
        """Take free clusters that follow each other; their count becomes 1.

        Args:
            most: so many are wanted.
            all_of_it: fewer will not do.

        Raises:
            OSError: EFBIG, there is no place that the format could point to.
        """
        at = self.first_free
        taken = False
        while not taken:
            at, length = await self._find(at, most, all_of_it=all_of_it)
            held: list[Table] = []
            try:
                made = await self._have_blocks(at, length, held)
                taken = not made and self._take(at, length)
            finally:
                for block in held:
                    block.busy -= 1
        if at == self.first_free:
            self.first_free = at + length
        return Run(at, length)

    def _take(self, first: int, count: int) -> bool:
        """Take some clusters whose blocks are at hand; False if somebody else has taken one meanwhile."""
        parts = [(self.blocks.get(index), index, start, stop) for index, start, stop in self.by_block(first, count)]
        if any(block is None or any(block.words[start:stop]) for block, _, start, stop in parts):
            return False
        for block, index, start, stop in parts:
            assert block is not None
            block.words[start:stop] = array(block.words.typecode, [1]) * (stop - start)
            self.blocks.mark(index, start, stop)
        return True

    def take_now(self) -> int:
        """Take one free cluster, if that can be done at once.

        Returns:
            its number; -1 if a block must be loaded or made first.
        """
        index, start = divmod(self.first_free, self.per_block)
        block = self.blocks.get(index)
        if block is None:
            return -1
        try:
            start = block.words.index(0, start)
        except ValueError:
            self.first_free = (index + 1) * self.per_block
            return -1
        cluster = index * self.per_block + start
        if not self.may_use(cluster):
            return -1
        block.words[start] = 1
        self.blocks.mark(index, start, start + 1)
        self.first_free = cluster + 1
        return cluster

    def put_back(self, cluster: int) -> None:
        """Give back what `take_now` gave, at once."""
        index, start = divmod(cluster, self.per_block)
        block = self.blocks.get(index)
        assert block is not None
        block.words[start] = 0
        self.first_free = min(self.first_free, cluster)

    async def _find(self, at: int, most: int, *, all_of_it: bool) -> tuple[int, int]:
        """(first, count) of free clusters from `at` on."""
        found = 0
        while True:
            index, start = divmod(at + found, self.per_block)
            block = await self.block(index)
            counts = block.words if block is not None else None
            if not found:
                if counts is not None:
                    try:
                        start = counts.index(0, start)
                    except ValueError:
                        if at == self.first_free:
                            self.first_free = (index + 1) * self.per_block
                        at = (index + 1) * self.per_block
                        continue
                first = index * self.per_block + start
                if at == self.first_free:
                    self.first_free = first
                at = first
                if at * self.header.cluster_size >= layout.MAX_HOST_OFFSET:
                    raise io_error(errno.EFBIG, self.image, "no free clusters below the end of what can be pointed to")
            while found < most and start < self.per_block and (counts is None or not counts[start]):
                if not self.may_use(at + found):
                    break
                found += 1
                start += 1
            if found == most or (found and start < self.per_block and not all_of_it):
                return at, found
            if start < self.per_block:
                at, found = at + found + 1, 0

    async def _have_blocks(self, first: int, count: int, held: list[Table]) -> bool:
        """Load the blocks that some clusters need, and make those that are missing.

        Args:
            first, count: the clusters.
            held: gets those that were loaded. They are `busy`, so that they stay here although they are many.

        Returns:
            whether one had to be made, which may lie among them.
        """
        made = False
        for index, _, _ in self.by_block(first, count):
            block = await self.block(index)
            if block is None:
                await self._new_block(index)
                made = True
            else:
                block.busy += 1
                held.append(block)
        return made

    async def _new_block(self, index: int) -> None:
        """Make a refcount block, in a free cluster: one that it counts itself, if need be."""
        while index >= len(self.table):
            self._grow_table(index)
        cluster, _ = await self._find(self.first_free, 1, all_of_it=True)
        if self.table[index]:
            return  # somebody else was quicker
        home = cluster // self.per_block
        if home != index and await self.block(home) is None:
            # The place is counted by a block that is missing as well: that one first, and it counts itself.
            await self._new_block(home)
            return
        holder = self.blocks.get(home)
        if holder is None and home != index:
            return
        if holder is not None and holder.words[cluster % self.per_block]:
            return
        block = Table(cluster * self.header.cluster_size, self._no_counts(), is_new=True)
        counted = block if home == index else holder
        assert counted is not None
        at = cluster % self.per_block
        counted.words[at] = 1
        if counted is holder:
            self.blocks.mark(home, at, at + 1)  # before another one comes in, which might push it out
        self.blocks.add(index, block)
        self.blocks.mark(index, 0, self.per_block)
        self.table[index] = block.offset
        self.dirty_entries.add(index)

    def _no_counts(self) -> "array[int]":
        return array(TYPECODES[self.order], [0]) * self.per_block

    def _grow_table(self, index: int) -> None:
        """Make room for another entry, in memory; `Image.commit` finds it a place on disk."""
        per_cluster = self.header.cluster_size // 8
        clusters = -(-(index + 1) // per_cluster)
        clusters = max(clusters, len(self.table) // per_cluster * 3 // 2)
        most = max(layout.MAX_REFCOUNT_TABLE_BYTES // self.header.cluster_size, 1)
        if index >= most * per_cluster:
            raise io_error(errno.EFBIG, self.image, f"a refcount table of more than {most} clusters")
        wanted = min(clusters, most) * per_cluster
        self.table.extend(array("Q", [0]) * (wanted - len(self.table)))
        self.table_moved = True


def is_uniform(counts: "array[int]", count: int) -> bool:
    """Whether all counts are the same."""
    return counts == array(counts.typecode, [count]) * len(counts)


def join(runs: list[Run], first: int, clusters: int = 1) -> None:
    """Add clusters behind all others: to the last run, if they follow that."""
    if runs and runs[-1].first + runs[-1].clusters == first:
        runs[-1] = Run(runs[-1].first, runs[-1].clusters + clusters)
    else:
        runs.append(Run(first, clusters))
