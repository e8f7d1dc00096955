"""Drivers from outside are called as they were written."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, ClassVar

import pytest

from pynbd.block import registry
from pynbd.block.adapt import DATA_METHODS, LIFE_METHODS, OTHER_NAMES, SHAPE_METHODS, Adapted, adapt, is_built_in
from pynbd.block.driver import Driver, Filter, ImageInfo, Preallocation
from pynbd.block.errors import OptionError
from pynbd.block.extents import Extent, Status
from pynbd.block.graph import Graph
from pynbd.block.options import NodeOptions
from pynbd.formats.raw import Raw
from tests.block.drivers import model


class Plain(Driver):
    """Plain functions that call one another, and take as little as they need."""

    size = 64
    threads: ClassVar[set[int]] = set()

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.data = bytearray(64)

    def read(self, offset: int, into: memoryview) -> bytes:  # type: ignore[override]  # this is what is tested
        self.threads.add(threading.get_ident())
        return bytes(self.data[offset : offset + len(into)])

    def write(self, offset: int, data: memoryview) -> None:  # type: ignore[override]
        assert self.read(offset, data) == bytes(self.data[offset : offset + len(data)]), (
            "its own method, as it wrote it"
        )
        self.data[offset : offset + len(data)] = data

    def flush_to_disk(self) -> None:  # type: ignore[override]
        self.flushed = bytes(self.data)

    def truncate(self, size: int) -> None:  # type: ignore[override]
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size

    def block_status(self, offset: int, length: int) -> list[Extent]:  # type: ignore[override]
        return [Extent(length, Status.ZERO | Status.ALLOCATED)]

    def allocated_size(self) -> int:  # type: ignore[override]
        return 7

    def info(self) -> ImageInfo:  # type: ignore[override]
        return ImageInfo(cluster_size=5)


class PlainSerial(Plain):
    """One call at a time, and still its methods call one another."""

    serial = True


@pytest.mark.parametrize("kind", [Plain, PlainSerial])
async def test_a_driver_of_plain_functions(graph: Graph, kind: type[Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pynbd.block.registry.driver_class", lambda name, trusted=True: kind)
    node = await graph.open({"driver": "plain"})
    await node.path.write(5, memoryview(b"hello"), 0)
    into = memoryview(bytearray(7))
    await node.path.read(4, into, 0)
    assert bytes(into) == b"\0hello\0"
    assert threading.get_ident() not in kind.threads
    await node.path.flush()
    assert bytes(node.driver.flushed[5:10]) == b"hello"  # type: ignore[attr-defined]  # of Plain
    await node.truncate(10, Preallocation.OFF, exact=True)
    assert node.size == 10
    assert (await node.block_status(0, 10))[0].zero
    assert await node.allocated_size() == 7
    assert (await node.info()).cluster_size == 5


async def test_one_call_at_a_time(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever kind."""

    class Serial(Driver):
        size = 64
        serial = True
        inside = most = 0

        async def _enter(self) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.inside -= 1

        async def read(self, offset: int, into: memoryview, flags: int) -> None:
            await self._enter()

        async def write(self, offset: int, data: memoryview, flags: int) -> None:
            await self._enter()

        async def flush_to_disk(self) -> None:
            await self._enter()

        async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
            await self._enter()

        async def block_status(self, offset: int, length: int) -> list[Extent]:
            await self._enter()
            return [Extent(length, Status.DATA)]

    monkeypatch.setattr("pynbd.block.registry.driver_class", lambda name, trusted=True: Serial)
    node = await graph.open({"driver": "serial"})
    assert isinstance(node.driver, Serial)
    await asyncio.gather(
        *(node.path.read(0, memoryview(bytearray(4)), 0) for _ in range(4)),
        *(node.path.write(0, memoryview(bytes(4)), 0) for _ in range(4)),
        node.path.flush(),
        node.truncate(64),
        node.block_status(0, 64),
    )
    assert (node.driver.inside, node.driver.most) == (0, 1)


@pytest.mark.parametrize("name", [*DATA_METHODS, *SHAPE_METHODS])
def test_too_few_parameters(name: str) -> None:
    arguments = (DATA_METHODS | SHAPE_METHODS)[name]
    if not arguments:
        return

    class Short(Driver):
        pass

    async def method(self: Any) -> None:
        raise AssertionError

    setattr(Short, name, method)
    with pytest.raises(OptionError, match=rf"driver 'short': {name}\(\) -> '?None'? takes too few arguments"):
        adapt(Short(NodeOptions()))


@pytest.mark.parametrize("name", [*DATA_METHODS, *SHAPE_METHODS, *LIFE_METHODS])
@pytest.mark.parametrize("more", ["more", "*, more"])
def test_too_many_parameters(name: str, more: str) -> None:
    """It is told as the driver is opened, not as each request fails. What has a default need not be given."""
    arguments = (DATA_METHODS | SHAPE_METHODS | LIFE_METHODS)[name]
    code = f"def {name}(self, {''.join(f'a{n}, ' for n in range(arguments))}{more}): pass"
    sound = code.replace("more)", "more=1, **others)")
    for source, said in ((code, rf"driver 'greedy': {name}\(.*more\) takes too many arguments"), (sound, None)):
        methods: dict[str, Any] = {}
        exec(source, methods)

        class Greedy(Driver):
            locals()[name] = methods[name]

        if said is None:
            assert isinstance(adapt(Greedy(NodeOptions())), Adapted)
        else:
            with pytest.raises(OptionError, match=said):
                adapt(Greedy(NodeOptions()))


@pytest.mark.parametrize(("theirs", "ours"), OTHER_NAMES.items())
@pytest.mark.parametrize("base", [Driver, Filter])
def test_methods_with_the_names_of_other_servers(theirs: str, ours: str, base: type[Driver]) -> None:
    """They would never be called; beside one of the right name they may stand."""

    def method(self: Any, *arguments: Any) -> None:
        raise AssertionError

    misnamed = type("Misnamed", (base,), {theirs: method})
    with pytest.raises(OptionError, match=rf"'misnamed': {theirs}\(\) would never be called; its name here is {ours}"):
        adapt(misnamed(NodeOptions()))
    both = type("Both", (base,), {theirs: method, ours: method})
    assert isinstance(adapt(both(NodeOptions())), Adapted)
    value = type("Value", (base,), {theirs: 5})
    assert isinstance(adapt(value(NodeOptions())), Adapted)


@pytest.mark.parametrize("serial", [False, True])
async def test_a_filter_from_outside(graph: Graph, monkeypatch: pytest.MonkeyPatch, serial: bool) -> None:
    """What it says nothing of goes to its child; what it overrides may leave out flags."""
    driver_class = registry.driver_class

    class Upper(Filter):
        async def read(self, offset: int, into: memoryview) -> None:  # type: ignore[override]  # this is what is tested
            await self.file.read(offset, into, 0)
            into[:] = bytes(into).upper()

    Upper.serial = serial
    monkeypatch.setattr(registry, "driver_class", lambda name, **how: Upper if name == "upper" else driver_class(name))
    node = await graph.open({"driver": "upper", "file": {"driver": "model", "size": 4096}})
    below = node.children["file"].node
    await node.path.write(0, memoryview(b"small"), 0)
    into = memoryview(bytearray(6))
    await node.path.read(0, into, 0)
    assert bytes(into) == b"SMALL\0"
    await below.path.read(0, into, 0)
    assert bytes(into) == b"small\0"
    await node.path.write_zeroes(0, 2, 0)
    await node.truncate(5)
    assert node.size == below.size == 5
    await node.path.read(0, into, 0)
    assert bytes(into) == b"\0\0ALL\0"
    await node.path.flush()
    assert [call.what for call in model(node).calls].count("flush") == 1
    assert await node.block_status(0, 5) == await below.block_status(0, 5)


@pytest.mark.parametrize(
    "parameters",
    ["size", "size, exact", "size, *, exact", "size, preallocation", "size, preallocation, exact", "size, **named"],
)
async def test_every_way_to_write_truncate(parameters: str) -> None:
    methods: dict[str, Any] = {}
    exec(f"def truncate(self, {parameters}): self.given = size", methods)
    kind = type("Elastic", (Driver,), {"truncate": methods["truncate"]})
    elastic = kind(NodeOptions())
    await adapt(elastic).truncate(5, Preallocation.FULL, exact=True)
    assert vars(elastic)["given"] == 5


def test_what_is_adapted_is_what_the_layer_calls() -> None:
    for name in DATA_METHODS | SHAPE_METHODS | LIFE_METHODS:
        assert asyncio.iscoroutinefunction(getattr(Driver, name)), name


def test_built_in_drivers_are_called_straight() -> None:
    assert is_built_in(Raw)
    assert not is_built_in(Plain)
    assert isinstance(adapt(Plain(NodeOptions())), Adapted)
