"""What one connection has begun: its caps, its sums, and what they are when answers are never sent."""

from types import SimpleNamespace
from typing import Any

import pytest

from nbd_protocol.transmission import Request
from pynbd.server.budget import RESERVE_BYTES, PayloadBudget
from pynbd.server.buffers import BufferPool
from pynbd.server.in_flight import InFlight
from pynbd.server.outstanding import MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, MAX_UNSENT_BYTES, Outstanding
from pynbd.server.payload import PAYLOAD_STEP_BYTES, Payload
from pynbd.server.spans import Deferred, FileSpan

KIB, MIB = 1 << 10, 1 << 20


def outstanding(in_flight: InFlight | None = None, budget: PayloadBudget | None = None) -> tuple[Outstanding, Any, Any]:
    """With its account and its wire."""
    account, wire = (budget or PayloadBudget(1 << 40)).account(), SimpleNamespace(unsent=0)
    return Outstanding(account, wire, in_flight, lambda: None), account, wire


def test_requests_have_a_cap() -> None:
    it, _, _ = outstanding()
    it.requests = MAX_REQUESTS_IN_FLIGHT - 1
    assert it.has_room_for(MIB)
    it.request_ended()
    assert it.may_begin_uncounted(1)
    assert not it.may_begin_uncounted(2)
    it.requests = MAX_REQUESTS_IN_FLIGHT
    assert not it.has_room_for(0)


def test_what_may_begin_in_place_stays_within_the_reserve() -> None:
    it, account, wire = outstanding()
    account.charge(RESERVE_BYTES - 10 * KIB)
    assert it.may_begin_together(2, 10 * KIB)
    assert not it.may_begin_together(2, 10 * KIB + 1)
    it.requests = MAX_REQUESTS_IN_FLIGHT - 1
    assert it.may_begin_together(1, 1)
    assert not it.may_begin_together(2, 1)
    it.requests = 0
    wire.unsent = MAX_UNSENT_BYTES + 1
    assert not it.may_begin_together(1, 1)
    limited, _, _ = outstanding(InFlight(2, 0))
    assert limited.may_begin_together(1, 1)
    assert not limited.may_begin_together(2, 2)


def test_bytes_have_a_cap_but_for_a_single_request() -> None:
    it, account, _ = outstanding()
    account.charge(MAX_BYTES_IN_FLIGHT)
    assert it.has_room_for(1)
    it.requests = 1
    assert it.has_room_for(0)
    assert not it.has_room_for(1)


@pytest.mark.parametrize("pressed", [False, True])
def test_answers_that_are_not_taken_have_a_cap(pressed: bool) -> None:
    """It is lower where memory runs short."""
    budget = PayloadBudget(8 * MIB)
    if pressed:
        budget.account().charge(9 * MIB)
    it, _, wire = outstanding(budget=budget)
    cap = RESERVE_BYTES if pressed else MAX_UNSENT_BYTES
    wire.unsent = cap
    assert it.has_room_for(0)
    wire.unsent = cap + 1
    assert it.owes_too_much()
    assert not it.has_room_for(0)


def test_what_is_not_taken_is_charged_once() -> None:
    it, account, wire = outstanding()
    for unsent in (100, 300, 300, 50, 0):
        wire.unsent = unsent
        it.charge_unsent()
        assert account.held == unsent


def test_the_sums_of_the_client() -> None:
    """A payload that has begun is all there, also what no memory was taken for yet; one that has not is nothing."""
    whole = InFlight(0, 100 * MIB)
    it, account, _ = outstanding(whole)
    assert not it.may_begin_uncounted(1)
    it.payload = Payload(Request(1, 0, 7, 0, 3 * MIB), memoryview(b"x"))
    it.count()
    assert (whole.requests, whole.bytes) == (0, 0)
    assert it.payload.reserve(account, BufferPool(), pytest.fail)
    assert account.held == 2 * PAYLOAD_STEP_BYTES
    it.requests, it.span_bytes = 1, 5 * MIB
    it.count()
    assert (whole.requests, whole.bytes) == (2, 8 * MIB)
    it.span_ended(5 * MIB)
    it.count()
    assert (whole.requests, whole.bytes) == (1, 3 * MIB)
    it.close()
    assert (whole.requests, whole.bytes, account.held) == (0, 0, 0)


def test_whose_turn_it_is() -> None:
    whole = InFlight(1, 0)
    busy, waits = outstanding(whole)[0], outstanding(whole)[0]
    busy.requests = 1
    busy.count()
    assert not waits.has_room_for(0)
    assert busy.keeps_others_waiting
    assert not waits.keeps_others_waiting
    waits.withdraw()
    assert not whole.line
    busy.requests = 0
    assert busy.has_room_for(0)
    assert waits.has_room_for(0)
    busy.close()
    waits.close()


def test_answers_that_are_dropped_are_not_outstanding() -> None:
    released: list[Any] = []

    class Late(Deferred):
        def __len__(self) -> int:
            return 1

        def release(self) -> None:
            released.append(self)

    it, _, _ = outstanding()

    def finish(problem: OSError | None) -> bytes:
        pytest.fail("it was never sent")

    file: Any = SimpleNamespace(spans=0, release=lambda: released.append("span"))
    span = FileSpan(file, 0, 4 * MIB, finish)
    it.requests, it.span_bytes = 3, 4 * MIB
    items: list[Any] = [b"header", span, Late(), b"done"]
    it.drop(items)
    assert (it.requests, it.span_bytes, items) == (1, 0, [])
    assert len(released) == 2
