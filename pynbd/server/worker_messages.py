"""What a server and its workers tell each other, a packet at a time, by a pair of Unix sockets (SOCK_SEQPACKET)."""

from enum import Enum
from typing import Final

import msgspec

MAX_ORDER_BYTES: Final = 8 << 10
MAX_REPORT_BYTES: Final = 256 << 10
"""More than the kernel lets a packet have."""

MAX_TEXT_CHARACTERS: Final = 10_000
"""Of an error."""


class Order(Enum):
    """What a worker is told to do."""

    BEGIN = b"begin"
    """Open the disks: the server itself has opened them."""
    CLIENT = b"client"
    """Serve the client whose socket comes with it."""
    RELOAD = b"reload:"
    """Read something again; its name follows."""
    STOP = b"stop"
    """Let what is in flight end, close the disks, and end."""
    END = b"end"
    """End at once."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """A worker has opened all disks.

    Args:
        exports: (size in bytes, whether it is read-only) of each export, in their order.
    """

    exports: list[tuple[int, bool]]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A worker ends, since something went wrong.

    Args:
        text: what, in a line.
        errno: its number, if it has one.
    """

    text: str
    errno: int | None = None


class Tally(msgspec.Struct, tag=True, frozen=True):
    """A worker's clients.

    Args:
        received: how many it was ever given.
        handshakes: those of them that have not chosen an export yet.
        connections: those that use one.
        served: how many ever did.
    """

    received: int = 0
    handshakes: int = 0
    connections: int = 0
    served: int = 0


Report = Ready | Failed | Tally

decoder = msgspec.msgpack.Decoder(Report)
encode = msgspec.msgpack.encode
