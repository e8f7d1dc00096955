"""`MissedReads`: the short reads of a wake-up that were tried in place, and whose bytes are not in memory.

To try has sent the kernel for them already (it reads what it was asked for, also where nobody is to wait). So all of a
wake-up are tried first, and are under way together. They wait in the queue of the file's driver then, without a
coroutine each; or as the driver's coroutines, where bytes may move meanwhile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns

from nbd_protocol.constants import Command
from nbd_protocol.transmission import Replies, Request
from pynbd.block.driver import ReadQueue
from pynbd.block.statistics import Operation
from pynbd.server.budget import Account
from pynbd.server.coroutines import Coroutines
from pynbd.server.outstanding import Outstanding
from pynbd.server.wire import Item

READ = int(Command.READ)

Missed = tuple[int, int, int, int]
"""A read: its cookie, the offset in the disk, the length, and where in its file the bytes lie."""


class MissedReads:
    """Those of one connection.

    Args:
        coroutines: carries out what nobody's queue takes, and what has failed in one.
        replies: the framing of replies.
        outstanding: counts what has begun.
        account: where the memory for a read goes back to.
        queue: says who makes reads that have to wait; see `Driver.read_queue`.
        ended: called with replies, and how many requests have ended with them.
    """

    __slots__ = (
        "_account",
        "_backend",
        "_bytes",
        "_coroutines",
        "_ended",
        "_missed",
        "_outstanding",
        "_queue",
        "_replies",
    )

    def __init__(
        self,
        coroutines: Coroutines,
        replies: Replies,
        outstanding: Outstanding,
        account: Account,
        queue: Callable[[], ReadQueue | None],
        ended: Callable[[Sequence[Item], int], None],
    ) -> None:
        self._coroutines = coroutines
        self._backend = coroutines.backend
        self._replies = replies
        self._outstanding = outstanding
        self._account = account
        self._queue = queue
        self._ended = ended
        self._missed: list[Missed] = []
        self._bytes = 0

    def __len__(self) -> int:
        """Those that have not begun."""
        return len(self._missed)

    def add(self, cookie: int, offset: int, length: int, host_offset: int) -> bool:
        """Put a read aside, if there is room for it.

        Args:
            cookie: of the request.
            offset, length: the range, in bytes, within the disk.
            host_offset: where its bytes lie in their file.
        """
        if not self._outstanding.may_begin_together(len(self._missed) + 1, self._bytes + length):
            return False
        self._missed.append((cookie, offset, length, host_offset))
        self._bytes += length
        return True

    def drop(self) -> None:
        """Forget those that have not begun: the client is gone."""
        self._missed.clear()
        self._bytes = 0

    def begin(self) -> None:
        """Begin those that were put aside."""
        missed, self._missed, self._bytes = self._missed, [], 0
        queue = self._queue()
        if queue is None:
            self._run(missed)
            return
        backend, begun, header = self._backend, self._outstanding.begun_in_place, self._replies.read_header_size
        started = perf_counter_ns()
        for cookie, offset, length, host_offset in missed:
            begun(length)
            backend.in_flight += 1
            reply = bytearray(header + length)
            arrived = partial(self._arrived, cookie, offset, length, reply, started)
            queue.put(host_offset, memoryview(reply)[header:], arrived)
        queue.submit()

    def _arrived(self, cookie: int, offset: int, length: int, reply: bytearray, started_ns: int, got: int) -> None:
        backend = self._backend
        backend.left()
        if got != length:
            # The file has failed, or has become shorter: the driver tells.
            self._coroutines.start(Request(READ, 0, cookie, offset, length), None, length)
            return
        backend.statistics.account(Operation.READ, 1, length, perf_counter_ns() - started_ns)
        self._replies.pack_read_header(reply, 0, cookie, offset, length)
        self._account.give(length)
        self._ended([reply], 1)

    def _run(self, missed: Sequence[Missed]) -> None:
        """Make reads by the driver's coroutines; some of the bytes may have come by now."""
        replies: list[Item] = []
        read_bytes, started = 0, perf_counter_ns()
        for cookie, offset, length, _ in missed:
            reply = self._coroutines.read_in_place(cookie, offset, length)
            if reply is not None:
                replies.append(reply)
                read_bytes += length
        if replies:
            self._backend.statistics.account(Operation.READ, len(replies), read_bytes, perf_counter_ns() - started)
            self._ended(replies, 0)
