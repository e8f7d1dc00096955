"""What was asked of a node by one user of it, counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.statistics import Operation, Statistics

ACCOUNTS = st.lists(
    st.tuples(st.sampled_from(Operation), st.integers(0, 99), st.integers(0, 1 << 40), st.integers(0, 1 << 50))
)


@given(accounts=ACCOUNTS)
def test_each_kind_adds_up_by_itself(accounts: list[tuple[Operation, int, int, int]]) -> None:
    statistics = Statistics()
    for account in accounts:
        statistics.account(*account)
    told = statistics.as_dict()
    for kind in Operation:
        own = [account[1:] for account in accounts if account[0] == kind]
        assert told[kind.name.lower().replace("_", "-")] == {
            "operations": sum(operations for operations, _, _ in own),
            "bytes": sum(length for _, length, _ in own),
            "failed": 0,
            "time-ns": sum(time_ns for _, _, time_ns in own),
        }


def test_every_operation_is_told_under_its_name() -> None:
    statistics = Statistics()
    statistics.failed[Operation.WRITE_ZEROES] += 2
    told = statistics.as_dict()
    assert list(told) == ["read", "write", "flush", "discard", "write-zeroes", "cache", "block-status"]
    assert [kind for kind, counters in told.items() if any(counters.values())] == ["write-zeroes"]
    assert told["write-zeroes"]["failed"] == 2


def test_counters_belong_to_one_user() -> None:
    one, other = Statistics(), Statistics()
    one.account(Operation.READ, 1, 512, 9)
    assert other.as_dict() == Statistics().as_dict()
