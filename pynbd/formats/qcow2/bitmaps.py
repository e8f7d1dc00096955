"""Persistent dirty bitmaps: in `node.bitmaps` while the image is open, in the image when it is closed.

Those of an image that is open for writing are marked as in use there: should it not be closed properly, nobody will
believe them. They are stored at new places, and then the header points to the new directory. A header that points to
none of the two whole is never valid: the autoclear bit says so meanwhile.
"""

import logging
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.errors import BlockError, ImageError
from pynbd.block.families import BitmapInfo
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.bitmap_directory import StoredBitmap, build_directory, read_bits, read_directory, read_table
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.header import BitmapsPointer
from pynbd.formats.qcow2.layout import Autoclear, BitmapFlag
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.tables import to_disk

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2

log = logging.getLogger(__name__)

MAX_LOADED_BYTES = 1 << 30
"""Memory of all bitmaps of an image together: a table of a few bytes may stand for many bits."""


class BitmapStore:
    """The bitmaps that one image keeps.

    Args:
        driver: the image's.
    """

    def __init__(self, driver: "Qcow2") -> None:
        self.driver = driver
        self.image = driver.image
        self.entries: list[StoredBitmap] = []
        """What the directory in the image says."""
        self.directory: BitmapsPointer | None = None
        """Where that lies."""

    # --- loading -------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the directory, and give the node its bitmaps.

        Raises:
            ImageError: something is wrong with them. OSError: they can't be read.
        """
        header, node = self.image.header, self.driver.node
        if header.bitmaps is None:
            return
        if Autoclear.BITMAPS not in header.autoclear:
            log.warning(
                "%s: its bitmaps are out of date, for something wrote to it that does not know them: they are ignored",
                self.image.name,
            )
            return
        self.directory = header.bitmaps
        self.entries = await read_directory(self.image)
        left = MAX_LOADED_BYTES
        for entry in self.entries:
            if not entry.is_usable:
                log.warning("%s: bitmap %r has unknown extra data; it is left alone", self.image.name, entry.name)
                continue
            bitmap = DirtyBitmap(entry.name, 0, 1 << entry.granularity_bits)
            bitmap.persistent = True
            left -= bitmap.bytes_for(self.driver.size)
            if left < 0:
                raise BlockError(f"{self.image.name}: its bitmaps take more than {MAX_LOADED_BYTES} bytes of memory")
            await self._load_bits(bitmap, entry)
            node.bitmaps[entry.name] = bitmap

    async def _load_bits(self, bitmap: DirtyBitmap, entry: StoredBitmap) -> None:
        size = self.driver.size
        bitmap.enabled = entry.is_consistent and BitmapFlag.AUTO in entry.flags
        bitmap.inconsistent = not entry.is_consistent
        bitmap.resize(size)
        if not entry.is_consistent:
            return
        length = bitmap.bytes_for(size)
        if entry.table_size * self.image.cluster_size < length:
            problem = f"bitmap {entry.name!r} has a table of {entry.table_size} entries, too few for {size} bytes"
            raise ImageError(self.image.name, problem, entry.table_offset)
        bitmap.load(await read_bits(self.image, await read_table(self.image, entry), length))

    async def begin_writing(self) -> None:
        """The image is going to change: its bitmaps are not to be believed until they are stored again.

        Raises:
            OSError: that can't be written.
        """
        image, header = self.image, self.image.header
        pointer = header.bitmaps
        if pointer is None:
            return
        if Autoclear.BITMAPS not in header.autoclear:
            header.bitmaps = None
            await image.write_header()
            return
        await self._note_metadata(pointer)
        # A flag lies in one sector, and each is good without the others: they can be set where they are.
        marked = [self._marked(entry) for entry in self.entries]
        if marked != self.entries:
            self.entries = marked
            await image.write_metadata(Kind.BITMAP_DIRECTORY, pointer.directory_offset, build_directory(marked))
            await image.file.flush()

    async def _note_metadata(self, pointer: BitmapsPointer) -> None:
        """Nobody is to take the places of bitmaps for his data."""
        self.image.metadata.note(Kind.BITMAP_DIRECTORY, pointer.directory_offset, pointer.directory_size)
        for entry in self.entries:
            for offset, length in await self._places(entry):
                self.image.metadata.note(Kind.BITMAP, offset, length)

    async def look_again(self) -> None:
        """The image was repaired while it is open: what it says of bitmaps may lie elsewhere.

        Those of the node stay as they are; they are stored instead when it is closed.

        Raises:
            OSError: it can't be read.
        """
        header = self.image.header
        self.entries, self.directory = [], None
        if header.bitmaps is None or Autoclear.BITMAPS not in header.autoclear:
            return
        try:
            self.entries = await read_directory(self.image)
        except ImageError as problem:
            log.warning("%s; its clusters are lost until the image is repaired", problem)
            return
        self.directory = header.bitmaps
        await self._note_metadata(header.bitmaps)

    @staticmethod
    def _marked(entry: StoredBitmap) -> StoredBitmap:
        if not entry.is_usable and BitmapFlag.AUTO not in entry.flags:
            return entry  # left alone, and it need not follow what is written
        return msgspec.structs.replace(entry, flags=entry.flags | BitmapFlag.IN_USE)

    async def _places(self, entry: StoredBitmap) -> list[tuple[int, int]]:
        """(offset, bytes) of everything that belongs to a bitmap."""
        places = [(entry.table_offset, entry.table_size * 8)]
        try:
            table = await read_table(self.image, entry)
        except ImageError as problem:
            log.warning("%s; its clusters are lost until the image is repaired", problem)
            return []
        places += [(word & layout.OFFSET_MASK, self.image.cluster_size) for word in table if word & layout.OFFSET_MASK]
        return places

    # --- telling -------------------------------------------------------------------------------------------

    def stored(self) -> Sequence[BitmapInfo]:
        """See `PersistentBitmaps.stored_bitmaps`."""
        names = ((BitmapFlag.IN_USE, "in-use"), (BitmapFlag.AUTO, "auto"))
        return [
            BitmapInfo(
                name=entry.name,
                granularity=1 << entry.granularity_bits,
                flags=tuple(name for flag, name in names if flag in entry.flags),
            )
            for entry in self.entries
        ]

    def can_store(self, name: str, granularity: int) -> None:
        """See `PersistentBitmaps.can_store_bitmap`."""
        image, header = self.image, self.image.header
        if header.version < 3:
            raise BlockError(f"{image.name}: an image of compat 0.10 can't keep bitmaps")
        kept = {bitmap.name for bitmap in self.driver.node.bitmaps.values() if bitmap.persistent}
        kept |= {entry.name for entry in self.entries if not entry.is_usable}
        if name in kept:
            raise BlockError(f"{image.name}: there is a bitmap {name!r} already")
        if len(kept) >= layout.MAX_BITMAPS:
            raise BlockError(f"{image.name}: it keeps {layout.MAX_BITMAPS} bitmaps, the most there may be")
        if DirtyBitmap(name, 0, granularity).bytes_for(self.driver.size) > layout.MAX_BITMAP_BYTES:
            what = f"bitmap {name!r} would take more than {layout.MAX_BITMAP_BYTES} bytes; choose a larger granularity"
            raise BlockError(f"{image.name}: {what}")

    # --- storing -------------------------------------------------------------------------------------------

    async def store(self) -> None:
        """Write the node's persistent bitmaps into the image, instead of those that are there.

        Raises:
            OSError: it could not be done; those in the image stay marked as in use, and some clusters may leak.
        """
        image, header, old = self.image, self.image.header, self.entries
        wanted = [bitmap for bitmap in self.driver.node.bitmaps.values() if bitmap.persistent]
        if not wanted and not old:
            return
        image.check_fence()
        if header.version < 3:
            await self._lose()
            return
        kept = {e.name: e for e in old if not e.is_usable or self._is_kept_as_it_is(e)}
        taken: list[tuple[int, int]] = []
        try:
            new = [kept[b.name] if b.name in kept else await self._write_bitmap(b, taken) for b in wanted]
            new += [entry for entry in kept.values() if not entry.is_usable]
            pointer = await self._write_directory(new, taken)
            await image.commit_all()
            await image.write_counts_now()
        except BaseException:
            for offset, length in taken:
                await image.release_metadata(offset, length)
            raise
        gone = [
            place for entry in old if entry.name not in kept or entry not in new for place in await self._places(entry)
        ]
        before, self.directory = self.directory, pointer
        header.autoclear &= ~Autoclear.BITMAPS
        await image.write_features()
        header.bitmaps = pointer
        if pointer is not None:
            header.autoclear |= Autoclear.BITMAPS
        await image.write_header()
        self.entries = new
        if before is not None:
            gone.append((before.directory_offset, before.directory_size))
        for offset, length in gone:
            image.given_up.add(offset, length, Cause.OTHER, structure=True)

    async def _lose(self) -> None:
        """The image was made one of compat 0.10, which keeps no bitmaps: give up all that belongs to them."""
        log.warning("%s: its bitmaps are lost, for an image of compat 0.10 can't keep any", self.image.name)
        places = [place for entry in self.entries for place in await self._places(entry)]
        if self.directory is not None:
            places.append((self.directory.directory_offset, self.directory.directory_size))
        self.entries, self.directory = [], None
        for offset, length in places:
            self.image.given_up.add(offset, length, Cause.OTHER, structure=True)

    def _is_kept_as_it_is(self, entry: StoredBitmap) -> bool:
        bitmap = self.driver.node.bitmaps.get(entry.name)
        return bitmap is not None and bitmap.persistent and bitmap.inconsistent

    async def _write_bitmap(self, bitmap: DirtyBitmap, taken: list[tuple[int, int]]) -> StoredBitmap:
        """Write the bits and the table of a bitmap; all places are put into `taken`."""
        image, cluster = self.image, self.image.cluster_size
        table = array("Q")
        for part in parts(bitmap.bits(), cluster):
            if not part.strip(b"\0"):
                table.append(0)
            elif len(part) == cluster and not part.strip(b"\xff"):
                table.append(layout.BITMAP_ALL_ONES)
            else:
                offset = await image.allocate_metadata(Kind.BITMAP, cluster)
                taken.append((offset, cluster))
                await image.write_metadata(Kind.BITMAP, offset, part.ljust(cluster, b"\0"))
                table.append(offset)
        table = table or array("Q", [0])
        offset = await image.allocate_metadata(Kind.BITMAP, len(table) * 8)
        taken.append((offset, len(table) * 8))
        await image.write_metadata(Kind.BITMAP, offset, to_disk(table))
        former = next((entry for entry in self.entries if entry.name == bitmap.name), None)
        extra = former.extra if former is not None else b""
        flags = BitmapFlag.AUTO if bitmap.enabled else BitmapFlag(0)
        return StoredBitmap(
            name=bitmap.name,
            table_offset=offset,
            table_size=len(table),
            flags=flags | (BitmapFlag.EXTRA_DATA_COMPATIBLE if extra else BitmapFlag(0)),
            granularity_bits=bitmap.granularity.bit_length() - 1,
            extra=extra,
        )

    async def _write_directory(
        self, entries: Sequence[StoredBitmap], taken: list[tuple[int, int]]
    ) -> BitmapsPointer | None:
        data = build_directory(entries)
        if not data:
            return None
        if len(data) > layout.MAX_BITMAP_DIRECTORY_BYTES:
            most = layout.MAX_BITMAP_DIRECTORY_BYTES
            raise BlockError(
                f"{self.image.name}: the bitmap directory would take {len(data)} bytes, at most {most} may be"
            )
        offset = await self.image.allocate_metadata(Kind.BITMAP_DIRECTORY, len(data))
        taken.append((offset, len(data)))
        await self.image.write_metadata(Kind.BITMAP_DIRECTORY, offset, data)
        return BitmapsPointer(len(entries), len(data), offset)


def parts(data: memoryview, size: int) -> Iterator[bytes]:
    """Bytes, so many at a time."""
    for start in range(0, len(data), size):
        yield bytes(data[start : start + size])
