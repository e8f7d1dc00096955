"""One client in the transmission phase: requests in, replies out, as many at a time as have arrived.

Everything here runs from the loop's callbacks, not from a task: one wake-up receives what is there, finds all
requests in it, answers at once whatever can be answered without waiting, starts the rest, and sends all answers that
are ready together.

The ways of a request:

    located     a small read whose bytes lie in an open file: read in place into the buffer of answers
    in place    a small write that a driver can make without waiting; all those of a batch that must be durable share
                one flush, with the FLUSHes of the batch
    span        a large read of bytes that never move and are in the page cache: sent from there
    coroutine   everything else; it is started in place and becomes a task only if it has to wait
"""

import logging
import os
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter_ns

import msgspec

from nbd_protocol.constants import Command, CommandFlag, Errno
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation_events import Ready
from nbd_protocol.transmission import ExportRules, ExtendedReplies, Request, ServerTransmission, replies_for
from pynbd.block.requests import RequestFlag
from pynbd.block.statistics import Operation
from pynbd.server import events
from pynbd.server.budget import RESERVE_BYTES, Account
from pynbd.server.buffers import BufferPool, anonymous_memory
from pynbd.server.events import about
from pynbd.server.execution import HOLE_READ_BYTES, Execution, describe
from pynbd.server.export import Export
from pynbd.server.in_flight import InFlight, Part
from pynbd.server.inline import InlineStarter
from pynbd.server.late_reads import LateRead
from pynbd.server.limits import Pace
from pynbd.server.payload import Payload
from pynbd.server.span_reads import SpanReads
from pynbd.server.spans import Deferred, FileSpan, is_whole
from pynbd.server.wire import PIECE_BYTES, Item, Wire, together

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
"""What one wake-up receives at the most (payloads of large writes go straight to buffers of their own)."""

HEADER_RECEIVE_BYTES = 4 << 10
"""What is received at first behind a large payload: another one is likely to follow, and is better not copied."""

INLINE_READ_BYTES = 64 << 10
"""Located reads up to this length are copied into the buffer of answers; longer ones are sent from the file."""

MAX_BATCH_REQUESTS = 64
MAX_BATCH_BYTES = 1 << 20
"""What one wake-up serves of one connection, before the others have their turn."""

MAX_REQUESTS_IN_FLIGHT = 1024
MAX_BYTES_IN_FLIGHT = 64 << 20
"""What one connection may have begun and not seen the end of. Two of the largest requests always fit."""

MAX_UNSENT_BYTES = 4 << 20
"""Answers that a client has not taken yet; beyond it no further requests of that client are looked at.
Where the memory of the process runs short, it is the connection's reserve instead."""

ALIGNED_READ_BYTES = 32 << 10
ALIGNMENT = 64
"""From that length on the data of a read begin at such an address: the kernel copies to others much slower."""

PAYLOAD_STEP_BYTES = 1 << 20
"""Memory for a payload is reserved in such steps, as the payload arrives."""

ANSWERS_BYTES = MAX_BATCH_BYTES + 2 * INLINE_READ_BYTES
"""Answers of one batch with the data of reads; the others need a few bytes each, for which there is room beside."""

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
DISC = int(Command.DISC)
FLUSH = int(Command.FLUSH)
COMMAND_FUA = int(CommandFlag.FUA)
FUA = int(RequestFlag.FUA)


class Scratch:
    """The buffers that all connections of one loop take turns in using: nothing stays in them after a wake-up."""

    def __init__(self) -> None:
        self.buffers = BufferPool()
        self.received = memoryview(bytearray(RECEIVE_BYTES + (128 << 10)))
        # At the start of a page: the kernel copies several times slower to addresses that are odd multiples of 16.
        self.answers = anonymous_memory(ANSWERS_BYTES + MAX_BATCH_REQUESTS * ExtendedReplies.done_size)
        self.passing = anonymous_memory(PIECE_BYTES)


class Connection:
    """The transmission phase with one client.

    Args:
        ready: what was negotiated.
        export: what the client uses.
        account: its share of the payload budget.
        starter: starts coroutines in place.
        scratch: the loop's buffers.
        peer: the client's name for the log.
        make_wire: gives the wire, told whom to call.
        on_closed: called once, when the last request has ended and everything is released.
        in_flight: what all connections of its client have in flight, None: that has no limit.
        pace: how often its client may ask, None: as often as it likes.
        warn: logs what went wrong, and with whom.
        request_failed: logs which request has failed, and why; None: as `warn`.
    """

    def __init__(
        self,
        ready: Ready,
        export: Export,
        account: Account,
        starter: InlineStarter,
        scratch: Scratch,
        peer: str,
        make_wire: "Callable[[Connection], Wire]",
        on_closed: "Callable[[Connection], None]",
        in_flight: InFlight | None,
        pace: Pace | None,
        warn: Callable[[str], None],
        request_failed: Callable[[str], None] | None = None,
    ) -> None:
        self.export = export
        self.backend = export.backend
        self.peer = peer
        self.account = account
        self.in_flight = 0
        self.rules = ExportRules(
            self.backend.size,  # not what the client was told: a resize may have come in between
            ready.info.flags,
            min_block=ready.info.min_block,
            max_payload=ready.info.max_payload,
            mode=ready.mode,
            context_ids=ready.contexts,
        )
        self._replies = replies_for(ready.mode)
        self.warn = warn
        self._request_failed = request_failed or warn
        self._execution = Execution(export, self._replies, ready.contexts, self._request_failed)
        self._spans = SpanReads(export, self._replies, warn, self._request_failed)
        self._pace = pace
        self._pace_timer: TimerHandle | None = None
        self._part = None if in_flight is None else Part(in_flight, self._continue_soon)
        self._framing = ServerTransmission(ready.mode, max_payload=self.rules.max_payload)
        self._starter = starter
        self._scratch = scratch
        self._on_closed = on_closed
        self._tail: bytes | bytearray = b""
        self._more_in_tail = False
        self._payload: Payload | None = None
        self._receive_bytes = RECEIVE_BYTES
        self._waiting: deque[Request] = deque()
        self._out: list[Item] = []
        self._charged = 0
        self._in_batch = False
        self._flush_due = False
        self._continue_due = False
        self._blocked = False
        self._awaiting_budget = False
        self._awaits_others = False
        self._span_bytes = 0
        self._ending = False
        self._lost = False
        self._closed = False
        self._shutting_down = False
        # Where holes can be told, larger reads ask for them first.
        self._asks_from = HOLE_READ_BYTES if self._replies.can_send_holes else INLINE_READ_BYTES + 1
        self.wire = make_wire(self)
        self._can_send_spans = self._replies.can_send_holes
        self.backend.on_resize.append(self._resized)

    # --- life ---------------------------------------------------------------------------------------------

    def begin(self, trailing: bytes) -> None:
        """Start serving; `trailing` came behind the handshake."""
        self._tail = trailing
        self._more_in_tail = bool(trailing)
        self.wire.resume_reading()
        if trailing:
            self._continue_soon()

    def shut_down(self) -> None:
        """Answer whatever has begun, refuse what comes from now on, and close when nothing is left."""
        self._shutting_down = True
        if self._waiting:
            self._continue_soon()  # to be refused, which needs no memory
        self._end_if_idle()

    def abort(self) -> None:
        """Close now. What is in flight runs to its end; nobody is told."""
        self._lose(None)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight or waits to be sent."""
        return not (self.in_flight or self._waiting or self._out or self.wire.queued)

    @property
    def payload_open(self) -> bool:
        """Whether the payload of a large write has begun and is not complete."""
        return self._payload is not None

    @property
    def holding_back(self) -> bool:
        """Whether it is the client's turn: to take answers, or to send the rest of a payload."""
        return self.wire.queued or (self._payload is not None and not self._blocked)

    @property
    def keeps_others_waiting(self) -> bool:
        """Whether other connections of its client can't begin a request because of what this one has in flight."""
        return self._part is not None and self._part.keeps_others_waiting

    def _resized(self, size: int) -> None:
        self.rules.size = size

    def _lose(self, problem: OSError | None) -> None:
        """The client is gone: forget what it was owed."""
        if self._lost:
            return
        self._lost = True
        if problem is not None:
            log.info(
                "%s: connection lost: %s",
                self.peer,
                problem,
                extra=about(events.CLIENT_FAILED, client=self.peer, export=self.export.name, error=problem),
            )
        self._drop_payload()
        self.account.withdraw()
        if self._part is not None:
            self._part.leave_line()
        if self._pace_timer is not None:
            self._pace_timer.cancel()
        self._waiting.clear()
        self._tail = b""
        self._more_in_tail = False
        self.in_flight -= self.wire.close()
        self._drop_answers()
        self._span_bytes = 0
        self._charge_unsent()
        self._end_if_idle()

    def _drop_answers(self) -> None:
        for item in self._out:
            if isinstance(item, Deferred):
                item.release()
                self.in_flight -= 1
                if isinstance(item, FileSpan):
                    self._span_bytes -= item.length
        self._out.clear()

    def _end(self) -> None:
        """The client will send nothing more: finish what it asked for."""
        self._ending = True
        self._drop_payload()
        self.wire.pause_reading()
        self._end_if_idle()

    def _drop_payload(self) -> None:
        """The rest of it will not come."""
        payload, self._payload = self._payload, None
        if payload is not None and payload.reserved:
            self.account.give(payload.reserved)
            if self._part is not None:
                self._count(self._part)

    def _end_if_idle(self) -> None:
        if not (self._ending or self._lost or self._shutting_down) or self._closed or self._in_batch:
            return
        if self.in_flight or (
            not self._lost and (self._waiting or self._out or self.wire.queued or self._more_in_tail)
        ):
            return
        self._closed = True
        self.wire.close()
        self.backend.on_resize.remove(self._resized)
        self.account.close()
        if self._part is not None:
            self._part.close()
        self._on_closed(self)

    # --- receiving ----------------------------------------------------------------------------------------

    def on_readable(self) -> None:
        """Something has arrived, or the client is gone."""
        if self._more_in_tail or self._waiting:
            # What came earlier is served first; until then nothing more is taken.
            self._continue_soon()
            return
        try:
            if self._payload is not None:
                self._receive_payload(self._payload)
                return
            buffer, tail = self._scratch.received, self._tail
            start = len(tail)
            if start:
                buffer[:start] = tail
            received = self.wire.receive_into(buffer[start : start + self._receive_bytes])
        except OSError as problem:
            self._lose(problem)
            return
        if received < 0:
            return
        if received == 0:
            self._end()
            return
        self._tail = b""
        self._parse(buffer[: start + received])

    def _parse(self, data: memoryview) -> None:
        """Find the requests in what was received, and serve them; what is left is kept."""
        try:
            batch = self._framing.parse(data, MAX_BATCH_REQUESTS)
        except RemoteProtocolError as problem:
            self.warn(str(problem))
            self._lose(None)
            return
        rest = data[batch.consumed :]
        partial = batch.partial
        self._serve(batch.requests)
        if self._lost:
            return
        if partial is not None:
            self._begin_payload(partial, rest)
            return
        self._receive_bytes = RECEIVE_BYTES
        if len(rest):
            self._tail = bytes(rest)
            self._more_in_tail = not batch.needs_data
        else:
            self._more_in_tail = False
        if self._framing.disconnected:
            self._end()
        elif self._more_in_tail:
            self._continue_soon()

    def _begin_payload(self, request: Request, rest: memoryview) -> None:
        """A large write has begun; its payload goes to a buffer of its own."""
        refused = self.rules.refusal(request)
        if refused is None and self._shutting_down:
            refused = (Errno.ESHUTDOWN, "the server is shutting down")
        if refused is not None:
            self._framing.swallow(request.length)
            self._serve([msgspec.structs.replace(request, refused=refused[0], reason=refused[1])])
            if not self._lost:
                self._tail = bytes(rest)
                self._more_in_tail = bool(self._tail)
                if self._more_in_tail:
                    self._continue_soon()
            return
        self._receive_bytes = HEADER_RECEIVE_BYTES
        self._payload = payload = Payload(request, rest)
        if not self._waiting:
            self._advance_payload(payload)
        if not payload.reserved:
            payload.buffer = memoryview(bytes(rest))  # the received bytes are overwritten at the next wake-up

    def _receive_payload(self, payload: Payload) -> None:
        room = payload.reserved - payload.filled
        if room <= 0:
            self._continue_soon()
            return
        received = self.wire.receive_into(payload.buffer[payload.filled : payload.filled + room])
        if received < 0:
            return
        if received == 0:
            self._end()
            return
        payload.filled += received
        if payload.in_parts:
            payload.write_part(self.backend)
        self._advance_payload(payload)

    def _advance_payload(self, payload: Payload) -> None:
        """Reserve memory for more of a payload, or carry out the write if it is complete."""
        length = payload.request.length
        if not payload.reserved:
            if not self._has_room_for(length):
                self._block()
                return
            if self._pace is not None and not payload.admitted:
                if not self._pace.admit((payload.request,)):
                    self._wait_for(self._pace)
                    return
                payload.admitted = True
        while payload.reserved < length and payload.reserved - payload.filled < PAYLOAD_STEP_BYTES:
            step = min(PAYLOAD_STEP_BYTES, length - payload.reserved)
            if not self.account.take(step, self._budget_is_back, begun=payload.reserved > 0):
                if payload.reserved > payload.filled:
                    break
                self._awaiting_budget = True
                self._block()
                return
            payload.reserved += step
            if payload.reserved == step:
                payload.make_room(self._scratch.buffers)
                if self._part is not None:
                    self._count(self._part)
        if payload.filled < length:
            return
        self._payload = None
        if payload.written == length:
            self._all_parts_written(payload)
            return
        self.in_flight += 1
        self._run(payload.request, payload.buffer.toreadonly(), length, payload.whole)

    def _all_parts_written(self, payload: Payload) -> None:
        """A large write has been made as it arrived: answer it, or make it durable first."""
        request = payload.request
        self.backend.statistics.account(Operation.WRITE, 1, request.length, payload.write_ns)
        if payload.whole is not None:
            self._scratch.buffers.give(payload.whole)
        self.account.give(payload.reserved)
        if request.flags & COMMAND_FUA or not self.backend.write_cache:
            self.in_flight += 1
            if self._part is not None:
                self._count(self._part)
            self._starter.start(self._make_durable([request]))
        else:
            self._out.append(self._replies.done(request))
            self._flush()

    # --- waiting ------------------------------------------------------------------------------------------

    def _block(self) -> None:
        """Nothing can go on before memory is given back, or something that is under way has ended."""
        self._blocked = True
        self.wire.pause_reading()

    def _budget_is_back(self) -> None:
        """The payload budget has room again: go on where memory was lacking."""
        self._go_on()

    def _continue_soon(self) -> None:
        if not self._continue_due:
            self._continue_due = True
            self._starter.loop.call_soon(self._continue)

    def _continue(self) -> None:
        self._continue_due = False
        self._go_on()

    def _go_on(self) -> None:
        """The next turn: requests that were put aside, then a payload, then what is left of the last receive."""
        if self._lost or self._closed:
            return
        self._blocked = self._awaiting_budget = self._awaits_others = False
        if self._waiting:
            waiting = list(self._waiting)
            self._waiting.clear()
            self._serve(waiting)
        elif self._payload is not None:
            self._advance_payload(self._payload)
        elif self._more_in_tail:
            tail = self._tail
            self._tail, self._more_in_tail = b"", False
            self._parse(memoryview(tail))
        if self._part is not None and not self._awaits_others:
            self._part.leave_line()
        if self._lost or self._closed or self._blocked:
            return
        payload = self._payload
        if self._waiting or self._more_in_tail or (payload is not None and not payload.reserved):
            self._continue_soon()
        elif not self._ending:
            self.wire.resume_reading()

    # --- serving ------------------------------------------------------------------------------------------

    def _serve(self, requests: Sequence[Request]) -> None:
        """Serve requests in one go; those beyond the connection's caps, or this turn's share, wait."""
        if self._owes_too_much():
            self._put_aside(requests)
            self._block()
            return
        self._in_batch = True
        try:
            if self._pace is None:
                self._serve_batch(requests)
            else:
                self._serve_paced(requests, self._pace)
        finally:
            self._in_batch = False
        self._flush()
        if self._blocked and not (
            self._awaiting_budget or self._awaits_others or self._pace_timer or self.in_flight or self.wire.queued
        ):
            self._continue_soon()  # what stood in the way has ended within this very turn: nobody else would wake us

    def _serve_batch(self, requests: Sequence[Request]) -> None:
        refusal, replies, scratch = self.rules.refusal, self._replies, self._scratch
        pack, header = replies.pack_read_header, replies.read_header_size
        pack_done, done_size = replies.pack_done, replies.done_size
        answers = scratch.answers
        locate, preadv, write_now = self.backend.locate, os.preadv, self.backend.write_now
        write_through = not self.backend.write_cache
        asks_from = self._asks_from
        # Where the client's requests are counted, each of those that wait for a flush is; they go the long way.
        may_flush = self._part is None and self.in_flight + MAX_BATCH_REQUESTS < MAX_REQUESTS_IN_FLIGHT
        durable: list[Request] = []
        position = count = total = written = total_written = begun = part = 0
        parts: list[memoryview] = []
        started = perf_counter_ns()
        for index, request in enumerate(requests):
            refused = refusal(request)
            if refused is not None or (self._shutting_down and request.type != DISC):
                self._out.append(replies.error(request, *(refused or (Errno.ESHUTDOWN, "the server is shutting down"))))
                continue
            length = request.length
            if request.type == READ and 0 < length <= INLINE_READ_BYTES:
                located = locate(request.offset, length)
                data = position + header
                if length >= ALIGNED_READ_BYTES and data & (ALIGNMENT - 1):
                    data += -data & (ALIGNMENT - 1)
                end = data + length
                if (
                    located is not None
                    and located[2] == length
                    and (length < asks_from or is_whole(located[0], located[1], length))
                ):
                    if end > ANSWERS_BYTES:
                        self._put_aside(requests[index:])
                        self._continue_soon()
                        break
                    try:
                        got = preadv(located[0], [answers[data:end]], located[1], located[3])
                    except OSError:
                        got = -1  # not in memory, or failed: either way it takes the long way
                    if got == length:
                        if position + header != data:
                            if position > part:
                                parts.append(answers[part:position])
                            part = position = data - header
                        pack(answers, position, request.cookie, request.offset, length)
                        position = end
                        count += 1
                        total += length
                        continue
            elif (
                request.type == WRITE
                and length
                and (may_flush or not (request.flags & COMMAND_FUA or write_through))
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
            elif request.type == FLUSH and may_flush:
                durable.append(request)
                continue
            if begun >= MAX_BATCH_BYTES:
                self._put_aside(requests[index:])
                self._continue_soon()
                break
            if not self._begin(request):
                self._put_aside(requests[index:])
                self._block()
                break
            if request.type <= WRITE:
                begun += length
        if written:
            self.backend.statistics.account(Operation.WRITE, written, total_written, perf_counter_ns() - started)
        if count:
            self.backend.statistics.account(Operation.READ, count, total, perf_counter_ns() - started)
        if position:
            try:
                if part:
                    parts.append(answers[part:position])
                    self.wire.send_borrowed_parts(parts)
                else:
                    self.wire.send_borrowed(answers[:position])
            except OSError as problem:
                self._lose(problem)
        if durable and not self._lost:
            self.in_flight += len(durable)
            self._starter.start(self._make_durable(durable))

    def _serve_paced(self, requests: Sequence[Request], pace: Pace) -> None:
        """Serve those that the client's rates allow now; nothing more is taken from it until they allow the others."""
        if self._shutting_down:
            self._serve_batch(requests)  # they are refused
            return
        count, before = pace.admit(requests), len(self._waiting)
        self._serve_batch(requests[:count])
        pace.give_back(islice(self._waiting, before, None))
        if count < len(requests) and not self._lost:
            self._put_aside(requests[count:])
            self._wait_for(pace)

    def _wait_for(self, pace: Pace) -> None:
        """Go on when the client's rates allow it."""
        self._block()
        if self._pace_timer is None:
            self._pace_timer = self._starter.loop.call_later(pace.wait_s, self._rates_allow)

    def _rates_allow(self) -> None:
        self._pace_timer = None
        self._go_on()

    def _owes_too_much(self) -> bool:
        """Whether the client must take some of its answers first."""
        unsent = self.wire.unsent
        return unsent > RESERVE_BYTES and (
            unsent > MAX_UNSENT_BYTES or self.account.pressed or (self._part is not None and self._part.pressed)
        )

    def _has_room_for(self, length: int) -> bool:
        """Whether the caps of the connection and of its client allow one request more, with so many bytes of data."""
        has_room = (
            self.in_flight < MAX_REQUESTS_IN_FLIGHT
            and not self._owes_too_much()
            and (self.account.held + length <= MAX_BYTES_IN_FLIGHT or not self.in_flight)
        )
        if self._part is None or not has_room:
            return has_room
        self._count(self._part)
        self._awaits_others = not self._part.has_room(length)
        return not self._awaits_others

    def _count(self, part: Part) -> None:
        """Tell the sums of the client what this connection has in flight; a payload that has begun is all there."""
        payload, requests, length = self._payload, self.in_flight, self.account.held + self._span_bytes
        if payload is not None and payload.reserved:
            requests += 1
            length += payload.request.length - payload.reserved
        part.count(requests, length)

    def _begin(self, request: Request) -> bool:
        """Start a request; False if a cap of the connection or the payload budget says "not now"."""
        if self._lost:
            return True
        kind = request.type
        length = request.length if kind in (READ, WRITE) else 0
        if not self._has_room_for(length):
            return False
        if kind == DISC:
            return True
        # What is shorter was tried in place, and is not in memory.
        if length > INLINE_READ_BYTES and kind == READ and self._can_send_spans and self._send_spans(request):
            return True
        if length and not self.account.take(length, self._budget_is_back):
            self._awaiting_budget = True
            return False
        self.in_flight += 1
        if length > INLINE_READ_BYTES and kind == READ and self._may_read_late(request):
            late = LateRead(request, self.backend, self.account, self._replies, self._late_read_copied, self._read_rest)
            self._out.append(late)
            return True
        # The received bytes are overwritten at the next wake-up; a copy costs less than finding out who needs one.
        payload = memoryview(bytes(request.payload)) if request.payload is not None else None
        self._run(request, payload, length)
        return True

    def _put_aside(self, requests: Sequence[Request]) -> None:
        """Keep requests for later; nothing more is looked at meanwhile."""
        for request in requests:
            payload = request.payload
            kept = request if payload is None else request.with_payload(memoryview(bytes(payload)))
            self._waiting.append(kept)

    def _run(
        self, request: Request, payload: memoryview | None, reserved: int, borrowed: memoryview | None = None
    ) -> None:
        self._starter.start(self._carry_out(request, payload, reserved, borrowed))

    async def _carry_out(
        self, request: Request, payload: memoryview | None, reserved: int, borrowed: memoryview | None, sent: int = 0
    ) -> None:
        """One request from its start, or what was not `sent` of it, to its reply. It is never cancelled, nor raises."""
        execution = self._execution
        try:
            if request.type == WRITE and payload is not None:
                await self.backend.write(request.offset, payload, FUA if request.flags & COMMAND_FUA else 0)
                answer: list[Item] = [self._replies.done(request)]
            elif request.type == READ:
                answer = await (execution.read_in_chunks(request, sent) if sent else execution.read(request))
            else:
                answer = await execution.execute(request)
        except OSError as problem:
            answer = [execution.error(request, problem)]
        except Exception as problem:
            log.exception("%s: %s failed", self.peer, describe(request), extra=self._about_failure(problem))
            answer = [self._replies.error(request, Errno.EIO, f"internal error: {problem!r}")]
        if borrowed is not None:
            self._scratch.buffers.give(borrowed)
        if reserved:
            self.account.give(reserved)
        self._answer(answer, 1)

    async def _make_durable(self, requests: Sequence[Request]) -> None:
        """One flush for writes that have been made, and for those who asked for a flush. As `_carry_out`."""
        execution = self._execution
        try:
            await self.backend.flush(sum(request.type == FLUSH for request in requests))
            answers: list[Item] = [self._replies.done(request) for request in requests]
        except OSError as problem:
            answers = [execution.error(request, problem) for request in requests]
        except Exception as problem:
            log.exception("%s: flush failed", self.peer, extra=self._about_failure(problem))
            answers = [self._replies.error(request, Errno.EIO, f"internal error: {problem!r}") for request in requests]
        self._answer(answers, len(requests))

    def _about_failure(self, problem: Exception) -> dict[str, object]:
        return about(events.REQUEST_FAILED, client=self.peer, export=self.export.name, error=repr(problem))

    def _answer(self, answer: Sequence[Item], requests: int) -> None:
        """So many requests have ended: send the answer, with others if there are any now."""
        self.in_flight -= requests
        if self._lost:
            if self._part is not None:
                self._count(self._part)
            self._end_if_idle()
            return
        self._out.extend(answer)
        if not self._in_batch:
            self._flush_soon()

    def _send_spans(self, request: Request) -> bool:
        """Answer a read from the page cache, if its bytes never move and are there; False if not."""
        answer = self._spans.answer(request, self._span_sent)
        if answer is None:
            return False
        self.in_flight += 1
        self._span_bytes += request.length
        self._out += answer
        return True

    def _may_read_late(self, request: Request) -> bool:
        """Whether a read is likely to be answered piece by piece: its bytes are in files, but may move in them."""
        if not self._replies.can_send_holes or request.flags & CommandFlag.DF:
            return False
        located = self.backend.locate(request.offset, request.length)
        # Of what never moves it is known by now that it is not in memory, or a hole.
        return located is not None and (located[2] < request.length or not self.export.located_for_good())

    def _late_read_copied(self) -> None:
        self.in_flight -= 1

    def _read_rest(self, request: Request, sent: int) -> None:
        """Some of a late read was not in memory after all."""
        self._starter.start(self._carry_out(request, None, request.length, None, sent))

    def _span_sent(self, length: int) -> None:
        self.in_flight -= 1
        self._span_bytes -= length

    # --- sending ------------------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._starter.loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._flush_due = False
        self._flush()
        self.on_sent()

    def _flush(self) -> None:
        """Send the answers that are ready."""
        if self._lost:
            self._drop_answers()
            if self._part is not None:
                self._count(self._part)
            self._end_if_idle()
            return
        if self._out:
            items, self._out = self._out, []
            try:
                self.wire.send(together(items))
            except OSError as problem:
                self._lose(problem)
                return
        self._charge_unsent()
        self._end_if_idle()

    def _charge_unsent(self) -> None:
        """Count what the client has not taken yet against its share of memory."""
        unsent = self.wire.unsent
        if unsent > self._charged:
            self.account.charge(unsent - self._charged)
        elif unsent < self._charged:
            self.account.give(self._charged - unsent)
        self._charged = unsent
        if self._part is not None:
            self._count(self._part)

    def on_sent(self) -> None:
        """The queue got shorter, or a request has ended: what was put aside may go on."""
        if self._lost or self._closed:
            return
        self._charge_unsent()
        if self._blocked:
            self._continue_soon()
        self._end_if_idle()

    def on_lost(self, problem: OSError) -> None:
        """Sending failed."""
        self._lose(problem)
