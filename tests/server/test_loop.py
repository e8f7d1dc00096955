"""The loop that servers run on: asyncio's laws hold on it, and readers are called where it waits."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from pynbd.server.loop import MAX_CREDIT, ServingLoop, ServingSelector, serving_loop


def run(work: Callable[[ServingLoop], Awaitable[Any]]) -> Any:
    """Run something on a new loop."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ServingLoop)
        return await work(loop)

    with asyncio.Runner(loop_factory=ServingLoop) as runner:
        return runner.run(main())


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection, neither of which waits."""
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    with closing(near), closing(far):
        yield near, far


def test_a_direct_reader_is_called_for_each_arrival(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair

    async def work(loop: ServingLoop) -> list[bytes]:
        received: list[bytes] = []
        done = loop.create_future()

        def reader() -> None:
            received.append(near.recv(1))
            if len(received) < 100:
                far.send(b"x")  # answered at once, without a turn of the loop
            else:
                done.set_result(None)

        loop.add_direct_reader(near.fileno(), reader)
        far.send(b"x")
        await done
        loop.remove_direct_reader(near.fileno())
        return received

    assert run(work) == [b"x"] * 100


def test_what_a_direct_reader_schedules_has_its_turn(pair: tuple[socket.socket, socket.socket]) -> None:
    """A client that never pauses does not keep tasks, timers or other descriptors waiting for ever."""
    near, far = pair
    left, right = os.pipe()

    async def work(loop: ServingLoop) -> None:
        def reader() -> None:
            far.send(near.recv(1))

        heard = loop.create_future()
        loop.add_reader(left, lambda: heard.set_result(os.read(left, 1)))
        loop.add_direct_reader(near.fileno(), reader)
        near_end = asyncio.ensure_future(ping(loop, far, near))
        await asyncio.sleep(0.01)
        os.write(right, b"y")
        assert await heard == b"y"
        near_end.cancel()
        loop.remove_direct_reader(near.fileno())
        loop.remove_reader(left)

    async def ping(loop: ServingLoop, one: socket.socket, other: socket.socket) -> None:
        # The socket's own echo keeps the reader busy: what it sends comes back to it.
        def reader() -> None:
            other.send(one.recv(1))

        loop.add_direct_reader(one.fileno(), reader)
        one.send(b"x")
        try:
            await loop.create_future()
        finally:
            loop.remove_direct_reader(one.fileno())

    try:
        run(work)
    finally:
        os.close(left)
        os.close(right)


def test_a_reader_that_was_removed_is_not_called(pair: tuple[socket.socket, socket.socket]) -> None:
    """Also when its event came together with that of the reader that removed it."""
    near, far = pair

    async def work(loop: ServingLoop) -> list[str]:
        called: list[str] = []
        done = loop.create_future()

        def reader(own: socket.socket, other: socket.socket) -> None:
            called.append("reader")
            loop.remove_direct_reader(other.fileno())
            loop.remove_direct_reader(own.fileno())
            done.set_result(None)

        far.send(b"x")
        near.send(b"x")
        loop.add_direct_reader(near.fileno(), lambda: reader(near, far))
        loop.add_direct_reader(far.fileno(), lambda: reader(far, near))
        await done
        await asyncio.sleep(0)
        return called

    assert run(work) == ["reader"]


def test_a_reader_that_fails_is_reported_and_the_loop_goes_on(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair

    async def work(loop: ServingLoop) -> dict[str, Any]:
        told = loop.create_future()
        loop.set_exception_handler(lambda _, context: told.set_result(context))

        def reader() -> None:
            near.recv(1)
            raise ValueError("a mistake")

        loop.add_direct_reader(near.fileno(), reader)
        far.send(b"x")
        context: dict[str, Any] = await told
        loop.remove_direct_reader(near.fileno())
        return context

    assert str(run(work)["exception"]) == "a mistake"


def test_stop_inside_of_a_reader_stops_the_loop(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    with closing(ServingLoop()) as loop:
        loop.add_direct_reader(near.fileno(), loop.stop)
        far.send(b"x")
        loop.run_forever()
        loop.remove_direct_reader(near.fileno())


def test_readers_and_writers_of_one_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    """A descriptor that is waited for both ways is told of both, the usual way."""
    near, far = pair

    async def work(loop: ServingLoop) -> None:
        read, written = loop.create_future(), loop.create_future()

        def reader() -> None:
            near.recv(1)
            read.set_result(None)

        def writer() -> None:
            loop.remove_writer(near.fileno())
            written.set_result(None)

        far.send(b"x")
        loop.add_direct_reader(near.fileno(), reader)
        loop.add_writer(near.fileno(), writer)
        await asyncio.gather(read, written)
        loop.remove_direct_reader(near.fileno())

    run(work)


def test_polls_in_vain_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes late keeps the processor busy: credit is used up, and then the selector sleeps."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with closing(ServingLoop()) as loop:
        selector = loop._serving
        selector.credit = MAX_CREDIT
        for _ in range(MAX_CREDIT):
            assert selector.select(0.001) == []
        assert selector.credit == 0


@pytest.mark.parametrize(("processors", "processes"), [({0}, 1), ({0, 1}, 2)])
def test_one_processor_is_left_to_the_client(
    processors: set[int],
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    with closing(ServingLoop(processes)) as loop:
        loop.add_reader(near.fileno(), lambda: None)
        far.send(b"x")
        for _ in range(3):
            assert loop._serving.select(None)
        assert loop._serving.credit == 0


def test_a_selector_without_a_loop_is_an_ordinary_one(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    with closing(ServingSelector()) as selector:
        selector.register(near, 1, "data")
        assert selector.select(0) == []
        far.send(b"x")
        assert [(key.data, events) for key, events in selector.select(0)] == [("data", 1)]


def test_the_policy_that_somebody_set_decides() -> None:
    uvloop = pytest.importorskip("uvloop")
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        with closing(serving_loop()) as loop:
            assert isinstance(loop, uvloop.Loop)
    finally:
        asyncio.set_event_loop_policy(before)
    with closing(serving_loop()) as loop:
        assert isinstance(loop, ServingLoop)


def test_one_client_is_told_from_several(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair

    async def work(loop: ServingLoop) -> list[bool]:
        told = [loop.has_one_client]
        for sock in (near, far):
            loop.add_direct_reader(sock.fileno(), lambda: None)
            told.append(loop.has_one_client)
        loop.remove_direct_reader(near.fileno())
        told.append(loop.has_one_client)
        loop.remove_direct_reader(far.fileno())
        return told

    assert run(work) == [False, True, False, True]
