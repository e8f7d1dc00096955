"""What requests ask for, done at the backend: from a request to the items of its reply."""

import errno
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from nbd_protocol.constants import Command, CommandFlag, Errno
from nbd_protocol.errors import errno_to_nbd
from nbd_protocol.transmission import Replies, Request
from pynbd.block.extents import ChainExtent, Status
from pynbd.block.requests import RequestFlag
from pynbd.server.export import Export
from pynbd.server.wire import Item

HOLE_READ_BYTES = 64 << 10
"""Reads from this length up ask where the holes are."""

SMALLEST_HOLE_BYTES = 4096
"""Smaller holes are sent as zeroes: a chunk of its own would cost more."""

COMMAND_FUA = int(CommandFlag.FUA)
FUA = int(RequestFlag.FUA)


class Execution:
    """Carries out the requests of one connection.

    Args:
        export: what they are for.
        replies: the framing of their replies.
        contexts: id and name of the metadata contexts that were negotiated.
        warn: logs what has failed.
    """

    __slots__ = ("_contexts", "_warn", "backend", "export", "replies")

    def __init__(
        self, export: Export, replies: Replies, contexts: Mapping[int, str], warn: Callable[[str], None]
    ) -> None:
        self.export = export
        self.backend = export.backend
        self.replies = replies
        self._contexts = contexts
        self._warn = warn

    def error(self, request: Request, problem: OSError) -> bytes:
        """The reply to a request that has failed; the log is told, too."""
        fast = request.type == Command.WRITE_ZEROES and bool(request.flags & CommandFlag.FAST_ZERO)
        # A driver from outside may raise anything: that it failed is sure, whatever it says.
        code = errno_to_nbd(problem.errno or errno.EIO, fast_zero=fast)
        if code is not Errno.ENOTSUP and problem.errno != errno.ESHUTDOWN:
            self._warn(f"export {self.export.name!r}: {describe(request)}: {problem}")
        return self.replies.error(request, code, str(problem.strerror or problem))

    def span_header(self, request: Request, offset: int, length: int) -> bytes:
        """What precedes bytes of a read that are sent from a file; all of the read's in a simple reply."""
        return self.replies.read_data(request, offset, length, done=not self.replies.can_send_holes)

    def span_end(self, request: Request, problem: OSError | None) -> bytes:
        """What follows the last of them.

        Args:
            request: the read.
            problem: zeroes were sent instead of bytes.

        Raises:
            OSError: the problem, where the reply can't tell it any more. The log was told.
        """
        can_tell = self.replies.can_send_holes
        if problem is not None:
            error = self.error(request, problem)
            if not can_tell:
                raise problem
            return error
        return self.replies.done(request) if can_tell else b""

    async def execute(self, request: Request) -> list[Item]:
        """Do what a request asks for that carries no data either way; returns its reply.

        Raises:
            OSError: what the backend said.
        """
        backend, offset, length, flags = self.backend, request.offset, request.length, request.flags
        fua = FUA if flags & COMMAND_FUA else 0
        match request.type:
            case Command.FLUSH:
                await backend.flush()
            case Command.TRIM:
                if length:
                    await backend.discard(offset, length)
                if fua:
                    await backend.flush()
            case Command.CACHE:
                if length:
                    await backend.cache(offset, length)
            case Command.WRITE_ZEROES:
                wanted = fua
                if not flags & CommandFlag.NO_HOLE:
                    wanted |= int(RequestFlag.MAY_UNMAP)
                if flags & CommandFlag.FAST_ZERO:
                    wanted |= int(RequestFlag.NO_FALLBACK)
                if length:
                    await backend.write_zeroes(offset, length, wanted)
            case Command.BLOCK_STATUS:
                return await self._block_status(request)
            case Command.RESIZE:
                await backend.truncate(offset)
            case _:
                raise AssertionError(f"{describe(request)} was let through")
        return [self.replies.done(request)]

    async def read(self, request: Request) -> list[Item]:
        """The reply to a READ.

        Raises:
            OSError: what the backend said.
        """
        length, offset = request.length, request.offset
        if not length:
            return [self.replies.done(request)]
        if length >= HOLE_READ_BYTES and self.replies.can_send_holes and not request.flags & CommandFlag.DF:
            return await self.read_in_chunks(request, 0)
        header = self.replies.read_header_size
        reply = bytearray(header + length)
        await self.backend.read(offset, memoryview(reply)[header:])
        self.replies.pack_read_header(reply, 0, request.cookie, offset, length)
        return [reply]

    async def read_in_chunks(self, request: Request, sent: int) -> list[Item]:
        """The reply to a large read, or what is missing of it: holes are told, not sent.

        Args:
            request: the read.
            sent: bytes of it that were sent already.

        Raises:
            OSError: what the backend said.
        """
        start, end = request.offset + sent, request.offset + request.length
        offset = start
        extents: list[ChainExtent] = []
        while offset < end:
            found = await self.backend.block_status(offset, end - offset)
            extents += found
            offset += sum(extent.length for extent in found)
        items: list[Item] = []
        offset = start
        for length, zero in runs(extents):
            done = offset + length == end
            if zero:
                items.append(self.replies.read_hole(request, offset, length, done=done))
            else:
                data = bytearray(length)
                await self.backend.read(offset, memoryview(data))
                items += [self.replies.read_data(request, offset, length, done=done), data]
            offset += length
        return items

    async def _block_status(self, request: Request) -> list[Item]:
        """One chunk for each selected context."""
        ids = request.context_ids if request.context_ids is not None else tuple(self._contexts)
        one = bool(request.flags & CommandFlag.REQ_ONE)
        items: list[Item] = []
        for number, context_id in enumerate(ids, 1):
            extents = await self.export.context_extents(
                self._contexts[context_id], request.offset, request.length, one=one
            )
            items.append(self.replies.block_status(request, context_id, extents, done=number == len(ids)))
        return items


def runs(extents: Sequence[ChainExtent]) -> list[tuple[int, bool]]:
    """(length, reads as zeroes) of neighbours that are alike; holes not worth a chunk count as data."""
    alike = groupby(extents, lambda extent: bool(extent.status & Status.ZERO))
    whole = [(sum(extent.length for extent in group), zero) for zero, group in alike]
    told = groupby(whole, lambda run: run[1] and run[0] >= SMALLEST_HOLE_BYTES)
    return [(sum(length for length, _ in group), zero) for zero, group in told]


def describe(request: Request) -> str:
    """A request for the log: `WRITE of 4096 bytes at 0`."""
    try:
        name = Command(request.type).name
    except ValueError:
        name = f"command {request.type}"
    return f"{name} of {request.length} bytes at {request.offset}"
