"""What a driver can take in one request."""

import math
import mmap

import msgspec

MAX_ALIGNMENT_BYTES = 64 << 20
"""The largest request alignment a driver may ask for: one block is read, modified and written in memory."""

MAX_MEMORY_ALIGNMENT_BYTES = mmap.PAGESIZE
"""The largest memory alignment a driver may ask for; no storage wants more than a page."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a node can take in one request; all in bytes, 0 means "no limit".

    Args:
        request_alignment: offsets and lengths of all I/O must be multiples of it (a power of two);
            the block layer reads, modifies and writes where a request is not. If the driver's size is no multiple of
            it, the last block is read and written whole all the same: what lies behind the size reads as zeroes, and
            what is written there the driver drops, or grows by.
        memory_alignment: of the buffers that the block layer makes itself (a power of two). Callers' buffers come
            as they are.
        max_transfer: the largest read or write; larger ones are split.
        optimal_transfer: what suits the storage best (a cluster, a stripe).
        max_write_zeroes: the largest write_zeroes; larger ones are split.
        write_zeroes_alignment: below it zeroes are written as data.
        max_discard: the largest discard; larger ones are split.
        discard_alignment: a discard is narrowed to it, except at the end of the disk.

    Raises:
        ValueError: an alignment is out of range, or a largest request is smaller than what it must be a multiple of.
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
        powers = (("request_alignment", MAX_ALIGNMENT_BYTES), ("memory_alignment", MAX_MEMORY_ALIGNMENT_BYTES))
        for name, most in powers:
            value = getattr(self, name)
            if not 1 <= value <= most or value & (value - 1):
                raise ValueError(f"{name} must be a power of two up to {most}, not {value}")
        for name in ("write_zeroes_alignment", "discard_alignment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name, unit in (
            ("max_transfer", self.request_alignment),
            ("max_write_zeroes", self.write_zeroes_unit),
            ("max_discard", self.discard_unit),
            ("optimal_transfer", 0),
        ):
            value = getattr(self, name)
            if value < 0 or 0 < value < unit:
                # No request could be both small enough and aligned.
                raise ValueError(f"{name} must be 0 or at least {unit}, not {value}")

    @property
    def write_zeroes_unit(self) -> int:
        """What offsets and lengths of every write_zeroes are multiples of."""
        return math.lcm(self.request_alignment, self.write_zeroes_alignment)

    @property
    def discard_unit(self) -> int:
        """What offsets and lengths of every discard are multiples of."""
        return math.lcm(self.request_alignment, self.discard_alignment)


UNLIMITED = Limits()
