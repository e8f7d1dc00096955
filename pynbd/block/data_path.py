"""`DataPath`: the functions of the nodes below that serve requests, and those that stand where a node has none."""

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from pynbd.block.driver import Filler, Finder, HostWriter, Location, WritePlace
from pynbd.block.ranges import Ranges


class DataPath(NamedTuple):
    """The functions that serve requests to a node, with every node that adds nothing left out.

    They are bound anew whenever the graph below changes, which happens only while nothing is in flight.
    """

    read: Callable[[int, memoryview, int], Coroutine[Any, Any, None]]
    write: Callable[[int, memoryview, int], Coroutine[Any, Any, None]]
    write_zeroes: Callable[[int, int, int], Coroutine[Any, Any, None]]
    discard: Callable[[int, int], Coroutine[Any, Any, None]]
    cache: Callable[[int, int], Coroutine[Any, Any, None]]
    flush: Callable[[], Coroutine[Any, Any, None]]
    locate: Callable[[int, int], Location | None]
    finder: Callable[[], Finder | None]
    write_now: Callable[[int, memoryview], bool]
    place_writes: Callable[[], WritePlace | None]
    fill_now: Callable[[int, int, Filler], int | None]
    write_by: Callable[[Ranges, HostWriter], Coroutine[Any, Any, int]]


def nowhere(offset: int, length: int) -> Location | None:
    """`locate` of a node that must see each read."""
    return None


def no_finder() -> Finder | None:
    """`finder` of a node that must see each read, or has no quicker way than `locate`."""
    return None


def not_now(offset: int, data: memoryview) -> bool:
    """`write_now` of a node that must see each write in its own time."""
    return False


def no_place() -> WritePlace | None:
    """`place_writes` of a node that must see each write, or does not lie in a file as it is."""
    return None


def never(offset: int, length: int, filler: Filler) -> int | None:
    """`fill_now` of a node that must see each write, or is no memory."""
    return None


async def by_nobody(ranges: Ranges, writer: HostWriter) -> int:
    """`write_by` of a node that must see each write."""
    return 0
