"""Dirty bitmaps: which parts of a disk were written since somebody began to look.

A bitmap is a Python integer's worth of bits in a `bytearray`, one bit for each `granularity` bytes. It is
marked before the write that made it dirty is answered.
"""

import os
from collections.abc import Iterator

from pynbd.block.errors import BlockError

MIN_GRANULARITY_BYTES = 512
MAX_GRANULARITY_BYTES = 1 << 31
DEFAULT_GRANULARITY_BYTES = 1 << 16
MAX_BITMAP_BYTES = 1 << 30
"""Memory of one bitmap; at the default granularity that is enough for 512 TiB."""

MAX_NAME_BYTES = 1023
"""As in qcow2, so that any bitmap can be made persistent."""


class DirtyBitmap:
    """The dirty blocks of one node.

    Args:
        name: what it is called; exported as `qemu:dirty-bitmap:NAME`.
        size: of the disk, in bytes.
        granularity: bytes that one bit stands for, a power of two.

    Raises:
        BlockError: the name or the granularity is out of range.
    """

    def __init__(self, name: str, size: int, granularity: int = DEFAULT_GRANULARITY_BYTES) -> None:
        if not 0 < len(os.fsencode(name)) <= MAX_NAME_BYTES:
            raise BlockError(f"bitmap name {name[:40]!r}: its length must be 1 to {MAX_NAME_BYTES} bytes")
        if granularity & (granularity - 1) or not MIN_GRANULARITY_BYTES <= granularity <= MAX_GRANULARITY_BYTES:
            raise BlockError(
                f"bitmap {name!r}: granularity {granularity} is no power of two "
                f"from {MIN_GRANULARITY_BYTES} to {MAX_GRANULARITY_BYTES}"
            )
        self.name = name
        self.granularity = granularity
        self.enabled = True
        self.persistent = False
        """Whether the image keeps it; see `families.PersistentBitmaps`."""
        self.inconsistent = False
        """The image kept it, but was not closed properly: nobody knows what is dirty. It can only be removed."""
        self._shift = granularity.bit_length() - 1
        self.size = 0
        self._bits = bytearray()
        self.resize(size)

    def can_cover(self, size: int) -> bool:
        """Whether a disk of that many bytes is within the limit of its memory."""
        return -(-size // self.granularity) <= MAX_BITMAP_BYTES * 8

    def bytes_for(self, size: int) -> int:
        """Memory of the bits for a disk of that many bytes."""
        blocks = -(-size // self.granularity)
        return -(-blocks // 8)

    def bits(self) -> memoryview:
        """All bits, the first one the least significant of the first byte; those behind the end are zero."""
        return memoryview(self._bits).toreadonly()

    def load(self, bits: bytes | bytearray) -> None:
        """Take over bits as `bits` gives them, of a bitmap of the same size and granularity."""
        assert len(bits) == len(self._bits)
        self._bits[:] = bits
        blocks = -(-self.size // self.granularity)
        if blocks % 8:
            self._bits[-1] &= (1 << blocks % 8) - 1

    def resize(self, size: int) -> None:
        """Follow the disk to another size; what is added is clean, what is cut off is forgotten."""
        blocks = -(-size // self.granularity)
        if not self.can_cover(size):
            raise BlockError(
                f"bitmap {self.name!r}: {size} bytes at granularity {self.granularity} need too much memory"
            )
        length = -(-blocks // 8)
        del self._bits[length:]
        self._bits.extend(bytes(length - len(self._bits)))
        if blocks % 8 and size < self.size:
            self._bits[-1] &= (1 << blocks % 8) - 1
        self.size = size

    def mark(self, offset: int, length: int) -> None:
        """Note that a range was written, unless the bitmap is disabled. The part past the end is ignored."""
        end = min(offset + length, self.size)
        if self.enabled and offset < end:
            self._fill(offset >> self._shift, ((end - 1) >> self._shift) + 1, dirty=True)

    def reset(self, offset: int, length: int) -> None:
        """Note that the blocks which lie wholly in a range (or reach the end of the disk) are clean again."""
        end = min(offset + length, self.size)
        first = -(-offset >> self._shift)
        last = -(-end >> self._shift) if end == self.size else end >> self._shift
        if first < last:
            self._fill(first, last, dirty=False)

    def merge(self, other: "DirtyBitmap") -> None:
        """Note what is dirty in another bitmap of a disk of the same size, enabled or not.

        Raises:
            BlockError: the sizes differ, or one of them is inconsistent.
        """
        for bitmap in (self, other):
            if bitmap.inconsistent:
                raise BlockError(f"bitmap {bitmap.name!r} is inconsistent: it can only be removed")
        if other.size != self.size:
            raise BlockError(
                f"bitmap {other.name!r} is of {other.size} bytes, {self.name!r} of {self.size}: they can't be merged"
            )
        offset = 0
        for length, dirty in other.extents(0, other.size):
            if dirty:
                self._fill(offset >> self._shift, (offset + length - 1 >> self._shift) + 1, dirty=True)
            offset += length

    def clear(self) -> None:
        """Note that everything is clean."""
        self._bits = bytearray(len(self._bits))

    def _fill(self, first: int, last: int, *, dirty: bool) -> None:
        """Set or clear the bits [first, last)."""
        bits = self._bits
        head, tail = first >> 3, (last - 1) >> 3
        head_mask, tail_mask = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last - 1 & 7))
        if head == tail:
            head_mask &= tail_mask
        if dirty:
            bits[head] |= head_mask
        else:
            bits[head] &= ~head_mask
        if head == tail:
            return
        bits[head + 1 : tail] = (b"\xff" if dirty else b"\0") * (tail - head - 1)
        if dirty:
            bits[tail] |= tail_mask
        else:
            bits[tail] &= ~tail_mask

    def is_dirty(self, offset: int) -> bool:
        """Whether the block that a byte lies in is dirty."""
        block = offset >> self._shift
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    @property
    def count(self) -> int:
        """Bytes that are dirty, whole blocks counted (the last one to the end of the disk)."""
        blocks = int.from_bytes(self._bits, "little").bit_count()
        total = blocks << self._shift
        if self.size and self.size & (self.granularity - 1) and self.is_dirty(self.size - 1):
            total -= self.granularity - (self.size & (self.granularity - 1))
        return total

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """(length, dirty) of the runs in a range, from `offset` to its end or that of the disk."""
        end = min(offset + length, self.size)
        while offset < end:
            dirty = self.is_dirty(offset)
            stop = min(self._run_end(offset >> self._shift, dirty=dirty) << self._shift, end)
            yield stop - offset, dirty
            offset = stop

    def _run_end(self, block: int, *, dirty: bool) -> int:
        """The first block after `block` that is not like it, or one past the last."""
        bits = self._bits
        blocks = -(-self.size // self.granularity)
        plain = 0xFF if dirty else 0
        while block < blocks:
            byte = bits[block >> 3]
            if block & 7 == 0 and byte == plain:
                block += 8 * self._like(block >> 3, plain)
                continue
            if (byte >> (block & 7) & 1) != dirty:
                break
            block += 1
        return min(block, blocks)

    def _like(self, index: int, plain: int) -> int:
        """How many bytes from `index` on are `plain` (at least 1, found a stretch at a time)."""
        bits, start, stretch = self._bits, index, 4096
        while index < len(bits):
            piece = bytes(bits[index : index + stretch])
            rest = piece.lstrip(bytes((plain,)))
            index += len(piece) - len(rest)
            if rest:
                break
        return index - start
