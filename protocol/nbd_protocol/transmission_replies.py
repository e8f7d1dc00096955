"""The server's half of the transmission phase, outgoing: answers become bytes.

Sections "Simple reply message", "Structured reply chunk message" and "Structured reply types" of
``doc/proto.md``, and the extended chunks. Payloads never pass through here: what these classes give is the
header, and the caller sends header and payload in one vectored write.
"""

import abc
import struct
from collections.abc import Sequence
from typing import ClassVar, Final

from nbd_protocol import messages
from nbd_protocol.codec import Codec, derive
from nbd_protocol.constants import (
    MAX_EXTENT_LENGTH_32,
    MAX_EXTENTS,
    MAX_OFFSET,
    MAX_STRING_BYTES,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError
from nbd_protocol.transmission_server import Request

__all__ = ["ExtendedReplies", "Replies", "SimpleReplies", "StructuredReplies", "replies_for"]

SIMPLE_REPLY_CODEC: Final = derive(messages.SIMPLE_REPLY, "simple reply")
STRUCTURED_CHUNK_CODEC: Final = derive(messages.STRUCTURED_CHUNK, "structured reply chunk")
EXTENDED_CHUNK_CODEC: Final = derive(messages.EXTENDED_CHUNK, "extended reply chunk")
STRUCTURED_DATA_CODEC: Final = derive(messages.STRUCTURED_DATA_CHUNK, "structured data chunk")
EXTENDED_DATA_CODEC: Final = derive(messages.EXTENDED_DATA_CHUNK, "extended data chunk")
OFFSET_DATA_CODEC: Final = derive(messages.OFFSET_DATA, "offset of a data chunk")
OFFSET_HOLE_CODEC: Final = derive(messages.OFFSET_HOLE, "hole chunk")
BLOCK_STATUS_CODEC: Final = derive(messages.BLOCK_STATUS, "block status chunk")
BLOCK_STATUS_EXT_CODEC: Final = derive(messages.BLOCK_STATUS_EXT, "extended block status chunk")
EXTENT_CODEC: Final = derive(messages.EXTENT, "extent")
EXTENT_EXT_CODEC: Final = derive(messages.EXTENT_EXT, "extended extent")

# Plain integers and bound methods: these run for every request.
_DONE: Final = int(ChunkFlag.DONE)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_NONE: Final = int(ChunkType.NONE)
_OFFSET_DATA: Final = int(ChunkType.OFFSET_DATA)
_OFFSET_BYTES: Final = OFFSET_DATA_CODEC.size

Extents = Sequence[tuple[int, int]]
"""(length in bytes, status flags) one after another, from the offset of the request on."""


class Replies(abc.ABC):
    """How a server answers in one of the three framings. It has no state: one object serves all connections.

    Attributes:
        mode: the framing.
        read_header_size: bytes that precede the data of a whole read, see pack_read_header.
        done_size: bytes of the end of a successful reply, see done.
        can_send_holes: whether parts of a read can be told to be zero without sending them, and whether a read
            can be answered in several chunks at all.
    """

    mode: ClassVar[ReplyMode]
    read_header_size: ClassVar[int]
    done_size: ClassVar[int]
    can_send_holes: ClassVar[bool]

    @abc.abstractmethod
    def pack_read_header(
        self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int, length: int
    ) -> None:
        """Write the header of a whole, successful read: read_header_size bytes at `position`; the data follow.

        Args:
            buffer: writable, with room for the header.
            position: where in it, in bytes.
            cookie: of the request.
            offset: of the request, in bytes.
            length: of the request, in bytes, not 0: a read of nothing is answered with done().

        Raises:
            LocalProtocolError: length is 0.
        """

    @abc.abstractmethod
    def read_data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Give the header of one chunk of data; the caller sends exactly `length` bytes behind it.

        Args:
            request: the READ.
            offset: of the data in the export, in bytes.
            length: of the data in bytes, not 0.
            done: it is the last chunk of the reply.

        Raises:
            LocalProtocolError: the chunk does not lie within the request, or the framing knows only whole reads.
        """

    @abc.abstractmethod
    def read_hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Give a whole chunk that says: these bytes are zero. Arguments and errors as of read_data()."""

    @abc.abstractmethod
    def done(self, request: Request) -> bytes:
        """Give the end of a successful reply, or all of one that has no payload."""

    @abc.abstractmethod
    def pack_done(self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int) -> None:
        """Write what done() gives: done_size bytes at `position`.

        Args:
            buffer: writable, with room for it.
            position: where in it, in bytes.
            cookie: of the request.
            offset: of the request, in bytes.
        """

    @abc.abstractmethod
    def error(self, request: Request, errno: Errno, text: str = "", offset: int | None = None) -> bytes:
        """Give the end of a failed reply.

        Args:
            request: what failed.
            errno: an NBD error (see errors.errno_to_nbd). ENOTSUP for anything but a fast zero is sent as EINVAL.
            text: for a human; cut at 4096 bytes. Simple replies cannot carry it.
            offset: the first offset concerned, in bytes, where it is known. Simple replies cannot carry it.

        Raises:
            LocalProtocolError: errno is OK, or no NBD error, or offset is not within the request.
        """

    @abc.abstractmethod
    def block_status(self, request: Request, context_id: int, extents: Extents, *, done: bool) -> bytes:
        """Give a whole chunk with the status of one metadata context.

        What the client must not see is cut off: extents behind the end of the request, more than 2^20 of them, with
        REQ_ONE all but the first and what of that reaches beyond the request; without extended headers what
        follows an extent too long for 32 bits.

        Args:
            request: the BLOCK_STATUS.
            context_id: one of those selected.
            extents: at least one, none of them empty, from the offset of the request on.
            done: it is the last chunk of the reply.

        Raises:
            LocalProtocolError: there is no extent, or an empty one, or the framing has no block status.
        """


class SimpleReplies(Replies):
    """Simple replies: 16 bytes and the data of the read."""

    mode = ReplyMode.SIMPLE
    read_header_size = SIMPLE_REPLY_CODEC.size
    done_size = SIMPLE_REPLY_CODEC.size
    can_send_holes = False

    _pack = SIMPLE_REPLY_CODEC.struct.pack
    _pack_into = SIMPLE_REPLY_CODEC.struct.pack_into
    _magic: int = SIMPLE_REPLY_CODEC.constants[0]

    def pack_read_header(
        self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int, length: int
    ) -> None:
        """See Replies."""
        if not length:
            raise LocalProtocolError(f"a read of 0 bytes at {offset} has no data to announce")
        self._pack_into(buffer, position, self._magic, 0, cookie)

    def read_data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See Replies; the one chunk is the whole read."""
        _check_chunk(request, offset, length)
        if not done or offset != request.offset or length != request.length:
            raise LocalProtocolError(
                f"a simple reply has all {request.length} bytes at {request.offset} at once, not {length} at {offset}"
            )
        return self._pack(self._magic, 0, request.cookie)

    def read_hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Raise LocalProtocolError: simple replies have no holes."""
        raise LocalProtocolError("simple replies have no holes")

    def done(self, request: Request) -> bytes:
        """See Replies."""
        return self._pack(self._magic, 0, request.cookie)

    def pack_done(self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int) -> None:
        """See Replies."""
        self._pack_into(buffer, position, self._magic, 0, cookie)

    def error(self, request: Request, errno: Errno, text: str = "", offset: int | None = None) -> bytes:
        """See Replies."""
        return self._pack(self._magic, _allowed_errno(request, errno), request.cookie)

    def block_status(self, request: Request, context_id: int, extents: Extents, *, done: bool) -> bytes:
        """Raise LocalProtocolError: simple replies have no block status."""
        raise LocalProtocolError("simple replies have no block status")


class _ChunkedReplies(Replies):
    """What structured and extended replies have in common: all but the header of a chunk."""

    can_send_holes = True

    @abc.abstractmethod
    def _chunk(self, request: Request, chunk_type: int, length: int, *, done: bool) -> bytes:
        """Give the header of a chunk with `length` bytes of payload."""

    def read_hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See Replies."""
        _check_chunk(request, offset, length)
        header = self._chunk(request, ChunkType.OFFSET_HOLE, OFFSET_HOLE_CODEC.size, done=done)
        return header + OFFSET_HOLE_CODEC.pack(offset, length)

    def done(self, request: Request) -> bytes:
        """See Replies."""
        return self._chunk(request, _NONE, 0, done=True)

    def error(self, request: Request, errno: Errno, text: str = "", offset: int | None = None) -> bytes:
        """See Replies."""
        errno = _allowed_errno(request, errno)
        text = _sendable(text)
        if offset is None:
            payload = messages.ERROR_CHUNK.build(messages.ErrorChunk(errno, text))
            return self._chunk(request, ChunkType.ERROR, len(payload), done=True) + payload
        _check_chunk(request, offset, 1)
        payload = messages.ERROR_OFFSET_CHUNK.build(messages.ErrorOffsetChunk(errno, text, offset))
        return self._chunk(request, ChunkType.ERROR_OFFSET, len(payload), done=True) + payload


class StructuredReplies(_ChunkedReplies):
    """Structured replies: chunks with a header of 20 bytes."""

    mode = ReplyMode.STRUCTURED
    read_header_size = STRUCTURED_DATA_CODEC.size
    done_size = STRUCTURED_CHUNK_CODEC.size

    _pack_chunk = STRUCTURED_CHUNK_CODEC.struct.pack
    _pack_chunk_into = STRUCTURED_CHUNK_CODEC.struct.pack_into
    _pack_data = STRUCTURED_DATA_CODEC.struct.pack
    _pack_into = STRUCTURED_DATA_CODEC.struct.pack_into
    _magic: int = STRUCTURED_DATA_CODEC.constants[0]

    def pack_read_header(
        self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int, length: int
    ) -> None:
        """See Replies: one data chunk with DONE."""
        if not length:
            raise LocalProtocolError(f"a read of 0 bytes at {offset} has no data to announce")
        self._pack_into(buffer, position, self._magic, _DONE, _OFFSET_DATA, cookie, length + _OFFSET_BYTES, offset)

    def _chunk(self, request: Request, chunk_type: int, length: int, *, done: bool) -> bytes:
        flags = _DONE if done else 0
        return self._pack_chunk(self._magic, flags, chunk_type, request.cookie, length)

    def pack_done(self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int) -> None:
        """See Replies."""
        self._pack_chunk_into(buffer, position, self._magic, _DONE, _NONE, cookie, 0)

    def read_data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See Replies."""
        _check_chunk(request, offset, length)
        flags, length = _DONE if done else 0, _OFFSET_BYTES + length
        return self._pack_data(self._magic, flags, _OFFSET_DATA, request.cookie, length, offset)

    def block_status(self, request: Request, context_id: int, extents: Extents, *, done: bool) -> bytes:
        """See Replies."""
        told = _told_extents(request, extents, MAX_EXTENT_LENGTH_32)
        payload = BLOCK_STATUS_CODEC.pack(context_id) + _packed_extents(EXTENT_CODEC, told)
        return self._chunk(request, ChunkType.BLOCK_STATUS, len(payload), done=done) + payload


class ExtendedReplies(_ChunkedReplies):
    """Extended replies: chunks with a header of 32 bytes that repeats the offset of the request."""

    mode = ReplyMode.EXTENDED
    read_header_size = EXTENDED_DATA_CODEC.size
    done_size = EXTENDED_CHUNK_CODEC.size

    _pack_chunk = EXTENDED_CHUNK_CODEC.struct.pack
    _pack_chunk_into = EXTENDED_CHUNK_CODEC.struct.pack_into
    _pack_data = EXTENDED_DATA_CODEC.struct.pack
    _pack_into = EXTENDED_DATA_CODEC.struct.pack_into
    _magic: int = EXTENDED_DATA_CODEC.constants[0]

    def pack_read_header(
        self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int, length: int
    ) -> None:
        """See Replies: one data chunk with DONE."""
        if not length:
            raise LocalProtocolError(f"a read of 0 bytes at {offset} has no data to announce")
        length += _OFFSET_BYTES
        self._pack_into(buffer, position, self._magic, _DONE, _OFFSET_DATA, cookie, offset, length, offset)

    def _chunk(self, request: Request, chunk_type: int, length: int, *, done: bool) -> bytes:
        flags = _DONE if done else 0
        return self._pack_chunk(self._magic, flags, chunk_type, request.cookie, request.offset, length)

    def pack_done(self, buffer: bytearray | memoryview, position: int, cookie: int, offset: int) -> None:
        """See Replies."""
        self._pack_chunk_into(buffer, position, self._magic, _DONE, _NONE, cookie, offset, 0)

    def read_data(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """See Replies."""
        _check_chunk(request, offset, length)
        flags, length = _DONE if done else 0, _OFFSET_BYTES + length
        return self._pack_data(self._magic, flags, _OFFSET_DATA, request.cookie, request.offset, length, offset)

    def block_status(self, request: Request, context_id: int, extents: Extents, *, done: bool) -> bytes:
        """See Replies."""
        told = _told_extents(request, extents, MAX_OFFSET)
        payload = BLOCK_STATUS_EXT_CODEC.pack(context_id, len(told)) + _packed_extents(EXTENT_EXT_CODEC, told)
        return self._chunk(request, ChunkType.BLOCK_STATUS_EXT, len(payload), done=done) + payload


_REPLIES: Final[dict[ReplyMode, Replies]] = {
    replies.mode: replies for replies in (SimpleReplies(), StructuredReplies(), ExtendedReplies())
}


def replies_for(mode: ReplyMode) -> Replies:
    """Give the replies of the framing that was negotiated."""
    return _REPLIES[mode]


def _check_chunk(request: Request, offset: int, length: int) -> None:
    if length < 1 or offset < request.offset or offset + length > request.offset + request.length:
        raise LocalProtocolError(
            f"{length} bytes at {offset} are not within the request for {request.length} bytes at {request.offset}"
        )


def _allowed_errno(request: Request, errno: int) -> Errno:
    """The error that may really be sent: ENOTSUP means only that a zeroing would not be fast."""
    if errno == Errno.ENOTSUP and not (request.type == Command.WRITE_ZEROES and request.flags & CommandFlag.FAST_ZERO):
        return Errno.EINVAL
    if errno == Errno.OK:
        raise LocalProtocolError(f"no error given for the failed request {request.cookie:#x}")
    try:
        return Errno(errno)
    except ValueError:
        raise LocalProtocolError(f"{errno} is no error that NBD knows") from None


def _sendable(text: str) -> str:
    """A text as the specification allows strings: no NUL, at most 4096 bytes, cut between characters."""
    encoded = text.replace("\0", "\ufffd").encode(errors="replace")
    return encoded[:MAX_STRING_BYTES].decode(errors="ignore")


def _told_extents(request: Request, extents: Extents, longest: int) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    wanted = request.length
    at_most = 1 if request.flags & _REQ_ONE else MAX_EXTENTS
    for length, flags in extents:
        if length < 1:
            raise LocalProtocolError(f"extent {len(told)} of the status at {request.offset} has {length} bytes")
        if at_most == 1:
            length = min(length, wanted)
        cut = length > longest
        told.append((longest if cut else length, flags))
        wanted -= length
        if cut or wanted <= 0 or len(told) == at_most:
            break
    if not told:
        raise LocalProtocolError(f"no extents for the status of {request.length} bytes at {request.offset}")
    return told


def _packed_extents(codec: Codec, extents: list[tuple[int, int]]) -> bytes:
    pack = codec.struct.pack
    try:
        return b"".join([pack(length, flags) for length, flags in extents])
    except struct.error as error:
        raise LocalProtocolError(f"status flags that do not fit into an {codec.name}: {error}") from error
