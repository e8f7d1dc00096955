"""Copying one disk to another: many requests in flight, holes kept, zeroes found."""

import asyncio
import functools
import mmap
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from pynbd.block.alignment import aligned_buffer, pieces, round_down, round_up
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Copied, Location, Room
from pynbd.block.extents import ChainExtent
from pynbd.block.ranges import Ranges, first_bytes, other_bytes, total_bytes
from pynbd.block.requests import RequestFlag
from pynbd.cli.pump import Pump
from pynbd.cli.walk import walk
from pynbd.cli.zero_runs import BLOCK_BYTES, runs

ZERO_BYTES = 256 << 20
"""Zeroes of one request: a server that has to write them should not be busy for many seconds."""

PUMPED_BYTES = 16 << 20
"""What is pumped from file to file at once, in one piece or several: no buffer has to hold it."""

PUMPED_PIECES = 64
"""So many pieces are pumped at once, with the holes between them; each time that pumping ends, those that are left are
looked at again.
"""

PUMPED_LOCATIONS = 1024
"""In so many places what is pumped at once may lie."""

UNPUMPED_BYTES = 64 << 10
"""What is dealt with here where pumping has ended. Where the target does not want it at all, it is twice as much each
time, up to what is asked for at once elsewhere."""

SECTOR_BYTES = 512
"""What a source that can't be read as a whole is read by."""

MAY_UNMAP = int(RequestFlag.MAY_UNMAP)


class Source(Protocol):
    """What is copied; a `BlockBackend` is one."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""

    async def block_status(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What lies where; of depth 0 and neither data nor zero is what the target shows already."""


class Kind(Enum):
    """What is done with a range."""

    COPY = "copy"
    ZERO = "zero"
    SKIP = "skip"


class Piece(NamedTuple):
    """A range that one request deals with."""

    number: int
    offset: int
    length: int
    kind: Kind


class Copier:
    """One copy.

    Args:
        source: what is read, from its first byte to its last.
        target: what is written; not smaller.
        requests: how many are in flight.
        request_bytes: the largest read and write, a multiple of `unit`.
        allocated: write zeroes so that they take space.
        zeroes_as_data: write them as everything else; they take space then, too.
        target_is_zero: whether the target reads as zeroes before, so that zeroes need not be written.
        block_bytes: how long zeroes inside data must be to be noticed, a multiple of 512.
        unit: what is copied is made of whole blocks of this size, but for the last one.
        in_order: one write at a time, from the first to the last.
        flags: of all writes of data.
        salvage: take what can't be read for zeroes, and say so on stderr.
        bytes_per_s: how fast it may be; 0 is without a limit.
        pump: copies what lies verbatim in files.
    """

    def __init__(
        self,
        source: Source,
        target: BlockBackend,
        *,
        requests: int,
        request_bytes: int,
        allocated: bool = False,
        zeroes_as_data: bool = False,
        target_is_zero: bool = False,
        block_bytes: int = BLOCK_BYTES,
        unit: int = 1,
        in_order: bool = False,
        flags: int = 0,
        salvage: bool = False,
        bytes_per_s: int = 0,
        pump: Pump | None = None,
    ) -> None:
        self.done_bytes = 0
        """How much of the source has been dealt with."""
        self._source = source
        self._target = target
        self._requests = requests
        self._request_bytes = request_bytes
        self._allocated = allocated or zeroes_as_data
        self._zeroes = memoryview(bytes(request_bytes if zeroes_as_data else 0))
        self._skips_zeroes = target_is_zero and not self._allocated
        self._block_bytes = block_bytes
        self._unit = unit
        self._turns = Turns() if in_order else None
        self._flags = flags
        self._salvage = salvage
        self._pace = Pace(bytes_per_s) if bytes_per_s else None
        self._pump = pump
        self._pumps_whole = True
        """What was pumped last was so to its end, and nothing was left out: few zeroes are in the data here."""
        self._stopped = False
        self._ready: deque[Piece] = deque()
        self._pieces = self._cut()
        self._looking = asyncio.Lock()

    async def run(self) -> None:
        """Copy. Nothing is in flight any more when this returns or raises.

        Must not be cancelled: `stop` it.

        Raises:
            OSError: a request failed; the target holds some of the source, no matter which.
        """
        problem: BaseException | None = None
        for ended in asyncio.as_completed([self._work() for _ in range(self._requests)]):
            try:
                await ended
            except Exception as failure:
                problem = problem or failure
                self.stop()
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """Start nothing new: `run` returns soon, with a part of the disk copied."""
        self._stopped = True
        if self._turns is not None:
            self._turns.end()

    @property
    def stopped(self) -> bool:
        """Whether somebody stopped it."""
        return self._stopped

    async def _work(self) -> None:
        """One request after another, in a buffer that is used again and again."""
        buffer = memoryview(b"")
        while (piece := await self._next_piece()) is not None:
            if self._pace is not None and piece.kind is Kind.COPY:
                await self._pace.wait(piece.length)
            if piece.kind is Kind.COPY:
                if piece.length > self._request_bytes or self._locate(piece.offset, piece.length) is not None:
                    await self._pump_pieces([piece, *self._following(piece)])
                    continue
                if not buffer:
                    buffer = aligned_buffer(self._request_bytes, mmap.PAGESIZE)
                await self._read(piece.offset, buffer[: piece.length])
            if self._turns is not None and not await self._turns.come(piece.number):
                return
            if piece.kind is Kind.COPY:
                await self._write(piece.offset, buffer[: piece.length])
            elif piece.kind is Kind.ZERO:
                await self._zero(piece.offset, piece.length)
            if self._turns is not None:
                self._turns.over(piece.number)
            self.done_bytes += piece.length

    # --- from file to file ------------------------------------------------------------------------------------

    def _locate(self, offset: int, length: int) -> Location | None:
        """Where bytes can be pumped from."""
        return self._pump.locate(offset, length) if self._pump is not None and length else None

    def _following(self, piece: Piece) -> Iterator[Piece]:
        """The pieces behind one that are dealt with together with it: a trip to a thread takes its time.

        Those that are not made of whole clusters are dealt with alone: others fill their clusters.
        """
        room = PUMPED_BYTES - piece.length if self._pace is None and self._is_whole(piece) else 0
        for _ in range(PUMPED_PIECES - 1):
            if not self._ready or room <= 0:
                break
            kind, length = self._ready[0].kind, self._ready[0].length
            if kind is Kind.COPY:
                if length > room or not self._is_whole(self._ready[0]):
                    break
                room -= length
            elif kind is Kind.ZERO and not self._skips_zeroes:
                break
            yield self._ready.popleft()

    def _is_whole(self, piece: Piece) -> bool:
        """Whether it is made of whole clusters of the target."""
        cluster = self._pump.cluster_bytes if self._pump is not None else 0
        return not cluster or (piece.offset % cluster == 0 and piece.length % cluster == 0)

    async def _pump_pieces(self, pieces: Sequence[Piece]) -> None:
        """Copy what is to be copied of some pieces, as far as possible without having the bytes here.

        Where writes are made in order, it is the places in the target that are taken in order; the bytes get there side
        by side.
        """
        turns = self._turns
        if turns is not None and not await turns.come(pieces[0].number):
            return
        ranges = [(piece.offset, piece.length) for piece in pieces if piece.kind is Kind.COPY]
        if turns is not None and self._pumps_whole:
            copying = asyncio.ensure_future(self._pump_all(ranges))
            turns.over(pieces[-1].number)  # the next one wakes up when `copying` has begun
            await copying
        else:
            await self._pump_all(ranges)
            if turns is not None:
                turns.over(pieces[-1].number)
        if not self._stopped:
            self.done_bytes += sum(piece.length for piece in pieces)

    async def _pump_all(self, ranges: Ranges) -> None:
        assert self._pump is not None
        buffer = memoryview(b"")
        unpumped_bytes = UNPUMPED_BYTES
        while ranges and not self._stopped:
            pumped, locations = self._located(ranges)
            done = 0
            if pumped:
                done = await self._target.write_by(pumped, functools.partial(self._pump_by, locations))
                whole = done == total_bytes(pumped)
                self._pumps_whole &= whole
                ranges = list(other_bytes(ranges, done))
                if whole or (done and self._skips_zeroes):
                    continue
            unpumped_bytes = UNPUMPED_BYTES if done else min(2 * unpumped_bytes, self._request_bytes)
            if len(buffer) < unpumped_bytes:
                buffer = aligned_buffer(unpumped_bytes, mmap.PAGESIZE)
            offset, length = ranges[0]
            part = buffer[: min(length, unpumped_bytes)]
            await self._read(offset, part)
            await self._write(offset, part)
            ranges = list(other_bytes(ranges, len(part)))

    def _pump_by(self, locations: Sequence[Location], room: Room) -> Copied:
        """See `HostWriter`."""
        assert self._pump is not None
        copied = self._pump.copy(locations, room)
        self._pumps_whole = copied == Copied(total_bytes(room.places), [])
        return copied

    def _located(self, ranges: Ranges) -> tuple[Ranges, Sequence[Location]]:
        """(the first bytes of some ranges, where they can be pumped from)."""
        locations: list[Location] = []
        count = 0
        for start, length in ranges:
            offset, end = start, start + length
            while offset < end:
                found = self._locate(offset, end - offset)
                if found is None or len(locations) == PUMPED_LOCATIONS:
                    return list(first_bytes(ranges, count)), locations
                found = found._replace(length=min(found.length, end - offset))
                locations.append(found)
                offset += found.length
                count += found.length
        return ranges, locations

    # --- what is to be done -----------------------------------------------------------------------------------

    async def _next_piece(self) -> Piece | None:
        if not self._ready and not self._stopped:
            async with self._looking:
                ahead = 0
                while ahead < PUMPED_BYTES and (not self._ready or ahead) and not self._stopped:
                    piece = await anext(self._pieces, None)
                    if piece is None:
                        break
                    self._ready.append(piece)
                    ahead += piece.length
        return self._ready.popleft() if self._ready and not self._stopped else None

    async def _cut(self) -> AsyncIterator[Piece]:
        """The whole source in pieces."""
        number = 0
        async for offset, length, kind in self._runs():
            largest = self._largest(offset, length, kind)
            for start, size in pieces(offset, length, largest, largest):
                yield Piece(number, start, size, kind)
                number += 1

    async def _runs(self) -> AsyncIterator[tuple[int, int, Kind]]:
        """(offset, length, kind) of the whole source; runs end at whole units."""
        start, end, kind = 0, 0, Kind.SKIP
        async for length, following in self._in_units():
            if following is not kind and end > start:
                yield start, end - start, kind
                start = end
            kind, end = following, end + length
        if end > start:
            yield start, end - start, kind

    async def _in_units(self) -> AsyncIterator[tuple[int, Kind]]:
        """(length, kind) of the same in whole units: one that is not all alike is copied."""
        unit, offset = self._unit, 0
        begun: Kind | None = None  # of the unit that `offset` lies in, if it does not begin there
        async for length, kind in self._extents():
            end = offset + length
            if begun is not None:
                begun = begun if begun is kind else Kind.COPY
                if end < round_up(offset, unit):
                    offset = end
                    continue
                yield unit, begun
                offset, begun = round_up(offset, unit), None
            if round_down(end, unit) > offset:
                yield round_down(end, unit) - offset, kind
            if end % unit:
                begun = kind
            offset = end
        if begun is not None:
            yield offset % unit, begun

    async def _extents(self) -> AsyncIterator[tuple[int, Kind]]:
        async for extent in walk(self._source.block_status, 0, self._source.size):
            yield extent.length, Kind.ZERO if extent.zero else Kind.COPY if extent.data or extent.depth else Kind.SKIP

    def _largest(self, offset: int, length: int, kind: Kind) -> int:
        """How long the pieces of a run may be."""
        if kind is Kind.COPY:
            # With a limit on the pace it goes on in small steps.
            pumped = self._pace is None and self._locate(offset, length) is not None
            return PUMPED_BYTES if pumped else self._request_bytes
        if kind is Kind.SKIP or self._skips_zeroes:
            return length
        return len(self._zeroes) or ZERO_BYTES

    # --- doing it ---------------------------------------------------------------------------------------------

    async def _read(self, offset: int, into: memoryview) -> None:
        try:
            await self._source.read(offset, into)
        except OSError as problem:
            if not self._salvage:
                raise
            if len(into) > SECTOR_BYTES:
                half = round_up(len(into) // 2, SECTOR_BYTES)
                await self._read(offset, into[:half])
                await self._read(offset + half, into[half:])
                return
            print(f"warning: error while reading offset {offset}: {problem.strerror}", file=sys.stderr)
            into[:] = bytes(len(into))

    async def _zero(self, offset: int, length: int) -> None:
        if self._zeroes:
            await self._write(offset, self._zeroes[:length])
        elif not self._skips_zeroes:
            await self._target.write_zeroes(offset, length, 0 if self._allocated else MAY_UNMAP)

    async def _write(self, offset: int, part: memoryview) -> None:
        if self._allocated:
            await self._target.write(offset, part, self._flags)
            return
        for start, length, zero in runs(part, self._block_bytes):
            if zero:
                await self._zero(offset + start, length)
            else:
                await self._target.write(offset + start, part[start : start + length], self._flags)


class Turns:
    """Who has read may write when all that lies before is written."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._ended = False

    async def come(self, number: int) -> bool:
        """Wait for a turn; False if it never comes."""
        if number != self._next and not self._ended:
            self._waiting[number] = turn = asyncio.get_running_loop().create_future()
            await turn
            del self._waiting[number]
        return not self._ended

    def over(self, number: int) -> None:
        """Let the next one have its turn."""
        self._next = number + 1
        waiting = self._waiting.get(self._next)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def end(self) -> None:
        """There are no more turns."""
        self._ended = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)


class Pace:
    """How fast data may be copied.

    Args:
        bytes_per_s: at the most, on average.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def wait(self, length: int) -> None:
        """Wait until so many bytes may be copied."""
        now = asyncio.get_running_loop().time()
        begin = max(self._free_at, now)
        self._free_at = begin + length / self._bytes_per_s
        if begin > now:
            await asyncio.sleep(begin - now)
