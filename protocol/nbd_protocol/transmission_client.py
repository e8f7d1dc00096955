"""The client's half of the transmission phase: requests become bytes, replies become events.

Section "Transmission phase" of ``doc/proto.md``, and extended headers. Nothing that a server says is taken on
trust: every reply is held against the request that it claims to answer, and what does not fit is a
RemoteProtocolError that says what was found and what was expected.
"""

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from nbd_protocol import messages
from nbd_protocol.constants import (
    CHUNK_ERROR_BIT,
    LARGE_PAYLOAD_BYTES,
    MAX_EXTENTS,
    MAX_LENGTH_32,
    MAX_OFFSET,
    MAX_PAYLOAD_BYTES,
    MAX_READ_FRAGMENTS,
    MAX_STRING_BYTES,
    SIMPLE_REPLY_MAGIC,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.transmission_events import DataChunk, Done, ErrorChunk, Event, HoleChunk, StatusChunk
from nbd_protocol.transmission_outstanding import Coverage, Outstanding
from nbd_protocol.transmission_replies import (
    BLOCK_STATUS_CODEC,
    BLOCK_STATUS_EXT_CODEC,
    EXTENDED_CHUNK_CODEC,
    EXTENT_CODEC,
    EXTENT_EXT_CODEC,
    OFFSET_DATA_CODEC,
    OFFSET_HOLE_CODEC,
    SIMPLE_REPLY_CODEC,
    STRUCTURED_CHUNK_CODEC,
)
from nbd_protocol.transmission_server import EXTENDED_REQUEST_CODEC, REQUEST_CODEC

__all__ = ["ClientTransmission"]


Buffer = bytes | bytearray | memoryview

# Plain integers: arithmetic with members of an IntFlag costs more than all the rest of a request.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_ASKABLE_FLAGS: Final = int(
    CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.DF | CommandFlag.REQ_ONE | CommandFlag.FAST_ZERO
)
_DONE: Final = int(ChunkFlag.DONE)
_COMMANDS: Final = frozenset(int(command) for command in Command)
_NO_CONTEXTS: Final[frozenset[int]] = frozenset()


class _Chunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk's header, and where its payload begins in the received data."""

    request: Outstanding
    flags: int
    type: int
    length: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def __str__(self) -> str:
        return f"chunk of type {self.type} with {self.length} bytes for {self.request}"


class _Collected(msgspec.Struct, gc=False):
    """A chunk whose long payload (block status) is being gathered here, as it arrives."""

    chunk: _Chunk
    payload: bytearray


class ClientTransmission:
    """Makes requests and understands the replies of a server.

    Args:
        mode: the framing that was negotiated.
        max_payload: the longest READ and WRITE that the server takes, in bytes.
        context_ids: the metadata contexts that were selected.
        large_payload: read data from this length up that are incomplete are left to the caller, in bytes.

    After a RemoteProtocolError every call raises it again: close the connection.
    """

    def __init__(
        self,
        mode: ReplyMode,
        *,
        max_payload: int = MAX_PAYLOAD_BYTES,
        context_ids: Iterable[int] = (),
        large_payload: int = LARGE_PAYLOAD_BYTES,
    ) -> None:
        self.mode: Final = mode
        self.max_payload: Final = max_payload
        self.context_ids: Final = frozenset(context_ids)
        self._large_payload = large_payload
        self._extended = mode is ReplyMode.EXTENDED
        self._longest = MAX_OFFSET if self._extended else MAX_LENGTH_32
        self._impossible_flags = ~(_ASKABLE_FLAGS & ~_DF if mode is ReplyMode.SIMPLE else _ASKABLE_FLAGS)
        request_codec = EXTENDED_REQUEST_CODEC if self._extended else REQUEST_CODEC
        self._pack = request_codec.struct.pack
        self._magic: int = request_codec.constants[0]
        self._chunk_codec = EXTENDED_CHUNK_CODEC if self._extended else STRUCTURED_CHUNK_CODEC
        self._max_status_bytes = 8 + MAX_EXTENTS * (EXTENT_EXT_CODEC if self._extended else EXTENT_CODEC).size
        self._outstanding: dict[int, Outstanding] = {}
        self._last_cookie = 0
        self._disconnected = False
        self._after_payload: tuple[Outstanding, int] | None = None
        self._collected: _Collected | None = None
        self._failure: RemoteProtocolError | None = None
        self._chunk_readers: Final[dict[int, Callable[[memoryview, _Chunk, list[Event]], int | None]]] = {
            ChunkType.NONE: self._read_none,
            ChunkType.OFFSET_DATA: self._read_data,
            ChunkType.OFFSET_HOLE: self._read_hole,
            ChunkType.BLOCK_STATUS: self._read_status,
            ChunkType.BLOCK_STATUS_EXT: self._read_status,
        }

    @property
    def outstanding(self) -> int:
        """How many requests wait for the end of their reply."""
        return len(self._outstanding)

    # Requests -----------------------------------------------------------------------------------------------

    def request(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: Buffer | None = None,
        context_ids: Iterable[int] | None = None,
    ) -> tuple[int, list[Buffer]]:
        """Make a request and remember it until its reply has ended.

        Args:
            command: what to do.
            offset: in bytes; for RESIZE the wanted size.
            length: in bytes; for WRITE that of the payload is taken.
            flags: CommandFlag bits; PAYLOAD_LEN is set here where it belongs.
            payload: the data of a WRITE, not copied: it must stay unchanged until it is sent.
            context_ids: for BLOCK_STATUS with extended headers: only these of the selected contexts.

        Returns:
            The cookie of the request, and the buffers to send, in order.

        Raises:
            LocalProtocolError: the framing cannot say that, or it is beyond what was negotiated.
            RemoteProtocolError: the connection has failed before.
        """
        if self._failure is not None:
            raise self._failure
        buffers: list[Buffer] = []
        wanted = _NO_CONTEXTS
        if payload is not None:
            view = memoryview(payload)
            length = view.nbytes
            if length:
                buffers.append(view)
        if command == _BLOCK_STATUS or context_ids is not None:
            wanted = self._wanted_contexts(command, context_ids)
        self._check_request(command, offset, length, flags, payload is not None)
        cookie = self._next_cookie()
        header_length = length
        if context_ids is not None:
            ids = messages.BLOCK_STATUS_PAYLOAD.build(messages.BlockStatusPayload(length, tuple(sorted(wanted))))
            flags |= _PAYLOAD_LEN
            header_length = len(ids)
            buffers.append(ids)
        elif command == _WRITE and self._extended:
            flags |= _PAYLOAD_LEN
        buffers.insert(0, self._pack(self._magic, flags, command, cookie, offset, header_length))
        if command == _DISC:
            self._disconnected = True
        else:
            self._outstanding[cookie] = Outstanding(cookie, int(command), flags, offset, length, wanted)
        return cookie, buffers

    def _wanted_contexts(self, command: Command, context_ids: Iterable[int] | None) -> frozenset[int]:
        if context_ids is None:
            return self.context_ids
        wanted = frozenset(context_ids)
        if command != _BLOCK_STATUS or not self._extended:
            raise LocalProtocolError(f"{Command(command).name} in {self.mode.value} mode cannot name metadata contexts")
        if not wanted or not wanted <= self.context_ids:
            raise LocalProtocolError(
                f"contexts {sorted(wanted)} are not among those selected, {sorted(self.context_ids)}"
            )
        return wanted

    def _check_request(self, command: Command, offset: int, length: int, flags: int, has_payload: bool) -> None:
        if (
            has_payload == (command == _WRITE)
            and command in _COMMANDS
            and 0 <= length <= (self.max_payload if command <= _WRITE else self._longest)
            and 0 <= offset <= MAX_OFFSET - length
            and not flags & self._impossible_flags
            and (command != _BLOCK_STATUS or (self.context_ids and self.mode is not ReplyMode.SIMPLE))
            and not self._disconnected
        ):
            return
        raise LocalProtocolError(self._why_impossible(command, offset, length, flags, has_payload))

    def _why_impossible(self, command: int, offset: int, length: int, flags: int, has_payload: bool) -> str:
        if command not in _COMMANDS:
            return f"command {command} is not known"
        described = f"{Command(command).name} of {length} bytes at {offset}"
        if self._disconnected:
            return f"{described} after DISC"
        if has_payload != (command == _WRITE):
            return f"{described} {'takes no' if has_payload else 'needs a'} payload"
        if flags & self._impossible_flags:
            return f"{described} with flags {flags:#x} that cannot be asked for in {self.mode.value} mode"
        if command == _BLOCK_STATUS and (self.mode is ReplyMode.SIMPLE or not self.context_ids):
            return f"{described} without a selected metadata context"
        if command <= _WRITE and length > self.max_payload:
            return f"{described} is longer than the maximum payload {self.max_payload}"
        return f"{described} does not fit into a request in {self.mode.value} mode"

    def _next_cookie(self) -> int:
        cookie = self._last_cookie
        while True:
            cookie = (cookie + 1) & MAX_OFFSET
            if cookie not in self._outstanding:
                self._last_cookie = cookie
                return cookie

    # Replies ------------------------------------------------------------------------------------------------

    def receive(self, data: memoryview) -> tuple[list[Event], int]:
        """Understand what the server sent.

        Args:
            data: the bytes not consumed yet, as bytes (format B).

        Returns:
            The events in order, and how many bytes are done with; the rest is to be given again, followed by more,
            and is never more than some headers and `large_payload` bytes.

        A DataChunk without data is always the last event: the caller then receives exactly its `length` bytes,
        first those in ``data[consumed:]``, straight to where they belong, and calls receive() again with what
        follows them, be it nothing: the Done of that reply may be due.

        Raises:
            RemoteProtocolError: the server broke the protocol; events of this call are lost, and whatever was not
                answered before will not be.
        """
        if self._failure is not None:
            raise self._failure
        events: list[Event] = []
        position = 0
        try:
            if self._after_payload is not None:
                request, ends = self._after_payload
                self._after_payload = None
                self._finish_if(ends, request, events)
            while self._after_payload is None:
                if self._collected is not None:
                    after = self._collect(data, position, self._collected, events)
                else:
                    after = self._read_reply(data, position, events)
                if after == position:
                    break
                position = after
        except RemoteProtocolError as error:
            self._failure = error
            raise
        return events, position

    def _read_reply(self, data: memoryview, position: int, events: list[Event]) -> int:
        """Read one reply or chunk; give the position behind it, or the same if it is not all here."""
        if len(data) - position < 4:
            return position
        magic = int.from_bytes(data[position : position + 4], "big")
        if magic == SIMPLE_REPLY_MAGIC and not self._extended:
            return self._read_simple(data, position, events)
        codec = self._chunk_codec
        if self.mode is ReplyMode.SIMPLE or magic != codec.constants[0]:
            raise RemoteProtocolError(f"reply magic is {magic:#x}, which is no reply in {self.mode.value} mode")
        if len(data) - position < codec.size:
            return position
        chunk = self._chunk_header(codec.struct.unpack_from(data, position), position + codec.size)
        reader = self._chunk_readers.get(chunk.type)
        if reader is None:
            if not chunk.type & CHUNK_ERROR_BIT:
                raise RemoteProtocolError(f"{chunk}: that type is not known")
            reader = self._read_error
        after = reader(data, chunk, events)
        return position if after is None else after

    def _chunk_header(self, values: tuple[int, ...], start: int) -> _Chunk:
        if self._extended:
            _, flags, type_, cookie, offset, length = values
        else:
            _, flags, type_, cookie, length = values
            offset = 0
        request = self._outstanding.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"reply for cookie {cookie:#x}, which is not outstanding")
        chunk = _Chunk(request, flags, type_, length, start)
        if self._extended and offset != request.offset:
            raise RemoteProtocolError(f"{chunk} says it is for offset {offset}")
        return chunk

    def _read_simple(self, data: memoryview, position: int, events: list[Event]) -> int:
        start = position + SIMPLE_REPLY_CODEC.size
        if len(data) < start:
            return position
        _, error, cookie = SIMPLE_REPLY_CODEC.struct.unpack_from(data, position)
        request = self._outstanding.get(cookie)
        if request is None:
            raise RemoteProtocolError(f"reply for cookie {cookie:#x}, which is not outstanding")
        if self.mode is ReplyMode.STRUCTURED and request.type == _READ:
            raise RemoteProtocolError(f"simple reply to {request}, though structured replies were negotiated")
        if request.type != _READ or error or not request.length:
            request.error = error
            self._finish_if(True, request, events)
            return start
        after = self._take_data(data, start, request, request.offset, request.length, True, events)
        return position if after is None else after

    def _read_none(self, data: memoryview, chunk: _Chunk, events: list[Event]) -> int | None:
        if chunk.length or not chunk.flags & _DONE:
            raise RemoteProtocolError(f"{chunk} and flags {chunk.flags:#x}, expected no bytes and DONE")
        self._finish_if(True, chunk.request, events)
        return chunk.start

    def _read_data(self, data: memoryview, chunk: _Chunk, events: list[Event]) -> int | None:
        length = chunk.length - OFFSET_DATA_CODEC.size
        start = chunk.start + OFFSET_DATA_CODEC.size
        self._check_read_chunk(chunk, length)
        if len(data) < start:
            return None
        (offset,) = OFFSET_DATA_CODEC.struct.unpack_from(data, chunk.start)
        self._check_within(chunk, offset, length)
        ends = chunk.flags & _DONE
        return self._take_data(data, start, chunk.request, offset, length, ends, events)

    def _take_data(
        self,
        data: memoryview,
        start: int,
        request: Outstanding,
        offset: int,
        length: int,
        ends: int,
        events: list[Event],
    ) -> int | None:
        """Give out read data, whole; or only announce them, if they are many and not all here."""
        whole = len(data) - start >= length
        if not whole and length < self._large_payload:
            return None
        self._cover(request, offset, length)
        if not whole:
            events.append(DataChunk(request.cookie, offset, length, None))
            self._after_payload = (request, ends)
            return start
        events.append(DataChunk(request.cookie, offset, length, data[start : start + length]))
        self._finish_if(ends, request, events)
        return start + length

    def _read_hole(self, data: memoryview, chunk: _Chunk, events: list[Event]) -> int | None:
        if chunk.length != OFFSET_HOLE_CODEC.size:
            raise RemoteProtocolError(f"{chunk}, expected {OFFSET_HOLE_CODEC.size} bytes")
        if len(data) < chunk.end:
            return None
        offset, length = OFFSET_HOLE_CODEC.struct.unpack_from(data, chunk.start)
        self._check_read_chunk(chunk, length)
        self._check_within(chunk, offset, length)
        self._cover(chunk.request, offset, length)
        events.append(HoleChunk(chunk.request.cookie, offset, length))
        self._finish_if(chunk.flags & _DONE, chunk.request, events)
        return chunk.end

    @staticmethod
    def _check_read_chunk(chunk: _Chunk, length: int) -> None:
        request = chunk.request
        if request.type != _READ:
            raise RemoteProtocolError(f"{chunk}: only a READ is answered with data")
        if not 1 <= length <= request.length:
            raise RemoteProtocolError(f"{chunk}: {length} bytes of data, expected 1 to {request.length}")

    @staticmethod
    def _check_within(chunk: _Chunk, offset: int, length: int) -> None:
        request = chunk.request
        if offset < request.offset or offset + length > request.offset + request.length:
            raise RemoteProtocolError(f"{chunk}: {length} bytes at {offset} lie outside of the request")

    @staticmethod
    def _cover(request: Outstanding, offset: int, length: int) -> None:
        request.data_chunks += 1
        if request.data_chunks > 1 and request.flags & _DF:
            raise RemoteProtocolError(f"reply in several chunks to {request} with DF")
        if request.coverage is None:
            request.coverage = Coverage()
        if not request.coverage.add(offset, offset + length):
            raise RemoteProtocolError(f"{length} bytes at {offset} were sent twice for {request}")
        if len(request.coverage.starts) > MAX_READ_FRAGMENTS:
            raise RemoteProtocolError(f"more than {MAX_READ_FRAGMENTS} fragments for {request}")

    def _read_error(self, data: memoryview, chunk: _Chunk, events: list[Event]) -> int | None:
        # Room for the fields around the text; unknown types may have a few more.
        longest = MAX_STRING_BYTES + 64
        if chunk.length > longest:
            raise RemoteProtocolError(f"{chunk}, expected at most {longest}")
        if len(data) < chunk.end:
            return None
        request, payload = chunk.request, data[chunk.start : chunk.end]
        offset: int | None = None
        if chunk.type == ChunkType.ERROR_OFFSET:
            located = messages.ERROR_OFFSET_CHUNK.parse(payload)
            error, text, offset = located.error, located.text, located.offset
            if not request.offset <= offset <= request.offset + request.length:
                raise RemoteProtocolError(f"{chunk}: offset {offset} lies outside of the request")
        elif chunk.type == ChunkType.ERROR:
            plain = messages.ERROR_CHUNK.parse(payload)
            error, text = plain.error, plain.text
        else:
            unknown = messages.UNKNOWN_ERROR_CHUNK.parse(payload)
            error, text = unknown.error, unknown.text
        if error == Errno.OK:
            raise RemoteProtocolError(f"{chunk}: an error chunk with error 0")
        request.error_chunks += 1
        if request.error_chunks > MAX_READ_FRAGMENTS:
            raise RemoteProtocolError(f"more than {MAX_READ_FRAGMENTS} error chunks for {request}")
        request.error = request.error or error
        events.append(ErrorChunk(request.cookie, error, text, offset))
        self._finish_if(chunk.flags & _DONE, request, events)
        return chunk.end

    # Block status -------------------------------------------------------------------------------------------

    def _read_status(self, data: memoryview, chunk: _Chunk, events: list[Event]) -> int | None:
        codec, extent = (
            (BLOCK_STATUS_EXT_CODEC, EXTENT_EXT_CODEC) if self._extended else (BLOCK_STATUS_CODEC, EXTENT_CODEC)
        )
        expected_type = ChunkType.BLOCK_STATUS_EXT if self._extended else ChunkType.BLOCK_STATUS
        if chunk.type != expected_type or chunk.request.type != _BLOCK_STATUS:
            raise RemoteProtocolError(f"{chunk} in {self.mode.value} mode")
        extents_bytes = chunk.length - codec.size
        if extents_bytes < extent.size or extents_bytes % extent.size or chunk.length > self._max_status_bytes:
            raise RemoteProtocolError(
                f"{chunk}, expected {codec.size} bytes and {extent.size} for each of 1 to {MAX_EXTENTS} extents"
            )
        if len(data) >= chunk.end:
            self._take_status(data[chunk.start : chunk.end], chunk, events)
            return chunk.end
        if chunk.length < self._large_payload:
            return None
        self._collected = _Collected(chunk, bytearray())
        return chunk.start

    def _collect(self, data: memoryview, position: int, collected: _Collected, events: list[Event]) -> int:
        missing = collected.chunk.length - len(collected.payload)
        piece = data[position : position + missing]
        collected.payload += piece
        if len(piece) == missing:
            self._collected = None
            self._take_status(memoryview(collected.payload), collected.chunk, events)
        return position + len(piece)

    def _take_status(self, payload: memoryview, chunk: _Chunk, events: list[Event]) -> None:
        request = chunk.request
        if self._extended:
            context_id, count = BLOCK_STATUS_EXT_CODEC.struct.unpack_from(payload)
            descriptors, extent = payload[BLOCK_STATUS_EXT_CODEC.size :], EXTENT_EXT_CODEC
            if count * extent.size != len(descriptors):
                raise RemoteProtocolError(f"{chunk} announces {count} extents")
        else:
            (context_id,) = BLOCK_STATUS_CODEC.struct.unpack_from(payload)
            descriptors, extent = payload[BLOCK_STATUS_CODEC.size :], EXTENT_CODEC
        if context_id not in request.missing_contexts:
            raise RemoteProtocolError(f"{chunk} is for context {context_id}, which was not asked for or came before")
        request.missing_contexts -= {context_id}
        extents = self._told_extents(chunk, extent.struct.iter_unpack(descriptors))
        events.append(StatusChunk(request.cookie, context_id, extents))
        self._finish_if(chunk.flags & _DONE, request, events)

    @staticmethod
    def _told_extents(chunk: _Chunk, extents: Iterable[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
        """The extents up to the end of the request.

        Servers are known that tell more than they were asked for: extents behind the request, or beyond it in spite
        of REQ_ONE. That harms nobody and is cut off; an empty extent would keep a client asking forever.
        """
        request = chunk.request
        told: list[tuple[int, int]] = []
        wanted = request.length
        one = request.flags & _REQ_ONE
        for length, flags in extents:
            if not length or request.offset + request.length - wanted + length > MAX_OFFSET:
                raise RemoteProtocolError(f"{chunk}: extent {len(told)} has {length} bytes")
            told.append((min(length, wanted) if one else length, flags))
            wanted -= length
            if one or wanted <= 0:
                break
        return tuple(told)

    def _finish_if(self, ends: int, request: Outstanding, events: list[Event]) -> None:
        """End the reply, if this was its end, after a look whether it is all there."""
        if not ends:
            return
        if not request.error:
            if request.type == _READ and request.length:
                told = request.coverage.total() if request.coverage else 0
                if told != request.length:
                    raise RemoteProtocolError(f"reply to {request} ends after {told} bytes of data")
            if request.type == _BLOCK_STATUS and request.missing_contexts:
                raise RemoteProtocolError(
                    f"reply to {request} ends without contexts {sorted(request.missing_contexts)}"
                )
        del self._outstanding[request.cookie]
        events.append(Done(request.cookie, request.error))
