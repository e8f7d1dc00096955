"""`file` and `host_device`: disks that are a file or a block device of the host.

What is in the page cache is read in place; what is not, and everything that may take long, is done by threads, so
that the event loop never waits for a disk.

Limits: Linux only; holes are found, and space is given back, where the file system can do so; a device tells nothing
of holes and can't be resized from here.
"""

import errno
import mmap
import os
import stat
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec

from pynbd.block import errors, pool
from pynbd.block.driver import Driver, HostWriter, Location, Preallocation, ReadQueue, Room, WritePlace
from pynbd.block.errors import OptionError, PermissionConflict
from pynbd.block.extents import Extent
from pynbd.block.limits import Limits
from pynbd.block.options import NodeOptions, OnOff, OnOffAuto
from pynbd.block.permissions import Permission
from pynbd.block.ranges import Ranges, end_of, total_bytes
from pynbd.block.requests import RequestFlag
from pynbd.storage import linux, opening, sizing, sparse, transfers, zeroing
from pynbd.storage.flushing import Flushing
from pynbd.storage.in_place import SLOW_S, InPlace, keeps_others_waiting
from pynbd.storage.locks import FileLocks

if TYPE_CHECKING:
    from pynbd.storage import uring

INLINE_READ_BYTES = 256 << 10
"""Larger reads are copied out of the page cache by a thread, while the event loop goes on."""

RING_READ_BYTES = 64 << 10
"""Larger reads from the disk are made by threads also where the kernel could make them without."""

INLINE_WRITE_BYTES = 64 << 10
"""Larger writes are copied into the page cache by a thread."""

BUFFERED_WRITERS = 2
"""Threads that write to one file through the page cache at one time."""

FALLBACK_DIRECT_ALIGNMENT = 4096
"""For direct I/O where the kernel does not say; no disk in use has larger blocks."""

MAX_HINT_BYTES = (1 << 32) - 1
"""Of extents: the kernel's field has 32 bits."""

new_tuple = tuple.__new__

FUA = int(RequestFlag.FUA)
MAY_UNMAP = int(RequestFlag.MAY_UNMAP)
NO_FALLBACK = int(RequestFlag.NO_FALLBACK)
CHANGING = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE


class FileOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the drivers `file` and `host_device`; the names are QEMU's.

    Args:
        filename: the file or device.
        locking: whether to lock it against other processes; `auto` does where the file system can.
        aio: who waits for small reads of what is not in the page cache: the kernel (`io_uring`), or threads. `auto`,
            and `native`, QEMU's name for an older way, take io_uring where the kernel lets this process have it.
    """

    filename: str
    locking: OnOffAuto = "auto"
    aio: Literal["auto", "threads", "native", "io_uring"] = "auto"


class FileCreationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a new file takes; the names are those of `qemu-img create -o`.

    Args:
        nocow: written in place, where the file system would copy on write (btrfs only).
        extent_size_hint: in which pieces the file gets its space, 0 for no hint (XFS; 1M).
    """

    nocow: OnOff = False
    extent_size_hint: Annotated[int, msgspec.Meta(ge=0, le=MAX_HINT_BYTES, extra={"size": True})] | None = None


class File(Driver):
    """A disk that is a regular file."""

    name = "file"
    schemes: ClassVar[tuple[str, ...]] = ("file",)
    Options = FileOptions
    FurtherCreateOptions: ClassVar[type[msgspec.Struct] | None] = FileCreationOptions
    growable = True
    zero_past_end = True
    several_processes = "always"  # the kernel is asked for all: bytes, holes, and whether a flush has failed
    is_device = False

    options: FileOptions
    _fd = -1

    # --- naming, opening -----------------------------------------------------------------------------------

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        rest = filename.removeprefix("file:")
        if not rest.startswith("//"):
            return {"filename": rest}  # QEMU's way to name a file that has a colon in it
        from urllib.parse import unquote

        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost") or not path:
            raise OptionError(f"{filename}: expected file:///PATH")
        return {"filename": slash + unquote(path)}

    def filename(self) -> str:
        return self.options.filename

    async def open(self) -> None:
        options = self.options
        if options.force_share and not options.read_only:
            raise OptionError(f"{options.filename}: force-share=on can only be used with read-only=on")
        self._direct = options.cache.direct
        # Going around the page cache, each write can be durable by itself. Otherwise one flush makes all writes durable
        # that were made before it began, and the layer above merges those.
        self.write_flags = FUA if self._direct else 0
        opened = await pool.run(pool.transfers, self._open)
        self._fd, self.node.read_only = opened.fd, opened.read_only
        try:
            self._locks = (
                FileLocks(self._fd, options.filename, required=options.locking == "on", shared=self.node.shared)
                if options.locking != "off"
                else None
            )
            self._prepare()
            if self.options.aio == "io_uring" and not self._direct:
                self._open_ring()  # who asks for it by name shall know at once that it is not to be had
        except OptionError:
            os.close(self._fd)
            raise
        except OSError as problem:
            os.close(self._fd)
            raise opening.explained(options.filename, problem) from problem

    def _open(self) -> opening.Opened:
        return opening.open_existing(
            self.options.filename,
            device=self.is_device,
            read_only=self.options.read_only,
            auto_read_only=self.options.auto_read_only,
            direct=self._direct,
        )

    def _prepare(self) -> None:
        """Find out what the open file can do."""
        self.size = self._measure()
        self._alignment = self._direct_alignment().offset if self._direct else 1
        self.limits = self._limits()
        # Direct I/O always goes to the disk, so that there is nothing to be had without waiting.
        self._nowait = None if self._direct else linux.nowait_flags(self._fd)
        self._ring: uring.ReadRing | None = None
        # Direct I/O needs aligned memory, which threads see to.
        self._reads_in_threads = self._direct or self.options.aio == "threads"
        self._reads = pool.Batch(self._read_in_thread, always_waits=self._direct)
        # Buffered writes to one file take turns at the lock of its inode: more threads only quarrel.
        writers = pool.WORKERS if self._direct else BUFFERED_WRITERS
        self._writes = pool.Batch(self._write_in_thread, always_waits=self._direct, workers=writers)
        self._in_place = InPlace(never=self._direct)
        self._place: WritePlace | None = None
        self._status_in_place = InPlace()
        self._flushing = Flushing(self._fd, direct=self._direct, failed=self._flush_failed)
        self._zeroing = zeroing.Zeroing(self._fd, device=self.is_device)
        self._zeroes = pool.Batch(self._zero_in_thread)
        self._discards = pool.Batch(self._discard_in_thread)

    def _measure(self) -> int:
        return os.fstat(self._fd).st_size

    def _direct_alignment(self) -> linux.DirectAlignment:
        return linux.direct_alignment(self._fd) or linux.DirectAlignment(
            FALLBACK_DIRECT_ALIGNMENT, FALLBACK_DIRECT_ALIGNMENT
        )

    def _limits(self) -> Limits:
        if not self._direct:
            return Limits()
        memory, offset = self._direct_alignment()
        return Limits(request_alignment=offset, memory_alignment=memory)

    async def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._flushing.close()
        os.close(self._fd)  # and with it go the locks
        self._fd = -1

    # --- reading -------------------------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Location | None:
        inside = self.size - offset
        if self._nowait is None or inside <= 0:
            return None
        # As `Location(…)`, in half the time.
        return new_tuple(Location, (self._fd, offset, length if length < inside else inside, self._nowait, None))

    def located_for_good(self) -> bool:
        return self._nowait is not None

    def read_queue(self) -> ReadQueue | None:
        return self._ring or self._open_ring()

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        length = len(into)
        if length <= INLINE_READ_BYTES and self._nowait is not None:
            try:
                got = os.preadv(self._fd, (into,), offset, self._nowait)
            except OSError:
                got = 0  # not in the page cache, mostly; if the disk is broken, the thread will learn that
            if got == length:
                return
            if got:
                into = into[got:]
                offset += got
            if offset >= self.size:
                into[:] = bytes(len(into))
                return
        await self._read_from_disk(offset, into)

    async def _read_from_disk(self, offset: int, into: memoryview) -> None:
        ring = None if len(into) > RING_READ_BYTES else self._ring or self._open_ring()
        if ring is None:
            await self._reads.run(offset, into)
            return
        try:
            while len(into) and (got := await ring.read(offset, into)):
                offset, into = offset + got, into[got:]
        except OSError as problem:
            if problem.errno not in (errno.EAGAIN, errno.EINVAL, errno.EOPNOTSUPP):
                raise self._failed(problem, "read", offset, len(into)) from problem
            await self._reads.run(offset, into)  # this file can't be read so
        else:
            into[:] = bytes(len(into))  # past the end

    def _open_ring(self) -> "uring.ReadRing | None":
        """The kernel's ring for reads, made when the first one waits for the disk; None if threads wait."""
        if self._reads_in_threads:
            return None
        from pynbd.storage import uring

        try:
            self._ring = uring.ReadRing(self._fd)
        except OSError as problem:
            if self.options.aio == "io_uring":
                raise OptionError(f"{self.options.filename}: aio=io_uring: {problem.strerror}") from problem
            self._reads_in_threads = True
        return self._ring

    def _read_in_thread(self, offset: int, into: memoryview) -> None:
        try:
            if self._direct:
                transfers.read_direct(self._fd, into, offset, self._alignment)
            else:
                transfers.read_at(self._fd, into, offset)
        except OSError as problem:
            raise self._failed(problem, "read", offset, len(into)) from problem

    def _failed(self, problem: OSError, what: str, offset: int, length: int) -> OSError:
        where = f"{self.node.name} ({self.options.filename})"
        return errors.io_error(problem.errno or errno.EIO, where, f"{what} at {offset} for {length} bytes")

    async def cache(self, offset: int, length: int) -> None:
        if not self._direct:
            await pool.run(pool.transfers, os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    # --- writing -------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        length = len(data)
        if flags & FUA and not self.options.cache.no_flush:
            await pool.run(pool.syncs, self._write_durably, offset, data)
        elif length <= INLINE_WRITE_BYTES and (started := perf_counter()) >= self._in_place.paused_until:
            try:
                done = os.pwrite(self._fd, data, offset)
            except OSError as problem:
                raise self._failed(problem, "write", offset, length) from problem
            ended = perf_counter()
            if ended - started > SLOW_S:
                self._in_place.was_slow(ended)
            if done < length:
                await self._writes.run(offset + done, data[done:])
        else:
            await self._writes.run(offset, data)
        if offset + length > self.size:
            self._grown(offset + length)

    def write_now(self, offset: int, data: memoryview) -> bool:
        if (started := perf_counter()) < self._in_place.paused_until:
            return False
        if len(data) > INLINE_WRITE_BYTES and keeps_others_waiting():
            return False
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError:
            return False  # `write` meets the same, and tells it
        ended = perf_counter()
        if ended - started > SLOW_S:
            self._in_place.was_slow(ended)
        if done < len(data):
            return False
        if offset + done > self.size:
            self._grown(offset + done)
        return True

    def place_writes(self) -> WritePlace | None:
        if perf_counter() < self._in_place.paused_until:
            return None
        place = self._place
        if place is None or place.size != self.size:
            place = self._place = WritePlace(self._fd, 0, self.size, self._placed)
        return place

    def _placed(self, end: int, took_ns: int) -> None:
        if took_ns > SLOW_S * 1e9:
            self._in_place.was_slow(perf_counter())

    async def write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        if self._direct:
            return 0
        start, end = ranges[0][0], end_of(ranges)
        try:
            copied = await pool.run(pool.copies, writer, Room(self._fd, ranges, start >= self.size))
        except OSError as problem:
            raise self._failed(problem, "write", start, total_bytes(ranges)) from problem
        if end > self.size and (size := self._measure()) > self.size:
            self._grown(size)
        return copied.bytes

    def _write_in_thread(self, offset: int, data: memoryview, flags: int = 0) -> None:
        try:
            if self._direct:
                transfers.write_direct(self._fd, data, offset, flags)
            else:
                transfers.write_at(self._fd, data, offset, flags)
        except OSError as problem:
            raise self._failed(problem, "write", offset, len(data)) from problem

    def _grown(self, size: int) -> None:
        self.size = size
        self.node.resized()

    # --- durability ----------------------------------------------------------------------------------------

    def _write_durably(self, offset: int, data: memoryview) -> None:
        self._flushing.write(partial(self._write_in_thread, offset, data))

    async def flush_to_disk(self) -> None:
        await self._flushing.flush()

    def _flush_failed(self, problem: OSError) -> OSError:
        return self._failed(problem, "flush", 0, self.size)

    # --- zeroes, holes -------------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._zeroes.run(offset, length, flags)
        if offset + length > self.size:
            self._grown(offset + length)

    def _zero_in_thread(self, offset: int, length: int, flags: int) -> None:
        try:
            self._zeroing.zero(offset, length, may_unmap=bool(flags & MAY_UNMAP), quickly=bool(flags & NO_FALLBACK))
        except OSError as problem:
            raise self._failed(problem, "write_zeroes", offset, length) from problem

    async def discard(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        if length > 0:
            await self._discards.run(offset, length)

    def _discard_in_thread(self, offset: int, length: int) -> None:
        try:
            self._zeroing.discard(offset, length)
        except OSError as problem:
            raise self._failed(problem, "discard", offset, length) from problem

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        started = perf_counter()
        if started < self._status_in_place.paused_until:
            return await pool.run(pool.transfers, sparse.extents, self.node, self._fd, offset, length)
        found = sparse.extents(self.node, self._fd, offset, length)
        ended = perf_counter()
        if ended - started > SLOW_S:
            self._status_in_place.was_slow(ended)
        return found

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        before = self.size
        try:
            await pool.run_stoppable(pool.syncs, partial(sizing.resize, self._fd, before, size, preallocation))
        except OSError as problem:
            raise self._failed(
                problem, f"resize to {size} (preallocation {preallocation.value})", 0, before
            ) from problem
        finally:
            self.size = self._measure()

    async def allocated_size(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    def has_zero_init(self) -> bool:
        return True

    @classmethod
    async def create(
        cls,
        options: NodeOptions,
        size: int,
        preallocation: Preallocation,
        further: msgspec.Struct | None = None,
    ) -> Sequence[str]:
        assert isinstance(options, FileOptions)
        more = further if isinstance(further, FileCreationOptions) else FileCreationOptions()
        make = partial(sizing.create, no_cow=more.nocow, extent_size_hint=more.extent_size_hint)
        return await pool.run(pool.syncs, make, options.filename, size, preallocation, options.locking)

    # --- permissions ---------------------------------------------------------------------------------------

    def check_permissions(self, held: Permission, shared: Permission) -> None:
        if self._fd < 0:
            return  # nothing can be locked before it is open, and nobody holds anything then
        if held & CHANGING and self.node.read_only:
            raise PermissionConflict(
                f"'{self.options.filename}' is open read-only, and {Permission(held & CHANGING).describe()} is needed"
            )
        if self._locks is not None:
            self._locks.prepare(held, self._lets_others(shared))

    def commit_permissions(self, held: Permission, shared: Permission) -> None:
        if self._fd >= 0 and self._locks is not None:
            self._locks.settle(held, self._lets_others(shared))

    def abort_permissions(self, held: Permission, shared: Permission) -> None:
        self.commit_permissions(held, shared)

    def _lets_others(self, shared: Permission) -> Permission:
        return Permission.ALL if self.options.force_share else shared


class HostDevice(File):
    """A disk that is a block device of the host."""

    name = "host_device"
    schemes = ("host_device",)
    FurtherCreateOptions: ClassVar[type[msgspec.Struct] | None] = None
    growable = False
    is_device = True

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename.removeprefix("host_device:")}

    @classmethod
    def probe_device(cls, filename: str) -> int:
        try:
            return 100 if stat.S_ISBLK(os.stat(filename).st_mode) else 0  # noqa: PTH116  # a Path changes names
        except (OSError, ValueError):
            return 0  # whoever opens it says why it can't be

    def _measure(self) -> int:
        return linux.device_size(self._fd)

    def _direct_alignment(self) -> linux.DirectAlignment:
        return linux.direct_alignment(self._fd) or linux.DirectAlignment(
            mmap.PAGESIZE, linux.logical_block_size(self._fd)
        )

    def _limits(self) -> Limits:
        block = linux.logical_block_size(self._fd)
        direct = super()._limits()
        return Limits(
            request_alignment=direct.request_alignment,
            memory_alignment=direct.memory_alignment,
            write_zeroes_alignment=block,
            discard_alignment=max(block, linux.discard_granularity(self._fd)),
        )

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        # It may take as long as writing all of it, so it must not hold up the threads that read.
        await pool.run(pool.syncs, self._zero_in_thread, offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await pool.run(pool.syncs, self._discard_in_thread, offset, length)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        # A device can't tell what was never written.
        return (Extent(length, sparse.DATA, self.node, offset),)

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        self.size = self._measure()  # it may have been resized from outside: this is how to tell us
        if size == self.size or (size < self.size and not exact):
            return
        raise errors.unsupported(
            self.node.name, f"resize of the device {self.options.filename} from {self.size} to {size}"
        )

    async def allocated_size(self) -> int | None:
        return None

    def has_zero_init(self) -> bool:
        return False

    @classmethod
    async def create(
        cls,
        options: NodeOptions,
        size: int,
        preallocation: Preallocation,
        further: msgspec.Struct | None = None,
    ) -> Sequence[str]:
        assert isinstance(options, FileOptions)
        await pool.run(pool.syncs, sizing.check_device, options.filename, size, preallocation)
        return ()
