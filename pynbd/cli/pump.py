"""Bytes straight from file to file, in threads: what lies verbatim in one and will in the other need not pass the event
loop."""

import mmap
import os
import threading
from collections.abc import Callable

from pynbd.block.alignment import aligned_buffer, round_up
from pynbd.block.driver import Location
from pynbd.cli.zero_runs import runs

STROKE_BYTES = 1 << 20
"""What is read and then written at once, where the target's clusters are not longer: the file system gets large folios
so, and the interpreter little to do."""

_thread = threading.local()


class Pump:
    """Copies ranges of files, and minds the zeroes in them.

    Args:
        locate: says where the source's bytes lie verbatim (`Driver.locate`). That holds as long as the copy lasts.
        block_bytes: zeroes shorter than this are data; 0: all are. See `takes`.
        cluster_bytes: the target's clusters: where one holds only zeroes, pumping ends before it, for it shall have no
            place in the target. 0: the target is a file as it is.
        skips_zeroes: the target reads as zeroes, so that they need not be written. Otherwise pumping ends before them.
    """

    def __init__(
        self,
        locate: Callable[[int, int], Location | None],
        *,
        block_bytes: int,
        cluster_bytes: int,
        skips_zeroes: bool,
    ) -> None:
        self.locate = locate
        self._block_bytes = block_bytes
        self._cluster_bytes = cluster_bytes
        self._skips_zeroes = skips_zeroes
        self._stroke_bytes = max(STROKE_BYTES, cluster_bytes)

    @staticmethod
    def takes(block_bytes: int) -> bool:
        """Whether zeroes of such a length can be minded: strokes are made of whole blocks."""
        return not block_bytes or STROKE_BYTES % block_bytes == 0

    def copy(self, source: Location, fd: int, host_offset: int, length: int, fresh: bool) -> int:
        """Copy a range, in a thread; see `HostWriter` for all but the source.

        Returns:
            how many bytes were copied. What comes then can't be read, or has zeroes that others must deal with.

        Raises:
            OSError: it can't be written.
        """
        buffer = self._buffer()
        done = 0
        while done < length:
            part = buffer[: length - done]
            try:
                if os.preadv(source.fd, (part,), source.host_offset + done) < len(part):
                    break
            except OSError:
                break
            put = self._put(part, fd, host_offset + done, fresh)
            done += put
            if put < len(part):
                break
        return done

    def _buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(_thread, "buffer", None)
        if buffer is None or len(buffer) < self._stroke_bytes:
            buffer = _thread.buffer = aligned_buffer(self._stroke_bytes, mmap.PAGESIZE)
        return buffer[: self._stroke_bytes]

    def _put(self, part: memoryview, fd: int, offset: int, fresh: bool) -> int:
        """Write what was read, up to zeroes that others must deal with: how many bytes of it."""
        end = len(part)
        pieces = [(0, end)]
        if self._block_bytes and 0 in bytes(part[:: self._block_bytes]):
            found = list(runs(part, self._block_bytes))
            others = (start for start, length, zero in found if zero and not self._may_leave(start, length))
            end = next(others, end)
            pieces = [(0, end)]
            if fresh or not self._cluster_bytes:
                pieces = [(start, length) for start, length, zero in found if start < end and not zero]
        for start, length in pieces:
            written = 0
            while written < length:
                written += os.pwritev(fd, (part[start + written : start + length],), offset + start + written)
        return end

    def _may_leave(self, start: int, length: int) -> bool:
        """Whether zeroes may be left out, or be written as they are."""
        cluster = self._cluster_bytes
        if not (cluster and self._skips_zeroes):
            return self._skips_zeroes
        return round_up(start, cluster) + cluster > start + length
