"""`NodeRequests`: what a node does with requests that its driver can't take just as they come.

Reads past the end, alignment (read-modify-write) and splitting, FUA by flush, zeroes and discards with their fallbacks,
`detect-zeroes`, discard policy, tracked requests, and flushes that are merged.
"""

import abc
import asyncio
import errno
from typing import TYPE_CHECKING, Protocol

from pynbd.block.alignment import BOUNCE_BYTES, aligned_buffer, pieces, round_down, round_up, split_by_alignment
from pynbd.block.data_path import DataPath
from pynbd.block.driver import Driver, Filler, HostWriter, WritePlace
from pynbd.block.errors import io_error
from pynbd.block.options import NodeOptions
from pynbd.block.ranges import Ranges, end_of, first_bytes, total_bytes
from pynbd.block.requests import RequestFlag, RequestTracker

if TYPE_CHECKING:
    from pynbd.block.bitmaps import DirtyBitmap
    from pynbd.block.child import Child

ZEROES = bytes(BOUNCE_BYTES)

FUA = int(RequestFlag.FUA)
MAY_UNMAP = int(RequestFlag.MAY_UNMAP)
NO_FALLBACK = int(RequestFlag.NO_FALLBACK)
SERIALISING = int(RequestFlag.SERIALISING)

UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP)


class WriteGuard(Protocol):
    """Looks at every change of the first `length` bytes of a node before it is made."""

    length: int
    lock: asyncio.Lock

    async def check(self, offset: int, data: memoryview) -> None:
        """Let the write pass, or raise the `OSError` that it is answered with; `lock` is held until it is made."""


class NodeRequests(abc.ABC):
    """That part of a `Node`.

    Args:
        driver: not yet opened.
        options: what every node takes, and the driver's own.
        name: of the node.
    """

    path: DataPath
    """The functions that serve requests to this node; the way down to the storage."""

    def __init__(self, driver: Driver, options: NodeOptions, name: str) -> None:
        self.driver = driver
        self.calls = driver
        """Whose methods the layer calls: the driver itself, or what fits a driver from outside to its calls."""
        self.options = options
        self.name = name
        self.read_only = options.read_only
        self.children: dict[str, Child] = {}
        self.bitmaps: dict[str, DirtyBitmap] = {}
        self.write_highest_offset = 0
        self.write_guard: WriteGuard | None = None
        self.growable = driver.growable
        """Whether it may be written past its end: it grows, or the child below a filter does."""
        self._told_size = 0
        self._place: tuple[WritePlace | None, WritePlace | None] = (None, None)
        self._discards = options.discard in ("unmap", "on")
        self._tracker: RequestTracker | None = None
        self._counts_writes = True
        self._generation = 0
        self._flushed_generation = -1
        self._flush: asyncio.Future[None] | None = None
        self._flushes_begun = 0
        self._newest_good_flush = 0

    @property
    @abc.abstractmethod
    def is_filter(self) -> bool:
        """Whether it shows exactly the bytes of its child `file`."""

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self.driver.size

    @abc.abstractmethod
    def resized(self) -> None:
        """The driver's `size` is another: tell everybody above."""

    # --- reads and writes ---------------------------------------------------------------------------------

    async def _read_plain(self, offset: int, into: memoryview, flags: int) -> None:
        """`_read` of a node whose driver takes any request that does not reach past the end."""
        if offset + len(into) > self.driver.size:
            await self._read(offset, into, flags)
        else:
            await self.calls.read(offset, into, flags)

    async def _read(self, offset: int, into: memoryview, flags: int) -> None:
        inside = self.driver.size - offset
        if inside < len(into) and not self.driver.zero_past_end:
            inside = max(inside, 0)
            into[inside:] = bytes(len(into) - inside)
            into = into[:inside]
            if not inside:
                return
        if self._tracker is None:
            await self._read_aligned(offset, into, flags)
            return
        async with self._tracker.track(offset, len(into), serialising=bool(flags & SERIALISING)):
            await self._read_aligned(offset, into, flags)

    async def _read_aligned(self, offset: int, into: memoryview, flags: int) -> None:
        limits = self.driver.limits
        alignment = limits.request_alignment
        if (offset | len(into)) & (alignment - 1):
            await self._read_bounced(offset, into, flags)
            return
        for start, length in pieces(offset, len(into), limits.max_transfer, alignment):
            await self.calls.read(start, into[start - offset : start - offset + length], flags)

    async def _read_bounced(self, offset: int, into: memoryview, flags: int) -> None:
        limits = self.driver.limits
        alignment = limits.request_alignment
        largest = max(round_down(min(BOUNCE_BYTES, limits.max_transfer or BOUNCE_BYTES), alignment), alignment)
        start, end = round_down(offset, alignment), offset + len(into)
        bounce = aligned_buffer(min(largest, round_up(end, alignment) - start), limits.memory_alignment)
        while start < end:
            length = min(len(bounce), round_up(end, alignment) - start)
            await self.calls.read(start, bounce[:length], flags)
            first, last = max(start, offset), min(start + length, end)
            into[first - offset : last - offset] = bounce[first - start : last - start]
            start += length

    async def _write_plain(self, offset: int, data: memoryview, flags: int) -> None:
        """`_write` of a node whose driver takes any request as it comes, and whose writes nobody looks at."""
        if flags & FUA:
            await self._write(offset, data, flags)
            return
        end = offset + len(data)
        if self.read_only or end > self.driver.size:
            self._check_writable(offset, len(data))
        try:
            await self.calls.write(offset, data, flags)
        finally:
            self._generation += 1
            if end > self.write_highest_offset or end > self._told_size or self.bitmaps:
                self._written(offset, len(data))

    def _write_now(self, offset: int, data: memoryview) -> bool:
        """The same for a write that the driver can make in place."""
        end = offset + len(data)
        if self.read_only or (end > self.driver.size and not self.growable):
            return False
        if not self.driver.write_now(offset, data):
            return False
        self._generation += 1
        if end > self.write_highest_offset or end > self._told_size or self.bitmaps:
            self._written(offset, len(data))
        return True

    def _place_writes(self) -> WritePlace | None:
        """The same for several writes that somebody else makes in a file."""
        place = None if self.read_only or self.bitmaps else self.driver.place_writes()
        known, watched = self._place
        if place is None or place is known:
            return place and watched
        made = place.made

        def told(end: int, took_ns: int) -> None:
            self._generation += 1
            if end > self.write_highest_offset:
                self.write_highest_offset = end
            made(end, took_ns)

        watched = place._replace(made=told)
        self._place = (place, watched)
        return watched

    def _fill_now(self, offset: int, length: int, filler: Filler) -> int | None:
        """The same for a write whose bytes the kernel puts into memory that is the disk."""
        if self.read_only or offset + length > self.driver.size:
            return None
        done: int | None = length
        try:
            done = self.driver.fill_now(offset, length, filler)
        finally:
            # Also after a failure: some of it may have reached the disk.
            if done is not None and done > 0:
                self._written(offset, done)
        return done

    async def _write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        """The same for a write whose bytes somebody else puts into the file."""
        if self.read_only or (end_of(ranges) > self.driver.size and not self.growable):
            return 0
        done = total_bytes(ranges)
        try:
            done = await self.driver.write_by(ranges, writer)
        finally:
            for offset, length in first_bytes(ranges, done):
                self._written(offset, length)
        return done

    async def _write(self, offset: int, data: memoryview, flags: int) -> None:
        self._check_writable(offset, len(data))
        if self.write_guard is not None and offset < self.write_guard.length:
            async with self.write_guard.lock:
                await self.write_guard.check(offset, data)
                await self._write_checked(offset, data, flags)
            return
        await self._write_checked(offset, data, flags)

    async def _write_checked(self, offset: int, data: memoryview, flags: int) -> None:
        length = len(data)
        if self.options.detect_zeroes != "off" and length and is_zero(data):
            unmap = MAY_UNMAP if self.options.detect_zeroes == "unmap" else 0
            await self._zero_checked(offset, length, flags | unmap)
            return
        flush_after = flags & FUA and not self._is_durable("write")
        if flush_after:
            flags &= ~FUA
        try:
            if self._tracker is None:
                await self._write_pieces(offset, data, flags)
            else:
                await self._write_tracked(offset, data, flags)
        finally:
            # Also after a failure: some of it may have reached the disk.
            self._written(offset, length)
        if flush_after:
            await self.path.flush()

    def _is_durable(self, request: str) -> bool:
        """Whether the driver answers a write with FUA (`write` or `write_zeroes`) only when it is durable."""
        driver = self.driver
        known = driver.write_flags if request == "write" else driver.write_flags & driver.write_zeroes_flags
        return bool(known & FUA) or (self.is_filter and driver.passes("write") and driver.passes(request))

    async def _write_tracked(self, offset: int, data: memoryview, flags: int) -> None:
        assert self._tracker is not None
        alignment = self.driver.limits.request_alignment
        start, end = round_down(offset, alignment), round_up(offset + len(data), alignment)
        unaligned = (start, end) != (offset, offset + len(data))
        async with self._tracker.track(start, end - start, serialising=unaligned or bool(flags & SERIALISING)):
            self._check_writable(offset, len(data))  # a resize may have come first
            head, middle, tail = split_by_alignment(offset, len(data), alignment)
            if head:
                await self._modify_block(offset, data[:head], flags, "head")
            if middle:
                await self._write_pieces(offset + head, data[head : head + middle], flags)
            if tail:
                await self._modify_block(offset + head + middle, data[head + middle :], flags, "tail")

    async def _write_pieces(self, offset: int, data: memoryview, flags: int) -> None:
        limits = self.driver.limits
        if not limits.max_transfer or len(data) <= limits.max_transfer:
            await self.calls.write(offset, data, flags)
            return
        for start, length in pieces(offset, len(data), limits.max_transfer, limits.request_alignment):
            await self.calls.write(start, data[start - offset : start - offset + length], flags)

    async def _modify_block(self, offset: int, data: memoryview, flags: int, end: str) -> None:
        """Read, modify and write the one block that `data` lies in; it is the `head` or the `tail` of a request."""
        limits = self.driver.limits
        start = round_down(offset, limits.request_alignment)
        block = aligned_buffer(limits.request_alignment, limits.memory_alignment)
        if start < self.driver.size:
            self.driver.debug_event(f"pwritev_rmw_{end}")
            await self.calls.read(start, block, 0)
            self.driver.debug_event(f"pwritev_rmw_after_{end}")
        block[offset - start : offset - start + len(data)] = data
        await self.calls.write(start, block, flags)

    async def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._check_writable(offset, length)
        guard = self.write_guard
        if guard is not None and offset < guard.length:
            async with guard.lock:
                await guard.check(offset, memoryview(bytes(min(length, guard.length - offset))))
                await self._zero_checked(offset, length, flags)
            return
        await self._zero_checked(offset, length, flags)

    async def _zero_checked(self, offset: int, length: int, flags: int) -> None:
        if flags & MAY_UNMAP and not self._discards:
            flags &= ~MAY_UNMAP
        flush_after = flags & FUA and not self._is_durable("write_zeroes")
        if flush_after:
            flags &= ~FUA
        alignment = self.driver.limits.request_alignment
        try:
            if self._tracker is None:
                await self._zero_pieces(offset, length, flags)
            else:
                unaligned = (offset | length) & (alignment - 1)
                start, end = round_down(offset, alignment), round_up(offset + length, alignment)
                serialising = bool(unaligned) or bool(flags & SERIALISING)
                async with self._tracker.track(start, end - start, serialising=serialising):
                    self._check_writable(offset, length)  # a resize may have come first
                    await self._zero_pieces(offset, length, flags)
        finally:
            self._written(offset, length)
        if flush_after:
            await self.path.flush()

    async def _zero_pieces(self, offset: int, length: int, flags: int) -> None:
        """The aligned middle by the driver's own means, the rest (or all) as data."""
        limits = self.driver.limits
        unit = limits.write_zeroes_unit
        head, middle, tail = split_by_alignment(offset, length, unit)
        if flags & NO_FALLBACK and (head or tail):
            raise io_error(errno.ENOTSUP, self.name, f"zeroes at {offset} for {length} bytes are not quick")
        done = 0
        for start, size in pieces(offset + head, middle, limits.max_write_zeroes, unit):
            try:
                await self.calls.write_zeroes(start, size, flags)
            except OSError as problem:
                if problem.errno not in UNSUPPORTED or flags & NO_FALLBACK:
                    raise
                break
            done += size
        for start, size in ((offset, head), (offset + head + done, middle - done), (offset + head + middle, tail)):
            await self._zeroes_as_data(start, size, flags & FUA)

    async def _zeroes_as_data(self, offset: int, length: int, flags: int) -> None:
        alignment = self.driver.limits.request_alignment
        largest = max(BOUNCE_BYTES, alignment)
        zeroes = memoryview(ZEROES if largest == BOUNCE_BYTES else bytes(min(largest, length)))
        for start, size in pieces(offset, length, largest, alignment):
            head, middle, tail = split_by_alignment(start, size, alignment)
            if head:
                await self._modify_block(start, zeroes[:head], flags, "head")
            if middle:
                await self._write_pieces(start + head, zeroes[:middle], flags)
            if tail:
                await self._modify_block(start + head + middle, zeroes[:tail], flags, "tail")

    async def _discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "discard on a read-only node")
        if not self._discards:
            return
        end = min(offset + length, self.size)
        if self.write_guard is not None:
            # Zeroes, or whatever lay there earlier, could complete a mark; a hint need not be followed.
            offset = max(offset, self.write_guard.length)
        limits = self.driver.limits
        unit = limits.discard_unit
        # Blocks that are needed in part stay, but behind the end of the disk nothing is needed.
        start = round_up(offset, unit)
        stop = round_up(end, limits.request_alignment) if end == self.size else round_down(end, unit)
        if start >= stop:
            return
        try:
            for first, size in pieces(start, stop - start, limits.max_discard, unit):
                await self._discard_tracked(first, size)
        except OSError as problem:
            if problem.errno not in UNSUPPORTED:
                raise
        finally:
            self._written(start, stop - start)

    async def _discard_tracked(self, offset: int, length: int) -> None:
        if self._tracker is None:
            await self.calls.discard(offset, length)
            return
        async with self._tracker.track(offset, length):
            await self.calls.discard(offset, length)

    def _check_writable(self, offset: int, length: int) -> None:
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "write to a read-only node")
        if offset + length > self.driver.size and not self.growable:
            raise io_error(errno.ENOSPC, self.name, f"write at {offset} for {length} bytes, size {self.driver.size}")

    def _written(self, offset: int, length: int) -> None:
        """Bookkeeping of everything that may have changed bytes, before it is answered."""
        self._generation += 1
        if self.driver.size != self._told_size:
            self.resized()
        if offset + length > self.write_highest_offset:
            self.write_highest_offset = offset + length
        for bitmap in self.bitmaps.values():
            bitmap.mark(offset, length)

    # --- durability ---------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make everything that was written and answered durable, here and below.

        Flushes are merged: one that finds everything flushed since the last write does nothing at this node, and one
        that finds another at work waits, and is content with any that begins after it.

        Raises:
            OSError: something below could not be made durable; it still counts as not flushed.
        """
        wanted, earlier = self._generation, self._flushes_begun
        while self._flush is not None:
            await asyncio.shield(self._flush)
            if self._newest_good_flush > earlier:
                return
        if self._counts_writes and self._flushed_generation >= wanted:
            await self._flush_children()
            return
        self._flush = asyncio.get_running_loop().create_future()
        self._flushes_begun += 1
        number, generation = self._flushes_begun, self._generation
        try:
            self._announce("flush_to_os")
            await self.calls.flush_to_os()
            if not self.options.cache.no_flush:
                self._announce("flush_to_disk")
                await self.calls.flush_to_disk()
            await self._flush_children()
            self._flushed_generation, self._newest_good_flush = generation, number
        finally:
            self._flush.set_result(None)
            self._flush = None

    def _announce(self, event: str) -> None:
        """Tell the child `file` what this node is about to do; see `Driver.debug_event`."""
        if "file" in self.children:
            self.children["file"].node.driver.debug_event(event)

    async def _flush_children(self) -> None:
        for child in self.children.values():
            if not child.node.read_only:
                await child.flush()

    def touch(self) -> None:
        """A driver changed something on disk by itself: the next flush has work to do."""
        self._generation += 1


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero. The first bytes decide nearly always; the rest is compared a block at a time."""
    if data[0]:
        return False
    return all(bytes(data[start : start + size]) == ZEROES[:size] for start, size in pieces(0, len(data), 1 << 16))
