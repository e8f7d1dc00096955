"""`raw`: the bytes of a file as they are, or those of a part of it.

Without `offset` and `size` the node is not on the data path at all: requests go straight to its child.

Limits: none; a disk whose `size` was given can't be resized.
"""

import errno
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pynbd.block import errors
from pynbd.block.alignment import round_up
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import (
    ChildSpec,
    CreationOptions,
    Driver,
    Filler,
    Filter,
    ImageInfo,
    Location,
    Preallocation,
    ReadQueue,
    WritePlace,
)
from pynbd.block.extents import Extent
from pynbd.block.families import Measurement
from pynbd.block.holding import Release, Revoke
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions, Size
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.requests import RequestFlag

FUA = int(RequestFlag.FUA)

SECTOR_BYTES = 512
"""New disks end with a whole sector, as QEMU's do."""


async def erase_header(file: BlockBackend) -> None:
    """Let a new raw disk not look like the image that was there before, where that could not be emptied.

    Raises:
        OSError: it can't be read or written.
    """
    head = bytearray(min(SECTOR_BYTES, file.size))
    await file.read(0, memoryview(head))
    if any(head):
        await file.write(0, memoryview(bytes(len(head))))


class RawOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `raw`.

    Args:
        offset: where in the file the disk begins, in bytes.
        size: its length in bytes; if it is not given, all from `offset` on, and the disk grows with the file.
    """

    offset: Size = 0
    size: Size | None = None


class Raw(Driver):
    """The bytes of a file, or of a part of it."""

    name = "raw"
    is_format = True
    Options = RawOptions
    CreateOptions = CreationOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {"file": ChildSpec(ChildRole.DATA)}
    growable = True
    several_processes = "always"
    # The node below answers a FUA write only when it is durable, by whatever means it has.
    write_flags = FUA
    write_zeroes_flags = FUA

    options: RawOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 1  # anything is raw, if it is nothing else

    async def open(self) -> None:
        offset, size, available = self.options.offset, self.options.size, self.file.size
        if offset > available:
            raise errors.OptionError(f"raw: offset {offset} lies behind the end of the file ({available} bytes)")
        if size is not None and offset + size > available:
            raise errors.OptionError(
                f"raw: offset {offset} and size {size} together exceed the file ({available} bytes)"
            )
        if self.options.auto_read_only and self.file.node.read_only:
            self.node.read_only = True

    def child_resized(self, name: str) -> None:
        if self.options.size is not None:
            self.size = self.options.size
        else:
            self.size = max(self.file.size - self.options.offset, 0)

    def child_permissions(self, name: str, held: Permission, shared: Permission) -> tuple[Permission, Permission]:
        # The same bytes, so the same permissions: the file is not resized unless somebody above asks for it.
        return held, shared

    # --- the data path of a disk that is a part of its file ------------------------------------------------

    def passes(self, member: str) -> bool:
        return not self.options.offset and self.options.size is None and not self._events_are_heard()

    def _events_are_heard(self) -> bool:
        """Whether a node below waits for the events that a format tells of as it works."""
        node = self.file.node
        while node.is_filter and type(node.driver).debug_event is Filter.debug_event:
            node = node.children["file"].node
        return type(node.driver).debug_event is not Driver.debug_event

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        self.file.node.driver.debug_event("read_aio")
        await self.file.read(self.options.offset + offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        self.file.node.driver.debug_event("write_aio")
        await self.file.write(self._in_file(offset, len(data)), data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.file.write_zeroes(self._in_file(offset, length), length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(self._in_file(offset, length), length)

    async def cache(self, offset: int, length: int) -> None:
        await self.file.cache(self.options.offset + offset, length)

    def _in_file(self, offset: int, length: int) -> int:
        """Where in the file something is written.

        Raises:
            OSError: ENOSPC, the disk has a fixed size, and this lies outside.
        """
        size = self.options.size
        if size is not None and offset + length > size:
            raise errors.io_error(
                errno.ENOSPC, self.node.name, f"write at {offset} for {length} bytes, behind the fixed size {size}"
            )
        return self.options.offset + offset

    def write_now(self, offset: int, data: memoryview) -> bool:
        if offset + len(data) > self.size or self._events_are_heard():
            return False
        return self.file.write_now(self.options.offset + offset, data)

    def place_writes(self) -> WritePlace | None:
        place = None if self._events_are_heard() else self.file.place_writes()
        if place is None:
            return None
        fd, shift, size, made = place
        before = self.options.offset
        inside = min(size - before, self.size)
        return WritePlace(fd, shift + before, inside, lambda end, took_ns: made(before + end, took_ns))

    def fill_now(self, offset: int, length: int, filler: Filler) -> int | None:
        if offset + length > self.size or self._events_are_heard():
            return None
        return self.file.fill_now(self.options.offset + offset, length, filler)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        return await self.file.block_status(self.options.offset + offset, length)

    def locate(self, offset: int, length: int) -> Location | None:
        inside = self.size - offset
        return self.file.locate(self.options.offset + offset, min(length, inside)) if inside > 0 else None

    def located_for_good(self) -> bool:
        return self.file.node.driver.located_for_good()

    def hold_located(self, revoke: Revoke) -> Release | None:
        return self.file.node.driver.hold_located(revoke)

    def read_queue(self) -> ReadQueue | None:
        return self.file.node.driver.read_queue()

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if self.options.size is not None:
            raise errors.unsupported(self.node.name, f"resize to {size}: the size was fixed by the option size")
        if size > MAX_SIZE_BYTES - self.options.offset:
            raise errors.io_error(errno.EFBIG, self.node.name, f"resize to {size} behind offset {self.options.offset}")
        await self.file.node.truncate(self.options.offset + size, preallocation, exact=exact)

    def has_zero_init(self) -> bool:
        return self.file.node.driver.has_zero_init()

    async def info(self) -> ImageInfo:
        return await self.file.node.info()

    # --- new images ----------------------------------------------------------------------------------------

    @classmethod
    async def create_image(
        cls, file: BlockBackend, options: CreationOptions, *, data_file: BlockBackend | None = None
    ) -> None:
        size = round_up(options.size, SECTOR_BYTES)
        try:
            await file.truncate(size, options.preallocation, exact=False)
        except OSError as problem:
            # What can't be resized (a device, a server's export) will do if it is large enough.
            if problem.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or file.size < size:
                raise
            if options.preallocation is not Preallocation.OFF:
                raise
        await erase_header(file)

    @classmethod
    async def measure(cls, options: CreationOptions, source: BlockBackend | None) -> Measurement:
        """The size of a file that holds these bytes as they are; see `Measurable`."""
        size = round_up(options.size if source is None else source.size, SECTOR_BYTES)
        return Measurement(required=size, fully_allocated=size)
