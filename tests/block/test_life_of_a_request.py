"""The life of a request, as laws over a driver that suspends, fails and delays at random.

A request that has entered the block layer runs to its end, whoever still waits for it; its payload is not touched by
the layer and is needed until the end only; a parked request is not in flight, is tried whole, and ends with ESHUTDOWN
on shutdown; nothing starts inside a drained section; nothing is lost, and nothing is done twice unless it failed.
"""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend, ErrorPolicy
from pynbd.block.drain import drained
from pynbd.block.node import Node
from pynbd.block.requests import RequestFlag
from tests.block.drivers import attach, driver, model, opened

SIZE = 1 << 15
SLOT = 96
"""Each request has a place of its own; with an alignment of 64 neighbours share blocks."""

LAYERS = st.lists(st.sampled_from(["through", "watcher", "wallet"]), max_size=2)


def described(layers: list[str], **options: Any) -> dict[str, Any]:
    """A model disk under some layers."""
    tree: dict[str, Any] = {"driver": "model", "size": SIZE, **options}
    for layer in layers:
        tree = {"driver": layer, "file": tree}
    return tree


class Requests:
    """Requests that are started and not waited for, and what became of each."""

    def __init__(self, backend: BlockBackend, seed: int) -> None:
        self.backend = backend
        self.chance = random.Random(seed)
        self.tasks: list[asyncio.Task[None]] = []
        self.payloads: dict[int, bytes] = {}
        self.answers: dict[int, int] = {}

    def start(self) -> None:
        """One more write, in the next slot."""
        number = len(self.tasks) + 1
        payload = self.chance.randbytes(self.chance.randrange(1, SLOT + 1))
        self.payloads[number] = payload
        flags = int(self.chance.choice([RequestFlag.NONE, RequestFlag.FUA]))
        self.tasks.append(asyncio.create_task(self._write(number, payload, flags)))

    async def _write(self, number: int, payload: bytes, flags: int) -> None:
        buffer = bytearray(payload)
        view = memoryview(buffer).toreadonly()
        try:
            await self.backend.write(number * SLOT, view, flags)
            answer = 0
        except OSError as problem:
            answer = problem.errno or -1
        assert number not in self.answers, "answered twice"
        self.answers[number] = answer
        assert bytes(buffer) == payload
        # From now on the memory belongs to somebody else.
        buffer[:] = b"\xff" * len(buffer)
        view.release()

    async def finish(self) -> None:
        """Wait for all."""
        await asyncio.gather(*self.tasks)

    def check(self, data: bytes) -> None:
        """Every write that was answered well is there, every other is there in part or not at all."""
        for number, answer in self.answers.items():
            found, payload = data[number * SLOT : (number + 1) * SLOT], self.payloads[number]
            if answer == 0:
                assert found[: len(payload)] == payload, number
            elif answer == errno.ESHUTDOWN:
                assert found == bytes(SLOT), f"{number} ended with ESHUTDOWN, but was begun"
            assert found[len(payload) :] == bytes(SLOT - len(payload)), number


async def contents(node: Node) -> bytes:
    """All bytes of a node, whatever its disk thinks of requests at present."""
    disk = model(node)
    disk.fails = disk.suspends = 0
    into = memoryview(bytearray(node.size))
    await node.path.read(0, into, 0)
    return bytes(into)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    layers=LAYERS,
    alignment=st.sampled_from([1, 64]),
    fails=st.sampled_from([0, 30]),
    script=st.lists(st.sampled_from(["start", "start", "start", "turn", "drain", "stop", "nested"]), max_size=40),
)
def test_whatever_happens_meanwhile_each_request_has_one_answer(
    seed: int, layers: list[str], alignment: int, fails: int, script: list[str]
) -> None:
    """Drained, stopped, resumed, failed, delayed: in any order."""

    async def law() -> None:
        limits = {"request_alignment": alignment}
        async with opened(described(layers, seed=seed, suspends=70, limits=limits)) as (graph, node):
            backend = attach(graph, node, on_write_error=ErrorPolicy.STOP)
            disk, requests = model(node), Requests(backend, seed)
            disk.fails = fails
            drains: list[asyncio.Task[None]] = []
            for action in script:
                if action == "start":
                    requests.start()
                elif action in ("drain", "nested"):
                    lowest = node if action == "drain" else disk.node
                    drains.append(asyncio.create_task(self_checking_drain(lowest, backend)))
                elif action == "stop":
                    backend.resume()
                await asyncio.sleep(0)
            await asyncio.gather(*drains)
            disk.fails = 0
            while not all(task.done() for task in requests.tasks):
                backend.resume()
                await asyncio.sleep(0)
            await requests.finish()
            assert not any(requests.answers.values()), "the policy is to stop, so every request ends well at last"
            assert (backend.in_flight, backend.parked) == (0, 0)
            requests.check(await contents(node))

    asyncio.run(law())


async def self_checking_drain(node: Node, backend: BlockBackend) -> None:
    """A drained section that looks whether it is one."""
    async with drained(node):
        disk = model(node)
        before = len(disk.calls)
        for _ in range(5):
            assert backend.in_flight == 0
            assert disk.in_flight == 0
            await asyncio.sleep(0)
        assert len(disk.calls) == before


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    layers=LAYERS,
    before=st.integers(0, 12),
    turns=st.integers(0, 12),
    how=st.sampled_from(["running", "drained", "stopped"]),
)
def test_shutdown_ends_what_has_not_begun_and_finishes_what_has(
    seed: int, layers: list[str], before: int, turns: int, how: str
) -> None:
    """Nothing is cut off in the middle: a request ran to its end, or it never touched the disk."""

    async def law() -> None:
        async with opened(described(layers, seed=seed, suspends=80)) as (graph, node):
            backend = attach(graph, node, on_write_error=ErrorPolicy.STOP)
            disk, requests = model(node), Requests(backend, seed)
            if how == "stopped":
                disk.failing = lambda call: call.offset == SLOT and call.what == "write" and call.length <= SLOT
            for _ in range(before):
                requests.start()
            for _ in range(turns):
                await asyncio.sleep(0)
            section = asyncio.create_task(self_checking_drain(node, backend)) if how == "drained" else None
            for _ in range(3):
                requests.start()
                await asyncio.sleep(0)
            backend.shutdown()
            requests.start()
            await requests.finish()
            if section is not None:
                await section
            disk.failing = None
            assert set(requests.answers.values()) <= {0, errno.ESHUTDOWN}
            assert requests.answers[len(requests.tasks)] == errno.ESHUTDOWN
            stopped = how == "stopped" and requests.answers.get(1) == errno.ESHUTDOWN
            if stopped:
                del requests.answers[1]  # this one had begun, and failed, before it was parked
            requests.check(await contents(node))
            assert (backend.in_flight, backend.parked) == (0, 0)

    asyncio.run(law())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), layers=LAYERS, gone=st.sets(st.integers(0, 14)))
def test_who_waits_for_a_request_may_go_away(seed: int, layers: list[str], gone: set[int]) -> None:
    """The requests are tasks that nobody cancels; cancelling those who wait for them changes nothing."""

    async def law() -> None:
        async with opened(described(layers, seed=seed, suspends=80)) as (graph, node):
            backend = attach(graph, node)
            requests = Requests(backend, seed)

            async def wait_for(task: asyncio.Task[None]) -> None:
                await asyncio.shield(task)

            waiters = []
            for _ in range(15):
                requests.start()
                waiters.append(asyncio.create_task(wait_for(requests.tasks[-1])))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for number in gone:
                waiters[number].cancel()
            await asyncio.gather(*waiters, return_exceptions=True)
            await requests.finish()
            assert not any(requests.answers.values())
            requests.check(await contents(node))

    asyncio.run(law())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), users=st.integers(2, 4), broken=st.integers(0, 3), turns=st.integers(0, 30))
def test_one_user_that_stops_holds_up_no_other(seed: int, users: int, broken: int, turns: int) -> None:
    """A user's failures are parked with that user."""

    async def law() -> None:
        async with opened(described([], seed=seed, suspends=50)) as (graph, node):
            disk = model(node)
            backends = [attach(graph, node, f"user {n}", on_write_error=ErrorPolicy.STOP) for n in range(users)]
            unlucky = broken % users
            disk.failing = lambda call: call.what == "write" and call.offset // 1024 == unlucky
            writes = [
                [
                    asyncio.create_task(backend.write(n * 1024 + i * 64, memoryview(bytes([n + 1]) * 64)))
                    for i in range(4)
                ]
                for n, backend in enumerate(backends)
            ]
            for number, tasks in enumerate(writes):
                if number != unlucky:
                    await asyncio.gather(*tasks)
            for _ in range(turns):
                await asyncio.sleep(0)
            async with drained(node):
                pass  # a stopped user is not in flight, so this comes to its end
            assert backends[unlucky].paused
            assert not any(backend.paused for n, backend in enumerate(backends) if n != unlucky)
            disk.failing = None
            backends[unlucky].resume()
            for number, tasks in enumerate(writes):
                await asyncio.gather(*tasks)
                assert bytes(disk.data[number * 1024 : number * 1024 + 256]) == bytes([number + 1]) * 256

    asyncio.run(law())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), where=st.integers(0, 3))
def test_a_request_sees_one_graph(seed: int, where: int) -> None:
    """A filter that is inserted under load sees whole requests, and every one of those that come later."""

    async def law() -> None:
        async with opened(described(["watcher"] * where, seed=seed, suspends=60)) as (graph, node):
            backend = attach(graph, node)
            requests = Requests(backend, seed)
            for _ in range(10):
                requests.start()
            await asyncio.sleep(0)
            inserted = await graph.open({"driver": "watcher", "file": node})
            assert backend.root is not None
            insert = asyncio.create_task(graph.replace(backend.root, inserted))
            for _ in range(10):
                requests.start()
                await asyncio.sleep(0)
            await insert
            seen = len([call for call in driver(inserted).calls if call == "write"])
            for _ in range(10):
                requests.start()
            await requests.finish()
            writes = len([call for call in driver(inserted).calls if call == "write"])
            assert writes - seen >= 10
            assert writes <= 20, "what had begun before went the old way"
            requests.check(await contents(inserted))

    asyncio.run(law())
