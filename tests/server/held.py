"""A storage driver for tests in which every request waits until the test lets it go on.

Named by its file (`HELD`). While `hold` is set, requests of the kinds named there wait in `waiting`. With `writes_now`
it writes in place, with `memory` large writes are received there.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from pynbd.block.driver import Driver, Filler
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions, Size

HELD = str(Path(__file__).resolve())
"""What to write for `driver`."""


class HeldOptions(NodeOptions, frozen=True, kw_only=True):
    """The options: `size` in bytes."""

    size: Size = 1 << 20


class Waiting(NamedTuple):
    """A request that waits for `go`; setting an exception makes it fail."""

    what: str
    offset: int
    length: int
    go: "asyncio.Future[None]"


class Held(Driver):
    """Bytes in memory, held back."""

    Options = HeldOptions
    options: HeldOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.size = self.options.size
        self.written: dict[int, bytes] = {}
        self.hold: frozenset[str] = frozenset({"read", "write"})
        self.waiting: list[Waiting] = []
        self.calls: list[tuple[str, int, int]] = []
        self.arrived = asyncio.Event()
        self.on_call: Callable[[], None] | None = None
        self.writes_now = False
        self.memory: bytearray | None = None
        """With it, `fill_now` takes what comes."""
        self.fill_fails: OSError | None = None

    async def _wait(self, what: str, offset: int, length: int) -> None:
        self.calls.append((what, offset, length))
        if self.on_call is not None:
            self.on_call()
        if what in self.hold:
            go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(Waiting(what, offset, length, go))
            self.arrived.set()
            await go

    async def until(self, count: int) -> None:
        """Wait until so many requests wait."""
        async with asyncio.timeout(30):
            while len(self.waiting) < count:
                self.arrived.clear()
                await self.arrived.wait()

    def release(self, count: int = -1) -> None:
        """Let the oldest requests go on; all of them, and all that come, if no number is given."""
        if count < 0:
            self.hold = frozenset()
            count = len(self.waiting)
        for request in self.waiting[:count]:
            request.go.set_result(None)
        del self.waiting[:count]

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self._wait("read", offset, len(into))
        into[:] = pattern(offset, len(into))

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        before = bytes(data)
        await self._wait("write", offset, len(data))
        # A buffer that was used for something else meanwhile would show here.
        assert data.readonly
        assert bytes(data) == before
        self.written[offset] = before

    def write_now(self, offset: int, data: memoryview) -> bool:
        if self.writes_now:
            self.calls.append(("write_now", offset, len(data)))
            self.written[offset] = bytes(data)
        return self.writes_now

    def fill_now(self, offset: int, length: int, filler: Filler) -> int | None:
        if self.memory is None:
            return None
        if self.fill_fails is not None:
            raise self.fill_fails
        filled = filler(memoryview(self.memory)[offset : offset + length])
        if not filled:
            return filled
        self.calls.append(("fill_now", offset, filled))
        return filled

    async def flush_to_disk(self) -> None:
        await self._wait("flush", 0, 0)


def pattern(offset: int, length: int) -> bytes:
    """What lies where: every eight bytes say their own position."""
    first = offset // 8
    words = b"".join((number * 8).to_bytes(8, "big") for number in range(first, (offset + length + 7) // 8))
    return words[offset - first * 8 :][:length]


def held(node: Node) -> Held:
    """The driver of a node that was opened with `HELD`."""
    return cast(Held, node.driver)
