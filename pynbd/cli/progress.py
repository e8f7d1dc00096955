"""How far a long command is: a bar on a terminal, and for `pynbd img` what scripts read elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def percentages(total: int, done: Callable[[], int]) -> Iterator[None]:
    """Lines on stdout like those of qemu-img's `-p`, which scripts read: `    (12.34/100%)` and a carriage return.

    Args:
        total: in any unit.
        done: tells how much of it is done.
    """
    before = -1.0

    def draw() -> None:
        nonlocal before
        percent = 100 * done() / total if total else 100.0
        if percent - before >= 1 or (percent == 100 and before != 100):
            print(f"    ({percent:3.2f}/100%)", end="\r", flush=True)
            before = percent

    with repeated(draw):
        yield
    print()


def shown(total: int, done: Callable[[], int], *, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """What `-p` shows while the block runs: a bar to people, numbers to scripts.

    Args:
        total: in bytes.
        done: tells how much of it is done.
        wanted: whether `-p` was given.
    """
    if not wanted:
        return contextlib.nullcontext()
    return (bar if sys.stdout.isatty() and sys.stderr.isatty() else percentages)(total, done)
