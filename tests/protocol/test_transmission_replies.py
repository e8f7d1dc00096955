"""Answers as the server writes them, read back by construct."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol import messages
from nbd_protocol.constants import (
    MAX_EXTENT_LENGTH_32,
    MAX_EXTENTS,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError
from nbd_protocol.transmission import Replies, Request, replies_for

CHUNKED = [ReplyMode.STRUCTURED, ReplyMode.EXTENDED]
READ = Request(Command.READ, 0, 0xC00C1E, 4096, 1024)
STATUS = Request(Command.BLOCK_STATUS, 0, 0xC00C1E, 4096, 1024)


def chunk_header(mode: ReplyMode, raw: bytes) -> tuple[Any, bytes]:
    layout = messages.EXTENDED_CHUNK if mode is ReplyMode.EXTENDED else messages.STRUCTURED_CHUNK
    header = layout.parse(raw)
    payload = raw[layout.sizeof() :]
    if mode is ReplyMode.EXTENDED:
        assert header.offset == 4096, "the reply repeats the offset of the request"
    return header, payload


def extents_of(mode: ReplyMode, raw: bytes) -> tuple[int, list[tuple[int, int]]]:
    header, payload = chunk_header(mode, raw)
    assert header.length == len(payload)
    extended = mode is ReplyMode.EXTENDED
    assert header.type == (ChunkType.BLOCK_STATUS_EXT if extended else ChunkType.BLOCK_STATUS)
    head = (messages.BLOCK_STATUS_EXT if extended else messages.BLOCK_STATUS).parse(payload)
    layout = messages.EXTENT_EXT if extended else messages.EXTENT
    descriptors = payload[8 if extended else 4 :]
    size = layout.sizeof()
    parsed = [layout.parse(descriptors[i : i + size]) for i in range(0, len(descriptors), size)]
    if extended:
        assert head.count == len(parsed)
    return head.context_id, [(extent.length, extent.flags) for extent in parsed]


@pytest.mark.parametrize("mode", ReplyMode)
def test_replies_for(mode: ReplyMode) -> None:
    replies = replies_for(mode)
    assert replies.mode is mode
    assert replies.can_send_holes == (mode is not ReplyMode.SIMPLE)
    expected = {ReplyMode.SIMPLE: 16, ReplyMode.STRUCTURED: 28, ReplyMode.EXTENDED: 40}
    assert replies.read_header_size == expected[mode]


@pytest.mark.parametrize("mode", ReplyMode)
@given(cookie=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**63), length=st.integers(1, 2**25))
def test_the_header_of_a_whole_read_is_packed_in_place(mode: ReplyMode, cookie: int, offset: int, length: int) -> None:
    replies = replies_for(mode)
    buffer = bytearray(b"\xaa" * 50)
    replies.pack_read_header(buffer, 3, cookie, offset, length)
    request = Request(Command.READ, 0, cookie, offset, length)
    packed = bytes(buffer[3 : 3 + replies.read_header_size])
    assert packed == replies.read_data(request, offset, length, done=True)
    assert buffer[:3] == b"\xaa" * 3
    assert set(buffer[3 + replies.read_header_size :]) <= {0xAA}


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_read_of_nothing_is_answered_without_data(mode: ReplyMode) -> None:
    with pytest.raises(LocalProtocolError):
        replies_for(mode).pack_read_header(bytearray(50), 0, 1, 0, 0)
    empty = Request(Command.READ, 0, 1, 0, 0)
    with pytest.raises(LocalProtocolError):
        replies_for(mode).read_data(empty, 0, 0, done=True)
    assert replies_for(mode).done(empty)


@pytest.mark.parametrize("mode", ReplyMode)
def test_a_successful_end_among_other_answers(mode: ReplyMode) -> None:
    replies = replies_for(mode)
    buffer = bytearray(b"\xaa" * (3 + replies.done_size + 3))
    replies.pack_done(buffer, 3, READ.cookie, READ.offset)
    assert bytes(buffer) == b"\xaa" * 3 + replies.done(READ) + b"\xaa" * 3


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_13_a_read_in_chunks_has_done_on_the_last_only(mode: ReplyMode) -> None:
    replies = replies_for(mode)
    data, payload = chunk_header(mode, replies.read_data(READ, 4096, 512, done=False))
    assert (data.type, data.flags, data.length) == (ChunkType.OFFSET_DATA, 0, 8 + 512)
    assert messages.OFFSET_DATA.parse(payload).offset == 4096
    hole, payload = chunk_header(mode, replies.read_hole(READ, 4608, 512, done=True))
    assert (hole.type, hole.flags, hole.length, len(payload)) == (ChunkType.OFFSET_HOLE, ChunkFlag.DONE, 12, 12)
    parsed = messages.OFFSET_HOLE.parse(payload)
    assert (parsed.offset, parsed.length) == (4608, 512)
    none, payload = chunk_header(mode, replies.done(READ))
    assert (none.type, none.flags, none.length, payload) == (ChunkType.NONE, ChunkFlag.DONE, 0, b"")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_13_a_failed_read_is_answered_structured_with_a_text(mode: ReplyMode) -> None:
    header, payload = chunk_header(mode, replies_for(mode).error(READ, Errno.EINVAL, "wrong: ü"))
    assert (header.type, header.flags, header.length) == (ChunkType.ERROR, ChunkFlag.DONE, len(payload))
    assert messages.ERROR_CHUNK.parse(payload) == messages.ErrorChunk(Errno.EINVAL, "wrong: ü")
    header, payload = chunk_header(mode, replies_for(mode).error(READ, Errno.EIO, "here", 5000))
    assert (header.type, header.length) == (ChunkType.ERROR_OFFSET, len(payload))
    assert messages.ERROR_OFFSET_CHUNK.parse(payload) == messages.ErrorOffsetChunk(Errno.EIO, "here", 5000)


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_13_a_df_read_of_64_kib_is_one_chunk(mode: ReplyMode) -> None:
    request = Request(Command.READ, CommandFlag.DF, 1, 4096, 65536)
    header, _ = chunk_header(mode, replies_for(mode).read_data(request, 4096, 65536, done=True))
    assert (header.flags, header.length) == (ChunkFlag.DONE, 8 + 65536)


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize(("offset", "length"), [(4095, 1), (4096, 1025), (5119, 2), (5120, 1), (4096, 0), (4096, -1)])
def test_conformance_13_chunks_lie_within_the_request(mode: ReplyMode, offset: int, length: int) -> None:
    for chunk in (replies_for(mode).read_data, replies_for(mode).read_hole):
        with pytest.raises(LocalProtocolError):
            chunk(READ, offset, length, done=True)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("offset", [4095, 5120])
def test_an_error_offset_lies_within_the_request(mode: ReplyMode, offset: int) -> None:
    with pytest.raises(LocalProtocolError):
        replies_for(mode).error(READ, Errno.EIO, "", offset)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("text", ["x" * 5000, "ü" * 3000, "a\0b", "\udc80"])
def test_texts_are_made_sendable(mode: ReplyMode, text: str) -> None:
    _, payload = chunk_header(mode, replies_for(mode).error(READ, Errno.EIO, text))
    sent = messages.ERROR_CHUNK.parse(payload).text
    assert 0 < len(sent.encode()) <= 4096
    assert "\0" not in sent


def test_simple_replies() -> None:
    replies = replies_for(ReplyMode.SIMPLE)
    for raw, error in [
        (replies.done(READ), 0),
        (replies.read_data(READ, 4096, 1024, done=True), 0),
        (replies.error(READ, Errno.EIO, "nobody will read this", 5000), 5),
    ]:
        parsed = messages.SIMPLE_REPLY.parse(raw)
        assert (parsed.error, parsed.cookie, len(raw)) == (error, 0xC00C1E, 16)


def test_simple_replies_know_only_whole_reads() -> None:
    replies = replies_for(ReplyMode.SIMPLE)
    for offset, length, done in [(4096, 512, False), (4096, 512, True), (4608, 512, True), (4096, 1024, False)]:
        with pytest.raises(LocalProtocolError):
            replies.read_data(READ, offset, length, done=done)
    with pytest.raises(LocalProtocolError):
        replies.read_hole(READ, 4096, 1024, done=True)
    with pytest.raises(LocalProtocolError):
        replies.block_status(STATUS, 1, [(1024, 0)], done=True)


@pytest.mark.parametrize("mode", ReplyMode)
def test_only_nbd_errors_are_sent(mode: ReplyMode) -> None:
    for error in (Errno.OK, 2, 9999):
        with pytest.raises(LocalProtocolError):
            replies_for(mode).error(READ, error)  # type: ignore[arg-type]  # that it is refused is what is tested


@pytest.mark.parametrize("mode", ReplyMode)
@pytest.mark.parametrize("flags", [0, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO])
@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
def test_conformance_18_enotsup_comes_nowhere_else(mode: ReplyMode, flags: int, command: Command) -> None:
    request = Request(command, flags, 1, 4096, 512)
    raw = replies_for(mode).error(request, Errno.ENOTSUP)
    expected = Errno.ENOTSUP if flags == CommandFlag.FAST_ZERO and command is Command.WRITE_ZEROES else Errno.EINVAL
    if mode is ReplyMode.SIMPLE:
        assert messages.SIMPLE_REPLY.parse(raw).error == expected
    else:
        _, payload = chunk_header(mode, raw)
        assert messages.ERROR_CHUNK.parse(payload).error == expected


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_19_one_chunk_for_each_context(mode: ReplyMode) -> None:
    replies = replies_for(mode)
    first = replies.block_status(STATUS, 7, [(512, 0), (512, 3)], done=False)
    second = replies.block_status(STATUS, 8, [(1024, 1)], done=True)
    assert chunk_header(mode, first)[0].flags == 0
    assert chunk_header(mode, second)[0].flags == ChunkFlag.DONE
    assert extents_of(mode, first) == (7, [(512, 0), (512, 3)])
    assert extents_of(mode, second) == (8, [(1024, 1)])


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_19_all_but_the_last_extent_end_within_the_request(mode: ReplyMode) -> None:
    extents = [(1000, 0), (24, 1), (512, 0), (512, 1)]
    assert extents_of(mode, replies_for(mode).block_status(STATUS, 1, extents, done=True))[1] == extents[:2]
    extents = [(1000, 0), (4096, 1), (512, 0)]
    assert extents_of(mode, replies_for(mode).block_status(STATUS, 1, extents, done=True))[1] == extents[:2]


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_19_req_one_is_one_extent_within_the_request(mode: ReplyMode) -> None:
    one = Request(Command.BLOCK_STATUS, CommandFlag.REQ_ONE, 1, 4096, 1024)
    for extents, expected in [([(512, 3), (512, 0)], (512, 3)), ([(4096, 1)], (1024, 1))]:
        assert extents_of(mode, replies_for(mode).block_status(one, 1, extents, done=True))[1] == [expected]


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("extents", [[], [(0, 0)], [(512, 0), (0, 1), (512, 0)], [(-1, 0)]])
def test_conformance_19_there_is_no_empty_extent(mode: ReplyMode, extents: list[tuple[int, int]]) -> None:
    with pytest.raises(LocalProtocolError):
        replies_for(mode).block_status(STATUS, 1, extents, done=True)


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_19_at_most_2_20_extents_in_a_chunk(mode: ReplyMode) -> None:
    request = Request(Command.BLOCK_STATUS, 0, 1, 4096, 2**31)
    raw = replies_for(mode).block_status(request, 1, [(1, 0)] * (MAX_EXTENTS + 5), done=True)
    header, _ = chunk_header(mode, raw)
    assert header.length == (8 + 16 * MAX_EXTENTS if mode is ReplyMode.EXTENDED else 4 + 8 * MAX_EXTENTS)


def test_conformance_19_an_extent_too_long_for_32_bits_is_cut() -> None:
    longest = Request(Command.BLOCK_STATUS, 0, 1, 4096, 0xFFFFFFFF)
    for extents, expected in [
        ([(1 << 40, 1)], [(MAX_EXTENT_LENGTH_32, 1)]),
        ([(512, 0), (1 << 32, 1), (512, 0)], [(512, 0), (MAX_EXTENT_LENGTH_32, 1)]),
        ([(MAX_EXTENT_LENGTH_32, 1), (512, 0)], [(MAX_EXTENT_LENGTH_32, 1), (512, 0)]),
    ]:
        raw = replies_for(ReplyMode.STRUCTURED).block_status(longest, 1, extents, done=True)
        assert extents_of(ReplyMode.STRUCTURED, raw)[1] == expected


def test_conformance_23_extended_block_status_has_64_bits() -> None:
    request = Request(Command.BLOCK_STATUS, 0, 1, 4096, 1 << 41)
    extents = [(1 << 40, 1 << 63), (1 << 40, 0)]
    raw = replies_for(ReplyMode.EXTENDED).block_status(request, 1, extents, done=True)
    assert extents_of(ReplyMode.EXTENDED, raw)[1] == extents


@pytest.mark.parametrize("mode", CHUNKED)
def test_status_flags_that_do_not_fit_are_our_error(mode: ReplyMode) -> None:
    with pytest.raises(LocalProtocolError, match="extent"):
        replies_for(mode).block_status(STATUS, 1, [(512, 1 << 64)], done=True)


@pytest.mark.parametrize("mode", ReplyMode)
def test_conformance_22_eshutdown_can_be_told(mode: ReplyMode) -> None:
    raw = replies_for(mode).error(READ, Errno.ESHUTDOWN, "the server is stopping")
    if mode is ReplyMode.SIMPLE:
        assert messages.SIMPLE_REPLY.parse(raw).error == Errno.ESHUTDOWN
    else:
        assert messages.ERROR_CHUNK.parse(chunk_header(mode, raw)[1]).error == Errno.ESHUTDOWN


def test_conformance_23_no_simple_replies_with_extended_headers() -> None:
    replies: Replies = replies_for(ReplyMode.EXTENDED)
    flush = Request(Command.FLUSH, 0, 1, 4096, 0)
    for raw in (replies.done(flush), replies.error(flush, Errno.EIO)):
        assert raw[:4] == bytes.fromhex("6e8a278c")
