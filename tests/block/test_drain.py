"""Drained sections: nothing in flight inside, nothing lost, whatever becomes of the graph meanwhile."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend, ErrorPolicy
from pynbd.block.drain import downwards, drained
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from tests.block.drivers import attach, driver, is_paused, model, opened

SIZE = 1 << 14


async def turns(count: int = 10) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


class Load:
    """Users that read and write what they wrote, one after another, until they are told to stop."""

    def __init__(self, backends: list[BlockBackend], seed: int) -> None:
        self.backends = backends
        self.stopped = False
        self.done = 0
        self.tasks = [asyncio.create_task(self._run(number, seed)) for number in range(len(backends) * 3)]

    async def _run(self, number: int, seed: int) -> None:
        chance, backend, turn = random.Random(seed * 100 + number), self.backends[number % len(self.backends)], 0
        while not self.stopped:
            turn += 1
            data = bytes([number + 1, turn & 255]) * chance.randrange(1, 30)
            await backend.write(number * 64, memoryview(data))
            into = memoryview(bytearray(len(data)))
            await backend.read(number * 64, into)
            assert bytes(into) == data
            if chance.random() < 0.2:
                await backend.flush()
            self.done += 1

    async def end(self) -> None:
        """Let them finish."""
        self.stopped = True
        await asyncio.gather(*self.tasks)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    nesting=st.lists(st.sampled_from(["top", "middle", "bottom", "other"]), min_size=1, max_size=4),
    users=st.integers(1, 3),
)
def test_nothing_is_in_flight_in_a_drained_section(seed: int, nesting: list[str], users: int) -> None:
    """Under load, nested and overlapping as it comes; what arrives meanwhile is parked, and then runs."""

    async def law() -> None:
        tree = {
            "driver": "watcher",
            "node-name": "top",
            "file": {
                "driver": "watcher",
                "node-name": "middle",
                "file": {"driver": "model", "size": SIZE, "node-name": "bottom", "seed": seed, "suspends": 50},
            },
        }
        async with opened(tree) as (graph, node):
            await graph.open({"driver": "model", "size": 512, "node-name": "other"})
            load = Load([attach(graph, node, f"user {number}") for number in range(users)], seed)
            disk, before = model(node), -1
            for _ in range(3):
                await turns(30)
                assert load.done > before
                async with AsyncExitStack() as sections:
                    for name in nesting:
                        await sections.enter_async_context(drained(graph.nodes[name]))
                    before = load.done
                    if set(nesting) != {"other"}:
                        calls = len(disk.calls)
                        await turns(30)
                        assert not disk.in_flight
                        assert not any(backend.in_flight for backend in load.backends)
                        assert len(disk.calls) == calls
                        assert sum(backend.parked for backend in load.backends) == len(load.tasks)
                if set(nesting) != {"other"}:
                    assert not any(backend.paused for backend in load.backends)
            await load.end()
            assert not any(backend.parked or backend.in_flight for backend in load.backends)

    asyncio.run(law())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), kinds=st.lists(st.sampled_from(["through", "watcher"]), max_size=5))
def test_filters_come_and_go_under_load(seed: int, kinds: list[str]) -> None:
    """Requests go on through every change of the graph, and never see anything of it but the new path."""

    async def law() -> None:
        tree = {"driver": "model", "size": SIZE, "node-name": "disk", "seed": seed, "suspends": 50}
        async with opened(tree) as (graph, node):
            backend = attach(graph, node)
            load = Load([backend], seed)
            await turns()
            assert backend.root is not None
            for kind in kinds:
                top = backend.node
                inserted = await graph.open({"driver": kind, "file": top.name})
                await graph.replace(backend.root, inserted)
                assert backend.node is inserted
                if kind == "through" and top.options.discard != "ignore":
                    assert backend.root.write == top.path.write
                if kind == "watcher":
                    assert backend.root.write == inserted.path.write
                before = load.done
                while load.done < before + 5:
                    await asyncio.sleep(0)
                if kind == "watcher":
                    assert {"read", "write"} <= set(driver(inserted).calls)
            assert not is_paused(backend)
            while backend.node is not node:
                above = backend.node
                await graph.replace(backend.root, above.children["file"].node)
                await graph.close(above)
                before = load.done
                while load.done < before + 5:
                    await asyncio.sleep(0)
            assert backend.root.write == node.path.write
            await load.end()
            assert not is_paused(backend)

    asyncio.run(law())


async def test_a_change_in_the_middle_of_a_chain(graph: Graph) -> None:
    """What a node above holds of the path below is bound anew as well."""
    node = await graph.open(
        {"driver": "wallet", "file": {"driver": "through", "file": {"driver": "model", "size": SIZE}}}
    )
    backend = attach(graph, node)
    through, disk = node.children["file"].node, node.children["file"].node.children["file"].node
    assert node.children["file"].write == disk.path.write
    watcher = await graph.open({"driver": "watcher", "file": disk})
    await graph.replace(through.children["file"], watcher)
    assert node.children["file"].write == watcher.path.write == through.path.write
    await backend.write(64, memoryview(b"through the watcher"))
    assert driver(watcher).calls == ["write"]
    await graph.replace(through.children["file"], disk)
    assert node.children["file"].write == disk.path.write


async def test_who_comes_to_stand_above_a_drained_node_is_paused_too(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE, "locates": True})
    disk = driver(node)
    elsewhere = await graph.open({"driver": "model", "size": SIZE, "locates": True})
    mover = attach(graph, elsewhere, "mover", Permission.CONSISTENT_READ)
    watcher = await graph.open({"driver": "watcher", "file": node})
    async with drained(node):
        newcomer = attach(graph, watcher, "newcomer")
        assert mover.root is not None
        await graph.replace(mover.root, node)
        requests = [asyncio.create_task(backend.read(0, memoryview(bytearray(1)))) for backend in (newcomer, mover)]
        await turns()
        assert not disk.calls
        assert newcomer.locate(0, 1) is None
        assert mover.locate(0, 1) is None
        assert (newcomer.parked, mover.parked) == (1, 1)
    await asyncio.gather(*requests)
    assert not is_paused(newcomer)
    assert not is_paused(mover)
    assert mover.locate(0, 1) is not None


async def test_who_leaves_a_drained_node_goes_on_after_the_section(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE})
    elsewhere = await graph.open({"driver": "model", "size": SIZE})
    backend = attach(graph, node)
    assert backend.root is not None
    async with drained(node):
        await graph.replace(backend.root, elsewhere)
    await backend.write(0, memoryview(b"x"))
    assert bytes(driver(elsewhere).data[:1]) == b"x"


async def test_a_wait_that_is_given_up_lets_everybody_go_on(graph: Graph) -> None:
    tree: dict[str, Any] = {"driver": "watcher", "file": {"driver": "model", "size": SIZE}}
    node = await graph.open(tree)
    first, second = attach(graph, node, "first"), attach(graph, node, "second")
    gate = model(node).gates["read"] = asyncio.Event()
    read = asyncio.create_task(second.read(0, memoryview(bytearray(1))))
    await turns()

    async def section() -> None:
        async with drained(node.children["file"].node):
            raise AssertionError("there is still a request in flight")

    waiting = asyncio.create_task(section())
    await turns()
    assert is_paused(first)
    assert is_paused(second)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not is_paused(first)
    assert not is_paused(second)
    await first.write(0, memoryview(b"x"))
    gate.set()
    await read


async def test_an_error_inside_ends_the_section(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE})
    backend = attach(graph, node)
    with pytest.raises(KeyError):
        async with drained(node), drained(node):
            raise KeyError
    assert not is_paused(backend)
    assert not node.drained_sections
    await backend.flush()


async def test_stop_and_drain_do_not_block_each_other(graph: Graph) -> None:
    """A stopped request is not in flight: a drain does not wait for it, nor does the end of the drain resume it."""
    node = await graph.open({"driver": "model", "size": SIZE})
    backend = attach(graph, node, on_write_error=ErrorPolicy.STOP)
    disk = driver(node)
    disk.fails = 100
    write = asyncio.create_task(backend.write(0, memoryview(b"x")))
    await turns()
    assert is_paused(backend)
    async with drained(node):
        disk.fails = 0
        backend.resume()
        await turns()
        assert not write.done()
    await write
    disk.fails = 100
    write = asyncio.create_task(backend.write(0, memoryview(b"y")))
    await turns()
    async with drained(node):
        pass
    disk.fails = 0
    await turns()
    assert not write.done()
    backend.resume()
    await write


async def test_a_diamond_is_drained_once(graph: Graph) -> None:
    disk = await graph.open({"driver": "model", "size": SIZE})
    twin = await graph.open({"driver": "twin", "file": disk, "other": disk})
    backend = attach(graph, twin, held=Permission.CONSISTENT_READ)
    async with drained(disk), drained(twin):
        assert is_paused(backend)
    assert not is_paused(backend)
    assert downwards([twin]) == [twin, disk]


def test_downwards_lists_each_node_before_its_children() -> None:
    async def law() -> None:
        async with opened({"driver": "model", "size": 16, "node-name": "d0"}) as (graph, _):
            for number in range(1, 6):
                below = [graph.nodes[f"d{n}"] for n in (number - 1, max(number - 2, 0))]
                held: list[Node] = below if below[0] is not below[1] else below[:1]
                tree: dict[str, Any] = {"driver": "twin", "node-name": f"d{number}", "file": held[0], "other": held[-1]}
                await graph.open(tree)
            order = downwards([graph.nodes["d3"], graph.nodes["d5"]])
            assert len(order) == len(set(order)) == 6
            for node in order:
                for edge in node.children.values():
                    assert order.index(node) < order.index(edge.node)

    asyncio.run(law())
