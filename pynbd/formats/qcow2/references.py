"""The references that a whole L1 table holds: to its L2 tables, and through them to clusters of data.

Snapshots share all of that. What is shared has a count of more than 1 and no COPIED flag, so that whoever writes takes
another cluster. Counts and flags of many tables can't change at once: `in_doubt` marks the image meanwhile.
"""

import contextlib
import logging
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

from pynbd.block.errors import ImageError
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK
from pynbd.formats.qcow2.mapping import ClusterMapping
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import Run, is_uniform, join
from pynbd.formats.qcow2.runs import RunFinder, number_of, repeated, words_of
from pynbd.formats.qcow2.tables import to_disk

log = logging.getLogger(__name__)

MAX_CHANGED_TABLES = 256
"""L2 tables that are changed before they are written."""


@contextlib.asynccontextmanager
async def in_doubt(image: Image) -> AsyncIterator[None]:
    """Counts and flags are going to change in many steps: what a crash leaves of them is repaired when the image is
    opened again. (Images of compat 0.10 can't be marked; the steps are such that clusters leak at worst.)

    Everything is on disk when it ends. If it does not get there, the mark stays until the image is closed.
    """
    marked = image.header.version >= 3
    if marked:
        await image.set_dirty(on=True)
    try:
        yield
    finally:
        await image.commit_all()
        await image.barrier()
        if marked and not image.lazy:
            await image.set_dirty(on=False)


class References:
    """What L1 tables of one image refer to. Nobody else is at work on the image meanwhile.

    Args:
        image: the image.
        map: its mapping.
    """

    def __init__(self, image: Image, map: ClusterMapping) -> None:
        self.image = image
        self.map = map
        self.runs = RunFinder(map.words, map.cluster)
        self._flags: dict[int, int] = {}

    async def table(self, l1_index: int, offset: int) -> "array[int]":
        """The entries of an L2 table of any L1 table: not to be changed.

        Raises:
            OSError: it can't be read.
        """
        active = self.image.l1
        if l1_index < len(active) and active[l1_index] & OFFSET_MASK == offset:
            return await self.image.l2_words(l1_index)
        return await self.image.read_table(offset)

    # --- counts --------------------------------------------------------------------------------------------

    async def _runs(self, l1_index: int, offset: int) -> list[tuple[Run, int]]:
        """(clusters, references to each) of an L2 table, its own cluster among them."""
        bits, cluster = self.map.bits, self.map.cluster
        words = await self.table(l1_index, offset)
        found = [(Run(offset >> bits, 1), 1)]
        for index, count, entry in self.runs.data_runs(words):
            host = entry & OFFSET_MASK
            if host & (cluster - 1):
                what = f"entry {index} points to a cluster at {host:#x}, expected a multiple of {cluster}"
                raise await self.image.corrupted(what, offset)
            found.append((Run(host >> bits, count), 1))
        packed: dict[int, int] = {}
        for entry in self.runs.compressed(words):
            place, length = self.map.compressed_place(entry)
            for number in range(place >> bits, ((place + length - 1) >> bits) + 1):
                packed[number] = packed.get(number, 0) + 1
        found += grouped(packed)
        return found

    async def add(self, l1: "array[int]", kind: Kind) -> None:
        """Another L1 table with the same entries is going to be: all that they lead to gets one more reference.

        Args:
            l1: the entries.
            kind: what their L2 tables become, or are already.

        Raises:
            OSError: EFBIG, a count would not fit; or something can't be read. The counts are as they were.
        """
        done = 0
        try:
            for index, entry in enumerate(l1):
                if entry & OFFSET_MASK:
                    await self._add_table(index, entry & OFFSET_MASK)
                    self.image.metadata.note(kind, entry & OFFSET_MASK, self.map.cluster)
                done = index + 1
        except BaseException:
            await self.take_back(l1[:done])
            raise

    async def _add_table(self, l1_index: int, offset: int) -> None:
        image = self.image
        counts, applied = image.refcounts, list[tuple[Run, int]]()
        try:
            for run, times in await self._runs(l1_index, offset):
                await counts.change(run.first, run.clusters, times, in_use=True)
                applied.append((run, times))
        except BaseException as problem:
            for run, times in applied:
                await counts.change(run.first, run.clusters, -times)
            if isinstance(problem, ImageError):
                raise await image.corrupted(problem.problem, problem.offset, writing=True) from problem
            raise
        await self._relieve()

    async def take_back(self, l1: "array[int]") -> None:
        """The opposite of `add`, for something that failed; at worst clusters leak."""
        try:
            await self.drop(l1, Cause.OTHER)
        except OSError as problem:
            log.error(
                "%s: clusters leak, for something failed while something else was undone: %s", self.image.name, problem
            )

    async def drop(self, l1: "array[int]", cause: Cause) -> None:
        """An L1 table is gone from the disk: all that it led to loses a reference.

        Args:
            l1: its entries.
            cause: why the data are given up.

        Raises:
            OSError: counts or tables can't be read; the rest leaks.
        """
        for index, entry in enumerate(l1):
            if not entry & OFFSET_MASK:
                continue
            for number, (run, times) in enumerate(await self._runs(index, entry & OFFSET_MASK)):
                for _ in range(times):
                    if number:
                        await self.image.given_up.drop_references(run, cause, structure=False)
                    else:
                        await self.image.given_up.drop_references(run, Cause.OTHER, structure=True)
            await self._relieve()

    async def _relieve(self) -> None:
        """Write counts, if too many blocks of them wait for that."""
        if len(self.image.blocks.dirty) > self.image.blocks.most // 2:
            await self.image.commit()

    # --- flags ---------------------------------------------------------------------------------------------

    def without_copied(self, words: "array[int]") -> "array[int]":
        """The entries of an L2 table, or of a slice of one, without any COPIED flag."""
        flags = self._copied_flags(len(words) // self.map.words)
        return words_of((number_of(words) | flags) ^ flags, len(words))

    def _copied_flags(self, entries: int) -> int:
        """A number of so many entries that have this flag and nothing else."""
        if entries not in self._flags:
            self._flags = {entries: repeated(COPIED, entries, self.map.words)}
        return self._flags[entries]

    async def clear_copied(self) -> None:
        """All that the active L1 table leads to is shared from now on."""
        image = self.image
        for index in self.tables():
            for number in image.l2_slices(index):
                words = await self.changeable(number)
                cleared = self.without_copied(words)
                if cleared != words:
                    words[:] = cleared
                    image.l2.mark(number, 0, len(words))
            self._set_l1_copied(index, on=False)

    async def clear_copied_below(self, l1: "array[int]") -> None:
        """The same for another L1 table: its L2 tables are changed on disk."""
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            words = await self.table(index, offset)
            cleared = self.without_copied(words)
            if cleared != words:
                await self._write_table(index, offset, cleared)

    async def _write_table(self, l1_index: int, offset: int, words: "array[int]") -> None:
        image = self.image
        image.metadata.note(Kind.INACTIVE_L2, offset, image.cluster_size)
        await image.write_metadata(Kind.ANY_L2, offset, to_disk(words))
        if l1_index < len(image.l1) and image.l1[l1_index] & OFFSET_MASK == offset:
            image.forget_l2(l1_index)

    async def restore_copied(self, indexes: Iterable[int]) -> None:
        """Set or clear the COPIED flags of some L2 tables of the active L1 table as the counts say."""
        image, bits = self.image, self.map.bits
        for index in indexes:
            for number in image.l2_slices(index):
                await self._restore_copied_in(number)
            self._set_l1_copied(index, on=await image.refcounts.get((image.l1[index] & OFFSET_MASK) >> bits) == 1)

    async def _restore_copied_in(self, number: int) -> None:
        """The same for a slice of an L2 table."""
        image, step, bits = self.image, self.map.words, self.map.bits
        words = await self.changeable(number)
        for at, count, entry in list(self.runs.data_runs(words)):
            counts = await image.refcounts.counts((entry & OFFSET_MASK) >> bits, count)
            alone = count if is_uniform(counts, 1) else counts.count(1)
            if alone == (count if entry & COPIED else 0):
                continue
            words = await self.changeable(number)  # it may have been read anew
            first, last = at * step, (at + count) * step
            if alone in (0, count):
                flags = self._copied_flags(count)
                changed = number_of(words[first:last]) | flags
                words[first:last] = words_of(changed if alone else changed ^ flags, last - first)
            else:
                for each, references in enumerate(counts):
                    place = words[first + each * step]
                    words[first + each * step] = place | COPIED if references == 1 else place & ~COPIED
            image.l2.mark(number, first, last)

    def tables(self) -> list[int]:
        """The indexes of the active L1 table that lead to an L2 table."""
        return [index for index, entry in enumerate(self.image.l1) if entry & OFFSET_MASK]

    async def changeable(self, number: int) -> "array[int]":
        """The entries of a slice of an L2 table of the disk, to be changed where they are before the next `await`."""
        image = self.image
        if len(image.l2.dirty) > min(image.l2.most // 2, MAX_CHANGED_TABLES):
            await image.commit()
        return (await image.l2_slice(number)).words

    def _set_l1_copied(self, l1_index: int, *, on: bool) -> None:
        entry = self.image.l1[l1_index]
        wanted = entry | COPIED if on else entry & ~COPIED
        if wanted != entry:
            self.image.l1[l1_index] = wanted
            self.image.dirty_l1.add(l1_index)


def grouped(references: Mapping[int, int]) -> Iterator[tuple[Run, int]]:
    """(clusters, references to each) from the references of single clusters."""
    times, runs = 0, list[Run]()
    for cluster in sorted(references):
        if references[cluster] != times:
            yield from ((run, times) for run in runs)
            times, runs = references[cluster], []
        join(runs, cluster)
    yield from ((run, times) for run in runs)
