"""Memory for payloads: never more than the pool, its overdraft and the reserves; and somebody can always go on."""

from hypothesis import given
from hypothesis import strategies as st

from pynbd.server.budget import OVERDRAFT_BYTES, RESERVE_BYTES, Account, PayloadBudget

MIB = 1 << 20


def never() -> None:
    raise AssertionError("woken without need")


def test_the_reserve_is_had_without_asking() -> None:
    budget = PayloadBudget(pool=0)
    accounts = [budget.account() for _ in range(3)]
    assert all(account.take(RESERVE_BYTES, never) for account in accounts)
    assert budget.taken == 0


def test_the_first_in_line_overdraws_and_the_next_waits() -> None:
    budget = PayloadBudget(pool=4 * MIB)
    first, second, third = (budget.account() for _ in range(3))
    woken: list[str] = []
    assert first.take(RESERVE_BYTES + 4 * MIB, never)
    assert second.take(RESERVE_BYTES + 2 * MIB, never)  # overdraws
    assert not third.take(RESERVE_BYTES + MIB, lambda: woken.append("third"))
    first.give(4 * MIB + RESERVE_BYTES)
    assert woken == ["third"]
    assert third.take(RESERVE_BYTES + MIB, never)


def test_a_request_as_large_as_any_fits_into_an_empty_pool() -> None:
    budget = PayloadBudget(pool=0)
    assert budget.account().take(32 * MIB, never)


def test_one_who_has_gone_frees_the_line() -> None:
    budget = PayloadBudget(pool=MIB)
    holder, waiter, last = (budget.account() for _ in range(3))
    woken: list[str] = []
    assert holder.take(RESERVE_BYTES + MIB + OVERDRAFT_BYTES, never)
    assert not waiter.take(RESERVE_BYTES + 1, lambda: woken.append("waiter"))
    assert not last.take(RESERVE_BYTES + 1, lambda: woken.append("last"))
    waiter.close()
    holder.close()
    assert woken == ["last"]
    assert budget.taken == 0


def test_those_who_wait_are_served_in_order() -> None:
    budget = PayloadBudget(pool=MIB)
    holder = budget.account()
    assert holder.take(RESERVE_BYTES + MIB + OVERDRAFT_BYTES, never)
    order: list[int] = []
    accounts = [budget.account() for _ in range(4)]

    def ask(number: int) -> None:
        if accounts[number].take(RESERVE_BYTES + MIB // 4, lambda: ask(number)):
            order.append(number)

    for number in range(4):
        ask(number)
    assert order == []
    holder.close()
    assert order == [0, 1, 2, 3]


@given(st.data())
def test_law_of_the_budget(data: st.DataObject) -> None:
    """Whatever is asked for and given back: the books balance, the limit holds, and everybody gets his turn."""
    budget = PayloadBudget(pool=8 * MIB)
    accounts = [budget.account() for _ in range(4)]
    asked: dict[Account, int] = {}
    got: dict[Account, list[int]] = {account: [] for account in accounts}

    def ask(account: Account, length: int) -> None:
        asked[account] = length
        if account.take(length, lambda: ask(account, length)):
            del asked[account]
            got[account].append(length)

    for _ in range(data.draw(st.integers(1, 40))):
        account = data.draw(st.sampled_from(accounts))
        if account not in asked and data.draw(st.booleans()):
            ask(account, data.draw(st.integers(1, 32 * MIB)))
        elif got[account]:
            account.give(got[account].pop())
        assert 0 <= budget.taken <= budget.pool + OVERDRAFT_BYTES
        assert all(a.held == sum(got[a]) for a in accounts)
    # When everything that can end has ended, nobody is left waiting.
    while any(got.values()):
        account = next(a for a in accounts if got[a])
        account.give(got[account].pop())
    assert not asked
    assert budget.taken == 0
    assert not budget.waiting
