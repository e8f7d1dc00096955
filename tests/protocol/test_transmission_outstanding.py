"""Which bytes of a read have been told."""

from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol.transmission_outstanding import Coverage, Outstanding

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10)), max_size=40)


@given(RANGES)
def test_coverage_is_a_set_of_bytes(ranges: list[tuple[int, int]]) -> None:
    coverage = Coverage()
    model: set[int] = set()
    for begin, length in ranges:
        added = set(range(begin, begin + length))
        assert coverage.add(begin, begin + length) == model.isdisjoint(added)
        if model.isdisjoint(added):
            model |= added
        assert coverage.total() == len(model)
        told = [byte for piece in zip(coverage.starts, coverage.ends, strict=True) for byte in range(*piece)]
        assert told == sorted(model)


@given(st.permutations(range(50)))
def test_ranges_that_touch_are_joined(order: list[int]) -> None:
    coverage = Coverage()
    for i in order:
        assert coverage.add(10 * i, 10 * i + 10)
    assert (coverage.starts, coverage.ends) == ([0], [500])


def test_a_request_says_what_it_is() -> None:
    assert str(Outstanding(255, 0, 0, 512, 1024, frozenset())) == "READ of 1024 bytes at 512 (cookie 0xff)"
