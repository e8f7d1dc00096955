"""Every message: parsing is the inverse of building, and malformed bytes are the peer's error."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol import constants as c
from nbd_protocol import messages as m
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError

AnyMessage = m.Message[Any]

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=1000)
HANDSHAKE_FLAGS = U16.map(c.HandshakeFlag)
TRANSMISSION_FLAGS = U16.map(c.TransmissionFlag)

RECORDS: dict[str, tuple[AnyMessage, st.SearchStrategy[Any]]] = {
    "GREETING_MAGICS": (m.GREETING_MAGICS, st.builds(m.GreetingMagics, U64)),
    "GREETING": (m.GREETING, st.builds(m.Greeting, HANDSHAKE_FLAGS)),
    "OLDSTYLE_GREETING": (m.OLDSTYLE_GREETING, st.builds(m.OldstyleGreeting, U64, HANDSHAKE_FLAGS, TRANSMISSION_FLAGS)),
    "CLIENT_FLAGS": (m.CLIENT_FLAGS, st.builds(m.ClientFlags, U32.map(c.ClientFlag))),
    "OPTION_HEADER": (m.OPTION_HEADER, st.builds(m.OptionHeader, U32 | st.sampled_from(c.Option), U32)),
    "OPTION_REPLY_HEADER": (
        m.OPTION_REPLY_HEADER,
        st.builds(m.OptionReplyHeader, U32, U32 | st.sampled_from(c.OptionReplyType), U32),
    ),
    "EXPORT_NAME": (m.EXPORT_NAME, st.builds(m.ExportName, TEXT)),
    "EXPORT_NAME_REPLY": (m.EXPORT_NAME_REPLY, st.builds(m.ExportNameReply, U64, TRANSMISSION_FLAGS)),
    "EXPORT_NAME_REPLY_WITH_ZEROES": (
        m.EXPORT_NAME_REPLY_WITH_ZEROES,
        st.builds(m.ExportNameReply, U64, TRANSMISSION_FLAGS),
    ),
    "INFO_REQUEST": (
        m.INFO_REQUEST,
        st.builds(m.InfoRequest, TEXT, st.lists(U16 | st.sampled_from(c.InfoType), max_size=20).map(tuple)),
    ),
    "META_CONTEXT_REQUEST": (
        m.META_CONTEXT_REQUEST,
        st.builds(m.MetaContextRequest, TEXT, st.lists(TEXT, max_size=5).map(tuple)),
    ),
    "META_CONTEXT_REPLY": (m.META_CONTEXT_REPLY, st.builds(m.MetaContextReply, U32, TEXT)),
    "SERVER_REPLY": (m.SERVER_REPLY, st.builds(m.ServerReply, TEXT, TEXT)),
    "ERROR_TEXT": (m.ERROR_TEXT, st.builds(m.ErrorText, TEXT)),
    "INFO_EXPORT": (m.INFO_EXPORT, st.builds(m.InfoExport, U64, TRANSMISSION_FLAGS)),
    "INFO_NAME": (m.INFO_NAME, st.builds(m.InfoName, TEXT)),
    "INFO_DESCRIPTION": (m.INFO_DESCRIPTION, st.builds(m.InfoDescription, TEXT)),
    "INFO_BLOCK_SIZE": (m.INFO_BLOCK_SIZE, st.builds(m.InfoBlockSize, U32, U32, U32)),
    "INFO_UNKNOWN": (m.INFO_UNKNOWN, st.builds(m.InfoUnknown, U16, st.binary(max_size=50))),
    "ERROR_CHUNK": (m.ERROR_CHUNK, st.builds(m.ErrorChunk, U32, TEXT)),
    "ERROR_OFFSET_CHUNK": (m.ERROR_OFFSET_CHUNK, st.builds(m.ErrorOffsetChunk, U32, TEXT, U64)),
    "UNKNOWN_ERROR_CHUNK": (
        m.UNKNOWN_ERROR_CHUNK,
        st.builds(m.UnknownErrorChunk, U32, TEXT, st.binary(max_size=50)),
    ),
    "BLOCK_STATUS_PAYLOAD": (
        m.BLOCK_STATUS_PAYLOAD,
        st.builds(m.BlockStatusPayload, U64, st.lists(U32, max_size=20).map(tuple)),
    ),
}
FIXED_SIZES = {
    "GREETING_MAGICS": 16,
    "GREETING": 18,
    "OLDSTYLE_GREETING": 152,
    "CLIENT_FLAGS": 4,
    "OPTION_HEADER": 16,
    "OPTION_REPLY_HEADER": 20,
    "EXPORT_NAME_REPLY": 10,
    "EXPORT_NAME_REPLY_WITH_ZEROES": 134,
    "INFO_EXPORT": 12,
    "INFO_BLOCK_SIZE": 14,
}


def test_every_message_is_tested() -> None:
    declared = {name for name, value in vars(m).items() if isinstance(value, m.Message) and name.isupper()}
    assert {name for name in declared if not name.startswith("_")} == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
@given(data=st.data())
def test_parse_is_the_inverse_of_build(name: str, data: st.DataObject) -> None:
    message, records = RECORDS[name]
    record = data.draw(records)
    built = message.build(record)
    assert message.parse(built) == record
    assert message.parse(memoryview(bytearray(built))) == record
    assert message.build(message.parse(built)) == built


@pytest.mark.parametrize("name", RECORDS)
@given(raw=st.binary(max_size=200))
def test_garbage_is_parsed_or_refused(name: str, raw: bytes) -> None:
    message, _ = RECORDS[name]
    try:
        record = message.parse(raw)
    except RemoteProtocolError:
        return
    assert isinstance(record, message.record)


@pytest.mark.parametrize(("name", "size"), FIXED_SIZES.items())
def test_fixed_sizes(name: str, size: int) -> None:
    message, _ = RECORDS[name]
    assert message.size_bytes == size


@pytest.mark.parametrize("name", FIXED_SIZES)
@given(data=st.data())
def test_a_byte_more_or_less_is_refused(name: str, data: st.DataObject) -> None:
    message, records = RECORDS[name]
    built = message.build(data.draw(records))
    with pytest.raises(RemoteProtocolError):
        message.parse(built[:-1])
    with pytest.raises(RemoteProtocolError):
        message.parse(built + b"\0")


def test_vectors() -> None:
    """Bytes written down from the specification by hand."""
    flags = c.HandshakeFlag.FIXED_NEWSTYLE | c.HandshakeFlag.NO_ZEROES
    assert m.GREETING.build(m.Greeting(flags)) == b"NBDMAGICIHAVEOPT\x00\x03"
    assert m.OPTION_HEADER.build(m.OptionHeader(c.Option.GO, 5)) == b"IHAVEOPT\0\0\0\x07\0\0\0\x05"
    unsup = m.OptionReplyHeader(c.Option.LIST, c.OptionReplyType.ERR_UNSUP, 0)
    assert m.OPTION_REPLY_HEADER.build(unsup) == bytes.fromhex("0003e889045565a9 00000003 80000001 00000000")
    go = m.InfoRequest("ab", (c.InfoType.BLOCK_SIZE,))
    assert m.INFO_REQUEST.build(go) == b"\0\0\0\x02ab\0\x01\0\x03"
    contexts = m.MetaContextRequest("e", ("base:",))
    assert m.META_CONTEXT_REQUEST.build(contexts) == b"\0\0\0\x01e\0\0\0\x01\0\0\0\x05base:"
    assert m.ERROR_OFFSET_CHUNK.build(m.ErrorOffsetChunk(5, "no", 9)) == b"\0\0\0\x05\0\x02no" + bytes(7) + b"\x09"
    assert m.BLOCK_STATUS_PAYLOAD.build(m.BlockStatusPayload(16, (3,))) == bytes(7) + b"\x10\0\0\0\x03"


def test_an_error_names_the_message_and_what_is_wrong() -> None:
    with pytest.raises(RemoteProtocolError, match=r"(?s)malformed option header of 16 bytes.*IHAVEOPT.*IHAVEOPS"):
        m.OPTION_HEADER.parse(b"IHAVEOPS" + bytes(8))


def test_known_numbers_become_members_and_unknown_ones_stay() -> None:
    parsed = m.OPTION_HEADER.parse(m.OPTION_HEADER.build(m.OptionHeader(7, 0)))
    assert parsed.option is c.Option.GO
    parsed = m.OPTION_HEADER.parse(m.OPTION_HEADER.build(m.OptionHeader(99, 0)))
    assert parsed.option == 99
    greeting = m.GREETING.parse(b"NBDMAGICIHAVEOPT\x80\x01")
    assert greeting.flags == 0x8001
    assert c.HandshakeFlag.FIXED_NEWSTYLE in greeting.flags


@pytest.mark.parametrize("raw", [b"\xff", b"a\0b", b"x" * 4097], ids=["not UTF-8", "NUL", "too long"])
def test_strings_are_held_to_the_specification(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.EXPORT_NAME.parse(raw)
    assert m.EXPORT_NAME.parse(b"x" * 4096).name == "x" * 4096


@pytest.mark.parametrize("text", ["a\0b", "x" * 4097, "\udcff"], ids=["NUL", "too long", "surrogate"])
def test_strings_that_must_not_be_sent_are_our_error(text: str) -> None:
    with pytest.raises(LocalProtocolError):
        m.EXPORT_NAME.build(m.ExportName(text))


def test_words_for_a_human_are_repaired_not_refused() -> None:
    assert m.ERROR_TEXT.parse(b"no \xff\0 such").text == "no \ufffd\ufffd such"
    assert len(m.ERROR_TEXT.parse(b"x" * 5000).text) == 4096


@pytest.mark.parametrize(
    "record",
    [m.OptionHeader(1 << 32, 0), m.OptionHeader(1, -1)],
)
def test_values_that_do_not_fit_are_our_error(record: m.OptionHeader) -> None:
    with pytest.raises(LocalProtocolError, match="option header"):
        m.OPTION_HEADER.build(record)


def test_lengths_that_overflow_are_refused() -> None:
    for raw in (
        b"\xff\xff\xff\xffabc",
        b"\0\0\0\x01a\xff\xff",
        b"\0\0\0\x01a\0\x01\0",
    ):
        with pytest.raises(RemoteProtocolError):
            m.INFO_REQUEST.parse(raw)
    with pytest.raises(RemoteProtocolError):
        m.META_CONTEXT_REQUEST.parse(b"\0\0\0\0\xff\xff\xff\xff\0\0\0\x01a")


@given(st.one_of(*(RECORDS[name][1] for name in ("INFO_EXPORT", "INFO_NAME", "INFO_DESCRIPTION", "INFO_BLOCK_SIZE"))))
def test_infos_are_told_apart_by_their_type(info: m.Info) -> None:
    assert m.parse_info(m.build_info(info)) == info


def test_an_unknown_info_is_kept() -> None:
    unknown = m.InfoUnknown(9, b"payload")
    assert m.parse_info(m.build_info(unknown)) == unknown


@pytest.mark.parametrize("raw", [b"", b"\0", b"\0\0short", b"\0\x03" + bytes(13)])
def test_malformed_infos_are_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        m.parse_info(raw)


def test_records_are_immutable() -> None:
    with pytest.raises(AttributeError):
        m.ErrorText("a").text = "b"  # type: ignore[misc]  # that it is refused is what is tested
    assert msgspec.structs.replace(m.ErrorText("a"), text="b") == m.ErrorText("b")
