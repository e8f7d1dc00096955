"""`PlainRequests`: from the bytes of a client to those for it in one loop, for requests of which nothing need be said.

These are short reads whose bytes lie in an open file, writes without flags that a driver can make in place, and both of
drivers whose coroutines end without having waited: nearly all that a busy client asks for. What costs them most is what
is done for each of them, so here nothing is: no object is made of a request, and nobody is asked whether it may be
refused. Reads whose bytes are not in memory are begun together at the end (`MissedReads`). The first request that is
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
from pynbd.server.buffers import Buffer
from pynbd.server.coroutines import Coroutines
from pynbd.server.execution import HOLE_READ_BYTES
from pynbd.server.missed_reads import MissedReads
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

# Plain integers: what an IntFlag costs in an expression is more than the rest of a small request.
READ = int(Command.READ)
WRITE = int(Command.WRITE)
OPERATION_READ = int(Operation.READ)
OPERATION_WRITE = int(Operation.WRITE)


WORTH_A_PLACE = 4
"""As many writes in a row, to say the least, are put where the disk lies, instead of asking the drivers for each."""


class PlainRequests:
    """Those of one connection.

    Args:
        framing: of the requests.
        rules: what is refused.
        replies: the framing of replies.
        backend: what is read and written.
        scratch: the loop's buffers.
        wire: where the answers leave.
        coroutines: reads and writes what only a driver's coroutine can.
        misses: makes the reads that have to wait.
        stay: whether bytes stay where `locate` says they are.
        may_begin: whether one of those may begin without asking for room and memory.
        lost: called when the answers can't be sent.
    """

    __slots__ = (
        "_asks_from",
        "_backend",
        "_coroutines",
        "_framing",
        "_gone",
        "_lost",
        "_may_begin",
        "_misses",
        "_replies",
        "_rules",
        "_scratch",
        "_stay",
        "_wire",
    )

    def __init__(
        self,
        framing: ServerTransmission,
        rules: ExportRules,
        replies: Replies,
        backend: BlockBackend,
        scratch: Scratch,
        wire: Wire,
        coroutines: Coroutines,
        misses: MissedReads,
        *,
        stay: Callable[[], bool],
        may_begin: Callable[[], bool],
        lost: Callable[[OSError], None],
    ) -> None:
        self._framing = framing
        self._rules = rules
        self._replies = replies
        self._backend = backend
        self._scratch = scratch
        self._wire = wire
        self._coroutines = coroutines
        self._stay = stay
        self._may_begin = may_begin
        self._misses = misses
        self._lost = lost
        self._gone = False
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
        locate, preadv, write_now, pwrite = backend.locate, os.preadv, backend.write_now, os.pwrite
        answers, coroutines, may_begin, misses = self._scratch.answers, self._coroutines, False, self._misses
        parts: list[Buffer] = []
        position = part = reads = read_bytes = writes = written_bytes = 0
        received = len(data)
        last = received - request_size
        started = perf_counter_ns()
        if last >= request_size:
            reads, length = self._answer_alike(data)
            position, read_bytes = reads * (header + length), reads * length
        tried = reads + len(misses)
        done, left = tried * request_size, MAX_BATCH_REQUESTS - tried
        # Where all of the disk lies is asked for once, if there are several requests.
        asks_for_disk = asks_for_place = done < last
        disk: Location | None = None
        located: Location | None
        place, placed_end = None, 0
        fd = shift = nowait = 0
        while left and done <= last:
            found, flags, kind, cookie, offset, length = unpack_from(data, done)
            stop = offset + length
            if found != magic or length <= 0 or (offset | length) & misaligned_bits or stop > size:
                break
            if kind == READ and not flags and length <= INLINE_READ_BYTES:
                if read_bytes >= MAX_BATCH_BYTES:
                    left = 0
                    break
                if asks_for_disk and length < ALIGNED_READ_BYTES:
                    asks_for_disk = False
                    disk = self._whole_disk()
                    if disk is not None:
                        fd, shift, _, nowait, _ = disk
                if disk is not None and length < ALIGNED_READ_BYTES:
                    located, host_offset = disk, shift + offset
                elif (located := locate(offset, length)) is not None and located[2] == length:
                    fd, host_offset, _, nowait, _ = located
                else:
                    may_begin = may_begin or self._may_begin()
                    if not may_begin:
                        break
                    reply = coroutines.read_in_place(cookie, offset, length)
                    done += request_size
                    left -= 1
                    if reply is None:
                        break
                    reads += 1
                    read_bytes += length
                    if position > part:
                        parts.append(answers[part:position])
                        part = position
                    parts.append(reply)
                    continue
                if length < ALIGNED_READ_BYTES:
                    start = position + header
                    end = start + length
                    try:
                        read = preadv(fd, [answers[start:end]], host_offset, nowait) == length
                    except OSError:
                        read = False  # not in memory, or failed
                    if read:
                        pack(answers, position, cookie, offset, length)
                        position = end
                else:
                    went = self._answer_longer(located, cookie, offset, position, part, parts)
                    read = went is not None
                    if went is not None:
                        position, part = went
                    elif length >= self._asks_from and not is_whole(located):
                        break
                if read:
                    reads += 1
                    read_bytes += length
                elif not (nowait and misses.add(cookie, offset, length, host_offset)):
                    break
                done += request_size
            elif kind == WRITE and flags == write_flags:
                start = done + request_size
                end = start + length
                if end > received:
                    break
                if asks_for_place and last - done > WORTH_A_PLACE * length:
                    asks_for_place, place = False, backend.place_writes()
                    if place is not None:
                        write_fd, write_shift, write_size, made = place
                if place is not None and length <= INLINE_READ_BYTES and stop <= write_size:
                    if stop > placed_end:
                        placed_end = stop
                    try:
                        written = pwrite(write_fd, data[start:end], write_shift + offset) == length
                    except OSError:
                        written = False  # the long way tells what has failed
                else:
                    written = write_now(offset, data[start:end])
                if not written:
                    if length > INLINE_READ_BYTES:
                        break
                    may_begin = may_begin or self._may_begin()
                    if not may_begin:
                        break
                    # What was received is overwritten at the next wake-up, and it may be waiting still.
                    written = coroutines.write_in_place(cookie, offset, memoryview(bytes(data[start:end])))
                    if not written:
                        done = end
                        left -= 1
                        break
                writes += 1
                written_bytes += length
                pack_done(answers, position, cookie, offset)
                position += done_size
                done = end
            else:
                break
            left -= 1
        if placed_end:
            made(placed_end, perf_counter_ns() - started)
        if not done:
            return 0, MAX_BATCH_REQUESTS - left
        took_ns = perf_counter_ns() - started
        statistics = backend.statistics
        if writes:
            statistics.account(OPERATION_WRITE, writes, written_bytes, took_ns)
        if reads:
            statistics.account(OPERATION_READ, reads, read_bytes, took_ns)
        try:
            if parts or part:
                if position > part:
                    parts.append(answers[part:position])
                self._wire.send_borrowed_parts(parts)
            elif position:  # if not, all was sent with bytes of files
                self._wire.send_borrowed(answers[:position])
        except OSError as problem:
            self._lose(problem)
        if self._gone:
            misses.drop()
        elif len(misses):
            misses.begin()
        return done, MAX_BATCH_REQUESTS - left

    def _answer_alike(self, data: memoryview) -> tuple[int, int]:
        """Answer the short reads of one length at the beginning of what was received: most of what many clients ask.

        Those among them whose bytes are not in memory are put aside.

        Args:
            data: as for `serve`, several requests.

        Returns:
            how many were answered, into the buffer of answers, and their length.
        """
        framing, rules, replies = self._framing, self._rules, self._replies
        magic, request_size = framing.magic, framing.header_size
        size, misaligned_bits = rules.size, rules.misaligned_bits
        _, _, kind, _, _, usual = framing.unpack_from(data)
        _, _, next_kind, _, _, next_length = framing.unpack_from(data, request_size)
        if kind != READ or next_kind != READ or next_length != usual or usual & misaligned_bits:
            return 0, usual
        slots = self._scratch.slots(replies.read_header_size, usual)
        if slots is None:
            return 0, usual
        locate, preadv, pack, answers = self._backend.locate, os.preadv, replies.pack_read_header, self._scratch.answers
        disk, find = self._whole_disk(), None
        if disk is not None:
            fd, shift, _, nowait, _ = disk
        else:
            find = self._backend.finder()
        reads, last_start = 0, size - usual
        requests = min(len(data) // request_size, MAX_BATCH_REQUESTS)
        headers = framing.iter_unpack(data[: requests * request_size])
        for found, flags, kind, cookie, offset, length in headers:
            if (
                length != usual
                or kind != READ
                or flags
                or found != magic
                or offset & misaligned_bits
                or offset > last_start
            ):
                break
            if disk is not None:
                host_offset = shift + offset
            elif find is not None:
                place = find(offset, usual)
                if place is None:
                    break
                fd, host_offset, nowait = place
            else:
                located = locate(offset, usual)
                if located is None:
                    break
                fd, host_offset, there, nowait, _ = located
                if there != usual:
                    break
            position, into = slots[reads]
            try:
                if preadv(fd, into, host_offset, nowait) == usual:
                    pack(answers, position, cookie, offset, usual)
                    reads += 1
                    continue
            except OSError:
                pass  # not in memory, or failed
            if not (nowait and self._misses.add(cookie, offset, usual, host_offset)):
                break
        return reads, usual

    def _lose(self, problem: OSError) -> None:
        self._gone = True
        self._lost(problem)

    def _whole_disk(self) -> Location | None:
        """Where all of the disk lies, for the requests of this wake-up; None if not in one piece."""
        size = self._rules.size
        disk = self._backend.locate(0, size) if self._stay() else None
        return disk if disk is not None and disk.length == size else None

    def _answer_longer(
        self, located: Location, cookie: int, offset: int, position: int, part: int, parts: list[Buffer]
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
        # Holes of those in memory are told; of others no page is in memory, if nobody has read them by other ways.
        tells_holes = not located.flags and (memory is not None or length >= self._asks_from)
        if tells_holes and not is_whole(located):
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
                self._lose(problem)
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
        return (
            bool(located.flags)
            and self._stay()
            and not self._wire.copies_files()
            and self._scratch.warm.hold(located.fd, located.host_offset, located.length)
        )
