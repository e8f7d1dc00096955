"""`memory`: a disk in RAM, gone when it is closed. What was never written takes no memory, whatever its size.

It is a memfd, an unnamed file on a file system in memory: holes, punching and `locate` come with it, and reading
it takes one system call without a coroutine. (A dict of blocks in Python writes 4 KiB a microsecond faster, but must
run a coroutine for each read and copy the bytes once more.)

The memfd is mapped as well, for the kernel to send from there and receive into it: a system call that finds no page
fails, where a program that looked at one would be ended.

Limits: what it held is gone when it is closed.
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence

from pynbd.block import errors
from pynbd.block.driver import Driver, Filler, Location, Preallocation, WritePlace
from pynbd.block.extents import Extent
from pynbd.block.options import NodeOptions, Size
from pynbd.storage import linux, sparse


class MemoryOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `memory`.

    Args:
        size: the length of the disk in bytes.
    """

    size: Size


class Memory(Driver):
    """A disk in RAM."""

    name = "memory"
    Options = MemoryOptions
    growable = True
    zero_past_end = True

    options: MemoryOptions
    _memory: memoryview | None = None

    async def open(self) -> None:
        self._fd = os.memfd_create(f"pynbd:{self.node.name[:200]}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self.options.size)
        except OSError as problem:
            os.close(self._fd)
            raise errors.OptionError(f"memory: a disk of {self.options.size} bytes: {problem.strerror}") from None
        self.size = self.options.size
        self._place = WritePlace(self._fd, 0, self.size, _nothing_to_do)
        self._map()

    async def close(self) -> None:
        self._memory = None  # unmapped when nobody looks at it any more
        os.close(self._fd)

    def _map(self) -> None:
        """Have all of the disk as memory, too, if that is possible: it may be longer than addresses are."""
        self._memory = None
        if self.size:
            with contextlib.suppress(OSError, OverflowError):
                self._memory = memoryview(mmap.mmap(self._fd, self.size))

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        fd, done, length = self._fd, os.preadv(self._fd, (into,), offset), len(into)
        while done < length:
            got = os.preadv(fd, (into[done:],), offset + done)
            if not got:
                into[done:] = bytes(length - done)  # past the end
                return
            done += got

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        fd, end, done = self._fd, offset + len(data), 0
        try:
            while offset + done < end:
                done += os.pwrite(fd, data[done:], offset + done)
        except OSError as problem:  # no memory left
            what = f"write at {offset} for {len(data)} bytes"
            raise errors.io_error(problem.errno or errno.ENOMEM, self.node.name, what) from problem
        if end > self.size:
            self._grown(end)

    def write_now(self, offset: int, data: memoryview) -> bool:
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError:
            return False  # no memory left: `write` says so
        if offset + done > self.size:
            self._grown(offset + done)
        return done == len(data)

    def place_writes(self) -> WritePlace | None:
        if self._place.size != self.size:
            self._place = WritePlace(self._fd, 0, self.size, _nothing_to_do)
        return self._place

    def fill_now(self, offset: int, length: int, filler: Filler) -> int | None:
        return None if self._memory is None else filler(self._memory[offset : offset + length])

    def _grown(self, size: int) -> None:
        self.size = size
        self._memory = None  # it would be mapped anew for each write past the end
        self.node.resized()

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        # Zeroes take no memory here, whether the caller asks for that or not.
        end = offset + length
        if end > self.size:
            os.ftruncate(self._fd, end)
            self._grown(end)
        await self.discard(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        if length:
            sparse.punch_hole(self._fd, offset, length)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        return sparse.extents(self.node, self._fd, offset, length)

    def locate(self, offset: int, length: int) -> Location | None:
        inside = self.size - offset
        if inside <= 0:
            return None
        return Location(self._fd, offset, length if length < inside else inside, 0, self._memory)

    def located_for_good(self) -> bool:
        return True

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if preallocation is not Preallocation.OFF and size > self.size:
            linux.fallocate(self._fd, 0, self.size, size - self.size)
        os.ftruncate(self._fd, size)
        self.size = size
        self._map()

    async def allocated_size(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    def has_zero_init(self) -> bool:
        return True


def _nothing_to_do(end: int, took_ns: int) -> None:
    """Writes to memory need nobody to know of them."""
