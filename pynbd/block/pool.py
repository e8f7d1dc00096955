"""Threads for what would keep the event loop waiting.

A trip to a thread and back costs tens of microseconds, nearly all of it for waking up, and threads that run at the
same time stand in each other's way (there is one interpreter lock). So requests go there together and come back
together, and only as many threads take part as really wait for disks.
"""

import asyncio
import resource
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

WORKERS = 8
"""Threads for reads and writes: so many requests of one process wait for disks at the same time."""

SYNC_WORKERS = 64
"""Threads for everything that waits until a disk says "done": a slow disk's flush must not hold up reads."""

TELL_S = 0.0002
"""A job that has answers and goes on tells them after so long."""

WAITING_S = 0.002
"""Requests that take so long on average wait for something else than a processor."""

COPIERS = 2
"""Threads that copy from file to file. Two writers of one file only take turns; but one of them can write while the
other one reads what it is going to write."""

transfers = ThreadPoolExecutor(WORKERS, "pynbd-io")
"""For reads, writes and other calls that are quick unless a disk is slow. Threads are started when they are needed."""

copies = ThreadPoolExecutor(COPIERS, "pynbd-copy")
"""For whoever writes a lot into a file by itself (`Driver.write_by`)."""

syncs = ThreadPoolExecutor(SYNC_WORKERS, "pynbd-sync")
"""For flushes, durable writes, and calls that may take seconds."""


def renew_threads() -> None:
    """End all threads, when they have done what they were given; those that come next are started by the caller's.

    For what holds for a thread and those that it starts, as Landlock does.
    """
    global transfers, copies, syncs  # they are the module's, and asked for by name each time
    ended = transfers, copies, syncs
    transfers = ThreadPoolExecutor(WORKERS, "pynbd-io")
    copies = ThreadPoolExecutor(COPIERS, "pynbd-copy")
    syncs = ThreadPoolExecutor(SYNC_WORKERS, "pynbd-sync")
    for executor in ended:
        executor.shutdown(wait=True)


Answer = tuple["asyncio.Future[None]", BaseException | None]


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


async def run_stoppable(executor: ThreadPoolExecutor, function: Callable[[Callable[[], bool]], T]) -> T:
    """Call a function in a thread that ends early when the caller is cancelled, and wait until it has ended.

    So nothing is at work any more with what the caller gives up then.

    Args:
        executor: whose thread.
        function: is given a function that says whether it shall end; what it raises for that is not told anybody.
    """
    stopped = threading.Event()
    running = asyncio.ensure_future(run(executor, function, stopped.is_set))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody is left to be told
        raise


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", problem: BaseException) -> None:
    if not future.done():
        future.set_exception(problem)


def _tell(answers: Sequence[Answer]) -> None:
    for future, problem in answers:
        if problem is None:
            _succeed(future, None)
        else:
            _fail(future, problem)


class Batch:
    """Requests of one kind, served by jobs in threads that each take as many as there are.

    How many jobs run at the same time depends on what the last one met: all workers, if it waited for a disk; one, if
    it did not, since threads that only copy memory are quicker alone.

    Args:
        function: serves one request in a thread, given the arguments of `run`.
        always_waits: whether every request waits for the disk (direct I/O), or lets other threads run otherwise.
        workers: how many may serve requests at one time.
        alone_in_place: serve a request that comes alone in the event loop, for it is shorter than a trip to a thread.
    """

    __slots__ = (
        "_alone_in_place",
        "_always_waits",
        "_function",
        "_jobs",
        "_scheduled",
        "_waiting",
        "_width",
        "_workers",
    )

    def __init__(
        self,
        function: Callable[..., None],
        *,
        always_waits: bool = False,
        workers: int = WORKERS,
        alone_in_place: bool = False,
    ) -> None:
        self._function = function
        self._alone_in_place = alone_in_place
        self._workers = workers
        self._always_waits = always_waits
        self._waiting: deque[tuple[asyncio.Future[None], tuple[Any, ...]]] = deque()
        self._scheduled = False
        self._jobs = 0
        self._width = workers

    def run(self, *arguments: Any) -> "asyncio.Future[None]":
        """Serve a request, together with the others of this turn of the event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append((future, arguments))
        if not self._scheduled and self._jobs < self._width:
            self._scheduled = True
            loop.call_soon(self._submit, loop)
        return future

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        if self._alone_in_place and len(self._waiting) == 1 and not self._jobs:
            future, arguments = self._waiting.popleft()
            _tell([(future, self._call(arguments))])
            return
        for _ in range(min(self._width - self._jobs, len(self._waiting))):
            self._jobs += 1
            transfers.submit(self._serve, loop)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread: serve requests until there are none left."""
        served, answers = 0, list[Answer]()
        started = told = perf_counter()
        blocks_read = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        while True:
            try:
                future, arguments = self._waiting.popleft()  # which other jobs do as well
            except IndexError:
                break
            answers.append((future, self._call(arguments)))
            served += 1
            now = perf_counter()
            if now - told > TELL_S and self._waiting:
                loop.call_soon_threadsafe(_tell, answers)
                answers, told = [], now
        waited = (
            resource.getrusage(resource.RUSAGE_THREAD).ru_inblock > blocks_read
            or perf_counter() - started > WAITING_S * served
        )
        loop.call_soon_threadsafe(self._ended, loop, answers, served, waited)

    def _call(self, arguments: tuple[Any, ...]) -> BaseException | None:
        """Serve one request, and return what was raised."""
        try:
            self._function(*arguments)
        except BaseException as problem:  # whatever it is, the waiting coroutine gets it
            return problem
        return None

    def _ended(self, loop: asyncio.AbstractEventLoop, answers: Sequence[Answer], served: int, waited: bool) -> None:
        """A job has served all that it found."""
        self._jobs -= 1
        if served:
            self._width = self._workers if waited or self._always_waits else 1
        _tell(answers)
        # What came while the job was about to end has found it still counted.
        if self._waiting and not self._scheduled and self._jobs < self._width:
            self._scheduled = True
            loop.call_soon(self._submit, loop)
