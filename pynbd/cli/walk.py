"""Asking what lies where, from one end of a disk to the other."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

ASKED_BYTES = 1 << 30
"""How much is asked about at a time, to begin with."""


class Run(Protocol):
    """Bytes that are all alike, as `Extent` and `ChainExtent` are."""

    @property
    def length(self) -> int:
        """How many."""


R = TypeVar("R", bound=Run)


async def walk(ask: Callable[[int, int], Awaitable[Sequence[R]]], start: int, end: int) -> AsyncIterator[R]:
    """The runs of bytes in [start, end), one behind the other.

    As long as all that is asked about is one run, twice as much is asked about the next time: a disk of many TiB can be
    empty but for a few.

    Args:
        ask: (offset, length) → what lies there, from the offset on; it may stop early, but not before the first run.
        start, end: in bytes.

    Raises:
        OSError: what `ask` said.
    """
    asked = ASKED_BYTES
    while start < end:
        length = min(asked, end - start)
        found = await ask(start, length)
        asked = 2 * asked if found[0].length >= length else ASKED_BYTES
        for run in found:
            yield run
            start += run.length
