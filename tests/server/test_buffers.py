"""Buffers that are used again: long enough, never two at once, and no more kept than allowed."""

from hypothesis import given
from hypothesis import strategies as st

from pynbd.server.buffers import KEPT_BYTES, SMALLEST_BYTES, BufferPool


@given(st.data())
def test_law_of_the_pool(data: st.DataObject) -> None:
    pool = BufferPool()
    taken: list[memoryview] = []
    for _ in range(data.draw(st.integers(1, 40))):
        give_back: bool = data.draw(st.booleans())
        if taken and give_back:
            pool.give(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            length = data.draw(st.integers(1, 32 << 20))
            buffer = pool.take(length)
            assert max(length, SMALLEST_BYTES) <= len(buffer) <= max(2 * length, SMALLEST_BYTES)
            assert not any(buffer is other or buffer.obj is other.obj for other in taken)
            taken.append(buffer)
        assert pool._kept <= KEPT_BYTES
        assert pool._kept == sum(len(buffer) for free in pool._free.values() for buffer in free)
    pool.clear()
    assert not pool._kept


def test_a_buffer_comes_back() -> None:
    pool = BufferPool()
    first = pool.take(100_000)
    pool.give(first)
    assert pool.take(70_000) is first
    assert pool.take(70_000) is not first
