"""`BlockBackend`: where a user of the graph (an export, a job, a command) holds on to a node.

It is the choke point of the block layer: here requests are counted, timed, checked against the size,
parked while the graph below is drained, and given to the error policy when they fail. A request that has
entered is never cancelled: whoever waits for it may go away, it runs to its end.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from enum import Enum
from time import perf_counter_ns
from typing import Any, TypeVar

from pynbd.block.child import Child
from pynbd.block.data_path import never, no_finder, no_place, not_now, nowhere
from pynbd.block.driver import Filler, Finder, HostWriter, Location, Preallocation, WritePlace
from pynbd.block.errors import io_error
from pynbd.block.extents import ChainExtent, Status
from pynbd.block.node import Node
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.ranges import Ranges, end_of
from pynbd.block.requests import RequestFlag
from pynbd.block.statistics import Operation, Statistics

T = TypeVar("T")

READ, WRITE = int(Operation.READ), int(Operation.WRITE)
READING = (Operation.READ, Operation.CACHE, Operation.BLOCK_STATUS)

FUA = int(RequestFlag.FUA)

NO_FAILURES = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOMEDIUM, errno.ESHUTDOWN)
"""Refusals: nothing is wrong with the storage, and trying again would not help, so no policy but to report it."""


class ErrorPolicy(Enum):
    """What is done about a request that failed (QEMU's `rerror`, `werror`)."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"
    ENOSPC = "enospc"
    """Stop where the space ran out, report all else."""


class IoStatus(Enum):
    """How the last failed request left the device."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


def writer_in_place(edge: Child) -> Callable[[int, memoryview], bool]:
    """`write_now` through an edge, within its permissions and the disk's size."""
    driver, write_now = edge.node.driver, edge.write_now

    def write(offset: int, data: memoryview) -> bool:
        return offset + len(data) <= driver.size and edge.may_write and write_now(offset, data)

    return not_now if write_now is not_now else write


def filler_in_place(edge: Child) -> Callable[[int, int, Filler], int | None]:
    """`fill_now` through an edge, within its permissions and the disk's size."""
    driver, fill_now = edge.node.driver, edge.fill_now

    def fill(offset: int, length: int, filler: Filler) -> int | None:
        return fill_now(offset, length, filler) if offset + length <= driver.size and edge.may_write else None

    return never if fill_now is never else fill


def places_for_writes(edge: Child) -> Callable[[], WritePlace | None]:
    """`place_writes` through an edge, within its permissions."""
    place_writes = edge.place_writes
    return no_place if place_writes is no_place else lambda: place_writes() if edge.may_write else None


class BlockBackend:
    """One user of a node.

    Args:
        name: who it is, for messages: `export 'disk0'`.
        on_read_error, on_write_error: the error policy.
    """

    def __init__(
        self,
        name: str,
        *,
        on_read_error: ErrorPolicy = ErrorPolicy.REPORT,
        on_write_error: ErrorPolicy = ErrorPolicy.REPORT,
    ) -> None:
        self.name = name
        self.on_read_error = on_read_error
        self.on_write_error = on_write_error
        self.write_cache = True
        """Without it every write is durable before it is answered (cache modes writethrough, directsync)."""
        self.io_status = IoStatus.OK
        self.statistics = Statistics()
        self.in_flight = 0
        self.parked = 0
        self.root: Child | None = None
        self.on_resize: list[Callable[[int], None]] = []
        self.on_error: list[Callable[[OSError, Operation, ErrorPolicy], None]] = []
        self.locate: Callable[[int, int], Location | None] = nowhere
        """See `Driver.locate`; says "nowhere" while the graph is drained or the backend is stopped."""
        self.finder: Callable[[], Finder | None] = no_finder
        """See `Driver.finder`; what holds for `locate`, holds for it."""
        self.write_now: Callable[[int, memoryview], bool] = not_now
        """Put data at an offset without waiting, if that can be done in place; see `Driver.write_now`.

        Such writes are counted by whoever makes them, many at a time, who also flushes where they have to be durable
        (without `write_cache` all of them have to). 0 requests are in flight meanwhile: nothing else runs before this
        returns.
        """
        self.place_writes: Callable[[], WritePlace | None] = no_place
        """Where many writes may be put without waiting; see `Driver.place_writes`, and `write_now` for who counts them
        and makes them durable.
        """
        self.fill_now: Callable[[int, int, Filler], int | None] = never
        """Have the kernel put data into memory that is the disk; see `Driver.fill_now`. What `write_now` says of who
        counts such writes, and makes them durable, holds here as well.
        """
        self.start_read: Callable[[int, memoryview, int], Coroutine[Any, Any, None]] | None = None
        self.start_write: Callable[[int, memoryview, int], Coroutine[Any, Any, None]] | None = None
        """The node's own coroutines, for who runs them in place; None while requests are parked. What is within the
        disk and the permissions, ends without having waited, and fails not, is counted by whoever made it; the others
        are for `watched_read` and `watched_write`.
        """
        self._ready = False
        self._drains = 0
        self._stopped = False
        self._shut_down = False
        self._resumed: asyncio.Event = asyncio.Event()
        self._idle: asyncio.Event = asyncio.Event()

    # --- the graph ----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """For messages."""
        return self.name

    def attach(self, node: Node) -> Child:
        """Make the edge to a node. `Graph.attach` does this, and checks the permissions."""
        assert self.root is None, f"{self.name} is attached already"
        self.root = Child("root", ChildRole.DATA, self, node)
        node.parents.append(self.root)
        self._bind()
        return self.root

    def detach(self) -> None:
        """Let go of the node. Nothing may be in flight. `Graph.detach` does this."""
        assert not self.in_flight, f"{self.name} has {self.in_flight} requests in flight"
        if self.root is not None:
            self.root.node.parents.remove(self.root)
            self.root = None
        self._bind()

    @property
    def node(self) -> Node:
        """The node that it is attached to.

        Raises:
            OSError: ENOMEDIUM, there is none.
        """
        if self.root is None:
            raise io_error(errno.ENOMEDIUM, self.name, "no medium")
        return self.root.node

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self.node.size

    @property
    def writable(self) -> bool:
        """Whether it may write."""
        return self.root is not None and Permission.WRITE in self.root.held

    def below_changed(self, edge: Child) -> None:
        """The data path below has been bound anew."""
        self._bind()

    def below_resized(self, edge: Child) -> None:
        """The node has another size."""
        for tell in list(self.on_resize):
            tell(edge.node.size)

    def users(self) -> Iterable["BlockBackend"]:
        """Itself: its requests come from outside of the graph."""
        return (self,)

    def begin_drain(self) -> None:
        """Start nothing new until as many `end_drain` have come."""
        self._drains += 1
        self._bind()

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    def end_drain(self) -> None:
        """Let parked requests go on, if this was the last drain."""
        self._drains -= 1
        self._wake()

    # --- parking ------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        root = self.root
        self._ready = root is not None and not (self._drains or self._stopped or self._shut_down)
        self.locate, self.write_now, self.place_writes, self.fill_now = nowhere, not_now, no_place, never
        self.finder = no_finder
        self.start_read = self.start_write = None
        if self._ready and root is not None:
            self.locate, self.finder, self.write_now = root.locate, root.finder, writer_in_place(root)
            self.place_writes, self.fill_now = places_for_writes(root), filler_in_place(root)
            self.start_read, self.start_write = root.read, root.write

    def _wake(self) -> None:
        self._bind()
        self._resumed.set()
        self._resumed = asyncio.Event()

    @property
    def paused(self) -> bool:
        """Whether requests are parked at present."""
        return bool(self._drains or self._stopped) and not self._shut_down

    def resume(self) -> None:
        """Try everything again that the error policy had stopped."""
        self._stopped = False
        self.io_status = IoStatus.OK
        self._wake()

    def shutdown(self) -> None:
        """From now on every request, parked ones too, ends with ESHUTDOWN."""
        self._shut_down = True
        self._wake()

    async def _park(self) -> None:
        self.parked += 1
        try:
            while self.paused:
                await self._resumed.wait()
        finally:
            self.parked -= 1

    async def _run(
        self, kind: Operation, offset: int, length: int, start: Callable[[Child], Awaitable[T]], *, writes: bool = False
    ) -> T | None:
        """One request, from its entry to its answer; parked and tried again as often as it takes.

        Args:
            kind: for the statistics and the error policy.
            offset, length: its range; it is looked at anew after each wait, for the disk may have changed.
            start: begins the I/O.
            writes: whether it needs the permission to write.

        Returns:
            what `start` gave; None if it failed, and the policy is to ignore that.
        """
        started = perf_counter_ns()
        while True:
            if self._drains or self._stopped:
                await self._park()
            if self._shut_down:
                raise io_error(errno.ESHUTDOWN, self.name, "shutting down")
            edge = self._edge(kind, offset, length, writes=writes)
            self.in_flight += 1
            try:
                result = await start(edge)
            except Exception as problem:
                policy = self._failed(problem, kind)
                if policy is ErrorPolicy.REPORT:
                    raise
                if policy is ErrorPolicy.IGNORE:
                    return None
            else:
                self.statistics.account(kind, 1, length, perf_counter_ns() - started)
                return result
            finally:
                self.left()

    def left(self) -> None:
        """A request is in flight no longer: for those, too, who make reads past the node, and count them here."""
        self.in_flight -= 1
        if self._drains and not self.in_flight:
            self._idle.set()

    def _failed(self, problem: Exception, kind: Operation) -> ErrorPolicy:
        """What is done about a request that failed: report, ignore or stop."""
        self.statistics.failed[kind] += 1
        if not isinstance(problem, OSError):
            return ErrorPolicy.REPORT  # a mistake in a driver, which no policy foresees
        policy = self.on_read_error if kind in READING else self.on_write_error
        if problem.errno in NO_FAILURES:
            policy = ErrorPolicy.REPORT
        elif policy is ErrorPolicy.ENOSPC:
            policy = ErrorPolicy.STOP if problem.errno == errno.ENOSPC else ErrorPolicy.REPORT
        if policy is ErrorPolicy.STOP:
            self._stopped = True
            self.io_status = IoStatus.NOSPACE if problem.errno == errno.ENOSPC else IoStatus.FAILED
            self._bind()
        for tell in list(self.on_error):
            tell(problem, kind, policy)
        return policy

    # --- requests -----------------------------------------------------------------------------------------

    def _edge(self, kind: Operation, offset: int, length: int, *, writes: bool = False) -> Child:
        edge = self.root
        what = kind.name.lower().replace("_", " ")
        if edge is None:
            raise io_error(errno.ENOMEDIUM, self.name, "no medium")
        if offset < 0 or length < 0 or offset + length > edge.node.size:
            raise io_error(
                errno.EINVAL,
                self.name,
                f"{what} at {offset} for {length} bytes is outside the disk of {edge.node.size}",
            )
        if writes and not edge.may_write:
            raise io_error(errno.EPERM, self.name, f"{what} through a read-only user")
        return edge

    # `read` and `write` are spelled out: what is usual is done by them, everything else by `_run`. A request of
    # 4 KiB takes a microsecond or two in all, and every call less is a tenth of it.

    async def read(self, offset: int, into: memoryview, flags: int = 0) -> None:
        """Fill `into` with the bytes at `offset`.

        Raises:
            OSError: EINVAL outside the disk; else what the storage said. `into` holds anything then.
        """
        edge, length = self.root, len(into)
        if not self._ready or edge is None or not length or offset < 0 or offset + length > edge.node.driver.size:
            await self._read_slowly(offset, into, flags)
            return
        await self.watched_read(edge.read(offset, into, flags), offset, into, flags)

    def watched_read(
        self, reading: Awaitable[None], offset: int, into: memoryview, flags: int = 0
    ) -> Coroutine[Any, Any, None]:
        """A read that is under way at the node; what comes of it is treated as `read` does.

        Args:
            reading: what `start_read` gave, or what is left of it; it is in flight from now on.
            offset, into, flags: those of the read.
        """
        self.in_flight += 1
        return self._watched_read(reading, offset, into, flags)

    async def _watched_read(self, reading: Awaitable[None], offset: int, into: memoryview, flags: int) -> None:
        started = perf_counter_ns()
        try:
            await reading
        except Exception as problem:
            policy = self._failed(problem, Operation.READ)
            if policy is ErrorPolicy.REPORT:
                raise
        else:
            statistics = self.statistics
            statistics.operations[READ] += 1
            statistics.bytes[READ] += len(into)
            statistics.time_ns[READ] += perf_counter_ns() - started
            return
        finally:
            self.left()
        if policy is ErrorPolicy.STOP:
            await self._read_slowly(offset, into, flags)
        else:
            into[:] = bytes(len(into))

    async def _read_slowly(self, offset: int, into: memoryview, flags: int) -> None:
        async def start(edge: Child) -> bool:
            if len(into):  # no driver gets a request for nothing
                await edge.read(offset, into, flags)
            return True

        if not await self._run(Operation.READ, offset, len(into), start):
            into[:] = bytes(len(into))  # nothing of what this memory held before goes to a client

    async def write(self, offset: int, data: memoryview, flags: int = 0) -> None:
        """Put `data` at `offset`; with `RequestFlag.FUA`, durably.

        Raises:
            OSError: EINVAL outside the disk, EPERM without the permission; else what the storage said. Any part of it
                may have been written then.
        """
        edge, length = self.root, len(data)
        if not self.write_cache:
            flags |= FUA
        if (
            not self._ready
            or edge is None
            or not length
            or not edge.may_write
            or offset < 0
            or offset + length > edge.node.driver.size
        ):
            await self._write_slowly(offset, data, flags)
            return
        await self.watched_write(edge.write(offset, data, flags), offset, data, flags)

    def watched_write(
        self, writing: Awaitable[None], offset: int, data: memoryview, flags: int = 0
    ) -> Coroutine[Any, Any, None]:
        """A write that is under way at the node. As `watched_read`."""
        self.in_flight += 1
        return self._watched_write(writing, offset, data, flags)

    async def _watched_write(self, writing: Awaitable[None], offset: int, data: memoryview, flags: int) -> None:
        started = perf_counter_ns()
        try:
            await writing
        except Exception as problem:
            policy = self._failed(problem, Operation.WRITE)
            if policy is ErrorPolicy.REPORT:
                raise
        else:
            statistics = self.statistics
            statistics.operations[WRITE] += 1
            statistics.bytes[WRITE] += len(data)
            statistics.time_ns[WRITE] += perf_counter_ns() - started
            return
        finally:
            self.left()
        if policy is ErrorPolicy.STOP:
            await self._write_slowly(offset, data, flags)

    async def _write_slowly(self, offset: int, data: memoryview, flags: int) -> None:
        async def start(edge: Child) -> None:
            if len(data):
                await edge.write(offset, data, flags)

        await self._run(Operation.WRITE, offset, len(data), start, writes=True)

    async def write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        """Let somebody else put bytes where they are to lie in an open file, as far as that is possible.

        Args:
            ranges: where.
            writer: see `HostWriter`. It may be one of many threads', and must not touch the graph.

        Returns:
            how many bytes of the ranges, from the first one on, are dealt with now; `write` is for the others.

        Raises:
            OSError: what the file said. Any part may have been written then.
        """
        edge = self.root
        if not (self._ready and self.write_cache) or edge is None or not edge.may_write or not ranges:
            return 0
        if ranges[0][0] < 0 or end_of(ranges) > edge.node.driver.size:
            return 0  # `write` tells what is wrong
        started = perf_counter_ns()
        self.in_flight += 1
        try:
            done = await edge.write_by(ranges, writer)
        except Exception as problem:
            if self._failed(problem, Operation.WRITE) is ErrorPolicy.REPORT:
                raise
            return 0
        else:
            if done:
                self.statistics.account(Operation.WRITE, 1, done, perf_counter_ns() - started)
            return done
        finally:
            self.left()

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Make a range read as zeroes; with `MAY_UNMAP` its space may be given back.

        Raises:
            OSError: as `write`; ENOTSUP with `NO_FALLBACK` if it is not quick, and nothing has changed.
        """
        wanted = flags if self.write_cache else flags | FUA
        await self._run(
            Operation.WRITE_ZEROES, offset, length, lambda edge: edge.write_zeroes(offset, length, wanted), writes=True
        )

    async def discard(self, offset: int, length: int) -> None:
        """The bytes of a range are no longer needed.

        Raises:
            OSError: EINVAL outside the disk, EPERM without the permission; else what the storage said.
        """
        await self._run(Operation.DISCARD, offset, length, lambda edge: edge.discard(offset, length), writes=True)

    async def cache(self, offset: int, length: int) -> None:
        """The bytes of a range will be read soon."""
        await self._run(Operation.CACHE, offset, length, lambda edge: edge.cache(offset, length))

    async def flush(self, requests: int = 1) -> None:
        """Make every write that was made durable.

        Args:
            requests: how many asked for it, for the statistics.

        Raises:
            OSError: something could not be made durable.
        """
        await self._run(Operation.FLUSH, 0, 0, lambda edge: edge.flush())
        self.statistics.operations[Operation.FLUSH] += requests - 1

    async def block_status(self, offset: int, length: int, base: Node | None = None) -> Sequence[ChainExtent]:
        """What the chain of images holds in a range; see `Node.block_status`.

        Raises:
            OSError: EINVAL outside the disk; else what the storage said.
        """
        found = await self._run(
            Operation.BLOCK_STATUS, offset, length, lambda edge: edge.node.block_status(offset, length, base)
        )
        # What could not be told, and need not, is called data: that is always safe to believe.
        return [ChainExtent(length, Status.DATA | Status.ALLOCATED, 1)] if found is None else found

    async def truncate(
        self, size: int, preallocation: Preallocation = Preallocation.OFF, *, exact: bool = True
    ) -> None:
        """Change the length of the disk; every user of the node is told.

        It is parked like other requests, but if it fails this is always reported, whatever the error policy.

        Raises:
            OSError: EPERM without the permission; else what the driver said.
        """
        if self._drains or self._stopped:
            await self._park()
        if self._shut_down:
            raise io_error(errno.ESHUTDOWN, self.name, "shutting down")
        edge = self._edge(Operation.WRITE, 0, 0)
        if Permission.RESIZE not in edge.held:
            raise io_error(errno.EPERM, self.name, "resize without the permission")
        self.in_flight += 1
        try:
            await edge.node.truncate(size, preallocation, exact=exact)
        finally:
            self.left()
