"""Starting a coroutine in place: it runs at once, and becomes a task only if it really has to wait.

A task costs several microseconds and a trip around the event loop; most requests need neither, because what they
want is in memory. `start` runs a coroutine up to its first suspension. Code in there may ask for the current task
(`asyncio.timeout`, `TaskGroup` and many libraries do), so meanwhile a stand-in is entered as the current task
(`asyncio.tasks._enter_task` is documented for those who extend asyncio). When the coroutine suspends, a real
task takes it over, and the stand-in passes on to that task whatever is asked of it later.
"""

import asyncio
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Coroutine, Generator
from contextvars import Context, copy_context
from types import coroutine
from typing import Any


class StandIn:
    """The current task of a coroutine that is running in place, and later the name its task is known by inside."""

    __slots__ = ("__weakref__", "_cancel_messages", "_loop", "task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._cancel_messages: list[Any] = []
        self.task: asyncio.Task[None] | None = None

    def take_over(self, task: "asyncio.Task[None]") -> None:
        """From now on `task` is meant. It calls this itself, when it runs: one that has not started can't be
        cancelled, or what it took over would never learn of it.
        """
        self.task = task
        for message in self._cancel_messages:
            task.cancel(message)

    def cancel(self, msg: Any = None) -> bool:
        """As `Task.cancel`; remembered if there is no task yet."""
        if self.task is not None:
            return self.task.cancel(msg)
        self._cancel_messages.append(msg)
        return True

    def cancelling(self) -> int:
        """As `Task.cancelling`."""
        return len(self._cancel_messages) if self.task is None else self.task.cancelling()

    def uncancel(self) -> int:
        """As `Task.uncancel`."""
        if self.task is not None:
            return self.task.uncancel()
        if self._cancel_messages:
            self._cancel_messages.pop()
        return len(self._cancel_messages)

    def done(self) -> bool:
        """As `Task.done`."""
        return self.task is not None and self.task.done()

    def cancelled(self) -> bool:
        """As `Task.cancelled`."""
        return self.task is not None and self.task.cancelled()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """As `Task.get_loop`."""
        return self._loop

    def get_name(self) -> str:
        """As `Task.get_name`."""
        return "request" if self.task is None else self.task.get_name()

    def get_coro(self) -> Any:
        """As `Task.get_coro`."""
        return None if self.task is None else self.task.get_coro()

    def get_context(self) -> Context:
        """As `Task.get_context`."""
        return copy_context()

    def add_done_callback(self, callback: Any, *, context: Context | None = None) -> None:
        """As `Task.add_done_callback`; there is no task yet while the coroutine runs in place."""
        if self.task is None:
            self._loop.call_soon(lambda: self.add_done_callback(callback, context=context))
        else:
            self.task.add_done_callback(callback, context=context)

    def remove_done_callback(self, callback: Any) -> int:
        """As `Task.remove_done_callback`."""
        return 0 if self.task is None else self.task.remove_done_callback(callback)


class InlineStarter:
    """Starts coroutines in place on one event loop, outside of any task.

    The tasks of those that suspended are kept alive here. Nobody else knows them, so nobody cancels them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tasks: set[asyncio.Task[None]] = set()
        self._stand_in = StandIn(loop)

    def start(self, coro: Coroutine[Any, Any, None]) -> bool:
        """Run a coroutine that raises nothing, and see whether it comes to its end at once.

        Returns:
            True if it ended, False if it goes on as a task.
        """
        rest = self.begin(coro)
        if rest is None:
            return True
        self.go_on(rest)
        return False

    def begin(self, coro: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
        """Run a coroutine as far as it comes without waiting.

        Returns:
            None if it ended; else what is left of it: the first thing that is awaited by what `go_on` is given.

        Raises:
            Exception: what the coroutine raised.
        """
        stand_in = self._stand_in
        loop = self.loop
        _enter_task(loop, stand_in)  # type: ignore[arg-type]  # it answers as a task does
        try:
            awaited = coro.send(None)
        except StopIteration:
            return None
        finally:
            _leave_task(loop, stand_in)  # type: ignore[arg-type]  # as above
        self._stand_in = StandIn(loop)
        return _rest_of(coro, awaited, stand_in)

    def go_on(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that raises nothing, as a task."""
        task = self.loop.create_task(coro)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def _rest_of(coro: Coroutine[Any, Any, None], awaited: Any, stand_in: StandIn) -> None:
    """The rest of a coroutine whose first suspension was for `awaited`."""
    task = asyncio.current_task()
    assert task is not None
    stand_in.take_over(task)
    await _resumed(coro, awaited)


@coroutine
def _resumed(coro: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    # What the coroutine waits for is yielded again, to the task that now drives it.
    while True:
        try:
            yield awaited
        except BaseException as problem:
            # The task was cancelled while it waited (a timeout inside the coroutine): that belongs in there.
            try:
                awaited = coro.throw(problem)
            except StopIteration:
                return
        else:
            break
    yield from coro
