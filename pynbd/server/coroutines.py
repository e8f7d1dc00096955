"""`Coroutines`: the requests of a connection that are carried out as coroutines, because they may have to wait.

Each is started in place, and becomes a task only if it does wait (`inline.py`). None is ever cancelled, and none
raises: whatever happens, there is a reply, and what was reserved for the request is given back.
"""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from nbd_protocol.constants import Command, CommandFlag, Errno
from nbd_protocol.transmission import Replies, Request
from pynbd.block.requests import RequestFlag
from pynbd.block.statistics import Operation
from pynbd.server import events
from pynbd.server.budget import Account
from pynbd.server.buffers import BufferPool
from pynbd.server.events import about
from pynbd.server.execution import Execution, describe
from pynbd.server.inline import InlineStarter
from pynbd.server.wire import Item

log = logging.getLogger(__name__)

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
FLUSH = int(Command.FLUSH)
COMMAND_FUA = int(CommandFlag.FUA)
FUA = int(RequestFlag.FUA)


class Coroutines:
    """Those of one connection.

    Args:
        execution: does what requests ask for.
        replies: the framing of their replies.
        starter: starts coroutines in place.
        account: what was reserved for a request is given back there.
        buffers: where borrowed buffers go back to.
        peer: the client's name for the log.
        begun: called with the length of a request that was tried in place and has not ended.
        ended: called with a reply, and how many requests have ended with it; also from within a call that starts one.
    """

    __slots__ = ("_account", "_begun", "_buffers", "_ended", "_execution", "_peer", "_replies", "_starter", "backend")

    def __init__(
        self,
        execution: Execution,
        replies: Replies,
        starter: InlineStarter,
        account: Account,
        buffers: BufferPool,
        peer: str,
        begun: Callable[[int], None],
        ended: Callable[[Sequence[Item], int], None],
    ) -> None:
        self._execution = execution
        self.backend = execution.backend
        self._replies = replies
        self._starter = starter
        self._account = account
        self._buffers = buffers
        self._peer = peer
        self._begun = begun
        self._ended = ended

    def start(
        self,
        request: Request,
        payload: memoryview | None,
        reserved: int,
        borrowed: memoryview | None = None,
        done: int = 0,
    ) -> None:
        """Carry out a request.

        Args:
            request: what is asked for.
            payload: of a write; it stays as it is until the request has ended.
            reserved: bytes that are given back to the account then.
            borrowed: a buffer that goes back to the pool then.
            done: bytes of a read that were sent already, or of a write that are in the disk already.
        """
        self._starter.start(self._conclude(request, self._carry_out(request, payload, done), reserved, borrowed))

    def read_in_place(self, cookie: int, offset: int, length: int) -> bytearray | None:
        """Read a little by the driver's coroutine.

        Returns:
            the reply, and the caller counts the read; None if it has to wait, or has failed: then the request has
            begun, and `ended` gets its reply.
        """
        header, backend = self._replies.read_header_size, self.backend
        reply = bytearray(header + length)
        into = memoryview(reply)[header:]
        if (start := backend.start_read) is None:
            reading = backend.read(offset, into)  # it is parked
        else:
            rest = self._run(start(offset, into, 0))
            if rest is None:
                self._replies.pack_read_header(reply, 0, cookie, offset, length)
                return reply
            reading = backend.watched_read(rest, offset, into)
        request = Request(READ, 0, cookie, offset, length)
        self._go_on(request, self._read_on(request, reading, reply))
        return None

    def write_in_place(self, cookie: int, offset: int, payload: memoryview) -> bool:
        """Write a little by the driver's coroutine. As `read_in_place`; True: it was written.

        It need not be durable: there are no flags, and a cache.
        """
        backend, edge = self.backend, self.backend.root
        start = backend.start_write
        if start is None or edge is None or not edge.may_write:
            writing = backend.write(offset, payload)  # it is parked, or refused
        else:
            rest = self._run(start(offset, payload, 0))
            if rest is None:
                return True
            writing = backend.watched_write(rest, offset, payload)
        request = Request(WRITE, 0, cookie, offset, len(payload))
        self._go_on(request, self._write_on(request, writing))
        return False

    def _run(self, coro: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
        """What is left of a coroutine that was run in place: None if it has ended; a failure is left to be met."""
        try:
            return self._starter.begin(coro)
        except Exception as problem:
            return _raise(problem)

    def _go_on(self, request: Request, answering: Awaitable[list[Item]]) -> None:
        """A request that was tried in place has begun: it becomes a task."""
        self._begun(request.length)
        self._starter.go_on(self._conclude(request, answering, request.length, None))

    async def _read_on(self, request: Request, rest: Awaitable[None], reply: bytearray) -> list[Item]:
        await rest
        self._replies.pack_read_header(reply, 0, request.cookie, request.offset, request.length)
        return [reply]

    async def _write_on(self, request: Request, rest: Awaitable[None]) -> list[Item]:
        await rest
        return [self._replies.done(request)]

    def start_flush(self, requests: Sequence[Request]) -> None:
        """Make one flush for writes that have been made, and for those who asked for a flush."""
        self._starter.start(self._make_durable(requests))

    async def _carry_out(self, request: Request, payload: memoryview | None, done: int) -> list[Item]:
        execution = self._execution
        if request.type == WRITE and payload is not None:
            await self._write(request, payload, done)
            return [self._replies.done(request)]
        if request.type == READ:
            return await (execution.read_in_chunks(request, done) if done else execution.read(request))
        return await execution.execute(request)

    async def _conclude(
        self, request: Request, answering: Awaitable[list[Item]], reserved: int, borrowed: memoryview | None
    ) -> None:
        """Whatever comes of a request, it is answered, and gives back what it held."""
        try:
            answer = await answering
        except OSError as problem:
            answer = [self._execution.error(request, problem)]
        except Exception as problem:
            log.exception("%s: %s failed", self._peer, describe(request), extra=self._about_failure(problem))
            answer = [self._replies.error(request, Errno.EIO, f"internal error: {problem!r}")]
        if borrowed is not None:
            self._buffers.give(borrowed)
        if reserved:
            self._account.give(reserved)
        self._ended(answer, 1)

    async def _write(self, request: Request, payload: memoryview, done: int) -> None:
        backend, flags = self.backend, FUA if request.flags & COMMAND_FUA else 0
        if not done:
            await backend.write(request.offset, payload, flags)
            return
        await backend.write(request.offset + done, payload[done:], 0)
        backend.statistics.account(Operation.WRITE, 0, done, 0)
        if flags or not backend.write_cache:
            await backend.flush(0)

    async def _make_durable(self, requests: Sequence[Request]) -> None:
        execution = self._execution
        try:
            await self.backend.flush(sum(request.type == FLUSH for request in requests))
            answers: list[Item] = [self._replies.done(request) for request in requests]
        except OSError as problem:
            answers = [execution.error(request, problem) for request in requests]
        except Exception as problem:
            log.exception("%s: flush failed", self._peer, extra=self._about_failure(problem))
            answers = [self._replies.error(request, Errno.EIO, f"internal error: {problem!r}") for request in requests]
        self._ended(answers, len(requests))

    def _about_failure(self, problem: Exception) -> dict[str, object]:
        export = self._execution.export
        return about(events.REQUEST_FAILED, client=self._peer, export=export.name, error=repr(problem))


async def _raise(problem: Exception) -> None:
    raise problem
