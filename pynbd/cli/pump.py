"""Bytes straight from file to file, in threads: what lies verbatim in one and will in the other need not pass the event
loop."""

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from pynbd.block.alignment import aligned_buffer, pieces, round_down, round_up
from pynbd.block.driver import Copied, Location, Room
from pynbd.cli.zero_runs import runs

STROKE_BYTES = 1 << 20
"""What is read and then written at once, where the target's clusters are not longer: the file system gets large folios
so, and the interpreter little to do."""

_thread = threading.local()


class Kind(Enum):
    """What is done with bytes that were read."""

    DATA = "data"  # they are written
    HOLE = "hole"  # they are zeroes, and so is their place
    LEFT_OUT = "left out"  # they are zeroes, and get no place


class Pump:
    """Copies ranges of files, and minds the zeroes in them.

    Args:
        locate: says where the source's bytes lie verbatim (`Driver.locate`). That holds as long as the copy lasts.
        block_bytes: zeroes shorter than this are data; 0: all are. See `takes`.
        cluster_bytes: the target's clusters: one that holds only zeroes shall have no place there. 0: it is a file.
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
        self.cluster_bytes = cluster_bytes
        self._skips_zeroes = skips_zeroes
        self._stroke_bytes = max(STROKE_BYTES, cluster_bytes)

    @staticmethod
    def takes(block_bytes: int) -> bool:
        """Whether zeroes of such a length can be minded: strokes are made of whole blocks."""
        return not block_bytes or STROKE_BYTES % block_bytes == 0

    def copy(self, sources: Sequence[Location], room: Room) -> Copied:
        """Copy, in a thread; see `HostWriter` for all but where the bytes come from.

        Returns:
            what was copied. What comes then can't be read, or has zeroes that others must deal with.

        Raises:
            OSError: it can't be written.
        """
        buffer = self._buffer()
        source = Joined(sources)
        unit = room.unit if self._packs(room) else 0
        left_out: list[tuple[int, int]] = []
        done = saved = 0
        for host_offset, length in room.places:
            for start, size in pieces(host_offset, length, len(buffer)):
                part = buffer[:size]
                if not source.fill(part):
                    return Copied(done, left_out)
                end = 0
                for begin, end, kind in self._sorted(part, unit, fresh=room.fresh):
                    if kind is Kind.DATA:
                        _write(room.fd, part[begin:end], start + begin - saved)
                    elif kind is Kind.LEFT_OUT:
                        left_out.append((done + begin, end - begin))
                        saved += end - begin
                done += end
                if end < size:
                    return Copied(done, left_out)
        return Copied(done, left_out)

    def _packs(self, room: Room) -> bool:
        """Whether zeroes can be left out in a way that they take no place."""
        one_place = len(room.places) == 1
        return bool(room.unit and self._skips_zeroes and one_place and self._stroke_bytes % room.unit == 0)

    def _buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(_thread, "buffer", None)
        if buffer is None or len(buffer) < self._stroke_bytes:
            buffer = _thread.buffer = aligned_buffer(self._stroke_bytes, mmap.PAGESIZE)
        return buffer[: self._stroke_bytes]

    def _sorted(self, part: memoryview, unit: int, *, fresh: bool) -> Iterator[tuple[int, int, Kind]]:
        """(start, end, what is done with it) of what was read, up to zeroes that others must deal with."""
        if not self._block_bytes or 0 not in bytes(part[:: self._block_bytes]):
            yield 0, len(part), Kind.DATA
            return
        short = Kind.HOLE if fresh or not self.cluster_bytes else Kind.DATA
        for start, length, zero in runs(part, self._block_bytes):
            end = start + length
            if not zero:
                yield start, end, Kind.DATA
            elif unit and (low := round_up(start, unit)) < (high := round_down(end, unit)):
                if start < low:
                    yield start, low, short
                yield low, high, Kind.LEFT_OUT
                if high < end:
                    yield high, end, short
            elif unit or self._may_leave(start, length):
                yield start, end, short
            else:
                break

    def _may_leave(self, start: int, length: int) -> bool:
        """Whether zeroes may be left where they are to lie, as a hole or as they are."""
        cluster = self.cluster_bytes
        if not (cluster and self._skips_zeroes):
            return self._skips_zeroes
        return round_up(start, cluster) + cluster > start + length


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwritev(fd, (data,), offset)
        data, offset = data[written:], offset + written


class Joined:
    """Places in files, read one behind the other.

    Args:
        places: where the bytes lie.
    """

    def __init__(self, places: Sequence[Location]) -> None:
        self._rest = iter(places)
        self._fd = self._offset = self._length = 0

    def fill(self, part: memoryview) -> bool:
        """Read on; False if it can't be done, and then nothing else can either."""
        while part:
            if not self._length:
                self._fd, self._offset, self._length, *_ = next(self._rest)
            piece = part[: self._length]
            try:
                if os.preadv(self._fd, (piece,), self._offset) < len(piece):
                    return False
            except OSError:
                return False
            self._offset += len(piece)
            self._length -= len(piece)
            part = part[len(piece) :]
        return True
