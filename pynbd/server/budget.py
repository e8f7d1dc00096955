"""How much memory the payloads of all clients together may take.

Every connection may always use a little (`RESERVE_BYTES`); beyond that it takes from one pool for the whole
process. Who finds the pool empty waits in line. Whoever is first in line may overdraw the pool if nobody else does,
and need not stand in line again for the rest of what he has begun: so one request can always be brought to its end,
whatever the others hold, and they give back what they hold when theirs end.
"""

from collections import OrderedDict
from collections.abc import Callable

RESERVE_BYTES = 256 << 10
"""What a connection may hold without asking: small requests are never held up by other clients' large ones."""

DEFAULT_POOL_BYTES = 64 << 20
"""Payload memory of the process beyond the reserves."""

OVERDRAFT_BYTES = 33 << 20
"""By how much the pool may be overdrawn: the largest request that is always served, and its framing."""


class PayloadBudget:
    """The pool.

    Args:
        pool: bytes that all connections together may hold beyond their reserves.
        later: calls a function soon, but not from within this call (`loop.call_soon`): those in line are woken by it.
            Without it they are woken from within `give`, wherever that was called.
    """

    def __init__(
        self, pool: int = DEFAULT_POOL_BYTES, later: Callable[[Callable[[], None]], object] | None = None
    ) -> None:
        self.pool = pool
        self.taken = 0
        self.overdrawn_by: Account | None = None
        self.waiting: OrderedDict[Account, Callable[[], None] | None] = OrderedDict()
        self._later = later
        self._wake_due = False

    def account(self) -> "Account":
        """A connection's share."""
        return Account(self)

    def wake_soon(self) -> None:
        """Memory was given back, or the line got shorter: let those in line try again."""
        if not self.waiting or self._wake_due:
            return
        if self._later is None:
            self._wake()
        else:
            self._wake_due = True
            self._later(self._wake)

    def _wake(self) -> None:
        """Let those in line try again, in order, until the first of them asks in vain."""
        self._wake_due = False
        while self.waiting:
            # It keeps its place in the line while it tries; `None` tells whether it asked again in vain.
            account, retry = next(iter(self.waiting.items()))
            if retry is None:
                return  # it is trying right now, further up the stack
            if self.taken >= self.pool and self.overdrawn_by not in (None, account):
                return
            self.waiting[account] = None
            retry()
            if self.waiting.get(account, retry) is None:
                del self.waiting[account]
            elif next(iter(self.waiting), None) is account:
                return


class Account:
    """What one connection holds of the budget."""

    __slots__ = ("__weakref__", "_budget", "held")

    def __init__(self, budget: PayloadBudget) -> None:
        self._budget = budget
        self.held = 0

    @property
    def pressed(self) -> bool:
        """Whether the pool is exhausted."""
        return self._budget.taken > self._budget.pool

    def take(self, length: int, retry: Callable[[], None], *, begun: bool = False) -> bool:
        """Reserve memory before it is used.

        Args:
            length: bytes.
            retry: called once when it is worth trying again, if there is not enough now.
            begun: it is for something that can't end, nor give back what it holds, without it.

        Returns:
            whether it was reserved.
        """
        budget = self._budget
        need = self._beyond_reserve(self.held + length) - self._beyond_reserve(self.held)
        if need:
            # Those in line wait for the one who overdraws; if he waited behind them, nobody would ever go on.
            goes_on = begun and budget.overdrawn_by is self
            first = not budget.waiting or next(iter(budget.waiting)) is self or goes_on
            fits = budget.taken + need <= budget.pool
            if not (first and (fits or self._may_overdraw(need))):
                budget.waiting[self] = retry
                if goes_on:
                    budget.waiting.move_to_end(self, last=False)
                return False
            if not fits:
                budget.overdrawn_by = self
            budget.taken += need
            budget.waiting.pop(self, None)
        self.held += length
        return True

    def _may_overdraw(self, need: int) -> bool:
        budget = self._budget
        return budget.overdrawn_by in (None, self) and budget.taken + need <= budget.pool + OVERDRAFT_BYTES

    def charge(self, length: int) -> None:
        """Count memory that is used already, whether there is enough or not (answers that wait to be sent)."""
        before = self._beyond_reserve(self.held)
        self.held += length
        self._budget.taken += self._beyond_reserve(self.held) - before

    def give(self, length: int) -> None:
        """Give memory back that was taken or charged."""
        before = self._beyond_reserve(self.held)
        self.held -= length
        assert self.held >= 0
        budget = self._budget
        freed = before - self._beyond_reserve(self.held)
        if not freed:
            return
        budget.taken -= freed
        overdrawer = budget.overdrawn_by
        if overdrawer is not None and (budget.taken <= budget.pool or overdrawer.held <= RESERVE_BYTES):
            budget.overdrawn_by = None
        budget.wake_soon()

    def withdraw(self) -> None:
        """Leave the line: what was asked for is not wanted any more."""
        self._budget.waiting.pop(self, None)
        self._budget.wake_soon()

    def close(self) -> None:
        """Give everything back, and leave the line."""
        self._budget.waiting.pop(self, None)
        if self._budget.overdrawn_by is self:
            self._budget.overdrawn_by = None
        self.give(self.held)
        self._budget.wake_soon()

    @staticmethod
    def _beyond_reserve(held: int) -> int:
        return held - RESERVE_BYTES if held > RESERVE_BYTES else 0
