"""What a client has in flight: the sums, and the line of those that wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pynbd.server.in_flight import InFlight, Part


def test_one_request_is_always_served() -> None:
    whole = InFlight(0, 1000)
    one, other = Part(whole, lambda: None), Part(whole, lambda: None)
    assert one.has_room(1 << 30)
    one.count(1, 1 << 30)
    assert not other.has_room(0)
    one.count(0, 5000)
    assert other.has_room(1 << 30)
    one.close()
    other.close()
    assert (whole.requests, whole.bytes, whole.line) == (0, 0, {})


def test_nobody_overtakes_and_only_who_fits_is_woken() -> None:
    whole, woken = InFlight(2, 100), []
    holder = Part(whole, lambda: None)
    large, small = Part(whole, lambda: woken.append("large")), Part(whole, lambda: woken.append("small"))
    holder.count(2, 90)
    assert not large.has_room(60)
    assert not small.has_room(10)
    holder.count(1, 50)
    assert not small.has_room(10)
    assert woken == []
    holder.count(1, 40)
    assert woken == ["large"]
    assert large.has_room(60)
    large.count(1, 60)
    assert not small.has_room(0)
    large.close()
    assert woken[-1] == "small"


def test_who_leaves_the_line_wakes_the_next() -> None:
    whole, woken = InFlight(2, 100), []
    holder = Part(whole, lambda: None)
    large, small = Part(whole, lambda: woken.append("large")), Part(whole, lambda: woken.append("small"))
    holder.count(1, 60)
    assert not large.has_room(60)
    assert not small.has_room(10)
    large.close()
    assert set(woken) == {"small"}


@given(st.integers(0, 4), st.integers(0, 50), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=80))
def test_all_come_to_their_end(max_requests: int, max_bytes: int, asked: list[tuple[int, int]]) -> None:
    """Whatever five connections ask for, the limits hold, and whoever is first is woken as soon as he fits."""
    whole = InFlight(max_requests, max_bytes)
    running: list[list[int]] = [[] for _ in range(5)]
    woken: set[int] = set()
    parts = [Part(whole, lambda number=number: woken.add(number)) for number in range(5)]  # type: ignore[misc]  # mypy does not know the type of such a default
    waiting: dict[int, int] = {}

    def tell(number: int) -> None:
        parts[number].count(len(running[number]), sum(running[number]))

    def attempt(number: int, length: int) -> None:
        if parts[number].has_room(length):
            waiting.pop(number, None)
            running[number].append(length)
            tell(number)
            begun = sum(map(len, running))
            assert begun == 1 or not max_requests or begun <= max_requests
            assert begun == 1 or not max_bytes or sum(map(sum, running)) <= max_bytes
        else:
            waiting[number] = length

    def end_one() -> None:
        number = next(number for number, lengths in enumerate(running) if lengths)
        running[number].pop()
        tell(number)

    for number, length in asked:
        if number in waiting:
            end_one()
        else:
            attempt(number, length)
        while woken & waiting.keys():
            again = (woken & waiting.keys()).pop()
            woken.discard(again)
            attempt(again, waiting[again])
    while any(running):
        end_one()
        while woken & waiting.keys():
            again = (woken & waiting.keys()).pop()
            woken.discard(again)
            attempt(again, waiting[again])
    assert not waiting
    assert not whole.line
