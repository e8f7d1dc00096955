"""`LateRead`: a long read whose bytes are fetched when it is their turn to be sent; `LateReads`: those of a connection.

So they need no memory of their own. What lies in one piece in a file is sent straight from there, if it can be held
there until the client has it. If not, what a piece is copied into is sent at once, and used for the next one while the
processor's cache has it still. Where they lie is asked for anew with each piece, since they may move meanwhile.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbd_protocol.constants import CommandFlag
from nbd_protocol.transmission import Request
from pynbd.block.holding import Release, Revoke
from pynbd.block.statistics import Operation
from pynbd.server.budget import Account
from pynbd.server.buffers import Buffer
from pynbd.server.spans import Deferred, FileSpan, SpanFile, is_whole, span_file
from pynbd.server.warm_regions import WarmRegions

if TYPE_CHECKING:
    from pynbd.server.execution import Execution

SHORTEST_SPAN_BYTES = 128 << 10
"""What is shorter is copied, with what lies elsewhere, into one piece."""

SHORTEST_BYTES = 32 << 10
"""A piece that is shorter, and not the last, is not worth a chunk of its own."""


class LateRead(Deferred):
    """What is left of a read; its reply may come in several chunks.

    Args:
        request: the read; its length is reserved in the account, and given back at the end.
        reads: those of its connection.
    """

    __slots__ = ("_reads", "_request", "_sent", "span")

    def __init__(self, request: Request, reads: "LateReads") -> None:
        self.span: FileSpan | None = None
        """What is being sent from a file."""
        self._request = request
        self._reads = reads
        self._sent = 0

    def __len__(self) -> int:
        return self._request.length - self._sent

    def begin_span(self, revoke: Revoke) -> tuple[bytes, Release] | None:
        """Send what comes next from its file: it is the `span` then.

        Args:
            revoke: see `Driver.hold_located`.

        Returns:
            what precedes it in the reply, and what is to be called when the client has it. None if the bytes can't be
            sent so, or had better not.
        """
        reads, request, sent = self._reads, self._request, self._sent
        offset, wanted = request.offset + sent, len(self)
        located = reads.backend.locate(offset, wanted)
        shortest = min(wanted, SHORTEST_SPAN_BYTES) if reads.replies.can_send_holes else wanted
        if located is None or located.length < shortest or not located.flags:
            return None
        fd, position, length, _, _ = located
        length = reads.warm.reach(fd, position, length)
        if length < shortest:
            return None
        release = reads.backend.node.driver.hold_located(revoke)
        if release is None:
            return None
        file = reads.file_of(fd)
        if file is None:
            release()
            return None

        def finish(problem: OSError | None) -> Buffer:
            self.span = None
            return self._span_sent(length, problem)

        self.span = FileSpan(file, position, length, finish)
        return reads.execution.span_header(request, offset, length), release

    def _span_sent(self, length: int, problem: OSError | None) -> Buffer:
        """What is to be sent behind a span."""
        reads, request = self._reads, self._request
        self._sent += length if problem is None else len(self)
        if len(self):
            reads.backend.statistics.account(Operation.READ, 0, length, 0)
            return b""
        self._over()
        if problem is None:
            reads.backend.statistics.account(Operation.READ, 1, length, 0)
        return reads.execution.span_end(request, problem)

    def next_piece(self, into: memoryview) -> tuple[bytes, int] | None:
        """Copy the bytes that come next, and say what precedes them in the reply and how many they are.

        Returns:
            None if they can't be had without waiting; that is seen to then, and nothing more is to come from here.
        """
        reads, request, sent = self._reads, self._request, self._sent
        offset, wanted = request.offset + sent, min(len(self), len(into))
        got = self._copy(offset, into[:wanted]) if reads.replies.can_send_holes else 0
        if got < min(wanted, SHORTEST_BYTES):
            reads.long_way(request, sent)
            return None
        self._sent = sent + got
        is_last = not len(self)
        reads.backend.statistics.account(Operation.READ, int(is_last), got, 0)
        if is_last:
            self._over()
        return reads.replies.read_data(request, offset, got, done=is_last), got

    def _copy(self, offset: int, into: memoryview) -> int:
        """Copy bytes of the disk that are in memory and no hole: how many, from the first one on."""
        locate, length, done = self._reads.backend.locate, len(into), 0
        while done < length:
            located = locate(offset + done, length - done)
            if located is None:
                break
            fd, position, found, flags, _ = located
            if not is_whole(located):
                break
            try:
                got = os.preadv(fd, [into[done : done + found]], position, flags)
            except OSError:
                break  # not in memory, or failed: either way it takes the long way
            done += got
            if got < found:
                break
        return done

    def _over(self) -> None:
        """All of it is done with."""
        self.release()
        self._reads.ended()

    def release(self) -> None:
        if self.span is not None:
            self.span.release()
            self.span = None
        self._reads.account.give(self._request.length)


class LateReads:
    """The reads of one connection that are likely to be answered so.

    Args:
        execution: knows what is read, and frames what is sent from files.
        account: of the connection.
        warm: what is known of the files.
        ended: called when all of a read is done with.
        long_way: called instead, with the request and how much of it was sent, where the rest can't be had at once:
            that is the callee's then, and so is what is reserved.
        holds_spans: whether bytes that may move can be sent from their files at all.
    """

    __slots__ = (
        "_file",
        "_holds_spans",
        "account",
        "backend",
        "ended",
        "execution",
        "export",
        "long_way",
        "replies",
        "warm",
    )

    def __init__(
        self,
        execution: "Execution",
        account: Account,
        warm: WarmRegions,
        ended: Callable[[], None],
        long_way: Callable[[Request, int], None],
        *,
        holds_spans: bool,
    ) -> None:
        self.export = execution.export
        self.backend = execution.backend
        self.replies = execution.replies
        self.account = account
        self.warm = warm
        self.execution = execution
        self.ended = ended
        self.long_way = long_way
        self._holds_spans = holds_spans
        self._file: SpanFile | None = None

    def answer(self, request: Request) -> LateRead | None:
        """The reply to a read that has its memory, if its bytes are in files, but may move in them; None if not."""
        in_chunks = self.replies.can_send_holes
        if request.flags & CommandFlag.DF or not (in_chunks or self._holds_spans):
            return None
        located = self.backend.locate(request.offset, request.length)
        # Of what never moves it is known by now that it is not in memory, or a hole.
        if located is None or (located[2] == request.length and self.export.located_for_good()):
            return None
        if not in_chunks and self.warm.reach(located[0], located[1], located[2]) < request.length:
            return None
        return LateRead(request, self)

    def file_of(self, fd: int) -> SpanFile | None:
        """The file that spans are sent from; None if there are no descriptors left."""
        try:
            self._file = span_file(self._file, fd, os.fstat(fd))
        except OSError:
            return None
        return self._file
