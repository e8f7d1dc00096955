"""What makes a server stop: signals, and whatever else it waits for."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Iterator
from typing import Any

from pynbd.block.errors import BlockError


class Stopped(BlockError):
    """A signal came before clients could connect."""


class Stop:
    """SIGTERM and SIGINT: the first one stops in order, the second one at once.

    Args:
        at_end: what is cleared away even then.
    """

    def __init__(self, at_end: contextlib.ExitStack) -> None:
        self.requested = asyncio.Event()
        self._at_end = at_end
        self._opening: asyncio.Task[Any] | None = None
        loop = asyncio.get_running_loop()
        self._awaited: list[asyncio.Task[None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)

    def _told(self, number: int) -> None:
        if self.requested.is_set():
            self._at_end.close()
            os._exit(128 + number)
        self.request()

    def request(self) -> None:
        """Stop in order."""
        self.requested.set()
        if self._opening is not None:
            self._opening.cancel()

    def after(self, work: Coroutine[Any, Any, None]) -> None:
        """Stop in order when this has ended."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.request())
        self._awaited.append(task)

    @contextlib.contextmanager
    def interrupting(self, announce: int | None) -> Iterator[None]:
        """Let the first signal break off what is done inside: opening may wait for another server.

        Args:
            announce: a pipe to who waits until we are ready. If they go away, that breaks it off as well.

        Raises:
            Stopped: it came.
        """
        loop = asyncio.get_running_loop()
        self._opening = task = asyncio.current_task()
        assert task is not None
        if announce is not None:
            # There is nothing to read from our end: it only ever tells that the other one was closed.
            loop.add_reader(announce, task.cancel)
        try:
            yield
        except asyncio.CancelledError:
            raise Stopped("stopped before clients could connect") from None
        finally:
            self._opening = None
            if announce is not None:
                loop.remove_reader(announce)


async def until_parent_has_gone() -> None:
    """Wait until the process that has started us ends, however it does.

    Raises:
        OSError: the kernel can't tell (pidfd_open, Linux 5.3).
    """
    loop = asyncio.get_running_loop()
    parent = os.pidfd_open(os.getppid())
    gone = asyncio.Event()
    loop.add_reader(parent, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(parent)
        os.close(parent)
