"""One client in the transmission phase: requests in, replies out, as many at a time as have arrived.

Everything here runs from the loop's callbacks, not from a task: one wake-up receives what is there, finds all
requests in it, answers at once whatever can be answered without waiting, starts the rest, and sends all answers that
are ready together.

The ways of a request:

    plain       a read of up to 64 KiB or a write, without flags, that needs no waiting, also if a driver's coroutine
                makes it: no request is even made of it (`plain_requests.py`)
    located     a small read behind one that was not plain: read in place into the buffer of answers (`batches.py`)
    in place    a write that a driver can make without waiting; all those of a batch that must be durable share one
                flush, with the FLUSHes of the batch (`batches.py`)
    span        a large read of bytes that never move and are in the page cache: sent from there (`span_reads.py`)
    late        a large read of bytes that may move: looked up piece by piece when it is sent (`late_reads.py`), and
                kept from moving until the client has it where it is sent from the page cache (`holds.py`)
    parts       a large write, made as its payload arrives (`payload.py`)
    coroutine   everything else; it is started in place and becomes a task only if it has to wait (`coroutines.py`)

Here is what they share: how bytes come in, when the next requests may begin, and how the connection ends.
"""

import logging
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import msgspec

from nbd_protocol.constants import Command, CommandFlag, Errno
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation_events import Ready
from nbd_protocol.transmission import ExportRules, Request, ServerTransmission, replies_for
from pynbd.block.statistics import Operation
from pynbd.server import events
from pynbd.server.batches import SHUTTING_DOWN, Batches
from pynbd.server.budget import Account
from pynbd.server.coroutines import Coroutines
from pynbd.server.events import about
from pynbd.server.execution import Execution
from pynbd.server.export import Export
from pynbd.server.in_flight import InFlight
from pynbd.server.inline import InlineStarter
from pynbd.server.late_reads import LateReads
from pynbd.server.limits import Pace
from pynbd.server.missed_reads import MissedReads
from pynbd.server.outstanding import Outstanding
from pynbd.server.payload import Payload
from pynbd.server.plain_requests import PlainRequests
from pynbd.server.scratch import INLINE_READ_BYTES, LARGE_PAYLOAD_BYTES, MAX_BATCH_REQUESTS, RECEIVE_BYTES, Scratch
from pynbd.server.span_reads import SpanReads
from pynbd.server.wire import Item, Wire, together

log = logging.getLogger(__name__)

HEADER_RECEIVE_BYTES = 4 << 10
"""What is received at first behind a large payload: another one is likely to follow, and is better not copied."""

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
DISC = int(Command.DISC)
COMMAND_FUA = int(CommandFlag.FUA)


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
        self.rules = ExportRules(
            self.backend.size,  # not what the client was told: a resize may have come in between
            ready.info.flags,
            min_block=ready.info.min_block,
            max_payload=ready.info.max_payload,
            mode=ready.mode,
            context_ids=ready.contexts,
        )
        self._replies = replies = replies_for(ready.mode)
        self.warn = warn
        request_failed = request_failed or warn
        self.wire = make_wire(self)
        self._outstanding = outstanding = Outstanding(account, self.wire, in_flight, self._continue_soon)
        self._framing = ServerTransmission(
            ready.mode, max_payload=self.rules.max_payload, large_payload=LARGE_PAYLOAD_BYTES
        )
        self._batches = Batches(
            self.rules,
            replies,
            self.backend,
            scratch,
            self.wire,
            begin=self._begin,
            refuse=self._refuse,
            may_flush=lambda: outstanding.may_begin_uncounted(MAX_BATCH_REQUESTS),
            lost=self._lose,
        )
        execution = Execution(export, replies, ready.contexts, request_failed)
        self._spans = SpanReads(execution, scratch.warm, warn, outstanding.span_ended)
        self._late_reads = LateReads(
            execution,
            account,
            scratch.warm,
            outstanding.request_ended,
            self._read_rest,
            holds_spans=self.wire.holds_spans,
        )
        self._coroutines = Coroutines(
            execution, replies, starter, account, scratch.buffers, peer, outstanding.begun_in_place, self._answer
        )
        misses = MissedReads(self._coroutines, replies, outstanding, account, export.read_queue, self._answer)
        self._plain = PlainRequests(
            self._framing,
            self.rules,
            replies,
            self.backend,
            scratch,
            self.wire,
            self._coroutines,
            misses,
            stay=export.located_for_good,
            may_begin=lambda: outstanding.may_begin_in_place(INLINE_READ_BYTES),
            lost=self._lose,
        )
        self._pace = pace
        self._pace_timer: TimerHandle | None = None
        self._starter = starter
        self._scratch = scratch
        self._on_closed = on_closed
        self._tail: bytes | bytearray = b""
        self._more_in_tail = False
        self._payload: Payload | None = None
        self._receive_bytes = RECEIVE_BYTES
        self._waiting: deque[Request] = deque()
        self._out: list[Item] = []
        self._in_batch = False
        self._flush_due = False
        self._continue_due = False
        self._blocked = False
        self._awaiting_budget = False
        self._leaving = False  # for one of these reasons:
        self._ending = False
        self._lost = False
        self._closed = False
        self._shutting_down = False
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
        self._leaving = self._shutting_down = True
        if self._waiting:
            self._continue_soon()  # to be refused, which needs no memory
        self._end_if_idle()

    def abort(self) -> None:
        """Close now. What is in flight runs to its end; nobody is told."""
        self._lose(None)

    @property
    def in_flight(self) -> int:
        """How many requests have begun and not ended."""
        return self._outstanding.requests

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight or waits to be sent."""
        return not (self._outstanding.requests or self._waiting or self._out or self.wire.queued)

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
        return self._outstanding.keeps_others_waiting

    def _resized(self, size: int) -> None:
        self.rules.size = size

    def _lose(self, problem: OSError | None) -> None:
        """The client is gone: forget what it was owed."""
        if self._lost:
            return
        self._leaving = self._lost = True
        if problem is not None:
            log.info(
                "%s: connection lost: %s",
                self.peer,
                problem,
                extra=about(events.CLIENT_FAILED, client=self.peer, export=self.export.name, error=problem),
            )
        self._drop_payload()
        self._outstanding.withdraw()
        if self._pace_timer is not None:
            self._pace_timer.cancel()
        self._waiting.clear()
        self._tail = b""
        self._more_in_tail = False
        self._outstanding.requests -= self.wire.close()
        self._outstanding.drop(self._out)
        self._outstanding.span_bytes = 0
        self._outstanding.charge_unsent()
        self._end_if_idle()

    def _end(self) -> None:
        """The client will send nothing more: finish what it asked for."""
        self._leaving = self._ending = True
        self._drop_payload()
        self.wire.pause_reading()
        self._end_if_idle()

    def _drop_payload(self) -> None:
        """The rest of it will not come."""
        payload, self._payload = self._payload, None
        self._outstanding.payload = None
        if payload is not None and payload.reserved:
            self.account.give(payload.reserved)
            self._outstanding.count()

    def _end_if_idle(self) -> None:
        if not self._leaving or self._closed or self._in_batch:
            return
        if self._outstanding.requests or (
            not self._lost
            and (self._waiting or self._out or self.wire.queued or self._more_in_tail or self.wire.holding)
        ):
            return
        self._closed = True
        self.wire.close()
        self.backend.on_resize.remove(self._resized)
        self._outstanding.close()
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
        self._take(self._scratch.arrived[: start + received])

    def _take(self, data: memoryview) -> None:
        """Serve the requests in what was received; what is left is kept."""
        served, wire = 0, self.wire
        owed = wire.unsent
        if (
            self._pace is None
            and not (self._framing.swallowing or self._leaving)
            and not (owed and self._outstanding.owes_too_much())
        ):
            done, served = self._plain.serve(data)
            if self._lost:
                return
            if done:
                if wire.unsent:
                    self._outstanding.charge_unsent()
                if done == len(data):
                    self._receive_bytes = RECEIVE_BYTES
                    self._more_in_tail = False
                    return
                data = data[done:]
        self._parse(data, MAX_BATCH_REQUESTS - served)

    def _parse(self, data: memoryview, most: int) -> None:
        """Make requests of what was received, at most so many, and serve them; what is left is kept."""
        try:
            batch = self._framing.parse(data, most)
        except RemoteProtocolError as problem:
            self.warn(str(problem))
            self._lose(None)
            return
        self._serve(batch.requests)
        if self._lost:
            return
        if batch.partial is not None:
            self._begin_payload(batch.partial, data[batch.consumed :])
            return
        self._receive_bytes = RECEIVE_BYTES
        if batch.consumed < len(data):
            self._tail = bytes(data[batch.consumed :])
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
            refused = SHUTTING_DOWN
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
        self._payload = self._outstanding.payload = payload = Payload(request, rest)
        if not self._waiting:
            self._advance_payload(payload)
        if not payload.reserved:
            payload.buffer = memoryview(bytes(rest))  # the received bytes are overwritten at the next wake-up

    def _receive_payload(self, payload: Payload) -> None:
        if payload.reserved <= payload.filled:
            self._continue_soon()
            return
        wire = self.wire
        received = payload.receive(self.backend, wire.receive_into, by_kernel=wire.kernel_receives)
        if received < 0:
            return
        if received == 0:
            self._end()
            return
        if payload.in_parts:
            payload.write_part(self.backend)
        self._advance_payload(payload)

    def _advance_payload(self, payload: Payload) -> None:
        """Reserve memory for more of a payload, or carry out the write if it is complete."""
        request, begins = payload.request, not payload.reserved
        if begins:
            if not self._outstanding.has_room_for(request.length):
                self._block()
                return
            if self._pace is not None and not payload.admitted:
                if not self._pace.admit((request,)):
                    self._wait_for(self._pace)
                    return
                payload.admitted = True
        has_memory = payload.reserve(self.account, self._scratch.buffers, self._go_on)
        if begins and payload.reserved:
            self._outstanding.count()
        if not has_memory:
            self._awaiting_budget = True
            self._block()
            return
        if payload.filled < request.length:
            return
        self._payload = self._outstanding.payload = None
        if payload.written == request.length:
            self._all_parts_written(payload)
            return
        self._outstanding.requests += 1
        self._coroutines.start(request, payload.buffer.toreadonly(), request.length, payload.whole, payload.placed)

    def _all_parts_written(self, payload: Payload) -> None:
        """A large write has been made as it arrived: answer it, or make it durable first."""
        request = payload.request
        self.backend.statistics.account(Operation.WRITE, 1, request.length, payload.write_ns)
        if payload.whole is not None:
            self._scratch.buffers.give(payload.whole)
        self.account.give(payload.reserved)
        if request.flags & COMMAND_FUA or not self.backend.write_cache:
            self._outstanding.requests += 1
            self._outstanding.count()
            self._coroutines.start_flush([request])
        else:
            self._out.append(self._replies.done(request))
            self._flush()

    # --- waiting ------------------------------------------------------------------------------------------

    def _block(self) -> None:
        """Nothing can go on before memory is given back, or something that is under way has ended."""
        self._blocked = True
        self.wire.pause_reading()

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
        self._blocked = self._awaiting_budget = self._outstanding.awaits_others = False
        if self._waiting:
            waiting = list(self._waiting)
            self._waiting.clear()
            self._serve(waiting)
        elif self._payload is not None:
            self._advance_payload(self._payload)
        elif self._more_in_tail:
            tail = self._tail
            self._tail, self._more_in_tail = b"", False
            self._take(memoryview(tail).toreadonly())
        if not self._outstanding.awaits_others:
            self._outstanding.leave_line()
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
        if self.wire.unsent and self._outstanding.owes_too_much():
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
            self._awaiting_budget
            or self._outstanding.awaits_others
            or self._pace_timer
            or self._outstanding.requests
            or self.wire.queued
        ):
            self._continue_soon()  # what stood in the way has ended within this very turn: nobody else would wake us

    def _serve_batch(self, requests: Sequence[Request]) -> None:
        served, durable = self._batches.serve(requests, self._shutting_down)
        if self._lost:
            return
        if served < len(requests):
            self._put_aside(requests[served:])
            if not self._blocked:
                self._continue_soon()
        if durable:
            self._outstanding.requests += len(durable)
            self._coroutines.start_flush(durable)

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

    def _refuse(self, request: Request, why: tuple[Errno, str]) -> None:
        self._out.append(self._replies.error(request, *why))

    def _begin(self, request: Request) -> bool:
        """Start a request; False if a cap of the connection or the payload budget says "not now"."""
        if self._lost:
            return True
        kind, outstanding = request.type, self._outstanding
        length = request.length if kind in (READ, WRITE) else 0
        if not outstanding.has_room_for(length):
            self._block()
            return False
        if kind == DISC:
            return True
        # What is shorter was tried in place, and is not in memory.
        is_long_read = length > INLINE_READ_BYTES and kind == READ
        if is_long_read:
            items = self._spans.answer(request)
            if items is not None:
                outstanding.requests += 1
                outstanding.span_bytes += length
                self._out += items
                return True
        if length and not self.account.take(length, self._go_on):
            self._awaiting_budget = True
            self._block()
            return False
        outstanding.requests += 1
        if is_long_read:
            late = self._late_reads.answer(request)
            if late is not None:
                self._out.append(late)
                return True
        # The received bytes are overwritten at the next wake-up; a copy costs less than finding out who needs one.
        payload = memoryview(bytes(request.payload)) if request.payload is not None else None
        self._coroutines.start(request, payload, length)
        return True

    def _put_aside(self, requests: Sequence[Request]) -> None:
        """Keep requests for later; nothing more is looked at meanwhile."""
        for request in requests:
            payload = request.payload
            kept = request if payload is None else request.with_payload(memoryview(bytes(payload)))
            self._waiting.append(kept)

    def _answer(self, answer: Sequence[Item], requests: int) -> None:
        """So many requests have ended: send the answer, with others if there are any now."""
        self._outstanding.requests -= requests
        if self._lost:
            self._outstanding.count()
            self._end_if_idle()
            return
        self._out.extend(answer)
        if not self._in_batch:
            self._flush_soon()

    def _read_rest(self, request: Request, sent: int) -> None:
        """Some of a late read was not in memory after all."""
        self._coroutines.start(request, None, request.length, done=sent)

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
            self._outstanding.drop(self._out)
            self._outstanding.count()
            self._end_if_idle()
            return
        if self._out:
            items, self._out = self._out, []
            try:
                self.wire.send(together(items))
            except OSError as problem:
                self._lose(problem)
                return
        self._outstanding.charge_unsent()
        if self._leaving:
            self._end_if_idle()

    def on_sent(self) -> None:
        """The queue got shorter, or a request has ended: what was put aside may go on."""
        if self._lost or self._closed:
            return
        self._outstanding.charge_unsent()
        if self._blocked:
            self._continue_soon()
        self._end_if_idle()

    def on_lost(self, problem: OSError) -> None:
        """Sending failed."""
        self._lose(problem)
