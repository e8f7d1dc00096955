"""How often each host cluster is referred to, for a check: a byte per cluster, as long as counts are small.

Clusters are counted by runs with operations on bytes, since an image of 100 GiB has millions of them. Memory is taken
by parts of the file that are referred to at all, so that holes in huge files cost nothing, and is bounded.
"""

import errno
from array import array
from collections.abc import Iterator

from pynbd.block.errors import io_error
from pynbd.formats.qcow2.refcounts import TYPECODES, pack, unpack

PART_BITS = 13
PART_CLUSTERS = 1 << PART_BITS
"""Clusters whose counts lie in memory together; as many as an L2 table of 64 KiB can point to."""

MAX_COUNT_BYTES = 1 << 30
"""What counts may take: enough for 64 TiB in clusters of 64 KiB, all in use."""

MANY = 255
"""Where a count is kept in a byte, one that does not fit: so many, or more."""

Part = bytearray | array  # type: ignore[type-arg]  # array("Q") where a count does not fit into a byte


class Counts:
    """A count for each cluster of a file.

    Args:
        image: its name for messages.
        most: the largest count that can be kept on disk; more are not counted.
    """

    def __init__(self, image: str, most: int) -> None:
        self.image = image
        self.most = most
        self.parts: dict[int, Part] = {}
        self._taken = 0

    def _part(self, number: int) -> Part:
        part = self.parts.get(number)
        if part is None:
            self._take(PART_CLUSTERS)
            part = self.parts[number] = bytearray(PART_CLUSTERS)
        return part

    def _take(self, length: int) -> None:
        self._taken += length
        if self._taken > MAX_COUNT_BYTES:
            what = f"counting its clusters takes more than {MAX_COUNT_BYTES} bytes of memory"
            raise io_error(errno.ENOMEM, self.image, what)

    @staticmethod
    def pieces(first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(part, start, stop) of all pieces of a run of clusters, by part and place in it."""
        end = first + count
        while first < end:
            number, start = divmod(first, PART_CLUSTERS)
            stop = min(start + end - first, PART_CLUSTERS)
            yield number, start, stop
            first += stop - start

    # --- looking -------------------------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        """The count of a cluster."""
        part = self.parts.get(cluster >> PART_BITS)
        return part[cluster & (PART_CLUSTERS - 1)] if part is not None else 0

    def slice(self, first: int, count: int) -> bytes:
        """The counts of some clusters; `MANY` stands for itself and everything larger."""
        found = []
        for number, start, stop in self.pieces(first, count):
            part = self.parts.get(number)
            if part is None:
                found.append(bytes(stop - start))
            elif isinstance(part, bytearray):
                found.append(bytes(part[start:stop]))
            else:
                found.append(bytes([min(value, MANY) for value in part[start:stop]]))
        return found[0] if len(found) == 1 else b"".join(found)

    def are_all(self, first: int, count: int, value: int) -> bool:
        """Whether each of some clusters has this count."""
        if count == 1:
            return self.get(first) == value
        for number, start, stop in self.pieces(first, count):
            part = self.parts.get(number)
            if part is None:
                if value:
                    return False
            elif part[start:stop].count(value) != stop - start:
                return False
        return True

    def used_blocks(self, per_block: int) -> set[int]:
        """The numbers of all blocks of so many clusters (a power of two) of which one has a count."""
        found: set[int] = set()
        for number, part in self.parts.items():
            first = number << PART_BITS
            if per_block >= PART_CLUSTERS:
                if any(part):
                    found.add(first // per_block)
                continue
            for start in range(0, PART_CLUSTERS, per_block):
                if any(part[start : start + per_block]):
                    found.add((first + start) // per_block)
        return found

    def free_run(self, at: int, count: int) -> int:
        """The first of `count` clusters in a row without a count, from `at` on."""
        first = at
        while True:
            number, start = divmod(at, PART_CLUSTERS)
            part = self.parts.get(number)
            if part is None:
                at += PART_CLUSTERS - start
            elif part[start]:
                try:
                    at += part.index(0, start) - start
                except ValueError:
                    at += PART_CLUSTERS - start
                first = at
            else:
                at += 1
            if at - first >= count:
                return first

    # --- counting ------------------------------------------------------------------------------------------

    def add(self, first: int, count: int, by: int = 1) -> int:
        """Count some clusters `by` times; gives how often a count was not raised since it would not fit on disk."""
        lost = 0
        for number, start, stop in self.pieces(first, count):
            part = self._part(number)
            if stop - start == 1 or isinstance(part, array):
                lost += self._add_one_by_one(number, start, stop, by)
                continue
            found = part[start:stop]
            if found.count(0) == stop - start:
                largest = 0
            elif found.count(1) == stop - start:
                largest = 1
            else:
                lost += self._add_one_by_one(number, start, stop, by)
                continue
            if largest + by > min(self.most, MANY - 1):
                lost += self._add_one_by_one(number, start, stop, by)
            else:
                part[start:stop] = bytes([largest + by]) * (stop - start)
        return lost

    def _add_one_by_one(self, number: int, start: int, stop: int, by: int) -> int:
        part, most, lost = self._part(number), self.most, 0
        for at in range(start, stop):
            value = part[at] + by
            if value > most:
                lost += value - most
                value = most
            if value >= MANY and isinstance(part, bytearray):
                self._take(7 * PART_CLUSTERS)
                part = self.parts[number] = array("Q", list(part))
            part[at] = value
        return lost

    def drop(self, first: int, count: int) -> None:
        """Count some clusters once less; one that was counted as often as fits on disk keeps its count."""
        for number, start, stop in self.pieces(first, count):
            part = self._part(number)
            for at in range(start, stop):
                if 0 < part[at] < self.most or part[at] == 1:
                    part[at] -= 1

    def raise_to(self, other: "Counts") -> None:
        """Raise each count to that of another one, if it is less."""
        for number, part in other.parts.items():
            mine = self._part(number)
            if mine != part:
                for at, value in enumerate(part):
                    mine[at] = max(mine[at], value)

    def put(self, first: int, values: bytes) -> None:
        """Set the counts of some clusters, each kept in a byte."""
        at = 0
        for number, start, stop in self.pieces(first, len(values)):
            piece = values[at : at + stop - start]
            at += stop - start
            if number in self.parts or any(piece):
                part = self._part(number)
                assert isinstance(part, bytearray)
                part[start:stop] = piece


def block_of(counts: Counts, first: int, count: int, order: int) -> bytes:
    """The refcount block that tells of some clusters."""
    small = counts.slice(first, count)
    if order < 3:
        return pack(array("B", small), order)
    if MANY in small:
        return pack(array(TYPECODES[order], map(counts.get, range(first, first + count))), order)
    width = 1 << order - 3
    data = bytearray(count * width)
    data[width - 1 :: width] = small
    return bytes(data)


def small_counts(data: bytes, order: int) -> tuple[bytes, "array[int]"]:
    """The counts of a refcount block.

    Args:
        data: the block.
        order: of the width of a count.

    Returns:
        (a byte for each, `MANY` for those that don't fit; the counts themselves, empty if there is no such one).
    """
    if order < 3:
        return unpack(data, order).tobytes(), array("B")
    width = 1 << order - 3
    low = data[width - 1 :: width]
    if all(data[byte::width].count(0) == len(low) for byte in range(width - 1)) and MANY not in low:
        return low, array(TYPECODES[order])
    exact = unpack(data, order)
    return bytes([min(value, MANY) for value in exact]), exact
