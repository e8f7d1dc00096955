"""Holes of a file: finding them, making them, and zeroing ranges without writing zeroes."""

import errno
import os
from collections.abc import Sequence

from pynbd.block.extents import Extent, Status
from pynbd.block.node import Node
from pynbd.storage import linux

MAX_EXTENTS_PER_CALL = 256
"""Extents that one question collects before it stops early: two system calls each, made on the event loop."""

DATA = Status.DATA | Status.ALLOCATED
HOLE = Status.ZERO | Status.ALLOCATED

MISSING = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV})
"""What the kernel says of a call that this file (or device, or kernel) does not have."""


def extents(node: Node, fd: int, offset: int, length: int) -> Sequence[Extent]:
    """Where a file has data and where holes, from `offset` on; stops early after `MAX_EXTENTS_PER_CALL`.

    Args:
        node: the node that the file is shown as.
        fd: the file; its position is moved.
        offset, length: the range in bytes, inside the file and not empty.
    """
    found: list[Extent] = []
    end = offset + length
    while offset < end and len(found) < MAX_EXTENTS_PER_CALL:
        data = _seek(fd, offset, os.SEEK_DATA, end)
        if data > offset:
            found.append(Extent(data - offset, HOLE, node, offset))
        if data < end:
            hole = _seek(fd, data, os.SEEK_HOLE, end)
            if hole <= data:
                # Somebody else punches holes at this moment, or a file system rounds: "data" is always true.
                hole = end
            found.append(Extent(hole - data, DATA, node, data))
            data = hole
        offset = data
    return found


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Where the next data or hole begins, at most `end`."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as problem:
        if problem.errno == errno.ENXIO:
            return end  # a hole up to the end of the file
        if problem.errno == errno.EINVAL:
            return offset if whence == os.SEEK_DATA else end  # the file system can't tell: all of it is data
        raise


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeroes then. The file keeps its length.

    Raises:
        OSError: one of `MISSING` where that can't be; nothing was changed then.
    """
    linux.fallocate(fd, linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE, offset, length)
