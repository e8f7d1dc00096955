"""Signals that end a command that copies."""

import asyncio
import signal

import pytest

from pynbd.cli.interruption import Interruption

FLOOD = 5000
"""Signals: more than a socket holds bytes, each of which takes a buffer of its own."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_flood_of_others_hides_none(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost, and nothing is said about it, though the loop could not look at any of them."""
    asked = 0

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1

    async def copy() -> None:
        with Interruption().listening():
            for _ in range(FLOOD):
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(number)
            await asyncio.sleep(60)

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(copy())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == FLOOD
    assert capfd.readouterr().err == ""


def test_what_was_there_before_is_there_again() -> None:
    """The signals do again what they did."""

    async def copy() -> None:
        with Interruption().listening():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    asyncio.run(copy())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_let_through_where_no_handler_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was blocked for a moment is not blocked for good."""

    def refuse(*_: object) -> None:
        raise RuntimeError("only in the main thread")

    async def copy() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse)
        with Interruption().listening():
            pytest.fail("it was not refused")

    with pytest.raises(RuntimeError, match="main thread"):
        asyncio.run(copy())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
