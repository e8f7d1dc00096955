"""Holding what several nodes locate."""

from typing import Any, cast

import pytest

from pynbd.block.child import Child
from pynbd.block.holding import Release, Revoke, hold_all, hold_nothing


class Holder:
    """The edge to a node that can be held, or not."""

    def __init__(self, *, can: bool) -> None:
        self.node = self.driver = self
        self.can = can
        self.holds = 0

    def hold_located(self, revoke: Revoke) -> Release | None:
        if not self.can:
            return None
        self.holds += 1
        return self.release

    def release(self) -> None:
        self.holds -= 1


def edge(holder: Any) -> Child:
    return cast(Child, holder)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("itself", [True, False])
def test_all_are_held(count: int, itself: bool) -> None:
    holders = [Holder(can=True) for _ in range(count)]
    above = Holder(can=True)
    own = above.hold_located(hold_nothing) if itself else hold_nothing
    assert own is not None
    release = hold_all(hold_nothing, *(edge(holder) for holder in holders), None, own=own)
    assert release is not None
    assert (release is hold_nothing) == (not count and not itself)
    assert [holder.holds for holder in holders] == [1] * count
    release()
    assert not any(holder.holds for holder in [*holders, above])


def test_or_none() -> None:
    holders = [Holder(can=True), Holder(can=False), Holder(can=True)]
    above = Holder(can=True)
    own = above.hold_located(hold_nothing)
    assert own is not None
    assert hold_all(hold_nothing, *(edge(holder) for holder in holders), own=own) is None
    assert not any(holder.holds for holder in [*holders, above])
