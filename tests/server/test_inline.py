"""Coroutines that are started in place behave as tasks do: every case runs with work that does and does not wait."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pynbd.server.inline import InlineStarter

Body = Callable[[list[Any]], Coroutine[Any, Any, None]]


async def run_inline(*bodies: Body) -> list[list[Any]]:
    """Start coroutines in place from a loop callback, as a connection does; give what each of them noted."""
    loop = asyncio.get_running_loop()
    starter = InlineStarter(loop)
    notes: list[list[Any]] = [[] for _ in bodies]
    ended = asyncio.Event()
    left = len(bodies)

    async def guarded(body: Body, noted: list[Any]) -> None:
        nonlocal left
        try:
            await body(noted)
        except BaseException as problem:
            noted.append(type(problem).__name__)
        left -= 1
        if not left:
            ended.set()

    def wake_up() -> None:
        for body, noted in zip(bodies, notes, strict=True):
            starter.start(guarded(body, noted))

    loop.call_soon(wake_up)
    async with asyncio.timeout(10):
        await ended.wait()
        while starter.tasks:
            await asyncio.sleep(0)
    return notes


async def nothing() -> str:
    return "now"


async def one_turn() -> str:
    await asyncio.sleep(0)
    return "later"


async def some_turns() -> str:
    for _ in range(3):
        await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    return "much later"


async def a_thread() -> str:
    return await asyncio.get_running_loop().run_in_executor(None, lambda: "thread")


async def a_future() -> str:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, "future")
    return await future


async def a_done_future() -> str:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    future.set_result("done future")
    return await future


WORK = [nothing, one_turn, some_turns, a_thread, a_future, a_done_future]
Work = Callable[[], Coroutine[Any, Any, str]]


@pytest.mark.parametrize("work", WORK)
async def test_it_runs_to_its_end(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        noted.append(await work())

    assert await run_inline(body) == [[await work()]]


async def test_what_does_not_wait_ends_in_place() -> None:
    starter = InlineStarter(asyncio.get_running_loop())
    ended: list[bool] = []

    async def body() -> None:
        await nothing()

    asyncio.get_running_loop().call_soon(lambda: ended.append(starter.start(body())))
    await asyncio.sleep(0.001)
    assert ended == [True]
    assert not starter.tasks


@pytest.mark.parametrize("work", WORK)
async def test_exceptions_reach_the_coroutine(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        try:
            noted.append(await work())
            raise LookupError
        finally:
            noted.append("finally")

    assert await run_inline(body) == [[await work(), "finally", "LookupError"]]


@pytest.mark.parametrize("work", WORK)
async def test_a_timeout_that_does_not_fire(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        async with asyncio.timeout(5):
            noted.append(await work())
        noted.append(await work())

    assert await run_inline(body) == [[await work()] * 2]


@pytest.mark.parametrize("work", WORK)
async def test_a_timeout_that_fires(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        await work()
        try:
            async with asyncio.timeout(0.001):
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            noted.append("timeout")
        noted.append(await work())

    assert await run_inline(body) == [["timeout", await work()]]


async def test_a_timeout_in_the_past() -> None:
    async def body(noted: list[Any]) -> None:
        try:
            async with asyncio.timeout(-1):
                await one_turn()
        except TimeoutError:
            noted.append("timeout")

    assert await run_inline(body) == [["timeout"]]


@pytest.mark.parametrize("work", WORK)
async def test_wait_for(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        noted.append(await asyncio.wait_for(work(), 5))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.get_running_loop().create_future(), 0.001)

    assert await run_inline(body) == [[await work()]]


@pytest.mark.parametrize("work", WORK)
async def test_task_groups(work: Work) -> None:
    async def body(noted: list[Any]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work()) for _ in range(3)]
        noted.extend(task.result() for task in tasks)

    assert await run_inline(body) == [[await work()] * 3]


async def test_a_task_group_whose_child_fails_cancels_its_parent_once() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError

    async def body(noted: list[Any]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.get_running_loop().create_future()
        except* LookupError:
            noted.append("group failed")
        noted.append(await some_turns())

    assert await run_inline(body) == [["group failed", "much later"]]


async def test_gather_and_shield() -> None:
    async def body(noted: list[Any]) -> None:
        noted.extend(await asyncio.gather(nothing(), one_turn(), a_thread()))
        noted.append(await asyncio.shield(asyncio.ensure_future(one_turn())))

    assert await run_inline(body) == [["now", "later", "thread", "later"]]


async def test_locks_serialise_coroutines_of_one_batch() -> None:
    lock = asyncio.Lock()
    inside = 0

    async def body(noted: list[Any]) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            await some_turns()
            inside -= 1
        noted.append("done")

    assert await run_inline(*[body] * 5) == [["done"]] * 5


async def test_each_coroutine_that_waits_is_cancelled_alone() -> None:
    """Two of one batch suspend under timeouts: the one that fires must not hit the other."""

    async def short(noted: list[Any]) -> None:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            noted.append("timeout")

    async def long(noted: list[Any]) -> None:
        async with asyncio.timeout(5):
            await asyncio.sleep(0.01)
        noted.append("fine")

    assert await run_inline(short, long, short, long) == [["timeout"], ["fine"]] * 2


async def test_the_current_task_is_asked_for_in_place_and_later() -> None:
    async def body(noted: list[Any]) -> None:
        first = asyncio.current_task()
        assert first is not None
        noted.append(first.done())
        await asyncio.sleep(0)
        second = asyncio.current_task()
        assert isinstance(second, asyncio.Task)
        noted.append(first.get_name() == second.get_name())
        noted.append(first.cancelling())

    assert await run_inline(body) == [[False, True, 0]]


async def test_nothing_is_current_after_a_batch() -> None:
    seen: list[Any] = []
    loop = asyncio.get_running_loop()
    starter = InlineStarter(loop)

    async def body() -> None:
        await asyncio.sleep(0)

    def wake_up() -> None:
        starter.start(body())
        seen.append(asyncio.current_task())

    loop.call_soon(wake_up)
    await asyncio.sleep(0.001)
    assert seen == [None]


async def test_cancelled_in_place_before_it_waits() -> None:
    """`cancel` on the current task before the first suspension takes effect at that suspension."""

    async def body(noted: list[Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        noted.append(task.cancelling())
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            noted.append("cancelled")
            noted.append(task.uncancel())
        noted.append(await some_turns())

    assert await run_inline(body) == [[1, "cancelled", 0, "much later"]]


async def test_conditions_queues_and_events() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
    event = asyncio.Event()

    async def producer(noted: list[Any]) -> None:
        for number in range(4):
            await queue.put(number)
        await event.wait()
        noted.append("produced")

    async def consumer(noted: list[Any]) -> None:
        noted.extend([await queue.get() for _ in range(4)])
        event.set()

    assert await run_inline(producer, consumer) == [["produced"], [0, 1, 2, 3]]


@pytest.mark.parametrize("work", WORK)
async def test_what_has_begun_goes_on_as_what_its_caller_likes(work: Work) -> None:
    """`begin` gives what is left of a coroutine; whoever awaits it first is its task from then on."""
    loop, noted = asyncio.get_running_loop(), []
    starter = InlineStarter(loop)

    async def body() -> None:
        first = asyncio.current_task()
        noted.append(await work())
        assert first is not None
        if isinstance(task := asyncio.current_task(), asyncio.Task):
            assert first.get_name() == task.get_name()

    async def around(rest: Coroutine[Any, Any, None]) -> None:
        await rest
        noted.append("around")

    def wake_up() -> None:
        rest = starter.begin(body())
        if rest is not None:
            starter.go_on(around(rest))

    loop.call_soon(wake_up)
    async with asyncio.timeout(10):
        await asyncio.sleep(0)
        while starter.tasks or not noted:
            await asyncio.sleep(0)
    waits = work not in (nothing, a_done_future)
    assert noted == [await work()] + ["around"] * waits


async def test_what_a_coroutine_raises_in_place_is_raised() -> None:
    starter = InlineStarter(asyncio.get_running_loop())
    caught: list[Any] = []

    async def body() -> None:
        raise OSError(5, "no")

    def wake_up() -> None:
        try:
            starter.begin(body())
        except OSError as problem:
            caught.append((problem.errno, asyncio.current_task()))

    asyncio.get_running_loop().call_soon(wake_up)
    await asyncio.sleep(0.001)
    assert caught == [(5, None)]
