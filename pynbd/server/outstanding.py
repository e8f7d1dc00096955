"""What one connection has begun and not seen the end of, and whether it may begin more.

Three things bound it: caps of its own, what its client may have in flight on all connections together (`in_flight.py`),
and answers that the client does not take. The memory for all that is taken from an account (`budget.py`).
"""

from collections.abc import Callable

from pynbd.server.budget import RESERVE_BYTES, Account
from pynbd.server.in_flight import InFlight, Part
from pynbd.server.payload import Payload
from pynbd.server.spans import Deferred, FileSpan
from pynbd.server.wire import Item, Wire

MAX_REQUESTS_IN_FLIGHT = 1024
MAX_BYTES_IN_FLIGHT = 64 << 20
"""What one connection may have begun and not seen the end of. Two of the largest requests always fit."""

MAX_UNSENT_BYTES = 4 << 20
"""Answers that a client has not taken yet; beyond it no further requests of that client are looked at.
Where the memory of the process runs short, it is the connection's reserve instead."""


class Outstanding:
    """The requests of one connection that have begun, and the bytes they hold.

    Args:
        account: the connection's share of the payload budget.
        wire: what its answers wait in.
        in_flight: what all connections of its client have in flight, None: that has no limit.
        wake: called when others of the client's connections have made room.
    """

    __slots__ = ("_account", "_charged", "_part", "_wire", "awaits_others", "payload", "requests", "span_bytes")

    def __init__(self, account: Account, wire: Wire, in_flight: InFlight | None, wake: Callable[[], None]) -> None:
        self._account = account
        self._wire = wire
        self._part = None if in_flight is None else Part(in_flight, wake)
        self._charged = 0
        self.requests = 0
        self.span_bytes = 0
        """Of reads that are being sent from a file: they hold no memory."""
        self.payload: Payload | None = None
        """The one that is arriving."""
        self.awaits_others = False
        """Whether, when room was last asked for, other connections of the client had taken it."""

    @property
    def keeps_others_waiting(self) -> bool:
        """Whether other connections of the client can't begin a request because of what this one has in flight."""
        return self._part is not None and self._part.keeps_others_waiting

    def may_begin_uncounted(self, requests: int) -> bool:
        """Whether so many requests may begin without asking for room for each of them."""
        return self._part is None and self.requests + requests < MAX_REQUESTS_IN_FLIGHT

    def owes_too_much(self) -> bool:
        """Whether the client must take some of its answers first."""
        unsent = self._wire.unsent
        return unsent > RESERVE_BYTES and (
            unsent > MAX_UNSENT_BYTES or self._account.pressed or (self._part is not None and self._part.pressed)
        )

    def has_room_for(self, length: int) -> bool:
        """Whether the caps of the connection and of its client allow one request more, with so many bytes of data."""
        has_room = (
            self.requests < MAX_REQUESTS_IN_FLIGHT
            and not self.owes_too_much()
            and (self._account.held + length <= MAX_BYTES_IN_FLIGHT or not self.requests)
        )
        if self._part is None or not has_room:
            return has_room
        self.count()
        self.awaits_others = not self._part.has_room(length)
        return not self.awaits_others

    def count(self) -> None:
        """Tell the sums of the client what is in flight here; a payload that has begun is all there."""
        if self._part is None:
            return
        payload, requests, length = self.payload, self.requests, self._account.held + self.span_bytes
        if payload is not None and payload.reserved:
            requests += 1
            length += payload.request.length - payload.reserved
        self._part.count(requests, length)

    def may_begin_in_place(self, length: int) -> bool:
        """Whether a request with so many bytes, which nearly always ends at once, may begin without asking: nothing is
        in flight, and what is held stays within what a connection may always hold.
        """
        return not self.requests and self._account.held + length <= RESERVE_BYTES and self.has_room_for(length)

    def may_begin_together(self, requests: int, length: int) -> bool:
        """Whether so many requests, with so many bytes in all, may begin without asking for each of them: what is held
        stays within what a connection may always hold. Of a client with limits it is one at a time.
        """
        return (
            self.requests + requests <= MAX_REQUESTS_IN_FLIGHT
            and self._account.held + length <= RESERVE_BYTES
            and (requests == 1 or self._part is None)
            and self.has_room_for(length)
        )

    def begun_in_place(self, length: int) -> None:
        """It did not end at once, and holds so many bytes."""
        self.requests += 1
        self._account.charge(length)
        self.count()

    def request_ended(self) -> None:
        """One is done with."""
        self.requests -= 1

    def span_ended(self, length: int) -> None:
        """A read of so many bytes has been sent from a file, or could not be."""
        self.requests -= 1
        self.span_bytes -= length

    def drop(self, items: list[Item]) -> None:
        """Forget answers that were ready, and will not be sent; the list is empty then."""
        for item in items:
            if isinstance(item, Deferred):
                item.release()
                self.requests -= 1
                if isinstance(item, FileSpan):
                    self.span_bytes -= item.length
        items.clear()

    def charge_unsent(self) -> None:
        """Count what the client has not taken yet against the connection's share of memory."""
        unsent = self._wire.unsent
        if unsent != self._charged:
            if unsent > self._charged:
                self._account.charge(unsent - self._charged)
            else:
                self._account.give(self._charged - unsent)
            self._charged = unsent
        if self._part is not None:
            self.count()

    def leave_line(self) -> None:
        """Wait no longer for the client's other connections; whoever of them is next may try."""
        if self._part is not None:
            self._part.leave_line()

    def withdraw(self) -> None:
        """Wait for nothing any more."""
        self._account.withdraw()
        self.leave_line()

    def close(self) -> None:
        """Nothing is in flight, and nothing will be."""
        self._account.close()
        if self._part is not None:
            self._part.close()
