"""When calls are made in place."""

import pytest

from pynbd.storage.in_place import FIRST_PAUSE_S, FORGET_S, LONGEST_PAUSE_S, InPlace


def test_at_first_they_are() -> None:
    assert InPlace().paused_until <= 0


def test_direct_io_never_is() -> None:
    assert InPlace(never=True).paused_until == float("inf")


def test_one_slow_call_pauses_briefly() -> None:
    calls = InPlace()
    calls.was_slow(100.0)
    assert calls.paused_until == pytest.approx(100.0 + FIRST_PAUSE_S)


def test_slow_calls_in_a_row_pause_longer_up_to_a_limit() -> None:
    calls, now, pauses = InPlace(), 100.0, list[float]()
    for _ in range(20):
        calls.was_slow(now)
        pauses.append(calls.paused_until - now)
        now = calls.paused_until
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S)


def test_it_is_forgotten_after_a_while() -> None:
    calls = InPlace()
    calls.was_slow(100.0)
    calls.was_slow(100.1)
    calls.was_slow(100.2 + FORGET_S)
    assert calls.paused_until == pytest.approx(100.2 + FORGET_S + FIRST_PAUSE_S)
