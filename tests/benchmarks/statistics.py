"""Medians, and ratios taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle of a few figures, with the lowest and the highest beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise ValueError("no spread of no values")
        return cls(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None], *, higher_is_better: bool) -> list[float]:
    """Our figure against the peer's, round by round: above 1 we are better. Rounds that lack one of them are left out,
    as is one that was broken off.

    A machine's pace changes from minute to minute. Within a round both sides were measured one right after the other,
    so the ratio holds where neither median would.
    """
    pairs = [(our, their) for our, their in zip(ours, theirs, strict=False) if our and their]
    return [our / their if higher_is_better else their / our for our, their in pairs]
