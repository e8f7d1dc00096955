"""`Node`: one opened driver in the graph. This is the seed's `struct BlockDriverState`.

A node adds to its driver what no driver should have to write itself: reads past the end, alignment
(read-modify-write) and splitting, FUA by flush, zeroes and discards with their fallbacks, `detect-zeroes`,
discard policy, flushes that are merged, tracked requests, dirty bitmaps, and the status of a whole chain.
What a node does not need, its requests do not pay for: see `relink`.
"""

import asyncio
import errno
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pynbd.block.alignment import BOUNCE_BYTES, aligned_buffer, pieces, round_down, round_up, split_by_alignment
from pynbd.block.child import Child, DataPath
from pynbd.block.driver import Driver, Filter, ImageInfo, Location, Preallocation
from pynbd.block.errors import io_error
from pynbd.block.extents import ChainExtent, Extent, Status
from pynbd.block.options import NodeOptions
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag, RequestTracker

if TYPE_CHECKING:
    from pynbd.block.bitmaps import DirtyBitmap

MAX_STATUS_EXTENTS = 4096
"""Extents that one walk through a chain collects before it stops early."""

ZEROES = bytes(BOUNCE_BYTES)

FUA = int(RequestFlag.FUA)
MAY_UNMAP = int(RequestFlag.MAY_UNMAP)
NO_FALLBACK = int(RequestFlag.NO_FALLBACK)
SERIALISING = int(RequestFlag.SERIALISING)

_numbers = itertools.count()


def nowhere(offset: int, length: int) -> Location | None:
    """`locate` of a node that must see each read."""
    return None


class WriteGuard(Protocol):
    """Looks at every write to the first `length` bytes of a node before it is made."""

    length: int
    lock: asyncio.Lock

    async def check(self, offset: int, data: memoryview) -> None:
        """Let the write pass, or raise the `OSError` that it is answered with."""


class Node:
    """One opened driver, its children, and what the block layer keeps for it.

    Args:
        driver: not yet opened; the graph opens it once the children are attached.
        options: what every node takes, and the driver's own.
    """

    def __init__(self, driver: Driver, options: NodeOptions) -> None:
        self.driver = driver
        self.options = options
        self.name = options.node_name or f"#{driver.name}{next(_numbers)}"
        self.read_only = options.read_only
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.bitmaps: dict[str, DirtyBitmap] = {}
        self.write_highest_offset = 0
        self.write_guard: WriteGuard | None = None
        self.opened = False
        self._discards = options.discard in ("unmap", "on")
        self._tracker: RequestTracker | None = None
        self._tracking_users = 0
        self._generation = 0
        self._flushed_generation = -1
        self._flush: asyncio.Future[None] | None = None
        driver.node = self
        self.path = self._own_path()

    def __repr__(self) -> str:
        return f"<Node {self.name} driver={self.driver.name}>"

    def describe(self) -> str:
        """For messages."""
        return f"node {self.name!r}"

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self.driver.size

    @property
    def is_filter(self) -> bool:
        """Whether it shows exactly the bytes of its child `file`."""
        return isinstance(self.driver, Filter)

    # --- the data path ------------------------------------------------------------------------------------

    def relink(self) -> None:
        """Bind the data path of this node, and then of all nodes above it, anew.

        A node that adds nothing to a kind of request is left out of that request's way: its path holds the
        function of the node below. Only called while nothing is in flight.
        """
        for child in self.children.values():
            child.bind()
        driver, own = self.driver, self._own_path()
        if "file" in self.children:
            below = self.children["file"].node.path
            passed = {name for name in DataPath._fields if self._left_out_of(name)}
            own = DataPath(*(getattr(below if name in passed else own, name) for name in DataPath._fields))
        self._merges_flushes = own.write == self._write
        if own.read == self._read and self._reads_need_no_help():
            own = own._replace(read=driver.read)
        self.path = own
        for edge in self.parents:
            edge.bind()
            edge.parent.below_changed(edge)

    def _own_path(self) -> DataPath:
        self._merges_flushes = True
        return DataPath(
            read=self._read,
            write=self._write,
            write_zeroes=self._write_zeroes,
            discard=self._discard,
            cache=self.driver.cache,
            flush=self.flush,
            locate=self.driver.locate if type(self.driver).locate is not Driver.locate else nowhere,
        )

    def _left_out_of(self, request: str) -> bool:
        """Whether requests of this kind may go straight to the child `file`."""
        driver = self.driver
        if request == "flush":
            return driver.passes("flush_to_os") and driver.passes("flush_to_disk")
        if not driver.passes(request):
            return False
        if request in ("read", "cache", "locate"):
            return self._tracker is None or request == "locate"
        # All kinds of writes stay together, or leave together: they share bitmaps, tracking and policy.
        return (
            self._tracker is None
            and not self.bitmaps
            and self.write_guard is None
            and self.options.detect_zeroes == "off"
            and (request == "write" or self._discards)
        )

    def _reads_need_no_help(self) -> bool:
        limits = self.driver.limits
        return (
            self._tracker is None
            and self.driver.zero_past_end
            and limits.request_alignment == 1
            and limits.max_transfer == 0
        )

    def below_changed(self, edge: Child) -> None:
        """A node below has another data path."""
        self.relink()

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
            await self.driver.read(start, into[start - offset : start - offset + length], flags)

    async def _read_bounced(self, offset: int, into: memoryview, flags: int) -> None:
        alignment = self.driver.limits.request_alignment
        largest = max(min(BOUNCE_BYTES, self.driver.limits.max_transfer or BOUNCE_BYTES), alignment)
        start, end = round_down(offset, alignment), offset + len(into)
        bounce = aligned_buffer(min(largest, round_up(end, alignment) - start), self.driver.limits.memory_alignment)
        while start < end:
            length = min(len(bounce), round_up(end, alignment) - start)
            await self.driver.read(start, bounce[:length], flags)
            first, last = max(start, offset), min(start + length, end)
            into[first - offset : last - offset] = bounce[first - start : last - start]
            start += length

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
            await self._write_zeroes(offset, length, flags | unmap)
            return
        try:
            if self._tracker is None:
                await self._write_pieces(offset, data, flags)
            else:
                await self._write_tracked(offset, data, flags)
        finally:
            # Also after a failure: some of it may have reached the disk.
            self._written(offset, length)
        if flags & FUA and not self.driver.write_flags & FUA:
            await self.path.flush()

    async def _write_tracked(self, offset: int, data: memoryview, flags: int) -> None:
        assert self._tracker is not None
        alignment = self.driver.limits.request_alignment
        start, end = round_down(offset, alignment), round_up(offset + len(data), alignment)
        unaligned = (start, end) != (offset, offset + len(data))
        async with self._tracker.track(start, end - start, serialising=unaligned or bool(flags & SERIALISING)):
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
            await self.driver.write(offset, data, flags)
            return
        for start, length in pieces(offset, len(data), limits.max_transfer, limits.request_alignment):
            await self.driver.write(start, data[start - offset : start - offset + length], flags)

    async def _modify_block(self, offset: int, data: memoryview, flags: int, end: str) -> None:
        """Read, modify and write the one block that `data` lies in; it is the `head` or the `tail` of a request."""
        limits = self.driver.limits
        start = round_down(offset, limits.request_alignment)
        block = aligned_buffer(limits.request_alignment, limits.memory_alignment)
        self.driver.debug_event(f"pwritev_rmw_{end}")
        await self.driver.read(start, block, 0)
        self.driver.debug_event(f"pwritev_rmw_after_{end}")
        block[offset - start : offset - start + len(data)] = data
        await self.driver.write(start, block, flags)

    async def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._check_writable(offset, length)
        if flags & MAY_UNMAP and not self._discards:
            flags &= ~MAY_UNMAP
        limits = self.driver.limits
        try:
            if self._tracker is None:
                await self._zero_pieces(offset, length, flags)
            else:
                unaligned = (offset | length) & (limits.request_alignment - 1)
                start = round_down(offset, limits.request_alignment)
                end = round_up(offset + length, limits.request_alignment)
                serialising = bool(unaligned) or bool(flags & SERIALISING)
                async with self._tracker.track(start, end - start, serialising=serialising):
                    await self._zero_pieces(offset, length, flags)
        finally:
            self._written(offset, length)
        if flags & FUA and not self.driver.write_zeroes_flags & FUA:
            await self.path.flush()

    async def _zero_pieces(self, offset: int, length: int, flags: int) -> None:
        """The aligned middle by the driver's own means, the rest (or all) as data."""
        limits = self.driver.limits
        alignment = max(limits.write_zeroes_alignment, limits.request_alignment)
        head, middle, tail = split_by_alignment(offset, length, alignment)
        if flags & NO_FALLBACK and (head or tail):
            raise io_error(errno.ENOTSUP, self.name, f"zeroes at {offset} for {length} bytes are not quick")
        done = 0
        for start, size in pieces(offset + head, middle, limits.max_write_zeroes, alignment):
            try:
                await self.driver.write_zeroes(start, size, flags)
            except OSError as problem:
                if problem.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or flags & NO_FALLBACK:
                    raise
                break
            done += size
        for start, size in ((offset, head), (offset + head + done, middle - done), (offset + head + middle, tail)):
            await self._zeroes_as_data(start, size, flags)

    async def _zeroes_as_data(self, offset: int, length: int, flags: int) -> None:
        alignment = self.driver.limits.request_alignment
        zeroes = memoryview(ZEROES)
        kept = flags & (FUA if self.driver.write_flags & FUA else 0)
        for start, size in pieces(offset, length, BOUNCE_BYTES, alignment):
            head, middle, tail = split_by_alignment(start, size, alignment)
            if head:
                await self._modify_block(start, zeroes[:head], kept, "head")
            if middle:
                await self._write_pieces(start + head, zeroes[:middle], kept)
            if tail:
                await self._modify_block(start + head + middle, zeroes[:tail], kept, "tail")

    async def _discard(self, offset: int, length: int) -> None:
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "discard on a read-only node")
        if not self._discards:
            return
        limits = self.driver.limits
        alignment = max(limits.discard_alignment, limits.request_alignment)
        # A hint: blocks that are needed in part stay.
        start, end = round_up(offset, alignment), round_down(offset + length, alignment)
        if offset + length >= self.size and limits.request_alignment == 1:
            end = offset + length
        try:
            for first, size in pieces(start, max(end - start, 0), limits.max_discard, alignment):
                await self._discard_tracked(first, size)
        except OSError as problem:
            if problem.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
        finally:
            self._written(offset, length)

    async def _discard_tracked(self, offset: int, length: int) -> None:
        if self._tracker is None:
            await self.driver.discard(offset, length)
            return
        async with self._tracker.track(offset, length):
            await self.driver.discard(offset, length)

    def _check_writable(self, offset: int, length: int) -> None:
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "write to a read-only node")
        if offset + length > self.driver.size and not self.driver.growable:
            raise io_error(errno.ENOSPC, self.name, f"write at {offset} for {length} bytes, size {self.driver.size}")

    def _written(self, offset: int, length: int) -> None:
        """Bookkeeping of everything that may have changed bytes, before it is answered."""
        self._generation += 1
        end = offset + length
        if end > self.write_highest_offset:
            self.write_highest_offset = end
        for bitmap in self.bitmaps.values():
            bitmap.mark(offset, length)

    # --- durability ---------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make everything that was written and answered durable, here and below.

        Flushes are merged: one that finds everything flushed since the last write does nothing at this node, and one
        that finds another at work waits and looks again.

        Raises:
            OSError: something below could not be made durable; it still counts as not flushed.
        """
        wanted = self._generation
        while self._flush is not None:
            await asyncio.shield(self._flush)
            if self._merges_flushes and self._flushed_generation >= wanted:
                return
        if self._merges_flushes and self._flushed_generation >= wanted:
            await self._flush_children()
            return
        self._flush = asyncio.get_running_loop().create_future()
        generation = self._generation
        try:
            self._announce("flush_to_os")
            await self.driver.flush_to_os()
            if not self.options.cache.no_flush:
                self._announce("flush_to_disk")
                await self.driver.flush_to_disk()
                await self._flush_children()
            self._flushed_generation = generation
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

    # --- tracking -----------------------------------------------------------------------------------------

    def needs_tracking(self, *, on: bool) -> None:
        """Somebody needs overlapping requests to be serialised (or no longer). Only while drained."""
        self._tracking_users += 1 if on else -1
        assert self._tracking_users >= 0
        self._tracker = (self._tracker or RequestTracker()) if self._tracking_users else None
        self.relink()

    @property
    def tracked_requests(self) -> Sequence[tuple[int, int, bool]]:
        """(offset, length, serialising) of what is in flight, as far as it is tracked."""
        tracker = self._tracker
        return [] if tracker is None else [(r.offset, r.end - r.offset, r.serialising) for r in tracker.in_flight]

    # --- what lies where ----------------------------------------------------------------------------------

    async def layer_status(self, offset: int, length: int) -> Sequence[Extent]:
        """What this layer holds in a range; see `Driver.block_status`. Never empty for a length over 0."""
        inside = self.size - offset
        if inside <= 0:
            # A short image decides what is read past its end: zeroes, whatever lies below it.
            return (Extent(length, Status.ZERO | Status.ALLOCATED),)
        found: list[Extent] = []
        rest = min(length, inside)
        for extent in await self.driver.block_status(offset, rest):
            if rest <= 0 or len(found) >= MAX_STATUS_EXTENTS:
                break
            extent = extent.cut(rest)
            rest -= extent.length
            if extent.status & Status.RECURSE and extent.where is not None:
                found.extend(await self._refined(extent))
            else:
                found.append(extent)
        assert found, f"{self.name}: driver {self.driver.name} returned no extent"
        return found

    async def _refined(self, extent: Extent) -> Sequence[Extent]:
        """An extent whose bytes lie in a child, split where the child knows of holes."""
        assert extent.where is not None
        refined: list[Extent] = []
        rest, start = extent.length, extent.host_offset
        while rest and len(refined) < MAX_STATUS_EXTENTS:
            for below in await extent.where.layer_status(start, rest):
                zero = below.status & Status.ZERO
                status = extent.status & ~Status.RECURSE | zero
                where = (extent.where, start) if below.where is None else (below.where, below.host_offset)
                refined.append(Extent(below.length, status, *where))
                rest -= below.length
                start += below.length
        return refined

    def backing(self) -> "Node | None":
        """The image below this one in its chain, filters passed over."""
        node = self
        while node.is_filter:
            node = node.children["file"].node
        child = node.children.get("backing")
        return child.node if child is not None else None

    async def block_status(self, offset: int, length: int, base: "Node | None" = None) -> list[ChainExtent]:
        """What the chain of images from here down to `base` (not included) holds in a range.

        Returns:
            extents from `offset` on, at least one for a length over 0; they may stop before the end of the range.
        """
        return await chain_status(self, offset, length, base, depth=1)

    # --- size and shape -----------------------------------------------------------------------------------

    async def truncate(
        self, size: int, preallocation: Preallocation = Preallocation.OFF, *, exact: bool = True
    ) -> None:
        """Change the length of the disk.

        Raises:
            OSError: it can't be changed; the size is what it was, or `self.size` says what it became.
        """
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "resize of a read-only node")
        before = self.size
        try:
            await self.driver.truncate(size, preallocation, exact=exact)
        finally:
            self._generation += 1
            if self.size != before:
                self.resized()

    def resized(self) -> None:
        """The driver's `size` is another: tell everybody above."""
        for bitmap in self.bitmaps.values():
            bitmap.resize(self.size)
        for edge in self.parents:
            edge.parent.below_resized(edge)

    def below_resized(self, edge: Child) -> None:
        """A child has another size."""
        before = self.size
        self.driver.child_resized(edge.name)
        if self.opened and self.size != before:
            self.resized()

    async def below_drained(self, edge: Child) -> None:
        """Pass a drain on to everybody above."""
        for parent in list(self.parents):
            await parent.parent.below_drained(parent)

    def below_resumed(self, edge: Child) -> None:
        """Pass the end of a drain on to everybody above."""
        for parent in list(self.parents):
            parent.parent.below_resumed(parent)

    async def allocated_size(self) -> int | None:
        """Bytes used on the host by this node and the files below it (not its backing chain)."""
        return await self.driver.allocated_size()

    async def info(self) -> ImageInfo:
        """What is worth telling beyond the size."""
        return await self.driver.info()

    def filename(self) -> str:
        """The name of the storage under this node, for people; "" if it has none."""
        own = self.driver.filename()
        child = self.children.get("file")
        return own if own or child is None else child.node.filename()

    # --- permissions --------------------------------------------------------------------------------------

    def held_by_parents(self) -> tuple[Permission, Permission]:
        """(all that the parents hold together, what every one of them shares)."""
        held, shared = Permission.NONE, Permission.ALL
        for edge in self.parents:
            held |= edge.held
            shared &= edge.shared
        return held, shared


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero. The first bytes decide nearly always; the rest is compared a block at a time."""
    if data[0]:
        return False
    return all(bytes(data[start : start + size]) == ZEROES[:size] for start, size in pieces(0, len(data), 1 << 16))


async def chain_status(node: Node, offset: int, length: int, base: Node | None, depth: int) -> list[ChainExtent]:
    """`Node.block_status` of a node that is the image number `depth` of its chain."""
    result: list[ChainExtent] = []
    backing = node.backing()
    for extent in await node.layer_status(offset, length):
        if extent.status & Status.ALLOCATED:
            result.append(ChainExtent(extent.length, extent.status, depth, extent.where, extent.host_offset))
        elif backing is None or backing is base:
            zero = Status.ZERO if backing is None else Status.NONE
            result.append(ChainExtent(extent.length, extent.status | zero, 0))
        else:
            below = await chain_status(backing, offset, extent.length, base, depth + 1)
            result.extend(below)
            if sum(found.length for found in below) < extent.length:
                break
        offset += extent.length
        if len(result) >= MAX_STATUS_EXTENTS:
            break
    return result
