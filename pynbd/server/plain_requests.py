"""`PlainRequests`: from the bytes of a client to those for it in one loop, for requests of which nothing need be said.

These are short reads whose bytes lie in an open file and are in memory, and writes without flags that a driver can make
in place: nearly all that a busy client asks for. What costs them most is what is done for each of them, so here
nothing is: no object is made of a request, and nobody is asked whether it may be refused. The first one that is
anything else ends the loop, and `ServerTransmission` and `Batches` go on from there.

This is the hottest code of the server: what it needs for each request are local names.
"""

import os
from collections.abc import Callable
from time import perf_counter_ns

from nbd_protocol.constants import Command
from nbd_protocol.transmission import ExportRules, Replies, ServerTransmission
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Location
from pynbd.block.statistics import Operation
from pynbd.server.execution import HOLE_READ_BYTES
from pynbd.server.scratch import (
    ALIGNED_READ_BYTES,
    ALIGNMENT,
    INLINE_READ_BYTES,
    MAX_BATCH_BYTES,
    MAX_BATCH_REQUESTS,
    SENT_FROM_FILE_BYTES,
    Scratch,
)
from pynbd.server.spans import is_whole
from pynbd.server.wire import Wire
from pynbd.storage import linux

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
OPERATION_READ = int(Operation.READ)
OPERATION_WRITE = int(Operation.WRITE)


class PlainRequests:
    """Those of one connection.

    Args:
        framing: of the requests.
        rules: what is refused.
        replies: the framing of replies.
        backend: what is read and written.
        scratch: the loop's buffers.
        wire: where the answers leave.
        stay: whether bytes stay where `locate` says they are.
        lost: called when the answers can't be sent.
    """

    __slots__ = ("_asks_from", "_backend", "_framing", "_lost", "_replies", "_rules", "_scratch", "_stay", "_wire")

    def __init__(
        self,
        framing: ServerTransmission,
        rules: ExportRules,
        replies: Replies,
        backend: BlockBackend,
        scratch: Scratch,
        wire: Wire,
        *,
        stay: Callable[[], bool],
        lost: Callable[[OSError], None],
    ) -> None:
        self._framing = framing
        self._rules = rules
        self._replies = replies
        self._backend = backend
        self._scratch = scratch
        self._wire = wire
        self._stay = stay
        self._lost = lost
        # Where holes can be told, larger reads ask for them first.
        self._asks_from = HOLE_READ_BYTES if replies.can_send_holes else INLINE_READ_BYTES + 1

    def serve(self, data: memoryview) -> tuple[int, int]:
        """Answer the plain requests at the beginning of what was received.

        Args:
            data: read-only; it begins with a request.

        Returns:
            how many bytes of it are done with, and how many requests these were; as many as one turn may have
            (`MAX_BATCH_REQUESTS`), if its share of bytes is used up.
        """
        framing, rules, replies, backend = self._framing, self._rules, self._replies, self._backend
        magic, unpack_from, request_size = framing.magic, framing.unpack_from, framing.header_size
        size, misaligned_bits = rules.size, rules.misaligned_bits
        pack, header, pack_done, done_size = (
            replies.pack_read_header,
            replies.read_header_size,
            replies.pack_done,
            replies.done_size,
        )
        # With extended headers a payload is announced by a flag.
        write_flags = framing.payload_flag if rules.writable and backend.write_cache else -1
        locate, preadv, write_now, answers = backend.locate, os.preadv, backend.write_now, self._scratch.answers
        parts: list[memoryview] = []
        done = position = part = reads = read_bytes = writes = written_bytes = 0
        received = len(data)
        last = received - request_size
        left = MAX_BATCH_REQUESTS
        started = perf_counter_ns()
        while left and done <= last:
            found, flags, kind, cookie, offset, length = unpack_from(data, done)
            if found != magic or length <= 0 or (offset | length) & misaligned_bits or offset + length > size:
                break
            if kind == READ and not flags and length <= INLINE_READ_BYTES:
                located = locate(offset, length)
                if located is None or located[2] != length:
                    break
                if read_bytes >= MAX_BATCH_BYTES:
                    left = 0
                    break
                if length < ALIGNED_READ_BYTES:
                    start = position + header
                    end = start + length
                    try:
                        if preadv(located[0], [answers[start:end]], located[1], located[3]) != length:
                            break
                    except OSError:
                        break  # not in memory, or failed
                    pack(answers, position, cookie, offset, length)
                    position = end
                else:
                    went = self._answer_longer(located, cookie, offset, position, part, parts)
                    if went is None:
                        break
                    position, part = went
                reads += 1
                read_bytes += length
                done += request_size
            elif kind == WRITE and flags == write_flags:
                start = done + request_size
                end = start + length
                if end > received or not write_now(offset, data[start:end]):
                    break
                pack_done(answers, position, cookie, offset)
                position += done_size
                writes += 1
                written_bytes += length
                done = end
            else:
                break
            left -= 1
        if not done:
            return 0, MAX_BATCH_REQUESTS - left
        took_ns = perf_counter_ns() - started
        if writes:
            backend.statistics.account(OPERATION_WRITE, writes, written_bytes, took_ns)
        if reads:
            backend.statistics.account(OPERATION_READ, reads, read_bytes, took_ns)
        try:
            if parts or part:
                if position > part:
                    parts.append(answers[part:position])
                self._wire.send_borrowed_parts(parts)
            elif position:  # if not, all was sent with bytes of files
                self._wire.send_borrowed(answers[:position])
        except OSError as problem:
            self._lost(problem)
        return done, MAX_BATCH_REQUESTS - left

    def _answer_longer(
        self, located: Location, cookie: int, offset: int, position: int, part: int, parts: list[memoryview]
    ) -> tuple[int, int] | None:
        """Answer a read of `ALIGNED_READ_BYTES` or more.

        Args:
            located: where its bytes lie.
            cookie, offset: of the request.
            position: where in the buffer its answer may begin.
            part: where in it begins what is in no part yet.
            parts: what is to be sent before that.

        Returns:
            the next position and part; None if it was not answered.
        """
        replies, answers, length, memory = self._replies, self._scratch.answers, located.length, located.memory
        if (memory is not None or length >= self._asks_from) and not is_whole(located):
            return None
        start = position + replies.read_header_size
        if memory is not None:
            replies.pack_read_header(answers, position, cookie, offset, length)
            parts += (answers[part:start], memory[located.host_offset : located.host_offset + length])
            return start, start
        if length >= SENT_FROM_FILE_BYTES and not part and self._may_send(located):
            replies.pack_read_header(answers, position, cookie, offset, length)
            try:
                self._wire.send_with_file(answers[:start], located.fd, located.host_offset, length)
            except OSError as problem:
                self._lost(problem)
                return None
            return 0, 0
        start += -start % ALIGNMENT
        end = start + length
        try:
            if os.preadv(located.fd, [answers[start:end]], located.host_offset, located.flags) != length:
                return None
        except OSError:
            return None
        header = start - replies.read_header_size
        if header != position:
            if position > part:
                parts.append(answers[part:position])
            part = header
        replies.pack_read_header(answers, header, cookie, offset, length)
        return end, part

    def _may_send(self, located: Location) -> bool:
        """Whether bytes are to be sent from their file: they stay there, nobody has to wait for them, and the client
        keeps up. Files in memory are copied: whether they can be sent is not known.
        """
        try:
            return (
                bool(located.flags)
                and self._stay()
                and not self._wire.copies_files()
                and linux.readable_at_once(located.fd, located.host_offset, located.length)
            )
        except OSError:
            return False
