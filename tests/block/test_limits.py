"""What a driver may say it can take."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.limits import MAX_ALIGNMENT_BYTES, MAX_MEMORY_ALIGNMENT_BYTES, UNLIMITED, Limits


@pytest.mark.parametrize("name", ["request_alignment", "memory_alignment"])
@pytest.mark.parametrize("value", [0, -1, 3, 513, MAX_ALIGNMENT_BYTES * 2])
def test_alignments_are_powers_of_two(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a power of two up to [0-9]+, not {value}"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", ["write_zeroes_alignment", "discard_alignment"])
def test_a_stripe_need_not_be_one(name: str) -> None:
    assert getattr(Limits(**{name: 3 << 20}), name) == 3 << 20
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, not 0"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_transfer": -1}, "max_transfer must be 0 or at least 1, not -1"),
        ({"max_transfer": 511, "request_alignment": 512}, "max_transfer must be 0 or at least 512, not 511"),
        ({"max_write_zeroes": 4095, "write_zeroes_alignment": 4096}, "max_write_zeroes must be 0 or at least 4096"),
        (
            {"max_discard": 1000, "discard_alignment": 96, "request_alignment": 64},
            None,
        ),
        (
            {"max_discard": 191, "discard_alignment": 96, "request_alignment": 64},
            "max_discard must be 0 or at least 192, not 191",
        ),
        ({"optimal_transfer": -1}, "optimal_transfer must be 0 or at least 0, not -1"),
    ],
)
def test_some_request_must_be_possible(limits: dict[str, int], said: str | None) -> None:
    if said is None:
        Limits(**limits)
        return
    with pytest.raises(ValueError, match=said):
        Limits(**limits)


@given(request=st.integers(0, 12), zeroes=st.integers(1, 10000), discard=st.integers(1, 10000))
def test_units_are_multiples_of_both(request: int, zeroes: int, discard: int) -> None:
    limits = Limits(request_alignment=1 << request, write_zeroes_alignment=zeroes, discard_alignment=discard)
    for unit, alignment in ((limits.write_zeroes_unit, zeroes), (limits.discard_unit, discard)):
        assert unit % alignment == unit % (1 << request) == 0
        assert unit <= alignment << request


def test_no_limits() -> None:
    assert Limits() == UNLIMITED
    assert UNLIMITED.write_zeroes_unit == UNLIMITED.discard_unit == 1
    assert mmap.PAGESIZE == MAX_MEMORY_ALIGNMENT_BYTES
