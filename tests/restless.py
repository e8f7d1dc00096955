"""A storage driver for tests, in memory, that suspends, fails and delays at random: what a driver may do, it does.

Named by its file (`RESTLESS`), as any driver from outside pynbd. Everything random comes from `seed`, so a run can
be repeated. Discarded bytes turn to garbage, since nobody may count on them.
"""

import asyncio
import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import msgspec

from pynbd.block.driver import Driver, Preallocation
from pynbd.block.extents import Extent, Status
from pynbd.block.limits import Limits
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions, OnOff, Size

RESTLESS = str(Path(__file__).resolve())
"""What to write for `driver`."""

GARBAGE = 0xDD

Chance = Annotated[float, msgspec.Meta(ge=0, le=1)]


class RestlessOptions(NodeOptions, frozen=True, kw_only=True):
    """The options.

    Args:
        size: of the disk in bytes.
        fill: with what it is filled: `random` or `zero`.
        seed: of everything random.
        suspends: how likely a request lets others run first (several times).
        fails: how likely a request fails; a write may have been made in part then.
        alignment: the request alignment in bytes.
        zeroes: whether it has a write_zeroes of its own.
        holes: whether block_status tells zeroes from data (in blocks of 512 bytes).
    """

    size: Size = 1 << 20
    fill: str = "random"
    seed: int = 0
    suspends: Chance = 0.0
    fails: Chance = 0.0
    alignment: int = 1
    zeroes: OnOff = True
    holes: OnOff = False


class Restless(Driver):
    """Bytes in memory, served in a disorderly way."""

    Options = RestlessOptions
    growable = True
    options: RestlessOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.random = random.Random(self.options.seed)
        self.limits = Limits(request_alignment=self.options.alignment)
        self.data = bytearray(
            self.random.randbytes(self.options.size) if self.options.fill == "random" else self.options.size
        )
        self.calls: list[tuple[str, int, int]] = []
        self.fails = self.options.fails
        self.flushes = 0
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def size(self) -> int:  # type: ignore[override]  # the length of the bytes, not a number of its own
        return len(self.data)

    async def _serve(self, what: str, offset: int, length: int) -> int:
        """Account for a request and let others run; the bytes of it to carry out before it fails (-1: it does not)."""
        self.calls.append((what, offset, length))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.random.random() < self.options.suspends:
                for _ in range(self.random.randrange(1, 5)):
                    await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        if self.random.random() >= self.fails:
            return -1
        return self.random.randrange(length + 1) if length else 0

    def _check(self, what: str, done: int) -> None:
        if done >= 0:
            raise OSError(errno.EIO, f"restless {what}: {os.strerror(errno.EIO)}")

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        done = await self._serve("read", offset, len(into))
        self._check("read", done)
        # A write that failed in the middle may have left the last block in part; it is read whole all the same.
        into[:] = self.data[offset : offset + len(into)].ljust(len(into), b"\0")

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        end = offset + len(data)
        self.data.extend(bytes(max(end - len(self.data), 0)))
        self.data[offset:end] = data

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        done = await self._serve("write", offset, len(data))
        self._put(offset, data if done < 0 else data[:done])
        self._check("write", done)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if not self.options.zeroes:
            await super().write_zeroes(offset, length, flags)
        done = await self._serve("write_zeroes", offset, length)
        self._put(offset, bytes(length if done < 0 else done))
        self._check("write_zeroes", done)

    async def discard(self, offset: int, length: int) -> None:
        done = await self._serve("discard", offset, length)
        end = min(offset + length, len(self.data))
        self.data[offset:end] = bytes([GARBAGE]) * max(end - offset, 0)
        self._check("discard", done)

    async def flush_to_disk(self) -> None:
        done = await self._serve("flush", 0, 0)
        self._check("flush", done)
        self.flushes += 1

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        if not self.options.holes:
            return await super().block_status(offset, length)
        end = min(offset + length, (offset // 512 + 1) * 512)
        zero = not any(self.data[offset:end])
        status = Status.ALLOCATED | (Status.ZERO if zero else Status.DATA)
        return (Extent(end - offset, status, self.node, offset),)

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


def restless(node: Node) -> Restless:
    """The driver of a node that was opened with `RESTLESS`."""
    return cast(Restless, node.driver)
