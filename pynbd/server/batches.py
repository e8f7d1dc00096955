"""`Batches`: requests that have arrived together, and what of them is answered at once.

Whatever needs no waiting is done in place: small reads whose bytes lie in an open file, and small writes that a driver
can make so. Their answers are in one buffer, and leave in one send. What comes here is what `plain_requests.py` leaves:
requests with flags, those behind them, and all of clients whose rates are limited.
"""

import os
from collections.abc import Callable, Sequence
from time import perf_counter_ns

from nbd_protocol.constants import Command, CommandFlag, Errno
from nbd_protocol.transmission import ExportRules, Replies, Request
from pynbd.block.backend import BlockBackend
from pynbd.block.statistics import Operation
from pynbd.server.scratch import ALIGNED_READ_BYTES, ANSWERS_BYTES, MAX_BATCH_BYTES, Scratch
from pynbd.server.wire import Wire

SHUTTING_DOWN = (Errno.ESHUTDOWN, "the server is shutting down")

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
DISC = int(Command.DISC)
FLUSH = int(Command.FLUSH)
COMMAND_FUA = int(CommandFlag.FUA)


class Batches:
    """Those of one connection.

    Args:
        rules: what is refused.
        replies: the framing of replies.
        backend: what is read and written.
        scratch: the loop's buffers.
        wire: where the answers leave.
        begin: starts a request that can't be answered in place; False: not now, and no other one before it.
        refuse: answers a request with an error.
        may_flush: whether requests may be held up for a flush they share; if not, each goes the long way.
        lost: called when the answers can't be sent.
    """

    __slots__ = (
        "_backend",
        "_begin",
        "_lost",
        "_may_flush",
        "_refuse",
        "_replies",
        "_rules",
        "_scratch",
        "_wire",
    )

    def __init__(
        self,
        rules: ExportRules,
        replies: Replies,
        backend: BlockBackend,
        scratch: Scratch,
        wire: Wire,
        *,
        begin: Callable[[Request], bool],
        refuse: Callable[[Request, tuple[Errno, str]], None],
        may_flush: Callable[[], bool],
        lost: Callable[[OSError], None],
    ) -> None:
        self._rules = rules
        self._replies = replies
        self._backend = backend
        self._scratch = scratch
        self._wire = wire
        self._begin = begin
        self._refuse = refuse
        self._may_flush = may_flush
        self._lost = lost

    def serve(self, requests: Sequence[Request], shutting_down: bool) -> tuple[int, list[Request]]:
        """Answer what can be answered without waiting, and begin the others, until the share of this turn is used up.

        Args:
            requests: their payloads lie in a buffer that is used again.
            shutting_down: all are refused but DISC.

        Returns:
            with how many of them, from the first one on, it is done, and which of these must be made durable by one
            flush before they are answered.
        """
        refusal, replies, begin = self._rules.refusal, self._replies, self._begin
        pack, header = replies.pack_read_header, replies.read_header_size
        pack_done, done_size = replies.pack_done, replies.done_size
        answers = self._scratch.answers
        locate, preadv, write_now = self._backend.locate, os.preadv, self._backend.write_now
        write_through = not self._backend.write_cache
        durable: list[Request] = []
        position = count = total = written = total_written = begun = 0
        started = perf_counter_ns()
        served = len(requests)
        for index, request in enumerate(requests):
            refused = refusal(request)
            if refused is not None or (shutting_down and request.type != DISC):
                self._refuse(request, refused or SHUTTING_DOWN)
                continue
            length = request.length
            if request.type == READ and 0 < length < ALIGNED_READ_BYTES:
                located = locate(request.offset, length)
                data = position + header
                end = data + length
                if located is not None and located[2] == length:
                    if end > ANSWERS_BYTES:
                        served = index
                        break
                    try:
                        got = preadv(located[0], [answers[data:end]], located[1], located[3])
                    except OSError:
                        got = -1  # not in memory, or failed: either way it takes the long way
                    if got == length:
                        pack(answers, position, request.cookie, request.offset, length)
                        position = end
                        count += 1
                        total += length
                        continue
            elif (
                request.type == WRITE
                and length
                and (not (request.flags & COMMAND_FUA or write_through) or self._may_flush())
                and request.payload is not None
                and write_now(request.offset, request.payload)
            ):
                if request.flags & COMMAND_FUA or write_through:
                    durable.append(request)
                else:
                    pack_done(answers, position, request.cookie, request.offset)
                    position += done_size
                written += 1
                total_written += length
                continue
            elif request.type == FLUSH and self._may_flush():
                durable.append(request)
                continue
            if begun >= MAX_BATCH_BYTES or not begin(request):
                served = index
                break
            if request.type <= WRITE:
                begun += length
        if written:
            self._backend.statistics.account(Operation.WRITE, written, total_written, perf_counter_ns() - started)
        if count:
            self._backend.statistics.account(Operation.READ, count, total, perf_counter_ns() - started)
        if position:
            try:
                self._wire.send_borrowed(answers[:position])
            except OSError as problem:
                self._lost(problem)
        return served, durable
