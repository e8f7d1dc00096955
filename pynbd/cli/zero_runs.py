"""Zeroes inside data: where they are."""

from collections.abc import Iterator

BLOCK_BYTES = 4096
"""Zeroes inside data are looked for in blocks of this size, as qemu-img and nbdcopy do."""


def runs(data: memoryview, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, bool]]:
    """(start, length, whether it is all zeroes) of the runs of blocks in a buffer.

    Only blocks whose first byte is zero are looked at: in most data there are few.
    """
    # A bytearray is compared at the speed of memory, with whatever it is compared; a memoryview item by item.
    if data and not data[0] and not data[-1] and bytearray(len(data)) == data:
        yield 0, len(data), True
        return
    firsts = bytes(data[::block_bytes])
    zero_block = bytearray(block_bytes)
    begin = 0
    number = firsts.find(0)
    while number >= 0:
        first = number
        while number < len(firsts) and _is_zero(data, number * block_bytes, zero_block):
            number += 1
        if number > first:
            start, end = first * block_bytes, min(number * block_bytes, len(data))
            if start > begin:
                yield begin, start - begin, False
            yield start, end - start, True
            begin = end
        number = firsts.find(0, number + 1)
    if begin < len(data):
        yield begin, len(data) - begin, False


def _is_zero(data: memoryview, start: int, zero_block: bytearray) -> bool:
    block = data[start : start + len(zero_block)]
    return zero_block == block if len(block) == len(zero_block) else not any(block)
