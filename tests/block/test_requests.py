"""Tracked requests: overlapping ones wait where one of them serialises, in the order of arrival."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.requests import RequestFlag, RequestTracker


class Planned(NamedTuple):
    """A request, when it comes, and how long it takes."""

    start: int
    length: int
    serialising: bool
    turns: int
    at: int


PLANS = st.lists(
    st.builds(Planned, st.integers(0, 30), st.integers(1, 12), st.booleans(), st.integers(0, 4), st.integers(0, 9)),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(plans=PLANS, cancelled=st.sets(st.integers(0, 11), max_size=3))
def test_overlapping_requests(plans: list[Planned], cancelled: set[int]) -> None:
    """Never two at work that overlap if one of them serialises; all that nobody cancels come to their end."""

    async def law() -> None:
        tracker = RequestTracker()
        working: dict[int, Planned] = {}
        arrived: list[int] = []
        begun: list[int] = []

        async def run(number: int, plan: Planned) -> None:
            for _ in range(plan.at):
                await asyncio.sleep(0)
            arrived.append(number)
            async with tracker.track(plan.start, plan.length, serialising=plan.serialising):
                for other in working.values():
                    apart = plan.start + plan.length <= other.start or other.start + other.length <= plan.start
                    assert apart or not (plan.serialising or other.serialising), (plan, other)
                working[number] = plan
                begun.append(number)
                try:
                    for _ in range(plan.turns):
                        await asyncio.sleep(0)
                finally:
                    del working[number]

        tasks = [asyncio.create_task(run(*numbered)) for numbered in enumerate(plans)]
        for _ in range(7):
            await asyncio.sleep(0)
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if result is not None:
                assert number in cancelled, result
                assert isinstance(result, asyncio.CancelledError), result
        assert not tracker.in_flight
        # Of two that may not meet, the one that arrived first begins first.
        for later, number in enumerate(begun):
            for other in begun[:later]:
                one, two = plans[other], plans[number]
                apart = one.start + one.length <= two.start or two.start + two.length <= one.start
                if not apart and (one.serialising or two.serialising):
                    assert arrived.index(other) < arrived.index(number)

    asyncio.run(law())


async def test_a_request_that_fails_lets_the_next_one_in() -> None:
    tracker = RequestTracker()

    async def fail() -> None:
        async with tracker.track(0, 10, serialising=True):
            await asyncio.sleep(0)
            raise ZeroDivisionError

    async def follow() -> int:
        async with tracker.track(5, 10):
            return len(tracker.in_flight)

    failing, following = asyncio.create_task(fail()), asyncio.create_task(follow())
    with pytest.raises(ZeroDivisionError):
        await failing
    assert await following == 1
    assert not tracker.in_flight


def test_flags_are_bits_of_their_own() -> None:
    assert sum(RequestFlag) == 2 ** len(RequestFlag) - 1
