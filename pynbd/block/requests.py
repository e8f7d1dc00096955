"""The flags of a request, and the requests that are tracked because they must not overlap."""

import asyncio
from enum import IntFlag
from types import TracebackType
from typing import Self


class RequestFlag(IntFlag):
    """How a request is to be carried out; the names are QEMU's (`BDRV_REQ_*`)."""

    NONE = 0
    FUA = 1  # answered only when it is on stable storage
    MAY_UNMAP = 2  # write_zeroes may deallocate
    NO_FALLBACK = 4  # write_zeroes quickly, or ENOTSUP with nothing changed
    WRITE_UNCHANGED = 8  # the bytes are those that are there already (copy-on-read, stream)
    SERIALISING = 16  # overlapping requests wait for this one
    COMPRESSED = 32  # store compressed, where the format can
    PREFETCH = 64  # read only for the sake of copy-on-read: the bytes are not wanted


class TrackedRequest:
    """One request in flight on a node: `async with` it around the I/O.

    Args:
        tracker: the node's list of requests in flight.
        offset: first byte.
        length: bytes.
        serialising: whether overlapping requests must wait for this one.
    """

    __slots__ = ("done", "end", "offset", "serialising", "tracker")

    def __init__(self, tracker: "RequestTracker", offset: int, length: int, *, serialising: bool) -> None:
        self.tracker = tracker
        self.offset = offset
        self.end = offset + length
        self.serialising = serialising
        self.done: asyncio.Future[None] | None = None

    def overlaps(self, other: "TrackedRequest") -> bool:
        """Whether the two share a byte."""
        return self.offset < other.end and other.offset < self.end

    async def __aenter__(self) -> Self:
        # Entered in the list first, so that the order of arrival decides and nobody waits in a circle:
        # a request waits only for those that were in the list before it.
        earlier = list(self.tracker.in_flight)
        self.tracker.in_flight[self] = None
        try:
            for request in earlier:
                if (self.serialising or request.serialising) and self.overlaps(request):
                    await request.finished()
        except BaseException:
            self.leave()
            raise
        return self

    async def finished(self) -> None:
        """Wait until the request has left the list (at once, if it has)."""
        if self not in self.tracker.in_flight:
            return
        if self.done is None:
            self.done = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.done)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Take the request off the list and wake those who wait for it."""
        del self.tracker.in_flight[self]
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


class RequestTracker:
    """The requests in flight on one node, oldest first.

    Only nodes that read-modify-write, copy on read, or take part in a block copy have one: see
    `Node.needs_tracking`.
    """

    __slots__ = ("in_flight",)

    def __init__(self) -> None:
        self.in_flight: dict[TrackedRequest, None] = {}

    def track(self, offset: int, length: int, *, serialising: bool = False) -> TrackedRequest:
        """A request on `length` bytes at `offset`, to be entered with `async with`."""
        return TrackedRequest(self, offset, length, serialising=serialising)
