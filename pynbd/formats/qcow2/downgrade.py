"""An image of compat 1.1 made one of compat 0.10: what that does not know must go, or be told otherwise.

Zero clusters become nothing, or clusters that are full of zeroes. Bitmaps are lost.
"""

from array import array
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from pynbd.block.errors import OptionError
from pynbd.block.families import Progress
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.layout import OFFSET_MASK, Autoclear, Compatible, Incompatible
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import Run
from pynbd.formats.qcow2.snapshot_table import MAX_U32, read_l1
from pynbd.formats.qcow2.tables import to_disk
from pynbd.formats.qcow2.zeroing import ZERO_PIECE_BYTES

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2


async def check(driver: "Qcow2") -> None:
    """Whether what the image holds can be told in one of compat 0.10.

    Raises:
        OptionError: it can't.
    """
    kept = driver.header.incompatible & ~Incompatible.DIRTY
    if kept & Incompatible.COMPRESSION and not await _has_compressed(driver):
        kept &= ~Incompatible.COMPRESSION
    if kept:
        names = ", ".join(str(feature.name).lower().replace("_", " ") for feature in Incompatible if feature in kept)
        raise OptionError(f"compat=0.10 does not know what this image uses: {names}")
    if driver.encryption is not None and driver.encryption.cipher is None:
        raise OptionError("compat=0.10 may take zeroes to be encrypted: give the passphrase by encrypt.key-secret")
    # Where they are told, such an image need not have room for them.
    for snapshot in driver.snapshots.entries:
        if snapshot.disk_size != driver.size:
            what = f"is of a disk of {snapshot.disk_size} bytes, which now has {driver.size}"
        elif snapshot.vm_state_size > MAX_U32:
            what = f"has a machine's state of {snapshot.vm_state_size} bytes"
        else:
            continue
        raise OptionError(f"snapshot {snapshot.name!r} {what}: compat 0.10 has no place for that")


async def _tables(driver: "Qcow2") -> AsyncIterator["array[int]"]:
    """All L2 tables of the disk and its snapshots, each once."""
    image, seen = driver.image, set[int]()
    for l1 in [image.l1, *[await read_l1(image, snapshot) for snapshot in driver.snapshots.entries]]:
        for l1_index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if offset and offset not in seen:
                seen.add(offset)
                is_active = l1_index < len(image.l1) and image.l1[l1_index] & OFFSET_MASK == offset
                yield (await image.l2_words(l1_index)) if is_active else await image.read_table(offset)


async def _has_compressed(driver: "Qcow2") -> bool:
    async for words in _tables(driver):
        if any(entry & layout.COMPRESSED for entry in words[:: driver.map.words]):
            return True
    return False


async def carry_out(driver: "Qcow2", progress: Progress) -> None:
    """Make it one. Nobody else is at work on it, and it was checked.

    Raises:
        OSError: something can't be read or written; the image is still one of compat 1.1, and holds the same.
    """
    header, image = driver.header, driver.image
    await image.set_dirty(on=False)
    await ZeroExpansion(driver).run(progress)
    header.version, header.header_length, header.additional = 2, layout.V2_HEADER_BYTES, b""
    header.compression_type = layout.CompressionType.ZLIB
    header.incompatible &= ~Incompatible.COMPRESSION
    header.compatible, header.autoclear, header.feature_names = Compatible(0), Autoclear(0), {}
    header.bitmaps = None
    await image.write_header()
    driver.map.header_changed()


class ZeroExpansion:
    """What is done to all L2 tables of an image, while nobody else is at work on it.

    A zero cluster that has a place is filled with zeroes; one that has none gets a place if something would show
    through, and else is given up.

    Args:
        driver: the image's.
    """

    def __init__(self, driver: "Qcow2") -> None:
        self.driver = driver
        self.image = driver.image
        self.cluster = driver.map.cluster
        self.backed = "backing" in driver.node.children

    async def run(self, progress: Progress) -> None:
        """Expand those of the disk, then those of its snapshots. Everything is on disk then.

        Raises:
            OSError: something can't be read or written. What was done stays, and shows the same zeroes.
        """
        await self._expand_disk(progress)
        await self.image.commit_all()
        await self._expand_snapshots()
        await self.image.commit_all()

    async def _expand_disk(self, progress: Progress) -> None:
        """The tables of the disk; those that snapshots share are copied."""
        driver, image, cluster = self.driver, self.image, self.cluster
        for l1_index, l1_entry in enumerate(list(image.l1)):
            progress(l1_index, len(image.l1))
            if not l1_entry & OFFSET_MASK:
                continue
            for index, entry in enumerate(list(await image.l2_words(l1_index))):
                if not _is_zero(entry):
                    continue
                offset = l1_index * driver.map.reach + index * cluster
                end = min(offset + cluster, driver.size)
                if offset < end and (self.backed or entry & OFFSET_MASK):
                    await driver.writer.zeroing.zeroes_as_data(offset, end)
                else:
                    await driver.writer.zeroing.forget(offset, offset + cluster, Cause.OTHER)

    async def _expand_snapshots(self) -> None:
        """The tables that only snapshots have: they are changed where they are."""
        references: Counter[tuple[int, int]] = Counter()
        for snapshot in self.driver.snapshots.entries:
            for l1_index, entry in enumerate(await read_l1(self.image, snapshot)):
                if entry & OFFSET_MASK:
                    references[l1_index, entry & OFFSET_MASK] += 1
        for (l1_index, offset), times in references.items():
            words = await self.image.read_table(offset)
            if any(map(_is_zero, words)):
                await self._expand_table(l1_index, offset, words, times)

    async def _expand_table(self, l1_index: int, offset: int, words: "array[int]", times: int) -> None:
        """One of them, to which so many L1 tables point, and through it to each of its clusters."""
        image, gone = self.image, list[Run]()
        for index, entry in enumerate(words):
            if not _is_zero(entry):
                continue
            place, start = entry & OFFSET_MASK, l1_index * self.driver.map.reach + index * self.cluster
            if not place and not self.backed:
                words[index] = 0
                continue
            is_shared = place and await image.refcounts.get(place >> image.cluster_bits) != times
            if is_shared:  # with a table for which it is no zero cluster
                gone.append(Run(place >> image.cluster_bits, 1))
            if is_shared or not place:
                run, _ = await image.allocate(1)
                await image.refcounts.change(run.first, 1, times - 1)
                place = run.first << image.cluster_bits
            await self._fill(place, start)
            words[index] = place
        await image.write_counts_now()
        image.metadata.note(Kind.INACTIVE_L2, offset, self.cluster)
        await image.write_metadata(Kind.ANY_L2, offset, to_disk(words))
        await image.barrier()
        for run in gone:
            for _ in range(times):
                await image.given_up.drop_references(run, Cause.OTHER, structure=False)

    async def _fill(self, host: int, offset: int) -> None:
        """Write zeroes into a host cluster, which is that of some bytes of the disk."""
        zeroes = memoryview(bytes(min(self.cluster, ZERO_PIECE_BYTES)))
        for start in range(0, self.cluster, len(zeroes)):
            await self.driver.writer.write_host(host + start, offset + start, zeroes)


def _is_zero(entry: int) -> bool:
    return bool(entry & layout.ZERO) and not entry & layout.COMPRESSED
