"""`overlay`: a copy-on-write layer for as long as it is open: writes go to a file, all else is the backing file's.

Limits: which clusters were written is kept in memory only, so an overlay that was closed cannot be opened again, and
there is nothing to check, commit or convert; that takes a real format. The file is laid out like the disk (it should
be sparse), its former content is not looked at, and at most `cluster_map.MAX_PAGES` pages of clusters may change.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pynbd.block.alignment import round_down, round_up
from pynbd.block.driver import ChildSpec, Driver, ImageInfo, Location, Preallocation
from pynbd.block.errors import io_error, unsupported
from pynbd.block.extents import Extent, Status
from pynbd.block.holding import Release, Revoke, hold_all
from pynbd.block.limits import Limits
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions, Size
from pynbd.block.permissions import ChildRole
from pynbd.block.requests import RequestFlag, RequestTracker, TrackedRequest
from pynbd.formats.cluster_map import ClusterMap, ClusterState

MIN_CLUSTER_BYTES = 512
MAX_CLUSTER_BYTES = 2 << 20
"""As in qcow2: what is copied up for a write of a single byte."""

MAX_STATUS_RUNS = 1024
"""Extents in one answer of block_status."""

BELOW, DATA, ZERO = ClusterState.BELOW, ClusterState.DATA, ClusterState.ZERO
MAY_UNMAP, NO_FALLBACK = int(RequestFlag.MAY_UNMAP), int(RequestFlag.NO_FALLBACK)


class OverlayOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `overlay`.

    Args:
        cluster_size: what is copied up at a time, in bytes; a power of two from 512 to 2M.
        size: the length of the disk in bytes; that of the backing file, if it is not given.
    """

    cluster_size: Size = 64 << 10
    size: Size | None = None

    def __post_init__(self) -> None:
        size = self.cluster_size
        if size & (size - 1) or not MIN_CLUSTER_BYTES <= size <= MAX_CLUSTER_BYTES:
            raise ValueError(f"cluster-size: {size} is no power of two from {MIN_CLUSTER_BYTES} to {MAX_CLUSTER_BYTES}")


class Overlay(Driver):
    """Changes over a disk that stays as it is, kept in another file and forgotten when closed."""

    name = "overlay"
    is_format = True
    Options = OverlayOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {
        # Nobody else may write to the file or resize it: what lies in it belongs to the map in memory.
        "file": ChildSpec(ChildRole.DATA | ChildRole.METADATA),
        "backing": ChildSpec(ChildRole.COW, writable=False),
    }
    options: OverlayOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._cluster = self.options.cluster_size
        self._map = ClusterMap()
        # Those who only write into clusters that are in the file go side by side; who changes what the map says of
        # a cluster waits for all others on it, and they for him.
        self._requests = RequestTracker()
        # From here on the backing file is not seen, since the disk once ended here.
        self._below_end = MAX_SIZE_BYTES

    # --- life ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self.limits = Limits(optimal_transfer=self._cluster, discard_alignment=self._cluster)
        size = self.options.size
        self.size = self.child("backing").size if size is None else size
        if not self.node.read_only:
            await self._make_room(self.size)

    async def _make_room(self, size: int) -> None:
        """See to it that the file takes writes up to `size` bytes.

        Raises:
            OSError: it is shorter, and stays so.
        """
        below = self.file.node
        if below.size >= size or below.growable:
            return
        try:
            await below.truncate(size)
        except OSError as problem:
            what = f"its file {below.name!r} has {below.size} bytes, needed are {size}, and it can't be made longer"
            raise io_error(problem.errno or errno.EIO, self.node.name, what) from problem

    # --- where bytes are -----------------------------------------------------------------------------------

    def _run(self, offset: int, end: int) -> tuple[int, int]:
        """(state, stop): what the bytes [offset, stop) are, as far as they are alike, and at most up to `end`."""
        cluster = self._cluster
        state, last = self._map.run(offset // cluster, (end - 1) // cluster + 1)
        stop = min(last * cluster, end)
        if state == BELOW:
            if offset >= self._below_end:
                return ZERO, stop
            stop = min(stop, self._below_end)
        return state, stop

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(state, start, stop) of all runs in [offset, end), each looked up when its turn comes."""
        while offset < end:
            state, stop = self._run(offset, end)
            yield state, offset, stop
            offset = stop

    def _event(self, event: str) -> None:
        self.file.node.driver.debug_event(event)

    # --- reading -------------------------------------------------------------------------------------------

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        # No lock: each byte is read where it lies, and a cluster that moves meanwhile is being written to.
        for state, start, stop in self._runs(offset, offset + len(into)):
            piece = into[start - offset : stop - offset]
            if state == DATA:
                self._event("read_aio")
                await self.file.read(start, piece, flags)
            elif state == BELOW:
                self._event("read_backing_aio")
                await self.child("backing").read(start, piece, flags)
            else:
                piece[:] = bytes(len(piece))

    def locate(self, offset: int, length: int) -> Location | None:
        end = min(offset + length, self.size)
        if offset >= end:
            return None
        state, stop = self._run(offset, end)
        if state == DATA:
            return self.file.locate(offset, stop - offset)
        if state == ZERO:
            return None
        backing = self.child("backing")
        inside = min(stop, backing.size) - offset
        return backing.locate(offset, inside) if inside > 0 else None

    def hold_located(self, revoke: Revoke) -> Release | None:
        # A cluster that is copied up gets a place that was never another one's, and its old one stays as it is.
        return hold_all(revoke, self.file, self.child("backing"))

    async def cache(self, offset: int, length: int) -> None:
        for state, start, stop in self._runs(offset, offset + length):
            if state != ZERO:
                await self.child("file" if state == DATA else "backing").cache(start, stop - start)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        found: list[Extent] = []
        for state, start, stop in self._runs(offset, offset + length):
            if state == DATA:
                status = Status.DATA | Status.ALLOCATED | Status.RECURSE
                found.append(Extent(stop - start, status, self.file.node, start))
            else:
                found.append(Extent(stop - start, Status.ZERO | Status.ALLOCATED if state == ZERO else Status.NONE))
            if len(found) >= MAX_STATUS_RUNS:
                break
        return found

    # --- writing -------------------------------------------------------------------------------------------

    def _track(self, offset: int, end: int, *, exclusive: bool) -> TrackedRequest:
        """A request on all clusters that [offset, end) touches."""
        start = round_down(offset, self._cluster)
        return self._requests.track(start, round_up(end, self._cluster) - start, serialising=exclusive)

    def _is_data(self, offset: int, end: int) -> bool:
        return self._run(offset, end) == (DATA, end)

    def _check_inside(self, offset: int, end: int) -> None:
        # The block layer has looked before; but while this request waited, the disk may have been made shorter.
        if end > self.size:
            raise io_error(errno.ENOSPC, self.node.name, f"write at {offset} up to {end}, size {self.size}")

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        end = offset + len(data)
        if not data:
            return
        if self._is_data(offset, end):
            async with self._track(offset, end, exclusive=False):
                self._check_inside(offset, end)
                if self._is_data(offset, end):  # nobody has discarded it meanwhile
                    self._event("write_aio")
                    await self.file.write(offset, data, 0)
                    return
        async with self._track(offset, end, exclusive=True):
            self._check_inside(offset, end)
            await self._write_alone(offset, data)

    def write_now(self, offset: int, data: memoryview) -> bool:
        end = offset + len(data)
        return self._is_data(offset, end) and not self._is_changing(offset, end) and self.file.write_now(offset, data)

    def _is_changing(self, offset: int, end: int) -> bool:
        """Whether somebody is at work on what the map says of these bytes' clusters, or waits to be."""
        return any(
            request.serialising and request.offset < end and offset < request.end
            for request in self._requests.in_flight
        )

    async def _write_alone(self, offset: int, data: memoryview) -> None:
        """Write where nobody else is at work, and take clusters into the file as needed."""
        for state, start, stop in self._runs(offset, offset + len(data)):
            piece = data[start - offset : stop - offset]
            if state == DATA:
                self._event("write_aio")
                await self.file.write(start, piece, 0)
            else:
                await self._allocate(start, piece)

    async def _allocate(self, offset: int, data: memoryview) -> None:
        """Write into clusters that are not in the file yet, the rest of the first and the last copied up.

        The map changes when all of a cluster is in the file: a failure leaves it as it was before.
        """
        cluster, end = self._cluster, offset + len(data)
        first, last = offset // cluster, (end - 1) // cluster + 1
        if not self._map.reserve(first, last):
            raise io_error(errno.ENOSPC, self.node.name, f"write at {offset}: too many clusters were changed")
        self._event("cluster_alloc")
        inner = round_up(offset, cluster)
        # Nothing comes after the last byte of the disk: a cluster that is written up to there is complete.
        outer = end if end == self.size else round_down(end, cluster)
        if inner > outer:
            await self._copy_up(first, offset, data)
            return
        if offset < inner:
            await self._copy_up(first, offset, data[: inner - offset])
        if inner < outer:
            self._event("write_aio")
            await self.file.write(inner, data[inner - offset : outer - offset], 0)
            self._map.set(inner // cluster, -(-outer // cluster), DATA)
        if outer < end:
            await self._copy_up(last - 1, outer, data[outer - offset :])

    async def _copy_up(self, number: int, offset: int, data: memoryview) -> None:
        """Put a whole cluster into the file: `data` at `offset`, which lies in it, and around it what it held."""
        start, stop = number * self._cluster, min((number + 1) * self._cluster, self.size)
        whole = memoryview(bytearray(stop - start))
        end = offset + len(data)
        if self._map.state(number) == BELOW:
            for begin, until in ((start, offset), (end, stop)):
                until = min(until, self._below_end)
                if begin < until:
                    self._event("cow_read")
                    await self.child("backing").read(begin, whole[begin - start : until - start], 0)
        whole[offset - start : end - start] = data
        self._event("cow_write")
        await self.file.write(start, whole, 0)
        self._map.set(number, number + 1, DATA)

    # --- zeroes --------------------------------------------------------------------------------------------

    def _whole_clusters(self, offset: int, end: int) -> tuple[int, int]:
        """The clusters [first, last) that lie wholly in a range; the one that the disk ends in may be short."""
        first = -(-offset // self._cluster)
        last = -(-end // self._cluster) if end >= self.size else end // self._cluster
        return first, max(first, last)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        end, cluster = offset + length, self._cluster
        async with self._track(offset, end, exclusive=True):
            self._check_inside(offset, end)
            first, last = self._whole_clusters(offset, end)
            parts = self._parts_to_zero(offset, end, first * cluster, last * cluster)
            if flags & NO_FALLBACK and (len(parts) > 1 or any(state == BELOW for state, _, _ in parts)):
                # Two halves could not be undone if the second one fails, and copying up takes its time.
                raise unsupported(self.node.name, f"zeroes at {offset} for {length} bytes take a copy of clusters")
            self._reserve(first, last, offset)
            for state, start, stop in parts:
                if state == DATA:
                    await self.file.write_zeroes(start, stop - start, flags & (MAY_UNMAP | NO_FALLBACK))
                else:
                    await self._allocate(start, memoryview(bytes(stop - start)))
            await self._zero_clusters(first, last, unmap=bool(flags & MAY_UNMAP))

    def _parts_to_zero(self, offset: int, end: int, inner: int, outer: int) -> list[tuple[int, int, int]]:
        """(state, start, stop) of what must be zeroed before and after the clusters [inner, outer)."""
        sides = ((offset, inner), (outer, end)) if inner < outer else ((offset, end),)
        return [run for start, stop in sides for run in self._runs(start, stop) if run[0] != ZERO]

    def _reserve(self, first: int, last: int, offset: int) -> None:
        if not self._map.reserve(first, last):
            raise io_error(errno.ENOSPC, self.node.name, f"zeroes at {offset}: too many clusters were changed")

    async def discard(self, offset: int, length: int) -> None:
        async with self._track(offset, offset + length, exclusive=True):
            first, last = self._whole_clusters(offset, min(offset + length, self.size))
            self._reserve(first, last, offset)
            await self._zero_clusters(first, last, unmap=True)

    async def _zero_clusters(self, first: int, last: int, *, unmap: bool) -> None:
        """Let whole clusters read as zeroes, and give their space back if asked to."""
        in_file: list[tuple[int, int]] = []
        cluster = first
        while cluster < last:
            state, stop = self._map.run(cluster, last)
            if state == DATA:
                in_file.append((cluster, stop))
            cluster = stop
        self._map.set(first, last, ZERO)
        if unmap:
            await self._free(in_file)

    async def _free(self, runs: Sequence[tuple[int, int]]) -> None:
        """Give back the space of clusters that the map does not count as `DATA` any more."""
        for first, last in runs:
            self._event("cluster_free")
            start, stop = first * self._cluster, min(last * self._cluster, self.file.size)
            if start < stop:
                await self.file.discard(start, stop - start)

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if preallocation is not Preallocation.OFF:
            raise unsupported(self.node.name, f"preallocation {preallocation.value!r}")
        async with self._track(min(size, self.size), MAX_SIZE_BYTES, exclusive=True):
            if size < self.size:
                await self._shrink(size)
            elif size > self.size:
                await self._grow(size)

    async def _shrink(self, size: int) -> None:
        self.size = size
        await self._free(self._map.forget(-(-size // self._cluster)))

    async def _grow(self, size: int) -> None:
        await self._make_room(size)
        last, end = self.size // self._cluster, round_up(self.size, self._cluster)
        if self.size < end and self._map.state(last) == DATA:
            # What the file holds behind the old end may be older still.
            await self.file.write_zeroes(self.size, min(end, size) - self.size, 0)
        self._below_end = min(self._below_end, self.size)
        self.size = size

    async def info(self) -> ImageInfo:
        return ImageInfo(
            cluster_size=self._cluster,
            specific={"data-clusters": self._map.count(DATA), "zero-clusters": self._map.count(ZERO)},
        )
