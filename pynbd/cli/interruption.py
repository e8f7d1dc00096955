"""What the signals that end a program do to a command that copies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.cli.copier import Copier


class Interruption:
    """What the signals that end a program do here: the first lets requests in flight end, the second is at once."""

    def __init__(self) -> None:
        self._copier: Copier | None = None
        self._task = asyncio.current_task()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the block runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    @contextlib.contextmanager
    def stops(self, copier: Copier) -> Iterator[None]:
        """The copy that is to be stopped."""
        self._copier = copier
        try:
            yield
        finally:
            self._copier = None

    def _interrupt(self) -> None:
        if self._copier is not None and not self._copier.stopped:
            self._copier.stop()
        elif self._task is not None:
            self._task.cancel()
