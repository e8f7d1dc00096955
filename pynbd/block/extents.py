"""What lies where: the answer to "which ranges hold data, which read as zeroes, and in which layer?"."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pynbd.block.node import Node


class Status:
    """What is known of a range; the names are QEMU's (`BDRV_BLOCK_*`).

    Plain numbers, added with `|`: an enumeration's `&` takes a microsecond, and a disk can have millions of extents.
    """

    NONE: Final = 0
    DATA: Final = 1  # this layer holds bytes for it
    ZERO: Final = 2  # it reads as zeroes
    ALLOCATED: Final = 4  # this layer decides what is read; without it, the backing file does
    RECURSE: Final = 8  # the child that holds the bytes may know more (holes in the file below)


class Extent(msgspec.Struct, frozen=True, gc=False):
    """A run of bytes of one layer that is all alike.

    Args:
        length: bytes, never 0.
        status: what is known of it.
        where: the node that holds the bytes verbatim, if one does; without DATA, that has a place for them.
        host_offset: where in that node, in bytes.
    """

    length: int
    status: int
    where: "Node | None" = None
    host_offset: int = 0

    def cut(self, length: int) -> "Extent":
        """The first `length` bytes of it."""
        return self if length >= self.length else Extent(length, self.status, self.where, self.host_offset)


class ChainExtent(msgspec.Struct, frozen=True, gc=False):
    """A run of bytes of a whole chain of images that is all alike.

    Args:
        length: bytes, never 0.
        status: DATA, ZERO and ALLOCATED (in any layer that was looked at).
        depth: 0 where no layer holds it, 1 the layer that was asked, n the nth below it.
        where: the node that holds the bytes verbatim, if one does.
        host_offset: where in that node, in bytes.
    """

    length: int
    status: int
    depth: int
    where: "Node | None" = None
    host_offset: int = 0

    @property
    def zero(self) -> bool:
        """Whether it reads as zeroes."""
        return bool(self.status & Status.ZERO)

    @property
    def data(self) -> bool:
        """Whether some layer holds bytes for it."""
        return bool(self.status & Status.DATA)


def merged(extents: Iterable[ChainExtent]) -> Iterator[ChainExtent]:
    """The same extents with neighbours that are alike (and contiguous below) made one."""
    last: ChainExtent | None = None
    for extent in extents:
        if (
            last is not None
            and (last.status, last.depth, last.where) == (extent.status, extent.depth, extent.where)
            and (last.where is None or last.host_offset + last.length == extent.host_offset)
        ):
            last = ChainExtent(last.length + extent.length, last.status, last.depth, last.where, last.host_offset)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
