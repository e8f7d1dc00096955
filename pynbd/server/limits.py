"""What one client may take: connections, requests and bytes, at one time and over time.

A client is who has one name by TLS; who has none is an address (of IPv6 a network of 64 bits), a virtual machine, or a
user of this machine at a Unix socket. All its connections share its limits.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import inf
from time import monotonic
from typing import Annotated

import msgspec

from nbd_protocol.constants import MAX_PAYLOAD_BYTES, NEGOTIATION_TIMEOUT_S, Command
from nbd_protocol.transmission import Request
from pynbd.block import options
from pynbd.server.in_flight import InFlight
from pynbd.server.visitor import Refused, Visitor

MAX_COUNT = 1_000_000_000
"""A larger limit is none."""

MAX_TIME_S = 365 * 86_400
"""A longer time is for ever."""

MAX_CLIENTS_KEPT = 4096
"""Clients without a connection whose rates are still counted; with more, those that went first are forgotten."""

WRITE = int(Command.WRITE)

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIME_S)]


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What a client may take; 0 is no limit, or the server's own.

    Args:
        connections: at one time; further ones are closed at once.
        requests: in flight, of all its connections together.
        bytes_in_flight: likewise, of their payloads and of answers not taken; one request is always served.
        bytes_per_second: read and written, by all its connections together.
        bytes_burst: how much at once, after a pause (default: what it may in a second).
        requests_per_second, requests_burst: likewise, requests of all kinds.
        handshake_timeout: how long it may take to choose an export, in seconds.
        idle_timeout: how long a connection may stay without a request, in seconds.
    """

    connections: Count = 0
    requests: Count = 0
    bytes_in_flight: options.Size = 0
    bytes_per_second: options.Size = 0
    bytes_burst: options.Size = 0
    requests_per_second: Count = 0
    requests_burst: Count = 0
    handshake_timeout: Seconds = NEGOTIATION_TIMEOUT_S
    idle_timeout: Seconds = 0

    def __post_init__(self) -> None:
        for what in ("bytes", "requests"):
            if getattr(self, f"{what}_burst") and not getattr(self, f"{what}_per_second"):
                raise ValueError(f"{what}-burst: it goes with {what}-per-second")

    @property
    def bounds_in_flight(self) -> bool:
        """Whether it matters how much a client has in flight."""
        return bool(self.requests or self.bytes_in_flight)

    @property
    def has_rates(self) -> bool:
        """Whether it matters how often a client asks."""
        return bool(self.bytes_per_second or self.requests_per_second)


NO_LIMITS = ClientLimits()


class Bucket:
    """A token bucket: it fills with time, and whoever finds it not empty may take as much as he needs.

    So one large request is served at once and paid for by waiting afterwards; over time the rate holds exactly.

    Args:
        rate: tokens a second; 0 is no limit.
        burst: how many it holds; 0: those of a second.
        now: the time, in seconds.
    """

    __slots__ = ("_at", "_burst", "_rate", "level")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = self.level = (burst or rate) if rate else inf
        self._at = now

    def fill(self, now: float) -> None:
        """Add what has come since the last time."""
        if self._rate:
            self.level = min(self._burst, self.level + (now - self._at) * self._rate)
            self._at = now

    def give_back(self, tokens: float) -> None:
        """What was taken is not used."""
        self.level = min(self._burst, self.level + tokens)

    @property
    def wait_s(self) -> float:
        """How long until it is not empty any more."""
        return 0.0 if self.level > 0 else (1 - self.level) / self._rate

    @property
    def is_full(self) -> bool:
        """Whether it is as if nothing had ever been taken."""
        return self.level >= self._burst


class Pace:
    """The rates of one client.

    Args:
        limits: what they are.
    """

    __slots__ = ("_bytes", "_requests")

    def __init__(self, limits: ClientLimits) -> None:
        now = monotonic()
        self._requests = Bucket(limits.requests_per_second, limits.requests_burst, now)
        self._bytes = Bucket(limits.bytes_per_second, limits.bytes_burst, now)

    def admit(self, requests: Sequence[Request]) -> int:
        """Count the requests that may begin now, and return how many of them, from the first on."""
        by_number, by_bytes = self._requests, self._bytes
        self._fill()
        for number, request in enumerate(requests):
            if by_number.level <= 0 or by_bytes.level <= 0:
                return number
            by_number.level -= 1
            by_bytes.level -= cost_bytes(request)
        return len(requests)

    def give_back(self, requests: Iterable[Request]) -> None:
        """They did not begin after all."""
        for request in requests:
            self._requests.give_back(1)
            self._bytes.give_back(cost_bytes(request))

    @property
    def wait_s(self) -> float:
        """How long until another request may begin."""
        return max(self._requests.wait_s, self._bytes.wait_s)

    @property
    def is_full(self) -> bool:
        """Whether a new client would have no more than this one."""
        self._fill()
        return self._requests.is_full and self._bytes.is_full

    def _fill(self) -> None:
        now = monotonic()
        self._requests.fill(now)
        self._bytes.fill(now)


def cost_bytes(request: Request) -> int:
    """What a request moves. One that asks for more than is ever served is refused, and moves nothing."""
    return request.length if request.type <= WRITE and request.length <= MAX_PAYLOAD_BYTES else 0


class Client:
    """What all connections of one client share."""

    __slots__ = ("connections", "in_flight", "key", "pace")

    def __init__(self, key: str, limits: ClientLimits) -> None:
        self.key = key
        self.connections = 0
        self.have(limits)

    def have(self, limits: ClientLimits) -> None:
        """What its next connections share."""
        self.pace = Pace(limits) if limits.has_rates else None
        self.in_flight = InFlight(limits.requests, limits.bytes_in_flight) if limits.bounds_in_flight else None


class Clients:
    """Who is there, and who was there lately: to go and come back does not fill a bucket.

    Args:
        limits: of each client.
    """

    def __init__(self, limits: ClientLimits) -> None:
        self.limits = limits
        self._present: dict[str, Client] = {}
        self._gone: OrderedDict[str, Client] = OrderedDict()

    def change(self, limits: ClientLimits) -> None:
        """Other limits from now on. Connections that are there keep those that they have, and count as before."""
        if limits == self.limits:
            return  # nobody's bucket fills
        self.limits = limits
        for client in (*self._present.values(), *self._gone.values()):
            client.have(limits)

    def enter(self, key: str) -> Client | None:
        """Count one connection more of a client; None if it has as many as it may."""
        client = self._present.get(key)
        if client is None:
            client = self._gone.pop(key, None) or Client(key, self.limits)
            self._present[key] = client
        elif self.limits.connections and client.connections >= self.limits.connections:
            return None
        client.connections += 1
        return client

    def leave(self, client: Client) -> None:
        """A connection that had entered is gone."""
        client.connections -= 1
        if client.connections:
            return
        del self._present[client.key]
        if client.pace is not None and not client.pace.is_full:
            self._gone[client.key] = client
            if len(self._gone) > MAX_CLIENTS_KEPT:
                self._gone.popitem(last=False)


class Presence:
    """One connection among those of its client.

    Args:
        clients: all of them.
        visitor: who it is.

    Raises:
        Refused: it has as many connections as it may.
    """

    def __init__(self, clients: Clients, visitor: Visitor) -> None:
        self._clients = clients
        self._counted: list[Client] = []
        self._enter(visitor.key)

    def named(self, name: str) -> None:
        """TLS has proved who it is: it counts under that name as well, and has that one's rates.

        Raises:
            Refused: there are as many connections of that name as there may be.
        """
        self._enter(f"name {name!r}")

    @property
    def pace(self) -> Pace | None:
        """The client's rates, if there are any."""
        return self._counted[-1].pace

    @property
    def in_flight(self) -> InFlight | None:
        """What the client has in flight, if that is limited."""
        return self._counted[-1].in_flight

    def leave(self) -> None:
        """The connection is gone."""
        while self._counted:
            self._clients.leave(self._counted.pop())

    def _enter(self, key: str) -> None:
        client = self._clients.enter(key)
        if client is None:
            raise Refused(f"{key} has {self._clients.limits.connections} connections already, the most it may have")
        self._counted.append(client)
