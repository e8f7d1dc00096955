"""The header of an open image, as it is in the file: what is written into it, and the marks that it bears.

The mark for a corrupt image goes with the fence: nothing is written to such an image any more.
"""

import errno
import logging
from typing import Protocol

from pynbd.block.errors import ImageError
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.header import PEEK_BYTES, Header, build_fixed, build_header, parse_header, peek_cluster_size
from pynbd.formats.qcow2.layout import Autoclear, Incompatible
from pynbd.formats.qcow2.tables import SECTOR

log = logging.getLogger(__name__)


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


class HeaderFile:
    """A file with a header.

    Args:
        file: where the image lies.
        header: what `read_header` gave.
        name: for messages.
    """

    def __init__(self, file: Storage, header: Header, name: str) -> None:
        self.file = file
        self.header = header
        self.name = name
        self.fence: str | None = None
        """Why nothing is written any more: the image is corrupt, or its header can't be written."""
        self.marked = False
        """It was marked as dirty here, not by somebody before."""

    # --- corruption --------------------------------------------------------------------------------------

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

    # --- writing -----------------------------------------------------------------------------------------

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
        rest = data[SECTOR:].ljust(min(self.header.cluster_size, 2 * layout.MAX_HEADER_BYTES) - SECTOR, b"\0")
        if rest:
            await self.file.write(SECTOR, memoryview(rest), 0)
            await self.file.flush()
        await self.file.write(0, memoryview(data[:SECTOR].ljust(SECTOR, b"\0")), 0)
        await self.file.flush()

    # --- marks -------------------------------------------------------------------------------------------

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
