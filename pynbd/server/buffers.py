"""Buffers for large payloads, used again.

Memory that is fresh from the kernel costs a page fault and a cleared page for every 4 KiB that is first written to:
for a large write that is as much as the write itself. So buffers are kept, up to a limit.
"""

import mmap

Buffer = bytes | bytearray | memoryview

SMALLEST_BYTES = 64 << 10
KEPT_BYTES = 16 << 20
"""What is kept for later, all sizes together."""


def anonymous_memory(size: int) -> memoryview:
    """So many zero bytes of memory, which begin with a page."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class BufferPool:
    """Free buffers by size. Sizes are powers of two; addresses are those of pages, as direct I/O likes them."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}
        self._kept = 0

    def take(self, length: int) -> memoryview:
        """A buffer of at least `length` bytes; what it holds is anything."""
        size = max(1 << (length - 1).bit_length(), SMALLEST_BYTES)
        free = self._free.get(size)
        if free:
            self._kept -= size
            return free.pop()
        return anonymous_memory(size)

    def give(self, buffer: memoryview) -> None:
        """Take back a buffer that nobody uses any more."""
        size = len(buffer)
        if self._kept + size <= KEPT_BYTES:
            self._free.setdefault(size, []).append(buffer)
            self._kept += size

    def clear(self) -> None:
        """Give all memory back to the system."""
        self._free.clear()
        self._kept = 0
