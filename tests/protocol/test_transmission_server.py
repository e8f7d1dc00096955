"""Requests as the server finds them."""

import pytest
from construct import Struct

from nbd_protocol import messages
from nbd_protocol.constants import (
    LARGE_PAYLOAD_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_SWALLOWED_PAYLOAD_BYTES,
    MIB,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.transmission import Batch, Request, ServerTransmission

COMPACT = [ReplyMode.SIMPLE, ReplyMode.STRUCTURED]


def raw(mode: ReplyMode, command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7) -> bytes:
    """A request header, built by construct."""
    layout: Struct = messages.EXTENDED_REQUEST if mode is ReplyMode.EXTENDED else messages.REQUEST
    if mode is ReplyMode.EXTENDED and command == Command.WRITE:
        flags |= CommandFlag.PAYLOAD_LEN
    built: bytes = layout.build({"flags": flags, "type": command, "cookie": cookie, "offset": offset, "length": length})
    return built


def parse(transmission: ServerTransmission, data: bytes, max_requests: int = 64) -> Batch:
    return transmission.parse(memoryview(data), max_requests)


@pytest.fixture(params=ReplyMode, ids=lambda mode: mode.value)
def mode(request: pytest.FixtureRequest) -> ReplyMode:
    mode: ReplyMode = request.param
    return mode


def test_all_complete_requests_are_found_in_one_pass(mode: ReplyMode) -> None:
    data = raw(mode, Command.READ, 4096, 512, cookie=1) + raw(mode, Command.WRITE, 0, 3, cookie=2) + b"abc"
    data += raw(mode, Command.FLUSH, cookie=2**64 - 1)
    batch = parse(ServerTransmission(mode), data + b"%")
    flags = int(CommandFlag.PAYLOAD_LEN) if mode is ReplyMode.EXTENDED else 0
    assert batch == Batch(
        [
            Request(Command.READ, 0, 1, 4096, 512),
            Request(Command.WRITE, flags, 2, 0, 3, memoryview(b"abc")),
            Request(Command.FLUSH, 0, 2**64 - 1, 0, 0),
        ],
        len(data),
    )


def test_payloads_are_read_only_slices_of_what_was_received(mode: ReplyMode) -> None:
    received = bytearray(raw(mode, Command.WRITE, 0, 4) + b"data")
    batch = ServerTransmission(mode).parse(memoryview(received), 1)
    payload = batch.requests[0].payload
    assert payload is not None
    assert payload.obj is received
    assert payload.readonly


def test_parsing_stops_at_the_wanted_number_of_requests(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    data = raw(mode, Command.FLUSH) * 5
    batch = parse(transmission, data, 2)
    assert (len(batch.requests), batch.consumed, batch.needs_data) == (2, 2 * transmission.header_size, False)
    assert parse(transmission, data[batch.consumed :], 64).needs_data


def test_an_incomplete_small_write_is_left_to_be_given_again(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    first = raw(mode, Command.READ, 0, 1)
    data = first + raw(mode, Command.WRITE, 0, LARGE_PAYLOAD_BYTES - 1) + bytes(LARGE_PAYLOAD_BYTES - 2)
    batch = parse(transmission, data)
    assert (len(batch.requests), batch.consumed, batch.partial, batch.needs_data) == (1, len(first), None, True)
    batch = parse(transmission, data[len(first) :] + b"!")
    assert [request.length for request in batch.requests] == [LARGE_PAYLOAD_BYTES - 1]


def test_the_header_of_an_incomplete_large_write_is_given_at_once(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    header = raw(mode, Command.WRITE, 512, LARGE_PAYLOAD_BYTES, cookie=3)
    batch = parse(transmission, header + b"begin of data")
    assert batch.requests == []
    assert batch.consumed == len(header)
    assert batch.partial is not None
    assert (batch.partial.cookie, batch.partial.length, batch.partial.payload) == (3, LARGE_PAYLOAD_BYTES, None)
    payload = memoryview(bytes(LARGE_PAYLOAD_BYTES))
    assert batch.partial.with_payload(payload).payload is payload
    # The caller has taken the payload; what follows it is a header again.
    assert parse(transmission, raw(mode, Command.FLUSH)).requests[0].type == Command.FLUSH


def test_a_large_write_that_is_all_here_needs_no_collecting(mode: ReplyMode) -> None:
    data = raw(mode, Command.WRITE, 0, 2 * LARGE_PAYLOAD_BYTES) + bytes(2 * LARGE_PAYLOAD_BYTES)
    batch = parse(ServerTransmission(mode), data)
    assert batch.partial is None
    assert bytes(batch.requests[0].payload or b"") == bytes(2 * LARGE_PAYLOAD_BYTES)


def test_the_payload_of_a_refused_partial_write_can_be_swallowed(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    batch = parse(transmission, raw(mode, Command.WRITE, 0, LARGE_PAYLOAD_BYTES))
    assert batch.partial is not None
    transmission.swallow(batch.partial.length)
    half = LARGE_PAYLOAD_BYTES // 2
    assert parse(transmission, bytes(half)) == Batch([], half)
    batch = parse(transmission, bytes(half) + raw(mode, Command.FLUSH))
    assert [request.type for request in batch.requests] == [Command.FLUSH]


def test_only_a_payload_can_be_swallowed(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    for length in (-1, transmission.max_payload + 1):
        with pytest.raises(LocalProtocolError):
            transmission.swallow(length)


@pytest.mark.parametrize("length", [0, 1, LARGE_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES])
def test_conformance_15_writes_up_to_32_mib_are_always_served(mode: ReplyMode, length: int) -> None:
    # Even where less was advertised.
    transmission = ServerTransmission(mode, max_payload=MIB)
    batch = parse(transmission, raw(mode, Command.WRITE, 0, length) + bytes(length))
    assert [(request.length, request.refused) for request in batch.requests] == [(length, None)]


@pytest.mark.parametrize("mode", COMPACT)
def test_conformance_15_refused_write_swallows_its_payload(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    length = MAX_PAYLOAD_BYTES + 1
    header = raw(mode, Command.WRITE, 0, length, cookie=5)
    batch = parse(transmission, header + bytes(1000))
    (refused,) = batch.requests
    assert (refused.cookie, refused.refused, refused.payload) == (5, Errno.EINVAL, None)
    assert "33554433" in refused.reason
    assert batch.consumed == len(header) + 1000
    remaining = length - 1000
    while remaining > MIB:
        assert parse(transmission, bytes(MIB)) == Batch([], MIB)
        remaining -= MIB
    batch = parse(transmission, bytes(remaining) + raw(mode, Command.READ, 0, 8, cookie=6))
    assert [request.cookie for request in batch.requests] == [6]


@pytest.mark.parametrize("mode", COMPACT)
def test_conformance_15_a_write_too_long_to_skip_ends_the_connection(mode: ReplyMode) -> None:
    with pytest.raises(RemoteProtocolError, match=r"4294967295 bytes is too long to skip \(at most 67108864\)"):
        parse(ServerTransmission(mode), raw(mode, Command.WRITE, 0, 2**32 - 1))
    swallowed = parse(ServerTransmission(mode), raw(mode, Command.WRITE, 0, MAX_SWALLOWED_PAYLOAD_BYTES))
    assert swallowed.requests[0].refused is Errno.EINVAL


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.BLOCK_STATUS, Command.CACHE])
def test_conformance_15_long_effects_are_not_payloads(mode: ReplyMode, command: Command) -> None:
    length = 2**40 if mode is ReplyMode.EXTENDED else 2**32 - 1
    batch = parse(ServerTransmission(mode), raw(mode, command, 0, length) + raw(mode, Command.FLUSH))
    assert [(request.type, request.length) for request in batch.requests] == [(command, length), (Command.FLUSH, 0)]


def test_conformance_16_unknown_commands_keep_the_stream(mode: ReplyMode) -> None:
    batch = parse(ServerTransmission(mode), raw(mode, 999, 1, 2, 0x8000) + raw(mode, Command.FLUSH))
    assert batch.requests[0] == Request(999, 0x8000, 7, 1, 2)
    assert batch.requests[1].type == Command.FLUSH


def test_conformance_17_zero_length_is_never_a_disconnect(mode: ReplyMode) -> None:
    data = b"".join(raw(mode, command) for command in Command if command is not Command.DISC)
    batch = parse(ServerTransmission(mode), data)
    assert [request.type for request in batch.requests] == [c for c in Command if c is not Command.DISC]
    assert all(request.refused is None for request in batch.requests)
    assert batch.requests[1].payload == memoryview(b"")


def test_conformance_21_nothing_is_read_after_disc(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    data = raw(mode, Command.READ, 0, 1) + raw(mode, Command.DISC) + b"garbage of whatever length, and more of it"
    batch = parse(transmission, data)
    assert [request.type for request in batch.requests] == [Command.READ, Command.DISC]
    assert batch.consumed == len(data)
    assert transmission.disconnected
    assert parse(transmission, b"more garbage") == Batch([], 12)


def test_conformance_22_cookies_are_opaque(mode: ReplyMode) -> None:
    cookies = [0, 2**64 - 1, 5, 5, 0]
    batch = parse(ServerTransmission(mode), b"".join(raw(mode, Command.FLUSH, cookie=cookie) for cookie in cookies))
    assert [request.cookie for request in batch.requests] == cookies


def test_conformance_23_extended_lengths_have_64_bits() -> None:
    mode = ReplyMode.EXTENDED
    batch = parse(ServerTransmission(mode), raw(mode, Command.TRIM, 2**64 - 1, 2**64 - 1))
    assert (batch.requests[0].offset, batch.requests[0].length) == (2**64 - 1, 2**64 - 1)


def test_conformance_23_a_write_beyond_the_maximum_ends_the_connection() -> None:
    mode = ReplyMode.EXTENDED
    with pytest.raises(RemoteProtocolError, match="33554433 bytes"):
        parse(ServerTransmission(mode), raw(mode, Command.WRITE, 0, MAX_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize("length", [0, 512])
def test_conformance_23_a_write_may_lack_payload_len(length: int) -> None:
    """QEMU 10's client never sets it: whatever the length of a WRITE says comes behind it."""
    header = messages.EXTENDED_REQUEST.build({"flags": 0, "type": 1, "cookie": 4, "offset": 0, "length": length})
    data = header + bytes(length) + raw(ReplyMode.EXTENDED, Command.FLUSH, cookie=5)
    expected = [Request(1, 0, 4, 0, length, memoryview(bytes(length))), Request(3, 0, 5, 0, 0)]
    assert parse(ServerTransmission(ReplyMode.EXTENDED), data).requests == expected


@pytest.mark.parametrize("command", [Command.READ, Command.TRIM, Command.FLUSH, Command.WRITE_ZEROES, 77])
def test_conformance_23_an_unexpected_payload_is_swallowed(command: int) -> None:
    mode = ReplyMode.EXTENDED
    transmission = ServerTransmission(mode)
    header = raw(mode, command, 0, 100, CommandFlag.PAYLOAD_LEN, cookie=8)
    batch = parse(transmission, header + bytes(40))
    assert [(request.cookie, request.refused) for request in batch.requests] == [(8, Errno.EINVAL)]
    batch = parse(transmission, bytes(60) + raw(mode, Command.FLUSH, cookie=9))
    assert [request.cookie for request in batch.requests] == [9]


def test_conformance_23_the_payload_form_of_block_status() -> None:
    mode = ReplyMode.EXTENDED
    payload = messages.BLOCK_STATUS_PAYLOAD.build(messages.BlockStatusPayload(2**40, (3, 1)))
    header = raw(mode, Command.BLOCK_STATUS, 512, len(payload), CommandFlag.PAYLOAD_LEN)
    transmission = ServerTransmission(mode)
    assert parse(transmission, header + payload[:-1]) == Batch([], 0)
    (request,) = parse(transmission, header + payload).requests
    assert (request.offset, request.length, request.context_ids, request.refused) == (512, 2**40, (3, 1), None)


@pytest.mark.parametrize("length", [0, 4, 7, 13, messages.MAX_BLOCK_STATUS_PAYLOAD_BYTES + 4])
def test_conformance_23_a_malformed_payload_of_block_status_is_swallowed(length: int) -> None:
    mode = ReplyMode.EXTENDED
    header = raw(mode, Command.BLOCK_STATUS, 0, length, CommandFlag.PAYLOAD_LEN)
    batch = parse(ServerTransmission(mode), header + bytes(length) + raw(mode, Command.FLUSH))
    assert [(request.type, request.refused) for request in batch.requests] == [(7, Errno.EINVAL), (3, None)]


@pytest.mark.parametrize("mode", COMPACT)
def test_payload_len_says_nothing_without_extended_headers(mode: ReplyMode) -> None:
    data = raw(mode, Command.READ, 0, 100, CommandFlag.PAYLOAD_LEN) + raw(mode, Command.FLUSH)
    assert len(parse(ServerTransmission(mode), data).requests) == 2


def test_a_bad_magic_ends_the_connection_for_good(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=r"request magic is 0x47455420, expected 0x2"):
            parse(transmission, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    with pytest.raises(RemoteProtocolError):
        parse(transmission, raw(mode, Command.FLUSH))


def test_the_magic_of_the_other_framing_is_a_bad_one(mode: ReplyMode) -> None:
    other = ReplyMode.SIMPLE if mode is ReplyMode.EXTENDED else ReplyMode.EXTENDED
    with pytest.raises(RemoteProtocolError):
        parse(ServerTransmission(mode), raw(other, Command.FLUSH) + bytes(8))


def test_requests_before_a_fault_are_not_lost(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    good = raw(mode, Command.FLUSH)
    batch = parse(transmission, good + b"bad!" + bytes(28))
    assert (len(batch.requests), batch.consumed, batch.needs_data) == (1, len(good), False)
    with pytest.raises(RemoteProtocolError, match="magic is 0x62616421"):
        parse(transmission, b"bad!" + bytes(28))
