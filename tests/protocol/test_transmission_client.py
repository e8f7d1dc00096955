"""Requests as the client sends them, and what it makes of replies, honest and lying ones."""

from typing import Any

import pytest

from nbd_protocol import messages
from nbd_protocol.constants import (
    LARGE_PAYLOAD_BYTES,
    MAX_EXTENTS,
    MAX_PAYLOAD_BYTES,
    ChunkFlag,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.transmission import (
    ClientTransmission,
    DataChunk,
    Done,
    ErrorChunk,
    Event,
    HoleChunk,
    StatusChunk,
)

SIMPLE, STRUCTURED, EXTENDED = ReplyMode
CHUNKED = [STRUCTURED, EXTENDED]
DONE = int(ChunkFlag.DONE)
CONTEXTS = (11, 12)


def client(mode: ReplyMode) -> ClientTransmission:
    return ClientTransmission(mode, context_ids=() if mode is SIMPLE else CONTEXTS)


def receive(transmission: ClientTransmission, data: bytes) -> list[Event]:
    """Take in data that have to be consumed to the last byte."""
    events, consumed = transmission.receive(memoryview(data))
    assert consumed == len(data)
    return events


def chunk(
    mode: ReplyMode, cookie: int, type_: int, payload: bytes = b"", flags: int = DONE, offset: int = 4096
) -> bytes:
    """A chunk, built by construct."""
    values = {"flags": flags, "type": type_, "cookie": cookie, "offset": offset, "length": len(payload)}
    built: bytes = (messages.EXTENDED_CHUNK if mode is EXTENDED else messages.STRUCTURED_CHUNK).build(values)
    return built + payload


def simple(cookie: int, error: int = 0) -> bytes:
    built: bytes = messages.SIMPLE_REPLY.build({"error": error, "cookie": cookie})
    return built


def data_payload(offset: int, data: bytes) -> bytes:
    built: bytes = messages.OFFSET_DATA.build({"offset": offset})
    return built + data


def hole_payload(offset: int, length: int) -> bytes:
    built: bytes = messages.OFFSET_HOLE.build({"offset": offset, "length": length})
    return built


def status_payload(mode: ReplyMode, context_id: int, *extents: tuple[int, int], count: int | None = None) -> bytes:
    head = messages.BLOCK_STATUS_EXT if mode is EXTENDED else messages.BLOCK_STATUS
    layout = messages.EXTENT_EXT if mode is EXTENDED else messages.EXTENT
    payload: bytes = head.build({"context_id": context_id, "count": len(extents) if count is None else count})
    return payload + b"".join(layout.build({"length": length, "flags": flags}) for length, flags in extents)


def error_payload(error: int, text: str = "") -> bytes:
    return messages.ERROR_CHUNK.build(messages.ErrorChunk(error, text))


def parsed_request(mode: ReplyMode, buffers: list[Any]) -> tuple[Any, bytes]:
    raw = b"".join(buffers)
    layout = messages.EXTENDED_REQUEST if mode is EXTENDED else messages.REQUEST
    return layout.parse(raw), raw[layout.sizeof() :]


@pytest.fixture(params=ReplyMode, ids=lambda mode: mode.value)
def mode(request: pytest.FixtureRequest) -> ReplyMode:
    mode: ReplyMode = request.param
    return mode


# Requests ---------------------------------------------------------------------------------------------------


def test_a_request_on_the_wire(mode: ReplyMode) -> None:
    cookie, buffers = client(mode).request(Command.TRIM, 512, 1024, CommandFlag.FUA)
    header, rest = parsed_request(mode, buffers)
    assert (header.type, header.flags, header.cookie) == (Command.TRIM, CommandFlag.FUA, cookie)
    assert (header.offset, header.length, rest) == (512, 1024, b"")


@pytest.mark.parametrize("payload", [b"data", bytearray(b"data"), memoryview(b"data"), memoryview(b"data").cast("I")])
def test_the_payload_of_a_write_is_not_copied(mode: ReplyMode, payload: Any) -> None:
    _, buffers = client(mode).request(Command.WRITE, 512, payload=payload)
    header, rest = parsed_request(mode, [buffers[0]])
    assert (header.length, rest, len(buffers)) == (4, b"", 2)
    assert memoryview(buffers[1]).obj is memoryview(payload).obj


def test_conformance_23_every_write_has_payload_len_with_extended_headers(mode: ReplyMode) -> None:
    for payload in (b"", b"data"):
        header, rest = parsed_request(mode, client(mode).request(Command.WRITE, payload=payload)[1])
        assert bool(header.flags & CommandFlag.PAYLOAD_LEN) == (mode is EXTENDED)
        assert rest == payload


def test_conformance_23_the_payload_form_of_block_status() -> None:
    _, buffers = client(EXTENDED).request(Command.BLOCK_STATUS, 0, 1 << 40, context_ids=[12])
    header, rest = parsed_request(EXTENDED, buffers)
    assert (header.flags, header.length) == (CommandFlag.PAYLOAD_LEN, 12)
    assert messages.BLOCK_STATUS_PAYLOAD.parse(rest) == messages.BlockStatusPayload(1 << 40, (12,))


def test_cookies_are_distinct_from_all_outstanding_ones(mode: ReplyMode) -> None:
    transmission = client(mode)
    cookies = {transmission.request(Command.FLUSH)[0] for _ in range(100)}
    assert len(cookies) == transmission.outstanding == 100


@pytest.mark.parametrize(
    "arguments",
    [
        {"command": Command.READ, "length": MAX_PAYLOAD_BYTES + 1},
        {"command": Command.READ, "length": -1},
        {"command": Command.READ, "offset": -1},
        {"command": Command.READ, "offset": 2**64 - 1, "length": 1},
        {"command": Command.READ, "payload": b"data"},
        {"command": Command.READ, "flags": 0x40},
        {"command": Command.READ, "flags": -1},
        {"command": Command.READ, "flags": CommandFlag.PAYLOAD_LEN},
        {"command": Command.READ, "context_ids": [11]},
        {"command": Command.WRITE},
        {"command": Command.WRITE, "payload": bytes(MAX_PAYLOAD_BYTES + 1)},
        {"command": Command.TRIM, "length": 2**64},
        {"command": Command.BLOCK_STATUS, "length": 1, "context_ids": []},
        {"command": Command.BLOCK_STATUS, "length": 1, "context_ids": [99]},
        {"command": 99},
    ],
    ids=lambda arguments: " ".join(str(value)[:20] for value in arguments.values()),
)
def test_what_the_protocol_cannot_say_is_our_error(mode: ReplyMode, arguments: dict[str, Any]) -> None:
    transmission = client(mode)
    with pytest.raises(LocalProtocolError):
        transmission.request(**arguments)
    assert transmission.outstanding == 0


@pytest.mark.parametrize(
    ("impossible_in", "arguments"),
    [
        ({SIMPLE}, {"command": Command.READ, "length": 1, "flags": CommandFlag.DF}),
        ({SIMPLE}, {"command": Command.BLOCK_STATUS, "length": 1}),
        ({SIMPLE, STRUCTURED}, {"command": Command.BLOCK_STATUS, "length": 1, "context_ids": [11]}),
        ({SIMPLE, STRUCTURED}, {"command": Command.TRIM, "length": 2**32}),
        (set(), {"command": Command.TRIM, "length": 2**32 - 1}),
    ],
    ids=["DF", "BLOCK_STATUS", "payload form", "64 bits", "32 bits"],
)
def test_what_a_framing_cannot_say_is_our_error(
    mode: ReplyMode, impossible_in: set[ReplyMode], arguments: dict[str, Any]
) -> None:
    if mode in impossible_in:
        with pytest.raises(LocalProtocolError):
            client(mode).request(**arguments)
    else:
        client(mode).request(**arguments)


def test_block_status_needs_a_selected_context() -> None:
    for mode in CHUNKED:
        with pytest.raises(LocalProtocolError, match="context"):
            ClientTransmission(mode).request(Command.BLOCK_STATUS, 0, 512)


def test_conformance_21_disc_has_no_reply_and_is_the_last(mode: ReplyMode) -> None:
    transmission = client(mode)
    flush, _ = transmission.request(Command.FLUSH)
    _, buffers = transmission.request(Command.DISC)
    assert parsed_request(mode, buffers)[0].type == Command.DISC
    assert transmission.outstanding == 1
    with pytest.raises(LocalProtocolError, match="after DISC"):
        transmission.request(Command.READ, 0, 1)
    # What was outstanding is still answered.
    raw = simple(flush) if mode is SIMPLE else chunk(mode, flush, ChunkType.NONE, offset=0)
    assert receive(transmission, raw) == [Done(flush, 0)]


# Honest replies ---------------------------------------------------------------------------------------------


def test_simple_replies() -> None:
    transmission = client(SIMPLE)
    read, _ = transmission.request(Command.READ, 4096, 4)
    empty, _ = transmission.request(Command.READ, 4096, 0)
    write, _ = transmission.request(Command.WRITE, 0, payload=b"x")
    failed, _ = transmission.request(Command.READ, 0, 512)
    raw = simple(write) + simple(read) + b"data" + simple(failed, Errno.EIO) + simple(empty)
    assert receive(transmission, raw) == [
        Done(write, 0),
        DataChunk(read, 4096, 4, memoryview(b"data")),
        Done(read, 0),
        Done(failed, Errno.EIO),
        Done(empty, 0),
    ]
    assert transmission.outstanding == 0


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_read_in_chunks_of_any_order(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    raw = chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4608, b"b" * 256), 0)
    raw += chunk(mode, read, ChunkType.OFFSET_HOLE, hole_payload(4096, 512), 0)
    raw += chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4864, b"c" * 256), 0)
    assert receive(transmission, raw) == [
        DataChunk(read, 4608, 256, memoryview(b"b" * 256)),
        HoleChunk(read, 4096, 512),
        DataChunk(read, 4864, 256, memoryview(b"c" * 256)),
    ]
    assert receive(transmission, chunk(mode, read, ChunkType.NONE)) == [Done(read, 0)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_22_replies_in_any_order(mode: ReplyMode) -> None:
    transmission = client(mode)
    first, second, third = (transmission.request(Command.READ, 4096, 8)[0] for _ in range(3))
    raw = chunk(mode, third, ChunkType.OFFSET_DATA, data_payload(4096, b"3333"), 0)
    raw += chunk(mode, first, ChunkType.OFFSET_DATA, data_payload(4096, b"11111111"))
    raw += chunk(mode, second, ChunkType.OFFSET_HOLE, hole_payload(4096, 8))
    raw += chunk(mode, third, ChunkType.OFFSET_DATA, data_payload(4100, b"3333"))
    done = [event.cookie for event in receive(transmission, raw) if isinstance(event, Done)]
    assert done == [first, second, third]


@pytest.mark.parametrize("mode", CHUNKED)
def test_errors_of_every_kind(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    located = messages.ERROR_OFFSET_CHUNK.build(messages.ErrorOffsetChunk(Errno.EIO, "bad sector", 4608))
    raw = chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4096, b"x" * 512), 0)
    raw += chunk(mode, read, ChunkType.ERROR_OFFSET, located, 0)
    raw += chunk(mode, read, ChunkType.ERROR, error_payload(Errno.ENOMEM, "and more"), 0)
    raw += chunk(mode, read, 0x8077, error_payload(4711, "of some new kind") + b"more fields")
    assert receive(transmission, raw)[1:] == [
        ErrorChunk(read, Errno.EIO, "bad sector", 4608),
        ErrorChunk(read, Errno.ENOMEM, "and more", None),
        ErrorChunk(read, 4711, "of some new kind", None),
        Done(read, Errno.EIO),
    ]


def test_with_structured_replies_all_but_reads_may_be_answered_simply() -> None:
    transmission = client(STRUCTURED)
    flush, _ = transmission.request(Command.FLUSH)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 512)
    assert receive(transmission, simple(flush)) == [Done(flush, 0)]
    assert receive(transmission, simple(status, Errno.EINVAL)) == [Done(status, Errno.EINVAL)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_block_status_of_several_contexts(mode: ReplyMode) -> None:
    transmission = client(mode)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    raw = chunk(mode, status, transmission_status(mode), status_payload(mode, 12, (512, 3), (512, 0)), 0)
    raw += chunk(mode, status, transmission_status(mode), status_payload(mode, 11, (8192, 0)))
    assert receive(transmission, raw) == [
        StatusChunk(status, 12, ((512, 3), (512, 0))),
        StatusChunk(status, 11, ((8192, 0),)),
        Done(status, 0),
    ]


def transmission_status(mode: ReplyMode) -> ChunkType:
    return ChunkType.BLOCK_STATUS_EXT if mode is EXTENDED else ChunkType.BLOCK_STATUS


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_19_extents_that_nobody_asked_for_are_cut_off(mode: ReplyMode) -> None:
    transmission = ClientTransmission(mode, context_ids=[11])
    plain, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    one, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024, CommandFlag.REQ_ONE)
    told = status_payload(mode, 11, (1024, 1), (512, 0), (512, 1))
    longer = status_payload(mode, 11, (4096, 1), (512, 0))
    raw = chunk(mode, plain, transmission_status(mode), told) + chunk(mode, one, transmission_status(mode), longer)
    assert receive(transmission, raw) == [
        StatusChunk(plain, 11, ((1024, 1),)),
        Done(plain, 0),
        StatusChunk(one, 11, ((1024, 1),)),
        Done(one, 0),
    ]


def test_conformance_23_only_the_named_contexts_are_waited_for() -> None:
    transmission = client(EXTENDED)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1 << 40, context_ids=[12])
    raw = chunk(EXTENDED, status, ChunkType.BLOCK_STATUS_EXT, status_payload(EXTENDED, 12, (1 << 40, 1 << 40)))
    assert receive(transmission, raw) == [StatusChunk(status, 12, ((1 << 40, 1 << 40),)), Done(status, 0)]


def read_head(mode: ReplyMode, cookie: int, length: int, flags: int = DONE) -> bytes:
    if mode is SIMPLE:
        return simple(cookie)
    head = chunk(mode, cookie, ChunkType.OFFSET_DATA, data_payload(4096, bytes(length)), flags)
    return head[: len(head) - length]


def test_a_large_read_is_left_to_the_caller(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, LARGE_PAYLOAD_BYTES)
    flush, _ = transmission.request(Command.FLUSH, 4096)
    head = read_head(mode, read, LARGE_PAYLOAD_BYTES)
    events, consumed = transmission.receive(memoryview(head + b"begin of data"))
    assert events == [DataChunk(read, 4096, LARGE_PAYLOAD_BYTES, None)]
    assert consumed == len(head)
    assert transmission.outstanding == 2
    after = simple(flush) if mode is SIMPLE else chunk(mode, flush, ChunkType.NONE)
    assert receive(transmission, b"") == [Done(read, 0)]
    assert receive(transmission, after) == [Done(flush, 0)]


def test_the_end_of_a_large_read_comes_with_what_follows_it(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, LARGE_PAYLOAD_BYTES)
    flush, _ = transmission.request(Command.FLUSH, 4096)
    transmission.receive(memoryview(read_head(mode, read, LARGE_PAYLOAD_BYTES)))
    after = simple(flush) if mode is SIMPLE else chunk(mode, flush, ChunkType.NONE)
    assert receive(transmission, after) == [Done(read, 0), Done(flush, 0)]


def test_a_small_read_is_given_whole(mode: ReplyMode) -> None:
    transmission = client(mode)
    length = LARGE_PAYLOAD_BYTES - 1
    read, _ = transmission.request(Command.READ, 4096, length)
    raw = read_head(mode, read, length) + bytes(length)
    assert transmission.receive(memoryview(raw[:-1])) == ([], 0)
    assert receive(transmission, raw) == [DataChunk(read, 4096, length, memoryview(bytes(length))), Done(read, 0)]


@pytest.mark.parametrize("mode", CHUNKED)
def test_a_long_block_status_is_gathered_as_it_arrives(mode: ReplyMode) -> None:
    transmission = ClientTransmission(mode, context_ids=[11])
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1 << 30)
    extents = tuple((512, i & 3) for i in range(20000))
    raw = chunk(mode, status, transmission_status(mode), status_payload(mode, 11, *extents))
    events: list[Event] = []
    tail = b""
    for i in range(0, len(raw), 10000):
        tail += raw[i : i + 10000]
        more, consumed = transmission.receive(memoryview(tail))
        events += more
        tail = tail[consumed:]
        assert len(tail) < 40
    assert events == [StatusChunk(status, 11, extents), Done(status, 0)]


# Lies -------------------------------------------------------------------------------------------------------


def assert_refused(transmission: ClientTransmission, raw: bytes, match: str) -> None:
    """The lie is refused, and the connection stays refused."""
    for data in (raw, raw, b""):
        with pytest.raises(RemoteProtocolError, match=match):
            transmission.receive(memoryview(data))
    with pytest.raises(RemoteProtocolError, match=match):
        transmission.request(Command.FLUSH)


@pytest.mark.parametrize("raw", [b"HTTP/1.1 400 Bad Request", b"\0" * 40, b"\xff" * 40])
def test_conformance_24_bad_magic(mode: ReplyMode, raw: bytes) -> None:
    assert_refused(client(mode), raw, "reply magic is 0x")


def test_conformance_24_a_bad_magic_is_noticed_at_once(mode: ReplyMode) -> None:
    assert client(mode).receive(memoryview(b"HTT")) == ([], 0)
    assert_refused(client(mode), b"HTTP", "0x48545450")


def test_conformance_24_the_replies_of_another_framing(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 4)
    flush, _ = transmission.request(Command.FLUSH, 4096)
    foreign = {
        SIMPLE: chunk(STRUCTURED, flush, ChunkType.NONE),
        STRUCTURED: simple(read) + b"data",
        EXTENDED: simple(flush),
    }
    assert_refused(transmission, foreign[mode], "repl")


def test_conformance_24_unknown_cookie(mode: ReplyMode) -> None:
    transmission = client(mode)
    raw = simple(999) if mode is SIMPLE else chunk(mode, 999, ChunkType.NONE)
    assert_refused(transmission, raw, "cookie 0x3e7, which is not outstanding")


def test_conformance_24_a_second_reply(mode: ReplyMode) -> None:
    transmission = client(mode)
    flush, _ = transmission.request(Command.FLUSH, 4096)
    raw = simple(flush) if mode is SIMPLE else chunk(mode, flush, ChunkType.NONE)
    assert receive(transmission, raw) == [Done(flush, 0)]
    assert_refused(transmission, raw, "not outstanding")


READ_LIES: dict[str, tuple[int, bytes, int, str]] = {
    "data before the request": (ChunkType.OFFSET_DATA, data_payload(4095, b"x"), 0, "outside of the request"),
    "data behind the request": (ChunkType.OFFSET_DATA, data_payload(5120, b"x"), 0, "outside of the request"),
    "data across the end": (ChunkType.OFFSET_DATA, data_payload(5000, b"x" * 121), 0, "outside of the request"),
    "data at a huge offset": (ChunkType.OFFSET_DATA, data_payload(2**64 - 1, b"x"), 0, "outside of the request"),
    "more data than asked for": (ChunkType.OFFSET_DATA, data_payload(4096, b"x" * 1025), 0, "expected 1 to 1024"),
    "no data": (ChunkType.OFFSET_DATA, data_payload(4096, b""), 0, "0 bytes of data"),
    "data without an offset": (ChunkType.OFFSET_DATA, b"1234", 0, "-4 bytes of data"),
    "hole outside": (ChunkType.OFFSET_HOLE, hole_payload(0, 512), 0, "outside of the request"),
    "hole of nothing": (ChunkType.OFFSET_HOLE, hole_payload(4096, 0), 0, "0 bytes of data"),
    "endless hole": (ChunkType.OFFSET_HOLE, hole_payload(4096, 2**32 - 1), 0, "expected 1 to 1024"),
    "hole of the wrong size": (ChunkType.OFFSET_HOLE, bytes(16), 0, "expected 12 bytes"),
    "the end too early": (ChunkType.OFFSET_DATA, data_payload(4096, b"x" * 1023), DONE, "ends after 1023 bytes"),
    "the end without anything": (ChunkType.NONE, b"", DONE, "ends after 0 bytes"),
    "NONE without DONE": (ChunkType.NONE, b"", 0, "expected no bytes and DONE"),
    "NONE with a payload": (ChunkType.NONE, b"x", DONE, "expected no bytes and DONE"),
    "unknown chunk type": (0x77, b"", DONE, "type is not known"),
    "status for a read": (ChunkType.BLOCK_STATUS, bytes(12), DONE, "chunk of type 5"),
    "error without an error": (ChunkType.ERROR, error_payload(0), DONE, "error 0"),
    "error with a short text": (ChunkType.ERROR, b"\0\0\0\5\0\x09text", DONE, "malformed NBD_REPLY_TYPE_ERROR"),
    "error with an endless text": (ChunkType.ERROR, bytes(10000), DONE, "expected at most"),
    "error of two bytes": (ChunkType.ERROR, b"\0\5", DONE, "malformed"),
    "error offset outside": (ChunkType.ERROR_OFFSET, error_payload(5) + bytes(8), DONE, "offset 0 lies outside"),
    "error offset missing": (ChunkType.ERROR_OFFSET, error_payload(5), DONE, "malformed NBD_REPLY_TYPE_ERROR_OFFSET"),
}


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("lie", READ_LIES)
def test_conformance_24_lies_about_a_read(mode: ReplyMode, lie: str) -> None:
    type_, payload, flags, match = READ_LIES[lie]
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    assert_refused(transmission, chunk(mode, read, type_, payload, flags), match)


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize(("begin", "length"), [(4096, 512), (4200, 1), (4000 + 96, 1024), (4607, 2)])
def test_conformance_24_overlapping_chunks(mode: ReplyMode, begin: int, length: int) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    receive(transmission, chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4096, b"x" * 512), 0))
    second = chunk(mode, read, ChunkType.OFFSET_HOLE, hole_payload(begin, length), 0)
    assert_refused(transmission, second, "sent twice")


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("type_", [ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE])
def test_conformance_24_data_for_a_write(mode: ReplyMode, type_: ChunkType) -> None:
    transmission = client(mode)
    write, _ = transmission.request(Command.WRITE, 4096, payload=b"12345678")
    payload = data_payload(4096, b"12345678") if type_ is ChunkType.OFFSET_DATA else hole_payload(4096, 8)
    assert_refused(transmission, chunk(mode, write, type_, payload), "only a READ")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_13_fragments_in_spite_of_df(mode: ReplyMode) -> None:
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 8, CommandFlag.DF)
    receive(transmission, chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4096, b"1234"), 0))
    second = chunk(mode, read, ChunkType.OFFSET_DATA, data_payload(4100, b"5678"))
    assert_refused(transmission, second, "several chunks")


def test_conformance_24_the_reply_repeats_the_offset() -> None:
    transmission = client(EXTENDED)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    assert_refused(transmission, chunk(EXTENDED, read, ChunkType.NONE, offset=4097), "for offset 4097")


@pytest.mark.parametrize("type_", [ChunkType.OFFSET_DATA, ChunkType.BLOCK_STATUS_EXT, ChunkType.ERROR, ChunkType.NONE])
def test_conformance_24_endless_lengths(type_: ChunkType) -> None:
    transmission = client(EXTENDED)
    command = Command.BLOCK_STATUS if type_ is ChunkType.BLOCK_STATUS_EXT else Command.READ
    cookie, _ = transmission.request(command, 4096, 1024)
    values = {"flags": 0, "type": type_, "cookie": cookie, "offset": 4096, "length": 2**64 - 8}
    assert_refused(transmission, messages.EXTENDED_CHUNK.build(values), "chunk of type")


def status_lies(mode: ReplyMode) -> dict[str, tuple[int, bytes, int, str]]:
    good, other = transmission_status(mode), transmission_status(STRUCTURED if mode is EXTENDED else EXTENDED)
    return {
        "context not asked for": (good, status_payload(mode, 99, (1024, 0)), 0, "context 99"),
        "no extent": (good, status_payload(mode, 11), 0, "expected"),
        "half an extent": (good, status_payload(mode, 11, (1024, 0)) + b"1234", 0, "expected"),
        "empty extent": (good, status_payload(mode, 11, (512, 0), (0, 1), (512, 0)), 0, "extent 1 has 0 bytes"),
        "missing context": (good, status_payload(mode, 11, (1024, 0)), DONE, r"without contexts \[12\]"),
        "no context at all": (ChunkType.NONE, b"", DONE, "without contexts"),
        "the other framing": (other, status_payload(mode, 11, (1024, 0), (1024, 0)), 0, "chunk of type"),
        "data": (ChunkType.OFFSET_DATA, data_payload(4096, b"x"), 0, "only a READ"),
    }


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("lie", status_lies(EXTENDED))
def test_conformance_24_lies_about_block_status(mode: ReplyMode, lie: str) -> None:
    type_, payload, flags, match = status_lies(mode)[lie]
    transmission = client(mode)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    assert_refused(transmission, chunk(mode, status, type_, payload, flags), match)


def test_conformance_24_a_wrong_count_of_extents() -> None:
    transmission = client(EXTENDED)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    payload = status_payload(EXTENDED, 11, (1024, 0), count=2)
    assert_refused(transmission, chunk(EXTENDED, status, ChunkType.BLOCK_STATUS_EXT, payload), "announces 2 extents")


def test_conformance_24_extents_beyond_the_end_of_the_world() -> None:
    transmission = client(EXTENDED)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    payload = status_payload(EXTENDED, 11, (512, 0), (2**64 - 1, 0))
    assert_refused(transmission, chunk(EXTENDED, status, ChunkType.BLOCK_STATUS_EXT, payload), "extent 1 has")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_24_a_context_twice(mode: ReplyMode) -> None:
    transmission = client(mode)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    raw = chunk(mode, status, transmission_status(mode), status_payload(mode, 11, (1024, 0)), 0)
    receive(transmission, raw)
    assert_refused(transmission, raw, "came before")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_24_too_many_extents(mode: ReplyMode) -> None:
    transmission = client(mode)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    sizes = (8, 16) if mode is EXTENDED else (4, 8)
    length = sizes[0] + sizes[1] * (MAX_EXTENTS + 1)
    values = {"flags": 0, "type": transmission_status(mode), "cookie": status, "offset": 4096, "length": length}
    raw = (messages.EXTENDED_CHUNK if mode is EXTENDED else messages.STRUCTURED_CHUNK).build(values)
    assert_refused(transmission, raw, "expected")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_24_endless_error_chunks(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbd_protocol.transmission_client.MAX_READ_FRAGMENTS", 10)
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    raw = chunk(mode, read, ChunkType.ERROR, error_payload(5), 0)
    for _ in range(10):
        receive(transmission, raw)
    assert_refused(transmission, raw, "more than 10 error chunks")


@pytest.mark.parametrize("mode", CHUNKED)
def test_conformance_24_endless_fragments(mode: ReplyMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbd_protocol.transmission_client.MAX_READ_FRAGMENTS", 10)
    transmission = client(mode)
    read, _ = transmission.request(Command.READ, 4096, 1024)
    for i in range(10):
        receive(transmission, chunk(mode, read, ChunkType.OFFSET_HOLE, hole_payload(4096 + 2 * i, 1), 0))
    raw = chunk(mode, read, ChunkType.OFFSET_HOLE, hole_payload(4200, 1), 0)
    assert_refused(transmission, raw, "more than 10 fragments")


def test_conformance_24_simple_success_without_the_status() -> None:
    transmission = client(STRUCTURED)
    status, _ = transmission.request(Command.BLOCK_STATUS, 4096, 1024)
    assert_refused(transmission, simple(status), "without contexts")


def test_conformance_13_simple_replies_to_reads_are_refused_with_structured_replies() -> None:
    for error in (Errno.OK, Errno.EINVAL):
        transmission = client(STRUCTURED)
        read, _ = transmission.request(Command.READ, 4096, 1024)
        assert_refused(transmission, simple(read, error), "simple reply to READ of 1024 bytes at 4096")


def test_a_lie_after_a_large_payload_is_noticed() -> None:
    transmission = client(STRUCTURED)
    read, _ = transmission.request(Command.READ, 4096, 2 * LARGE_PAYLOAD_BYTES)
    transmission.receive(memoryview(read_head(STRUCTURED, read, LARGE_PAYLOAD_BYTES)))
    assert_refused(transmission, b"", "ends after 65536 bytes")
