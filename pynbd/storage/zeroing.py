"""Making a range of a file or a device read as zeroes, or giving it back, by the quickest way that there is."""

import errno
import os
from collections.abc import Callable

from pynbd.storage import linux, sparse


class Zeroing:
    """What one open file can do about zeroes; what turned out to be missing is not tried again.

    Its methods wait for the file system: call them in threads.

    Args:
        fd: the file.
        device: whether it is a block device.
    """

    def __init__(self, fd: int, *, device: bool) -> None:
        self._fd = fd
        self._device = device
        self._missing: set[Callable[[int, int], None]] = set()

    def zero(self, offset: int, length: int, *, may_unmap: bool, quickly: bool) -> None:
        """Make a range read as zeroes.

        Args:
            offset, length: in bytes. A regular file grows, if need be; of a device it is whole blocks.
            may_unmap: whether the space may be given back; otherwise it stays (or becomes) reserved.
            quickly: not by writing zeroes.

        Raises:
            OSError: ENOTSUP, there is no such way, and nothing was changed; or what the file system said.
        """
        ways = self._ways_on_device(may_unmap, quickly) if self._device else self._ways_in_file(may_unmap)
        for way in ways:
            if self._tried(way, offset, length):
                return
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def _ways_in_file(self, may_unmap: bool) -> tuple[Callable[[int, int], None], ...]:
        if may_unmap:
            return self._punch, self._zero_range
        return self._zero_range, self._punch_and_reserve

    def _ways_on_device(self, may_unmap: bool, quickly: bool) -> tuple[Callable[[int, int], None], ...]:
        # Punching is refused by the kernel where it is not quick; zeroing out is not refused, but writes then.
        punching = (self._punch,) if may_unmap else ()
        return punching if quickly else (*punching, self._zero_out)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back.

        Raises:
            OSError: ENOTSUP, it can't be; or what the file system said.
        """
        if not self._tried(self._discard_blocks if self._device else self._punch, offset, length):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def _tried(self, way: Callable[[int, int], None], offset: int, length: int) -> bool:
        """Whether a way worked; False if this file does not have it."""
        if way in self._missing:
            return False
        try:
            way(offset, length)
        except OSError as problem:
            if problem.errno not in sparse.MISSING:
                raise
            self._missing.add(way)
            return False
        return True

    # --- the ways ------------------------------------------------------------------------------------------

    def _punch(self, offset: int, length: int) -> None:
        sparse.punch_hole(self._fd, offset, length)
        self._extend(offset + length)

    def _zero_range(self, offset: int, length: int) -> None:
        linux.fallocate(self._fd, linux.FALLOC_FL_ZERO_RANGE, offset, length)

    def _punch_and_reserve(self, offset: int, length: int) -> None:
        sparse.punch_hole(self._fd, offset, length)
        linux.fallocate(self._fd, 0, offset, length)

    def _zero_out(self, offset: int, length: int) -> None:
        linux.device_zero_out(self._fd, offset, length)

    def _discard_blocks(self, offset: int, length: int) -> None:
        linux.device_discard(self._fd, offset, length)

    def _extend(self, end: int) -> None:
        """Let the file reach to `end` at least."""
        if not self._device and os.fstat(self._fd).st_size < end:
            # Not by ftruncate, which would cut off what another thread has just written behind it.
            os.pwrite(self._fd, b"\0", end - 1)
