"""Threads for what would keep the event loop waiting.

A trip to a thread and back costs tens of microseconds, nearly all of it for waking up: so requests go there
together, as one job per worker, and come back together.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

WORKERS = 8
"""Threads for reads and writes: so many requests of one process wait for disks at the same time."""

SYNC_WORKERS = 64
"""Threads for everything that waits until a disk says "done": a slow disk's flush must not hold up reads."""

transfers = ThreadPoolExecutor(WORKERS, "pynbd-io")
"""For reads, writes and other calls that are quick unless a disk is slow. Threads are started when they are needed."""

syncs = ThreadPoolExecutor(SYNC_WORKERS, "pynbd-sync")
"""For flushes, durable writes, and calls that may take seconds."""


async def run(executor: ThreadPoolExecutor, function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """Call a function in a thread and wait for what it returns or raises.

    It runs to its end even if the caller is cancelled while it waits.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def job() -> None:
        try:
            result = function(*arguments)
        except BaseException as problem:  # whatever it is, the waiting coroutine gets it
            loop.call_soon_threadsafe(_fail, future, problem)
        else:
            loop.call_soon_threadsafe(_succeed, future, result)

    executor.submit(job)
    return await future


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", problem: BaseException) -> None:
    if not future.done():
        future.set_exception(problem)


class Batch:
    """Requests of the same kind that arise in one turn of the event loop, given to the pool as one job per worker.

    Args:
        function: serves one request in a thread, given the arguments of `run`.
    """

    __slots__ = ("_function", "_waiting")

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._waiting: list[tuple[asyncio.Future[None], tuple[Any, ...]]] = []

    def run(self, *arguments: Any) -> "asyncio.Future[None]":
        """Serve a request, together with the others of this turn."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._submit, loop)
        self._waiting.append((future, arguments))
        return future

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        for worker in range(min(WORKERS, len(waiting))):
            transfers.submit(self._serve, loop, waiting[worker::WORKERS])

    def _serve(
        self, loop: asyncio.AbstractEventLoop, requests: Sequence[tuple["asyncio.Future[None]", tuple[Any, ...]]]
    ) -> None:
        """Runs in a thread: serve the requests one by one, and tell the loop of all of them at once."""
        answers: list[tuple[asyncio.Future[None], BaseException | None]] = []
        for future, arguments in requests:
            try:
                self._function(*arguments)
            except BaseException as problem:  # whatever it is, the waiting coroutine gets it
                answers.append((future, problem))
            else:
                answers.append((future, None))
        loop.call_soon_threadsafe(_answer, answers)


def _answer(answers: Sequence[tuple["asyncio.Future[None]", BaseException | None]]) -> None:
    for future, problem in answers:
        if problem is None:
            _succeed(future, None)
        else:
            _fail(future, problem)
