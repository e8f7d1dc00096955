"""`LateRead`: a long read whose bytes are fetched when it is their turn to be sent; `LateReads`: those of a connection.

So they need no memory of their own: what one piece is copied into is sent at once, and used for the next one while the
processor's cache has it still. Where they lie is asked for anew with each piece, since they may move meanwhile.
"""

import os
from collections.abc import Callable

from nbd_protocol.constants import CommandFlag
from nbd_protocol.transmission import Replies, Request
from pynbd.block.backend import BlockBackend
from pynbd.block.statistics import Operation
from pynbd.server.budget import Account
from pynbd.server.export import Export
from pynbd.server.spans import Deferred, is_whole

SHORTEST_BYTES = 32 << 10
"""A piece that is shorter, and not the last, is not worth a chunk of its own."""


class LateRead(Deferred):
    """What is left of a read; its reply may come in several chunks.

    Args:
        request: the read; its length is reserved in the account, and given back at the end.
        backend: what is read.
        account: of the connection.
        replies: the framing of the reply; chunks must be possible.
        copied: called when all of it is done with.
        long_way: called instead, with the request and how much of it was sent, where the rest can't be had at once:
            that is the callee's then, and so is what is reserved.
    """

    __slots__ = ("_account", "_backend", "_copied", "_long_way", "_replies", "_request", "_sent")

    def __init__(
        self,
        request: Request,
        backend: BlockBackend,
        account: Account,
        replies: Replies,
        copied: Callable[[], None],
        long_way: Callable[[Request, int], None],
    ) -> None:
        self._request = request
        self._sent = 0
        self._backend = backend
        self._account = account
        self._replies = replies
        self._copied = copied
        self._long_way = long_way

    def __len__(self) -> int:
        return self._request.length - self._sent

    def next_piece(self, into: memoryview) -> tuple[bytes, int] | None:
        """Copy the bytes that come next, and say what precedes them in the reply and how many they are.

        Returns:
            None if they can't be had without waiting; that is seen to then, and nothing more is to come from here.
        """
        request, sent = self._request, self._sent
        offset, wanted = request.offset + sent, min(len(self), len(into))
        got = self._copy(offset, into[:wanted])
        if got < min(wanted, SHORTEST_BYTES):
            self._long_way(request, sent)
            return None
        self._sent = sent + got
        is_last = not len(self)
        self._backend.statistics.account(Operation.READ, int(is_last), got, 0)
        if is_last:
            self.release()
            self._copied()
        return self._replies.read_data(request, offset, got, done=is_last), got

    def _copy(self, offset: int, into: memoryview) -> int:
        """Copy bytes of the disk that are in memory and no hole: how many, from the first one on."""
        locate, length, done = self._backend.locate, len(into), 0
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

    def release(self) -> None:
        self._account.give(self._request.length)


class LateReads:
    """The reads of one connection that are likely to be answered so.

    Args:
        export: what is read.
        account: of the connection.
        replies: the framing of its replies.
        copied: called when all of a read is done with.
        long_way: called instead, as `LateRead` says.
    """

    __slots__ = ("_account", "_copied", "_export", "_long_way", "_replies")

    def __init__(
        self,
        export: Export,
        account: Account,
        replies: Replies,
        copied: Callable[[], None],
        long_way: Callable[[Request, int], None],
    ) -> None:
        self._export = export
        self._account = account
        self._replies = replies
        self._copied = copied
        self._long_way = long_way

    def answer(self, request: Request) -> LateRead | None:
        """The reply to a read that has its memory, if its bytes are in files, but may move in them; None if not."""
        if not self._replies.can_send_holes or request.flags & CommandFlag.DF:
            return None
        export = self._export
        located = export.backend.locate(request.offset, request.length)
        # Of what never moves it is known by now that it is not in memory, or a hole.
        if located is None or (located[2] == request.length and export.located_for_good()):
            return None
        return LateRead(request, export.backend, self._account, self._replies, self._copied, self._long_way)
