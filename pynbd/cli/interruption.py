"""What the signals that end a program do to a command that copies, or makes room for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.cli.copier import Copier

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What ends a program."""


class Interrupted(Exception):
    """A command was ended by a signal, and has cleaned up.

    Args:
        number: of the signal.
        text: what there is to be told; "" if nothing.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number


class Interruption:
    """What the signals that end a program do here.

    While something is copied, the first lets requests in flight end, and the second is at once; else the first is.
    """

    def __init__(self) -> None:
        self._copier: Copier | None = None
        self._task = asyncio.current_task()
        self._number = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the block runs.

        asyncio learns of a signal from a byte in a socket, and that may be full of others' (SIGUSR1 asks how far a copy
        is, and may be sent by a loop). So the byte only wakes it up here, and what a signal does is told it besides.

        Raises:
            Interrupted: a signal ended the block while no copy was running, or a second one did.
        """
        loop = asyncio.get_running_loop()
        try:
            with _held_back(SIGNALS):
                for number in SIGNALS:
                    loop.add_signal_handler(number, _woken)
                    signal.signal(number, lambda got, _: loop.call_soon_threadsafe(self._interrupt, got))
                signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
            yield
        except asyncio.CancelledError:
            if not self._number:
                raise
            raise Interrupted(self._number) from None
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    @contextlib.contextmanager
    def stops(self, copier: Copier) -> Iterator[None]:
        """The copy that is to be stopped."""
        self._copier = copier
        try:
            yield
        finally:
            self._copier = None

    def stopped(self, text: str) -> Interrupted:
        """The error of a copy that a signal has stopped.

        Args:
            text: what it leaves behind.
        """
        return Interrupted(self._number, f"interrupted; {text}")

    def _interrupt(self, number: int) -> None:
        self._number = self._number or number
        if self._copier is not None and not self._copier.stopped:
            self._copier.stop()
        elif self._task is not None:
            self._task.cancel()


@contextlib.contextmanager
def _held_back(signals: Collection[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _woken() -> None:
    """A signal has woken the loop up."""
