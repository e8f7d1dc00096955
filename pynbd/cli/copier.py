"""Copying one disk to another: many requests in flight, holes kept, zeroes found."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator

from pynbd.block.alignment import pieces
from pynbd.block.backend import BlockBackend
from pynbd.block.requests import RequestFlag

STATUS_BYTES = 1 << 30
"""How far ahead the source is asked what lies where."""

ZERO_BYTES = 256 << 20
"""Zeroes of one request: a server that has to write them should not be busy for many seconds."""

BLOCK_BYTES = 4096
"""Zeroes inside data are looked for in blocks of this size, as qemu-img and nbdcopy do."""

ZERO_BLOCK = bytes(BLOCK_BYTES)

MAY_UNMAP = int(RequestFlag.MAY_UNMAP)


class Copier:
    """One copy.

    Args:
        source: what is read, from its first byte to its last.
        target: what is written; not smaller.
        requests: how many are in flight.
        request_bytes: the largest read and write.
        allocated: write zeroes so that they take space.
        target_is_zero: whether the target reads as zeroes before, so that zeroes need not be written.
    """

    def __init__(
        self,
        source: BlockBackend,
        target: BlockBackend,
        *,
        requests: int,
        request_bytes: int,
        allocated: bool = False,
        target_is_zero: bool = False,
    ) -> None:
        self.done_bytes = 0
        """How much of the source has been dealt with."""
        self._source = source
        self._target = target
        self._requests = requests
        self._request_bytes = request_bytes
        self._allocated = allocated
        self._skips_zeroes = target_is_zero and not allocated
        self._stopped = False
        self._ready: deque[tuple[int, int, bool]] = deque()
        self._pieces = self._look_ahead()
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
                self._stopped = True
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """Start nothing new: `run` returns soon, with a part of the disk copied."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether somebody stopped it."""
        return self._stopped

    async def _work(self) -> None:
        """One request after another, in a buffer that is used again and again."""
        buffer = memoryview(bytearray(self._request_bytes))
        while (piece := await self._next_piece()) is not None:
            offset, length, zero = piece
            if zero:
                await self._zero(offset, length)
            else:
                await self._copy(offset, buffer[:length])
            self.done_bytes += length

    async def _next_piece(self) -> tuple[int, int, bool] | None:
        if not self._ready and not self._stopped:
            async with self._looking:
                if not self._ready:
                    async for extent in self._pieces:
                        self._ready += self._cut(*extent)
                        break
        return self._ready.popleft() if self._ready and not self._stopped else None

    async def _look_ahead(self) -> AsyncIterator[tuple[int, int, bool]]:
        """(offset, length, whether it reads as zeroes) of the whole source."""
        offset, size = 0, self._source.size
        while offset < size:
            for extent in await self._source.block_status(offset, min(STATUS_BYTES, size - offset)):
                yield offset, extent.length, extent.zero
                offset += extent.length

    def _cut(self, offset: int, length: int, zero: bool) -> Iterator[tuple[int, int, bool]]:
        largest = ZERO_BYTES if zero else self._request_bytes
        for start, size in pieces(offset, length, largest, largest):
            yield start, size, zero

    async def _zero(self, offset: int, length: int) -> None:
        if not self._skips_zeroes:
            await self._target.write_zeroes(offset, length, 0 if self._allocated else MAY_UNMAP)

    async def _copy(self, offset: int, part: memoryview) -> None:
        await self._source.read(offset, part)
        if self._allocated:
            await self._target.write(offset, part)
            return
        for start, length, zero in runs(part):
            if zero:
                await self._zero(offset + start, length)
            else:
                await self._target.write(offset + start, part[start : start + length])


def runs(data: memoryview) -> Iterator[tuple[int, int, bool]]:
    """(start, length, whether it is all zeroes) of the runs of blocks in a buffer.

    Only blocks whose first byte is zero are looked at: in most data there are few.
    """
    firsts = bytes(data[::BLOCK_BYTES])
    begin = 0
    number = firsts.find(0)
    while number >= 0:
        start = number * BLOCK_BYTES
        block = bytes(data[start : start + BLOCK_BYTES])
        if block == ZERO_BLOCK[: len(block)]:
            if start > begin:
                yield begin, start - begin, False
            while number < len(firsts) and block == ZERO_BLOCK[: len(block)]:
                number += 1
                block = bytes(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            end = min(number * BLOCK_BYTES, len(data))
            yield start, end - start, True
            begin = end
        number = firsts.find(0, number + 1)
    if begin < len(data):
        yield begin, len(data) - begin, False
