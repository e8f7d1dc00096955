"""A storage driver for tests that notes what a disk could hold if the power went at any moment.

It is a page cache over a disk: between two flushes each sector of 512 bytes may hold what it held at the first one, or
anything that was written to it since.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pynbd.block.driver import Driver, Preallocation
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions

RECORDER = str(Path(__file__).resolve())
"""What to write for `driver`."""

SECTOR = 512


class RecorderOptions(NodeOptions, frozen=True, kw_only=True):
    """The options.

    Args:
        seed: of everything random.
    """

    seed: int = 0


class Recorder(Driver):
    """Bytes in memory, and what each sector has been since the last flush."""

    Options = RecorderOptions
    growable = True
    options: RecorderOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.random = random.Random(self.options.seed)
        self.data = bytearray()
        self.operations: list[dict[int, bytes]] = []
        """The writes since the last flush, oldest first: sector → what it held after it."""
        self.durable = bytearray()
        """What was there at the last flush."""
        self.discards: list[tuple[int, int]] = []
        """(offset, bytes) of all discards."""
        self.on_write: Callable[[], None] | None = None
        """Called after each write, also those in the middle of a flush of the nodes above."""

    @property
    def size(self) -> int:  # type: ignore[override]  # the length of the bytes, not a number of its own
        return len(self.data)

    def begin(self, data: bytes) -> None:
        """Hold these bytes, durably."""
        self.data[:] = data
        self.durable[:] = data

    async def _wait(self) -> None:
        while self.random.random() < 0.3:
            await asyncio.sleep(0)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self._wait()
        into[:] = self.data[offset : offset + len(into)].ljust(len(into), b"\0")

    def _put(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.data.extend(bytes(max(end - len(self.data), 0)))
        self.data[offset:end] = data
        first, last = offset // SECTOR, -(-end // SECTOR)
        self.operations.append(
            {sector: bytes(self.data[sector * SECTOR : (sector + 1) * SECTOR]) for sector in range(first, last)}
        )
        if self.on_write is not None:
            self.on_write()

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self._wait()
        self._put(offset, bytes(data))

    def write_now(self, offset: int, data: memoryview) -> bool:
        if self.random.random() < 0.3:
            return False
        self._put(offset, bytes(data))
        return True

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._wait()
        self._put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self._wait()
        length = min(length, len(self.data) - offset)
        if length > 0:
            self.discards.append((offset, length))
            self._put(offset, self.random.randbytes(length))  # nobody may count on what comes back

    async def flush_to_disk(self) -> None:
        await self._wait()
        self.durable[:] = self.data
        self.operations.clear()

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def after_crash(self, how: random.Random) -> bytes:
        """What the disk may hold if the power went now: all that was flushed, and any part of the rest."""
        image = bytearray(self.durable)
        mode = how.random()
        share = how.random()
        if mode < 0.3:
            # A prefix of the writes, the last of them torn.
            whole = how.randrange(len(self.operations) + 1)
            chosen = self.operations[:whole]
            if whole < len(self.operations):
                torn = self.operations[whole]
                chosen.append({sector: data for sector, data in torn.items() if how.random() < 0.5})
        elif mode < 0.6:
            chosen = [operation for operation in self.operations if how.random() < share]
        else:
            chosen = [
                {sector: data for sector, data in operation.items() if how.random() < share}
                for operation in self.operations
            ]
        for operation in chosen:
            for sector, data in operation.items():
                end = sector * SECTOR + len(data)
                image.extend(bytes(max(end - len(image), 0)))
                image[sector * SECTOR : end] = data
        return bytes(image)


def recorder(node: Node) -> Recorder:
    """The driver of a node that was opened with `RECORDER`."""
    return cast(Recorder, node.driver)
