"""Drivers for tests of the block layer: a model disk that checks its limits and suspends or fails at random, a layer
over a backing file, and filters. `conftest.py` registers them under their names."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, NamedTuple, cast

import msgspec

from pynbd.block.backend import BlockBackend
from pynbd.block.driver import ChildSpec, Driver, Filter, Location, Preallocation
from pynbd.block.extents import Extent, Status
from pynbd.block.graph import Graph
from pynbd.block.limits import Limits
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions, OnOff, Size
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.requests import RequestFlag

NAMES = {
    "model": "tests.block.drivers:Model",
    "layer": "tests.block.drivers:Layer",
    "watcher": "tests.block.drivers:Watcher",
    "through": "tests.block.drivers:Through",
    "twin": "tests.block.drivers:Twin",
    "wallet": "tests.block.drivers:Wallet",
}
"""Name → class, as in `registry.BUILT_IN`."""

GARBAGE = 0xDD
"""What discarded bytes turn to: nobody may count on them."""

READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE

OPEN_DRIVERS: list[Driver] = []
"""The drivers of this module that have been opened and not closed."""


class Call(NamedTuple):
    """A call that a driver got."""

    what: str
    offset: int = 0
    length: int = 0
    flags: int = 0


class Recorded(Driver):
    """Notes when it is opened and closed, and fails to open (or close) if it is told to."""

    async def open(self) -> None:
        if getattr(self.options, "fail_open", False):
            raise OSError(errno.EACCES, f"{self.node.name}: told not to open")
        OPEN_DRIVERS.append(self)
        await asyncio.sleep(0)

    async def close(self) -> None:
        OPEN_DRIVERS.remove(self)
        await asyncio.sleep(0)
        if getattr(self.options, "fail_close", False):
            raise OSError(errno.EIO, f"{self.node.name}: told not to close well")


class ModelOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the model disk.

    Args:
        size: in bytes.
        limits: the fields of `Limits`.
        seed: of all that is random.
        suspends, fails: how likely a request lets others run first, or fails, in percent.
        fua: whether writes honour FUA.
        zero_fua: whether write_zeroes does.
        zeroes, discards: whether it has write_zeroes and discard.
        grows: whether it is `growable`.
        locates: whether it says where its bytes lie (in a file that does not exist).
        fail_open, fail_close: whether to fail then.
    """

    size: Size = 0
    limits: dict[str, int] = msgspec.field(default_factory=dict)
    seed: int = 0
    suspends: int = 0
    fails: int = 0
    fua: OnOff = False
    zero_fua: OnOff = False
    zeroes: OnOff = True
    discards: OnOff = True
    grows: OnOff = False
    locates: OnOff = False
    fail_open: OnOff = False
    fail_close: OnOff = False


class Model(Recorded):
    """A disk on a bytearray. It accepts nothing outside its limits."""

    name = "model"
    Options = ModelOptions
    options: ModelOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        own = self.options
        self.limits = Limits(**own.limits)
        self.random = random.Random(own.seed)
        self.data = bytearray(own.size)
        self.size = own.size
        self.growable = own.grows  # type: ignore[misc]  # each model says for itself
        self.write_flags = int(RequestFlag.FUA) if own.fua else 0
        self.write_zeroes_flags = int(RequestFlag.FUA) if own.zero_fua else 0
        self.calls: list[Call] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.suspends = own.suspends
        self.fails = own.fails
        self.errno = errno.EIO
        self.failing: Callable[[Call], bool] | None = None
        """Decides instead of chance which calls fail."""
        self.gates: dict[str, asyncio.Event] = {}
        """Calls of these kinds wait until their gate is open."""
        self.durable = bytes(self.data)
        """What a power failure would leave, at the least."""

    def told(self, what: str) -> list[Call]:
        """The calls of one kind."""
        return [call for call in self.calls if call.what == what]

    async def _enter(self, call: Call) -> bool:
        """Note a call, let others run; whether it is to fail."""
        self.calls.append(call)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if call.what in self.gates:
                await self.gates[call.what].wait()
            if self.random.randrange(100) < self.suspends:
                for _ in range(self.random.randrange(1, 6)):
                    await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        return self.failing(call) if self.failing is not None else self.random.randrange(100) < self.fails

    def _fail(self, what: str) -> OSError:
        return OSError(self.errno, f"model {what}: {os.strerror(self.errno)}")

    def _check(self, call: Call, unit: int, largest: int) -> None:
        end = call.offset + call.length
        last = -(-self.size // self.limits.request_alignment) * self.limits.request_alignment
        assert call.length > 0, call
        assert call.offset % unit == 0, (call, unit)
        assert call.length % unit == 0 or (call.what == "discard" and end == last), (call, unit)
        assert not largest or call.length <= largest, (call, largest)
        assert end <= last or (self.growable and call.what in ("write", "write_zeroes")), (call, self.size)
        if call.flags & RequestFlag.FUA:
            assert (self.write_flags if call.what == "write" else self.write_zeroes_flags) & RequestFlag.FUA, call

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        end = offset + len(data)
        if self.growable and end > self.size:
            self.data.extend(bytes(end - self.size))
            self.size = end
        data = data[: max(self.size - offset, 0)]
        self.data[offset : offset + len(data)] = data

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        call = Call("read", offset, len(into), flags)
        self._check(call, self.limits.request_alignment, self.limits.max_transfer)
        if await self._enter(call):
            raise self._fail("read")
        found = self.data[offset : offset + len(into)]
        into[:] = found + bytes(len(into) - len(found))

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        call = Call("write", offset, len(data), flags)
        self._check(call, self.limits.request_alignment, self.limits.max_transfer)
        assert data.nbytes == len(data)
        if await self._enter(call):
            self._put(offset, data[: self.random.randrange(len(data) + 1)])
            raise self._fail("write")
        self._put(offset, data)
        if flags & RequestFlag.FUA:
            self._save(offset, len(data))

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        call = Call("write_zeroes", offset, length, flags)
        self._check(call, self.limits.write_zeroes_unit, self.limits.max_write_zeroes)
        if not self.options.zeroes:
            await super().write_zeroes(offset, length, flags)
        if await self._enter(call):
            self._put(offset, bytes(self.random.randrange(length + 1)))
            raise self._fail("write_zeroes")
        self._put(offset, bytes(length))
        if flags & RequestFlag.FUA:
            self._save(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        call = Call("discard", offset, length)
        self._check(call, self.limits.discard_unit, self.limits.max_discard)
        if not self.options.discards:
            await super().discard(offset, length)
        failed = await self._enter(call)
        end = min(offset + length, self.size)
        self.data[offset:end] = bytes([GARBAGE]) * max(end - offset, 0)
        if failed:
            raise self._fail("discard")

    async def cache(self, offset: int, length: int) -> None:
        if await self._enter(Call("cache", offset, length)):
            raise self._fail("cache")

    async def flush_to_disk(self) -> None:
        before = bytes(self.data)
        if await self._enter(Call("flush")):
            raise self._fail("flush")
        self.durable = before

    def _save(self, offset: int, length: int) -> None:
        durable = bytearray(self.durable)
        durable.extend(bytes(max(offset + length - len(durable), 0)))
        durable[offset : offset + length] = self.data[offset : offset + length]
        self.durable = bytes(durable)

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if await self._enter(Call("truncate", size)):
            raise self._fail("truncate")
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size

    def locate(self, offset: int, length: int) -> Location | None:
        return Location(-1, offset, length) if self.options.locates else None


class LayerOptions(ModelOptions, frozen=True, kw_only=True):
    """Options of a layer.

    Args:
        unit: the layer holds or does not hold units of so many bytes.
        steps: `block_status` tells of at most so many extents at a time.
        verbatim: whether it tells where in its file its bytes lie.
    """

    unit: int = 16
    steps: int = 3
    verbatim: OnOff = False


class Layer(Recorded):
    """A copy-on-write layer: what was never written to it is read from `backing`."""

    name = "layer"
    Options = LayerOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {
        "file": ChildSpec(ChildRole.DATA | ChildRole.METADATA, optional=True),
        "backing": ChildSpec(ChildRole.COW, optional=True, writable=False),
    }
    is_format = True
    options: LayerOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.size = self.options.size
        self.units: dict[int, bytes] = {}

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        unit = self.options.unit
        while len(into):
            number, inside = divmod(offset, unit)
            length = min(unit - inside, len(into))
            if number in self.units:
                into[:length] = self.units[number][inside : inside + length]
            elif "backing" in self.node.children:
                await self.child("backing").read(offset, into[:length], 0)
            else:
                into[:length] = bytes(length)
            into = into[length:]
            offset += length

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        unit = self.options.unit
        assert offset % unit == 0
        assert len(data) % unit == 0
        for start in range(0, len(data), unit):
            self.units[(offset + start) // unit] = bytes(data[start : start + unit])

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        unit, end, found = self.options.unit, offset + length, list[Extent]()
        while offset < end and len(found) < self.options.steps:
            number, inside = divmod(offset, unit)
            size = min(unit - inside, end - offset)
            held = self.units.get(number)
            if held is None:
                found.append(Extent(size, Status.NONE))
            elif any(held):
                file = self.node.children["file"].node if self.options.verbatim else None
                recurse = Status.RECURSE if file else Status.NONE
                found.append(Extent(size, Status.DATA | Status.ALLOCATED | recurse, file, offset))
            else:
                found.append(Extent(size, Status.ZERO | Status.ALLOCATED))
            offset += size
        return found


class Watcher(Filter):
    """Sees every request, and lets others run first."""

    name = "watcher"

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.calls: list[str] = []

    async def _see(self, what: str) -> None:
        self.calls.append(what)
        await asyncio.sleep(0)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self._see("read")
        await super().read(offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self._see("write")
        await super().write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._see("write_zeroes")
        await super().write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._see("discard")
        await super().discard(offset, length)

    async def flush_to_os(self) -> None:
        await self._see("flush_to_os")

    async def flush_to_disk(self) -> None:
        await self._see("flush_to_disk")


class Through(Filter):
    """Overrides nothing."""

    name = "through"


class Twin(Filter):
    """Shows `file`, and has a second child that wants its flushes, too."""

    name = "twin"
    children: ClassVar[Mapping[str, ChildSpec]] = {
        "file": ChildSpec(ChildRole.FILTERED | ChildRole.DATA),
        "other": ChildSpec(ChildRole.DATA),
    }


class Wallet(Recorded):
    """A format that writes its own structures to its file; it holds nothing else."""

    name = "wallet"
    is_format = True
    Options = ModelOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {"file": ChildSpec(ChildRole.DATA | ChildRole.METADATA)}
    write_flags = 0

    def child_resized(self, name: str) -> None:
        self.size = self.file.size

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self.file.read(offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self.file.write(offset, data, flags)

    async def flush_to_os(self) -> None:
        await self.file.write(0, memoryview(b"header!!"), 0)


def model(node: Node) -> Model:
    """The model disk at the bottom of a chain of `file` children."""
    while "file" in node.children:
        node = node.children["file"].node
    return cast(Model, node.driver)


def driver(node: Node) -> Any:
    """The driver of a node, for what only this module's drivers have."""
    return node.driver


def attach(graph: Graph, node: Node, name: str = "user", held: Permission = READ_WRITE, **policy: Any) -> BlockBackend:
    """A user of a node."""
    backend = BlockBackend(name, **policy)
    graph.attach(backend, node, held)
    return backend


@asynccontextmanager
async def opened(description: Mapping[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[Graph, Node]]:
    """A graph with one node open; everything is closed at the end."""
    graph = Graph()
    node = await graph.open(description or {"driver": "model", **options})
    try:
        yield graph, node
    except BaseException:
        OPEN_DRIVERS.clear()  # what failed may still be at work
        raise
    await close(graph)


async def close(graph: Graph) -> None:
    """Close a graph, users and all."""
    for each in list(graph.nodes.values()):
        for edge in list(each.parents):
            if isinstance(edge.parent, BlockBackend):
                graph.detach(edge.parent)
    await graph.close_all()
    assert not graph.nodes


def is_paused(backend: BlockBackend) -> bool:
    """Whether requests are parked, for tests that ask several times."""
    return backend.paused
