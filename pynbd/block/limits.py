"""What a driver can take in one request."""

import msgspec

MAX_TRANSFER_BYTES = 1 << 30
"""No request of the block layer carries more payload than this, whatever a driver says."""

MAX_ALIGNMENT_BYTES = 64 << 20
"""The largest alignment a driver may ask for; a bounce buffer is never larger."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a node can take in one request; all in bytes, 0 means "no limit".

    Args:
        request_alignment: offsets and lengths of all I/O must be multiples of it (a power of two);
            the block layer reads, modifies and writes where a request is not.
        memory_alignment: of buffers, for direct I/O.
        max_transfer: the largest read or write; larger ones are split.
        optimal_transfer: what suits the storage best (a cluster, a stripe).
        max_write_zeroes: the largest write_zeroes; larger ones are split.
        write_zeroes_alignment: below it zeroes are written as data.
        max_discard: the largest discard; larger ones are split.
        discard_alignment: a discard is narrowed to it.
    """

    request_alignment: int = 1
    memory_alignment: int = 1
    max_transfer: int = 0
    optimal_transfer: int = 0
    max_write_zeroes: int = 0
    write_zeroes_alignment: int = 1
    max_discard: int = 0
    discard_alignment: int = 1

    def __post_init__(self) -> None:
        for name in ("request_alignment", "memory_alignment"):
            value = getattr(self, name)
            if value < 1 or value > MAX_ALIGNMENT_BYTES or value & (value - 1):
                raise ValueError(f"{name} must be a power of two up to {MAX_ALIGNMENT_BYTES}, not {value}")


UNLIMITED = Limits()
