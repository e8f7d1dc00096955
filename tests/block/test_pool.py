"""Threads: what runs there, comes back, and fails there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pynbd.block import pool


async def test_run_returns_from_another_thread() -> None:
    assert await pool.run(pool.transfers, threading.get_ident) != threading.get_ident()


async def test_run_raises_what_was_raised() -> None:
    def fail(text: str) -> None:
        raise OSError(5, text)

    with pytest.raises(OSError, match="broken") as caught:
        await pool.run(pool.syncs, fail, "broken")
    assert caught.value.errno == 5


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to the threads for reads and writes."""
    given: list[object] = []
    submit = pool.transfers.submit

    def counted(*arguments: object) -> object:
        given.append(arguments[0])
        return submit(*arguments)  # type: ignore[arg-type]  # passed on as they come

    monkeypatch.setattr(pool.transfers, "submit", counted)
    return given


async def test_requests_of_one_turn_share_jobs(jobs: list[object]) -> None:
    """Many requests at once need no more jobs than there are workers, and each gets its own answer."""
    threads: list[tuple[int, int]] = []
    batch = pool.Batch(lambda number: threads.append((number, threading.get_ident())))
    await asyncio.gather(*(batch.run(number) for number in range(100)))
    assert len(jobs) == pool.WORKERS
    assert sorted(number for number, _ in threads) == list(range(100))
    assert threading.get_ident() not in {thread for _, thread in threads}


async def test_as_many_threads_as_wait(jobs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What turns out to be quick is done by one thread at a time; what waits for disks by all."""
    now = tick = 0.0

    def clock() -> float:
        nonlocal now
        now += tick
        return now

    monkeypatch.setattr(pool, "perf_counter", clock)
    batch = pool.Batch(lambda number: None)

    async def serve_many() -> int:
        """Jobs that it takes to serve many requests, when those before have all ended."""
        jobs.clear()
        await asyncio.gather(*(batch.run(number) for number in range(100)))
        async with asyncio.timeout(30):
            while batch._jobs:  # a job that found nothing left may end after the last answer
                await asyncio.sleep(0)
        return len(jobs)

    assert await serve_many() == pool.WORKERS
    assert await serve_many() == 1
    tick = 1.0
    assert await serve_many() == 1
    assert await serve_many() > 1


async def test_direct_requests_always_wait(jobs: list[object]) -> None:
    batch = pool.Batch(lambda number: None, always_waits=True)
    for _ in range(3):
        await asyncio.gather(*(batch.run(number) for number in range(100)))
    assert len(jobs) > pool.WORKERS


async def test_a_request_that_comes_alone_goes_nowhere(jobs: list[object]) -> None:
    """Where a trip to a thread takes longer; several share the threads."""
    threads: list[int] = []

    def work(number: int) -> None:
        threads.append(threading.get_ident())
        if number < 0:
            raise OSError(-number, "broken")

    batch = pool.Batch(work, always_waits=True, alone_in_place=True)
    await batch.run(0)
    with pytest.raises(OSError, match="broken"):
        await batch.run(-5)
    assert threads == [threading.get_ident()] * 2
    assert not jobs
    answers = await asyncio.gather(*(batch.run(number) for number in (1, -5, 2)), return_exceptions=True)
    assert [answer is None for answer in answers] == [True, False, True]
    assert threading.get_ident() not in threads[2:]


async def test_requests_that_come_while_a_job_ends(jobs: list[object]) -> None:
    """None is forgotten, whenever it comes."""
    batch = pool.Batch(lambda number: None)

    async def chain(length: int) -> int:
        for number in range(length):
            await batch.run(number)
        return length

    assert await asyncio.gather(*(chain(length) for length in range(200))) == list(range(200))
    assert len(jobs) < sum(range(200))


async def test_one_request_failing_leaves_the_others_alone() -> None:
    def odd(number: int) -> None:
        if number % 2:
            raise OSError(number, "odd")

    batch = pool.Batch(odd)
    answers = await asyncio.gather(*(batch.run(number) for number in range(20)), return_exceptions=True)
    for number, answer in enumerate(answers):
        assert (answer is None) == (number % 2 == 0)
        assert answer is None or (isinstance(answer, OSError) and answer.errno == number)


@pytest.mark.parametrize("way", ["run", "batch"])
async def test_who_stops_waiting_does_not_stop_the_work(way: str) -> None:
    """A request whose caller is cancelled runs to its end, and its answer disturbs nobody."""
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait()
        ended.set()

    async def caller() -> None:
        await (pool.run(pool.transfers, work) if way == "run" else pool.Batch(work).run())

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_end.set()
    await pool.run(pool.syncs, ended.wait)
    for _ in range(2 * pool.WORKERS):  # every thread has told what it had to tell before it takes another job
        await pool.run(pool.transfers, int)


async def test_what_can_be_stopped() -> None:
    """What it returns and raises comes back; who is cancelled goes on when it has ended, whatever it raised."""
    assert await pool.run_stoppable(pool.transfers, lambda is_stopped: (is_stopped(), 5)) == (False, 5)

    def fail(is_stopped: Callable[[], bool]) -> None:
        raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await pool.run_stoppable(pool.transfers, fail)
    ended = threading.Event()

    def work(is_stopped: Callable[[], bool]) -> None:
        while not is_stopped():
            time.sleep(0.001)
        ended.set()
        raise OSError(125, "stopped")

    task = asyncio.create_task(pool.run_stoppable(pool.transfers, work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_job_that_outlives_its_loop_harms_nobody() -> None:
    """A loop that is closed with work in flight (the process is ending) leaves no thread dead."""
    may_end = threading.Event()

    async def leave() -> None:
        started: asyncio.Future[bool] = asyncio.ensure_future(pool.run(pool.transfers, may_end.wait))
        await asyncio.sleep(0)
        started.cancel()

    await asyncio.to_thread(asyncio.run, leave())
    may_end.set()
    assert await pool.run(pool.transfers, int) == 0
