"""Lines 1 to 12: negotiation."""

import struct

import pytest

from nbd_protocol.constants import (
    MAX_OPTION_KEPT_BYTES,
    MAX_OPTION_SKIPPED_BYTES,
    MAX_OPTIONS,
    Command,
    Errno,
    InfoType,
    Option,
    OptionReplyType,
    ReplyMode,
    TransmissionFlag,
)
from pynbd.server.limits import ClientLimits
from tests.restless import RESTLESS, restless
from tests.server.clients import MODES, Served, serving
from tests.server.conformance.haggler import MEMORY, Haggler, go_payload, meta_payload, still_serves


async def test_conformance_01_an_unknown_client_flag_drops_the_connection(served: Served) -> None:
    for flags in (4, 1 << 31, 7):
        haggler = await Haggler.meet(served, flags)
        assert await haggler.is_closed()
    await still_serves(served)


@pytest.mark.parametrize("length", [0, 1, 4097, MAX_OPTION_KEPT_BYTES + 1, MAX_OPTION_SKIPPED_BYTES])
async def test_conformance_02_an_unknown_option_is_consumed_exactly(served: Served, length: int) -> None:
    haggler = await Haggler.meet(served)
    for option in (4, 12, 0x7FFFFFFF):
        assert await haggler.verdict(option, bytes(length)) == OptionReplyType.ERR_UNSUP
    assert await haggler.verdict(Option.LIST) == OptionReplyType.ACK


async def test_conformance_03_abort_is_acknowledged_and_closes(served: Served) -> None:
    haggler = await Haggler.meet(served)
    assert await haggler.ask(Option.ABORT) == [(OptionReplyType.ACK, b"")]
    assert await haggler.is_closed()


async def test_conformance_03_a_client_that_aborts_and_does_not_read(served: Served) -> None:
    for _ in range(20):
        haggler = await Haggler.meet(served)
        await haggler.option(Option.ABORT)
        haggler.sock.close()
    await still_serves(served)


async def test_conformance_04_options_without_payload_refuse_one(served: Served) -> None:
    haggler = await Haggler.meet(served)
    for option in (Option.LIST, Option.STRUCTURED_REPLY, Option.STARTTLS, Option.EXTENDED_HEADERS):
        assert await haggler.verdict(option, b"x") == OptionReplyType.ERR_INVALID
    assert await haggler.verdict(Option.STRUCTURED_REPLY) == OptionReplyType.ACK


async def test_conformance_04_list_has_all_names_and_ends_with_ack(served: Served) -> None:
    haggler = await Haggler.meet(served)
    replies = await haggler.ask(Option.LIST)
    names = [payload[4 : 4 + int.from_bytes(payload[:4], "big")] for _, payload in replies[:-1]]
    assert names == [b"", b"disk1"]
    assert [kind for kind, _ in replies] == [OptionReplyType.SERVER] * 2 + [OptionReplyType.ACK]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
async def test_conformance_05_ill_formed_info_and_go_are_invalid(served: Served, option: Option) -> None:
    whole = go_payload("disk1", InfoType.NAME)
    haggler = await Haggler.meet(served)
    for payload in (b"", b"\0\0\0", whole[:-1], whole + b"\0", struct.pack(">LH", 5, 0), go_payload("x" * 4097)):
        assert await haggler.verdict(option, payload) == OptionReplyType.ERR_INVALID
    assert await haggler.verdict(option, go_payload("nowhere")) == OptionReplyType.ERR_UNKNOWN
    assert await haggler.verdict(option, go_payload("disk1", 3, 77, 0, 9999)) == OptionReplyType.ACK


async def test_conformance_05_info_and_go_tell_the_same(served: Served) -> None:
    asked = go_payload("disk1", InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)
    haggler = await Haggler.meet(served)
    info = await haggler.ask(Option.INFO, asked)
    go = await haggler.ask(Option.GO, asked)
    assert info == go
    kinds = [int.from_bytes(payload[:2], "big") for kind, payload in go[:-1] if kind == OptionReplyType.INFO]
    assert InfoType.EXPORT in kinds
    assert go[-1] == (OptionReplyType.ACK, b"")


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
async def test_conformance_06_export_name_and_its_zeroes(served: Served, flags: int) -> None:
    haggler = await Haggler.meet(served, flags)
    await haggler.option(Option.EXPORT_NAME, b"disk1")
    size, _ = struct.unpack(">QH", await haggler.receive(10))
    assert size == MEMORY["size"]
    if not flags & 2:
        assert await haggler.receive(124) == bytes(124)
    # The next bytes are those of the transmission phase, exactly.
    await haggler.send(struct.pack(">LHHQQL", 0x25609513, 0, Command.READ, 5, 0, 1))
    assert await haggler.receive(17) == struct.pack(">LLQ", 0x67446698, 0, 5) + b"\0"


async def test_conformance_06_an_unknown_export_name_closes(served: Served) -> None:
    haggler = await Haggler.meet(served)
    await haggler.option(Option.EXPORT_NAME, b"nowhere")
    assert await haggler.is_closed()
    await still_serves(served)


async def test_conformance_07_go_without_info_requests_is_served(served: Served) -> None:
    """As the kernel's client sends it."""
    haggler = await Haggler.meet(served)
    replies = await haggler.ask(Option.GO, go_payload("disk1"))
    assert replies[-1][0] == OptionReplyType.ACK
    sizes = [payload for kind, payload in replies if kind == OptionReplyType.INFO and payload[:2] == b"\0\3"]
    assert all(struct.unpack(">HLLL", payload)[1] == 1 for payload in sizes)
    client = await served.connect("disk1")
    assert client.info.min_block == 1


async def test_conformance_08_no_tls_is_asked_for_where_there_is_none(served: Served) -> None:
    haggler = await Haggler.meet(served)
    assert await haggler.verdict(Option.STARTTLS) == OptionReplyType.ERR_POLICY
    verdicts = {await haggler.verdict(option) for option in (*range(3, 16), 200)}
    assert OptionReplyType.ERR_TLS_REQD not in verdicts
    assert await haggler.verdict(Option.GO, go_payload("")) == OptionReplyType.ACK


async def test_conformance_09_contexts_need_structured_or_extended(served: Served) -> None:
    for opener in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
        haggler = await Haggler.meet(served)
        asked = meta_payload("", "base:allocation")
        assert await haggler.verdict(Option.SET_META_CONTEXT, asked) == OptionReplyType.ERR_INVALID
        assert await haggler.verdict(Option.LIST_META_CONTEXT, asked) == OptionReplyType.ERR_INVALID
        assert await haggler.verdict(opener) == OptionReplyType.ACK
        replies = await haggler.ask(Option.SET_META_CONTEXT, asked)
        assert [payload[4:] for _, payload in replies] == [b"base:allocation", b""]


async def test_conformance_09_which_queries_select_what(served: Served) -> None:
    haggler = await Haggler.meet(served)
    await haggler.verdict(Option.STRUCTURED_REPLY)

    async def names(option: Option, *queries: str) -> list[bytes]:
        return [payload[4:] for _, payload in (await haggler.ask(option, meta_payload("", *queries)))[:-1]]

    assert await names(Option.LIST_META_CONTEXT) == [b"base:allocation"]
    assert await names(Option.LIST_META_CONTEXT, "base:") == [b"base:allocation"]
    assert await names(Option.SET_META_CONTEXT) == []
    assert await names(Option.SET_META_CONTEXT, "base:") == []
    assert await names(Option.SET_META_CONTEXT, "elsewhere:x", "base:allocation") == [b"base:allocation"]
    long = meta_payload("", "base:allocation")[:-1]
    assert await haggler.verdict(Option.SET_META_CONTEXT, long) == OptionReplyType.ERR_INVALID
    overflow = struct.pack(">LLL", 0, 1, 0xFFFFFFFF)
    assert await haggler.verdict(Option.SET_META_CONTEXT, overflow) == OptionReplyType.ERR_INVALID
    assert await haggler.verdict(Option.SET_META_CONTEXT, meta_payload("nowhere", "x")) == OptionReplyType.ERR_UNKNOWN


@pytest.mark.parametrize(
    "last", [meta_payload("", "base:"), meta_payload("nowhere", "base:allocation"), b"\0", meta_payload("disk1", "a:b")]
)
async def test_conformance_09_block_status_only_with_contexts_of_this_export(served: Served, last: bytes) -> None:
    """Another SET_META_CONTEXT replaces the earlier one, even when it fails."""
    haggler = await Haggler.meet(served)
    await haggler.verdict(Option.STRUCTURED_REPLY)
    assert await haggler.verdict(Option.SET_META_CONTEXT, meta_payload("", "base:allocation")) == OptionReplyType.ACK
    await haggler.ask(Option.SET_META_CONTEXT, last)
    assert await haggler.verdict(Option.GO, go_payload("")) == OptionReplyType.ACK
    await haggler.send(struct.pack(">LHHQQL", 0x25609513, 0, Command.BLOCK_STATUS, 5, 0, 4096))
    _, flags, kind, _, length = struct.unpack(">LHHQL", await haggler.receive(20))
    assert (flags, kind) == (1, 0x8001)
    assert int.from_bytes((await haggler.receive(length))[:4], "big") == Errno.EINVAL


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_10_flags_that_were_not_negotiated_are_not_set(served: Served, mode: ReplyMode) -> None:
    flags = (await served.connect(mode=mode)).info.flags
    assert bool(flags & TransmissionFlag.SEND_DF) is (mode is not ReplyMode.SIMPLE)
    assert bool(flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) is (mode is ReplyMode.EXTENDED)
    assert flags & TransmissionFlag.SEND_WRITE_ZEROES
    assert flags & TransmissionFlag.SEND_FAST_ZERO


async def test_conformance_10_no_fast_zero_without_write_zeroes() -> None:
    async with serving(MEMORY, read_only=True) as served:
        flags = (await served.connect()).info.flags
        assert flags & TransmissionFlag.READ_ONLY
        assert not flags & (TransmissionFlag.SEND_FAST_ZERO | TransmissionFlag.SEND_WRITE_ZEROES)


async def test_conformance_11_no_disk_is_touched_before_one_is_chosen() -> None:
    async with serving({"driver": RESTLESS}, {"driver": RESTLESS}) as served:
        drivers = [restless(served.node()), restless(served.node("disk1"))]
        for driver in drivers:
            driver.calls.clear()
        haggler = await Haggler.meet(served)
        await haggler.verdict(Option.STRUCTURED_REPLY)
        await haggler.verdict(Option.LIST)
        for name in ("", "disk1"):
            await haggler.verdict(Option.INFO, go_payload(name, 0, 1, 2, 3))
            await haggler.verdict(Option.LIST_META_CONTEXT, meta_payload(name))
            await haggler.verdict(Option.SET_META_CONTEXT, meta_payload(name, "base:allocation"))
        assert [driver.calls for driver in drivers] == [[], []]
        assert await haggler.verdict(Option.GO, go_payload("disk1")) == OptionReplyType.ACK
        assert [driver.calls for driver in drivers] == [[], []]
        await haggler.send(struct.pack(">LHHQQL", 0x25609513, 0, Command.READ, 5, 0, 512))
        await haggler.receive(28 + 512)
        assert [driver.calls for driver in drivers] == [[], [("read", 0, 512)]]


async def test_conformance_12_options_are_counted(served: Served) -> None:
    haggler = await Haggler.meet(served)
    for _ in range(MAX_OPTIONS):
        assert await haggler.verdict(99) == OptionReplyType.ERR_UNSUP
    await haggler.option(99)
    assert await haggler.is_closed()
    await still_serves(served)


async def test_conformance_12_long_options_are_skipped_up_to_a_limit(served: Served) -> None:
    haggler = await Haggler.meet(served)
    too_big = go_payload("", *[3] * (MAX_OPTION_KEPT_BYTES // 2))
    assert await haggler.verdict(Option.INFO, too_big) == OptionReplyType.ERR_TOO_BIG
    assert await haggler.verdict(Option.INFO, go_payload("")) == OptionReplyType.ACK
    await haggler.send(struct.pack(">QLL", 0x49484156454F5054, 99, MAX_OPTION_SKIPPED_BYTES + 1))
    assert await haggler.is_closed()
    await still_serves(served)


async def test_conformance_12_the_whole_negotiation_has_a_time_limit() -> None:
    async with serving(MEMORY, server_options={"limits": ClientLimits(handshake_timeout=0.05)}) as served:
        silent = await served.open_socket()
        haggler = await Haggler.meet(served)
        await haggler.send(b"IHAV")
        assert await haggler.is_closed()
        assert (await Haggler(silent).receive(18)).startswith(b"NBDMAGIC")
        assert await Haggler(silent).is_closed()
        # Who has chosen an export in time may take all the time in the world.
        await still_serves(served)
