"""What is logged of clients: lines at first, then how many were left out; and nothing that could deceive a reader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from pynbd.server.client_log import (
    MAX_CLIENTS_COUNTED,
    MAX_LINES,
    MAX_LINES_OF_A_CLIENT,
    WINDOW_S,
    ClientLog,
    printable,
)


class Clock:
    """Timers that go off when they are told to."""

    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.due.append((delay_s, call))
        return asyncio.TimerHandle(0.0, call, (), asyncio.get_running_loop())

    def go_off(self) -> None:
        ((delay_s, call),) = self.due
        assert delay_s == WINDOW_S
        self.due.clear()
        call()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


async def test_one_client_can_not_flood_it(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = ClientLog(clock.later)
    for number in range(1000):
        log.tell("10.0.0.5", f"refused: {number}")
    log.tell("10.0.0.6", "somebody else is heard")
    assert lines(caplog) == [*(f"refused: {n}" for n in range(MAX_LINES_OF_A_CLIENT)), "somebody else is heard"]
    clock.go_off()
    assert lines(caplog) == [
        f"10.0.0.5: {1000 - MAX_LINES_OF_A_CLIENT} more lines like these within 60 s were left out"
    ]
    log.tell("10.0.0.5", "again")
    assert lines(caplog) == ["again"]
    clock.go_off()
    assert lines(caplog) == []


async def test_many_clients_can_not_flood_it(caplog: pytest.LogCaptureFixture) -> None:
    """However many addresses they have; and neither does what is kept of them grow."""
    clock = Clock()
    log = ClientLog(clock.later)
    for number in range(10_000):
        log.tell(f"client {number}", "refused")
    assert len(lines(caplog)) == MAX_LINES
    assert len(log._told) + len(log._left_out) <= MAX_LINES + MAX_CLIENTS_COUNTED + 1
    clock.go_off()
    told = lines(caplog)
    assert len(told) == MAX_CLIENTS_COUNTED + 1
    assert told[-1].startswith(f"other clients: {10_000 - MAX_LINES - MAX_CLIENTS_COUNTED} more lines")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export 'ä'", "export 'ä'"),
        ("a\nroot logged in", "a\\nroot logged in"),
        ("\x1b[2J\x07\x00", "\\x1b[2J\\x07\\x00"),
        ("\u202egnp.exe\u2028", "\\u202egnp.exe\\u2028"),
        ("\udcff", "\\udcff"),
        ("x" * 5000, "x" * 1000 + "…"),
    ],
)
def test_nothing_that_moves_a_cursor(text: str, shown: str) -> None:
    assert printable(text) == shown
