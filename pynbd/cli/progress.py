"""How far a long command is: a bar on a terminal, and for `pynbd img` what scripts read elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

REFRESH_S = 0.1
"""Between two drawings."""


@contextlib.contextmanager
def repeated(draw: Callable[[], None]) -> Iterator[None]:
    """Call `draw` now, again and again while the block runs, and once more at its end."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def again() -> None:
        nonlocal timer
        draw()
        timer = loop.call_later(REFRESH_S, again)

    again()
    try:
        yield
    finally:
        timer.cancel()
        draw()


@contextlib.contextmanager
def bar(total: int, done: Callable[[], int]) -> Iterator[None]:
    """A bar that is drawn on stderr, which is a terminal, while the block runs.

    Args:
        total: in bytes.
        done: tells how much of it is done.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TaskProgressColumn(), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False) as drawn:
        task = drawn.add_task("", total=total)
        with repeated(lambda: drawn.update(task, completed=done(), refresh=True)):
            yield


class Progress:
    """How far a verb of `pynbd img` is, while it is entered.

    With `-p` a bar shows it to people, and to scripts what qemu-img prints: `    (12.34/100%)` and a carriage return at
    0, at 100, and where it has gone on by some percent; and the end of the line when it is left. Without `-p` a line
    on stderr tells it whenever the process gets the signal SIGUSR1.

    Args:
        wanted: whether `-p` was given.
        step: more than so many percent lie between two numbers.
    """

    def __init__(self, *, wanted: bool, step: float = 1.0) -> None:
        self._bar = wanted and sys.stdout.isatty() and sys.stderr.isatty()
        self._prints = wanted and not self._bar
        self._asked = not wanted
        self._step = step
        self._told = -1.0
        self._total = 1
        self._done: Callable[[], int] = int
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        if self._asked:
            self._before = signal.signal(signal.SIGUSR1, self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked:
            signal.signal(signal.SIGUSR1, self._before)
        if self._prints:
            print()

    def tell(self, percent: float) -> None:
        """Print a number, if it is time for one."""
        is_due = percent - self._told > self._step or (percent in (0, 100) and percent != self._told)
        if self._prints and is_due:
            print(f"    ({percent:3.2f}/100%)", end="\r", flush=True)
            self._told = percent

    @contextlib.contextmanager
    def follow(self, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Show how far something is while the block runs.

        Args:
            total: in any unit.
            done: tells how much of it is done.
        """
        self._total, self._done = total, done
        if self._bar:
            with bar(total, done):
                yield
        elif self._prints:
            self.tell(0)
            with repeated(lambda: self.tell(self._percent())):
                yield
        else:
            yield

    def _percent(self) -> float:
        return min(100 * self._done() / self._total, 100.0) if self._total else 0.0

    def _answer(self, *_: object) -> None:
        # Python's own files must not be used here: the signal may come while one of them is being written to.
        with contextlib.suppress(OSError):
            os.write(2, f"    ({self._percent():3.2f}/100%)\n".encode())
