"""What a client learns from the replies of a server, as typed events (section "Structured reply types")."""

import msgspec

__all__ = ["DataChunk", "Done", "ErrorChunk", "Event", "HoleChunk", "StatusChunk"]


class DataChunk(msgspec.Struct, frozen=True, gc=False):
    """Part of a READ, or all of it.

    Attributes:
        cookie: of the request.
        offset: of the data in the export, in bytes.
        length: in bytes.
        data: a slice of the received data, valid as long as that is. None: the data have not all arrived and are
            many; the caller receives exactly `length` bytes itself (see ClientTransmission.receive).
    """

    cookie: int
    offset: int
    length: int
    data: memoryview | None


class HoleChunk(msgspec.Struct, frozen=True, gc=False):
    """Part of a READ that is all zeroes: `length` bytes at `offset` of the export."""

    cookie: int
    offset: int
    length: int


class StatusChunk(msgspec.Struct, frozen=True, gc=False):
    """The answer of one metadata context to a BLOCK_STATUS.

    Attributes:
        cookie: of the request.
        context_id: one of those selected.
        extents: (length in bytes, status flags), one after another from the offset of the request on; all but the last
            end within the request. They may end before the request does.
    """

    cookie: int
    context_id: int
    extents: tuple[tuple[int, int], ...]


class ErrorChunk(msgspec.Struct, frozen=True, gc=False):
    """The server's words about a failure; the failure itself comes with Done.

    Attributes:
        cookie: of the request.
        error: an Errno where it is a known one.
        text: for a human, may be empty.
        offset: the first offset concerned, in bytes, where the server knows it.
    """

    cookie: int
    error: int
    text: str
    offset: int | None


class Done(msgspec.Struct, frozen=True, gc=False):
    """The end of a reply: success if `error` is 0, else an Errno, or a number that NBD does not know."""

    cookie: int
    error: int


Event = DataChunk | HoleChunk | StatusChunk | ErrorChunk | Done
