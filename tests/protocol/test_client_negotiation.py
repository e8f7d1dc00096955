"""The client's end of the negotiation against servers made of bytes: what they may say, and what only liars say."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol.client_negotiation import (
    ITEMS,
    MAX_AHEAD_BYTES,
    MAX_INFOS,
    MAX_LISTING_BYTES,
    OPTIONS_PER_CONNECTION,
    SEQUELS,
    TRANSITIONS,
    ClientNegotiation,
    State,
    Then,
    TlsWish,
)
from nbd_protocol.constants import MAX_OPTION_REPLY_BYTES, Option, OptionReplyType, ReplyMode, TransmissionFlag
from nbd_protocol.errors import LocalProtocolError, OptionRefused, RemoteProtocolError
from nbd_protocol.messages import ServerReply
from nbd_protocol.negotiation import NEED_DATA, ExportInfo, NeedData
from nbd_protocol.negotiation_events import (
    ClientEvent,
    Ended,
    Established,
    ExportDescribed,
    ExportsListed,
    MetaContextsListed,
    Refused,
    TlsWanted,
)

REPLY = OptionReplyType
FLAGS = TransmissionFlag
FIXED = b"NBDMAGICIHAVEOPT\0\3"
FIXED_WITH_ZEROES = b"NBDMAGICIHAVEOPT\0\1"
NEWSTYLE = b"NBDMAGICIHAVEOPT\0\0"
TOLD = FLAGS.HAS_FLAGS | FLAGS.SEND_FLUSH


def oldstyle(size: int = 4096, flags: int = TOLD) -> bytes:
    return b"NBDMAGIC" + struct.pack(">QQI", 0x420281861253, size, flags) + bytes(124)


def reply(number: int, kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(payload)) + payload


def ack(number: int) -> bytes:
    return reply(number, REPLY.ACK)


def unsup(number: int) -> bytes:
    return reply(number, REPLY.ERR_UNSUP)


def info_export(number: int, size: int = 4096, flags: int = TOLD) -> bytes:
    return reply(number, REPLY.INFO, struct.pack(">HQH", 0, size, flags))


def context(number: int, name: bytes, key: int = 1) -> bytes:
    return reply(number, REPLY.META_CONTEXT, struct.pack(">I", key) + name)


def sent_options(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while data:
        magic, number, length = struct.unpack_from(">8sII", data)
        assert magic == b"IHAVEOPT"
        found.append((number, data[16 : 16 + length]))
        assert len(data) >= 16 + length
        data = data[16 + length :]
    return found


class Script:
    """A client, and a server that says the given things, one after each option that it gets."""

    def __init__(
        self,
        *says: bytes,
        greeting: bytes = FIXED,
        structured: bool = False,
        extended: bool = False,
        tls: TlsWish = "off",
        no_zeroes: bool = True,
    ):
        self.client = ClientNegotiation(structured=structured, extended=extended, tls=tls, no_zeroes=no_zeroes)
        self.says = list(says)
        self.greeting = greeting
        self.client_flags: int | None = None
        self.options: list[tuple[int, bytes]] = []
        self.left = b""

    def event(self) -> ClientEvent:
        """The next event; the server hangs up when it has nothing more to say."""
        while True:
            event = self.client.next_event()
            self.left += self.client.data_to_send()
            if not isinstance(event, NeedData):
                return event
            if self.greeting:
                said, self.greeting = self.greeting, b""
            else:
                self._take_what_was_sent()
                said = self.says.pop(0) if self.says else b""
            self.client.receive_data(said)

    def _take_what_was_sent(self) -> None:
        if self.client_flags is None and self.left:
            (self.client_flags,) = struct.unpack_from(">I", self.left)
            self.left = self.left[4:]
        self.options += sent_options(self.left)
        self.left = b""

    def numbers(self) -> list[int]:
        self._take_what_was_sent()
        return [number for number, _ in self.options]


def connect(script: Script, export: str = "disk", contexts: Iterable[str] = ("base:allocation",)) -> ClientEvent:
    script.client.connect(export, contexts=tuple(contexts))
    return script.event()


def test_go_with_extended_headers_and_contexts() -> None:
    script = Script(
        ack(Option.EXTENDED_HEADERS),
        context(Option.SET_META_CONTEXT, b"base:allocation", 7) + ack(Option.SET_META_CONTEXT),
        info_export(Option.GO, 77, FLAGS(0x1FFF))
        + reply(Option.GO, REPLY.INFO, b"\0\1real")
        + reply(Option.GO, REPLY.INFO, b"\0\2words")
        + reply(Option.GO, REPLY.INFO, struct.pack(">HIII", 3, 512, 4096, 1 << 20))
        + reply(Option.GO, REPLY.INFO, b"\x99\x99future")
        + ack(Option.GO),
        extended=True,
        structured=True,
    )
    assert connect(script, contexts=("base:allocation", "qemu:allocation-depth")) == Established(
        Option.GO,
        "disk",
        ExportInfo(77, FLAGS(0x1FFF), "real", "words", 512, 4096, 1 << 20),
        ReplyMode.EXTENDED,
        {7: "base:allocation"},
        secure=False,
    )
    assert script.client_flags == 3
    assert script.options == [
        (Option.EXTENDED_HEADERS, b""),
        (
            Option.SET_META_CONTEXT,
            b"\0\0\0\4disk\0\0\0\2\0\0\0\x0fbase:allocation\0\0\0\x15qemu:allocation-depth",
        ),
        (Option.GO, b"\0\0\0\4disk\0\3\0\1\0\2\0\3"),
    ]
    assert script.client.state is State.TRANSMISSION
    assert (script.client.style, script.client.mode) == ("fixed newstyle", ReplyMode.EXTENDED)


@pytest.mark.parametrize(
    ("extended", "structured", "says", "asked", "mode"),
    [
        (True, True, [ack(11)], [11], ReplyMode.EXTENDED),
        (True, True, [unsup(11), ack(8)], [11, 8], ReplyMode.STRUCTURED),
        (True, True, [reply(11, REPLY.ERR_POLICY), ack(8)], [11, 8], ReplyMode.STRUCTURED),
        (True, True, [unsup(11), unsup(8)], [11, 8], ReplyMode.SIMPLE),
        (True, True, [unsup(11), reply(8, REPLY.ERR_INVALID, b"no")], [11, 8], ReplyMode.SIMPLE),
        (True, False, [unsup(11)], [11], ReplyMode.SIMPLE),
        (False, True, [ack(8)], [8], ReplyMode.STRUCTURED),
        (False, False, [], [], ReplyMode.SIMPLE),
    ],
)
def test_conformance_24_falls_back_when_reply_modes_are_unsup(
    extended: bool, structured: bool, says: list[bytes], asked: list[int], mode: ReplyMode
) -> None:
    script = Script(*says, info_export(Option.GO) + ack(Option.GO), extended=extended, structured=structured)
    event = connect(script, contexts=())
    assert isinstance(event, Established)
    assert event.mode is mode
    assert script.numbers() == [*asked, Option.GO]


def test_conformance_24_falls_back_to_export_name_when_go_is_unsup() -> None:
    script = Script(ack(8), unsup(10), unsup(7), struct.pack(">QH", 99, TOLD) + b"tail", structured=True)
    assert connect(script) == Established(
        Option.EXPORT_NAME, "disk", ExportInfo(99, TOLD), ReplyMode.STRUCTURED, {}, secure=False
    )
    assert script.options[-1] == (Option.EXPORT_NAME, b"disk")
    assert script.client.trailing_data == b"tail"


def test_conformance_24_no_fallback_to_export_name_after_extended_headers() -> None:
    script = Script(ack(11), unsup(7), extended=True)
    assert connect(script, contexts=()) == Refused(Option.GO, REPLY.ERR_UNSUP, "")


@pytest.mark.parametrize("no_zeroes", [True, False])
@pytest.mark.parametrize("greeting", [FIXED, FIXED_WITH_ZEROES, NEWSTYLE, b"NBDMAGICIHAVEOPT\xff\xff"])
def test_conformance_06_export_name_with_and_without_zeroes(greeting: bytes, no_zeroes: bool) -> None:
    without = greeting[-1] & 2 and no_zeroes
    script = Script(
        *([unsup(7)] if greeting[-1] & 1 else []),
        struct.pack(">QH", 99, TOLD) + (b"" if without else bytes(124)) + b"tail",
        greeting=greeting,
        no_zeroes=no_zeroes,
    )
    event = connect(script)
    assert isinstance(event, Established)
    assert event.info == ExportInfo(99, TOLD)
    assert script.client_flags == (greeting[-1] & 1) | (2 if without else 0)
    assert script.client.trailing_data == b"tail"


def test_conformance_06_a_server_that_hangs_up_on_export_name_has_refused_it() -> None:
    script = Script(greeting=NEWSTYLE)
    event = connect(script)
    assert event == Refused(Option.EXPORT_NAME, REPLY.ERR_UNKNOWN, "the server closed the connection")
    assert script.client.state is State.ENDED


def test_refusals_can_be_raised() -> None:
    script = Script(reply(7, REPLY.ERR_UNKNOWN, b"no such export"))
    event = connect(script)
    assert isinstance(event, Refused)
    with pytest.raises(OptionRefused, match="ERR_UNKNOWN: no such export"):
        raise event.exception()


def test_after_a_refusal_another_export_can_be_chosen() -> None:
    script = Script(reply(7, REPLY.ERR_UNKNOWN, b"no"), info_export(7) + ack(7))
    assert connect(script) == Refused(Option.GO, REPLY.ERR_UNKNOWN, "no")
    assert isinstance(connect(script, "other"), Established)


def test_infos_before_an_error_are_forgotten() -> None:
    script = Script(info_export(7, 1) + reply(7, REPLY.ERR_UNKNOWN), info_export(7, 2) + ack(7))
    assert isinstance(connect(script), Refused)
    event = connect(script)
    assert isinstance(event, Established)
    assert event.info.size == 2


def test_a_refused_context_is_done_without() -> None:
    script = Script(
        ack(8),
        context(10, b"base:allocation") + reply(10, REPLY.ERR_INVALID),
        info_export(7) + ack(7),
        structured=True,
    )
    event = connect(script)
    assert isinstance(event, Established)
    assert event.contexts == {}


def test_describing_many_exports_on_one_connection() -> None:
    script = Script(
        ack(8),
        reply(3, REPLY.SERVER, b"\0\0\0\1a") + reply(3, REPLY.SERVER, b"\0\0\0\1bwords") + ack(3),
        info_export(6, 1) + ack(6),
        context(9, b"base:allocation", 0) + context(9, b"x:y", 0) + ack(9),
        reply(6, REPLY.ERR_TLS_REQD, b"b is secret"),
        reply(9, REPLY.ERR_UNKNOWN),
        ack(2),
        structured=True,
    )
    client = script.client
    client.list_exports()
    assert script.event() == ExportsListed((ServerReply("a", ""), ServerReply("b", "words")))
    client.describe("a")
    assert script.event() == ExportDescribed("a", ExportInfo(1, TOLD))
    client.list_meta_contexts("a")
    assert script.event() == MetaContextsListed("a", ("base:allocation", "x:y"))
    client.describe("b")
    assert script.event() == Refused(Option.INFO, REPLY.ERR_TLS_REQD, "b is secret")
    client.list_meta_contexts("b", ["base:"])
    assert script.event() == Refused(Option.LIST_META_CONTEXT, REPLY.ERR_UNKNOWN, "")
    client.abort()
    assert script.event() == Ended()
    assert script.options[-2] == (Option.LIST_META_CONTEXT, b"\0\0\0\1b\0\0\0\1\0\0\0\5base:")
    with pytest.raises(LocalProtocolError, match="too late"):
        client.list_exports()


def test_commands_can_be_given_ahead() -> None:
    script = Script(ack(3), unsup(6), ack(2))
    script.client.list_exports()
    script.client.describe("a")
    script.client.abort()
    assert [type(script.event()) for _ in range(3)] == [ExportsListed, Refused, Ended]
    assert script.numbers() == [3, 6, 2]


def test_connect_and_abort_are_last_commands() -> None:
    for last in ("connect", "abort"):
        client = ClientNegotiation()
        getattr(client, last)()
        with pytest.raises(LocalProtocolError, match="after connect"):
            client.list_exports()


def test_conformance_03_a_server_that_closes_without_acknowledging_abort_is_fine() -> None:
    script = Script()
    script.client.abort()
    assert script.event() == Ended()
    assert script.numbers() == [Option.ABORT]


@pytest.mark.parametrize("tls", ["prefer", "require"])
def test_conformance_08_tls_comes_first_and_forgets_nothing_needed(tls: TlsWish) -> None:
    script = Script(ack(5), ack(8), info_export(7) + ack(7), tls=tls, structured=True)
    script.client.connect("disk", contexts=())
    assert script.event() == TlsWanted()
    assert script.numbers() == [Option.STARTTLS]
    with pytest.raises(LocalProtocolError, match="bytes that are not of the negotiation"):
        script.client.receive_data(b"x")
    with pytest.raises(LocalProtocolError, match="TLS handshake"):
        script.client.next_event()
    script.client.tls_established()
    event = script.event()
    assert isinstance(event, Established)
    assert event.secure
    assert event.mode is ReplyMode.STRUCTURED
    assert script.numbers() == [5, 8, 7]


def test_conformance_08_bytes_before_the_handshake_are_an_attack() -> None:
    script = Script(ack(5) + ack(8), tls="prefer")
    script.client.connect()
    with pytest.raises(RemoteProtocolError, match="plain text after STARTTLS"):
        script.event()


def test_conformance_08_tls_is_done_without_only_where_it_was_not_required() -> None:
    script = Script(reply(5, REPLY.ERR_POLICY), info_export(7) + ack(7), tls="prefer")
    event = connect(script, contexts=())
    assert isinstance(event, Established)
    assert not event.secure
    script = Script(reply(5, REPLY.ERR_POLICY, b"never"), tls="require")
    assert connect(script) == Refused(Option.STARTTLS, REPLY.ERR_POLICY, "never")
    assert script.client.state is State.ENDED
    assert script.numbers() == [Option.STARTTLS, Option.ABORT]


@pytest.mark.parametrize("greeting", [NEWSTYLE, oldstyle()])
def test_conformance_08_required_tls_is_not_had_from_old_servers(greeting: bytes) -> None:
    script = Script(greeting=greeting, tls="require")
    event = connect(script)
    assert isinstance(event, Refused)
    assert event.option == Option.STARTTLS
    assert "which has no TLS" in event.text
    assert script.numbers() == []


def test_tls_established_without_a_handshake_is_our_error() -> None:
    with pytest.raises(LocalProtocolError, match="no TLS handshake was asked for"):
        ClientNegotiation(tls="prefer").tls_established()


def test_oldstyle_has_one_export_without_a_name() -> None:
    script = Script(greeting=oldstyle(123, TOLD) + b"tail", tls="prefer")
    script.client.describe("")
    assert script.event() == ExportDescribed("", ExportInfo(123, TOLD))
    assert script.client.style == "oldstyle"
    for command in (script.client.list_exports, script.client.list_meta_contexts, lambda: script.client.describe("x")):
        command()
        event = script.event()
        assert isinstance(event, Refused)
        assert event.reply_type == REPLY.ERR_UNSUP
        assert "oldstyle" in event.text
    assert isinstance(connect(script, "x"), Refused)
    assert connect(script, "") == Established(None, "", ExportInfo(123, TOLD), ReplyMode.SIMPLE, {}, secure=False)
    assert script.client.trailing_data == b"tail"
    assert script.numbers() == []
    assert script.client_flags is None


@pytest.mark.parametrize("greeting", [NEWSTYLE, oldstyle()])
def test_old_servers_are_left_without_a_word(greeting: bytes) -> None:
    script = Script(greeting=greeting)
    script.client.abort()
    assert script.event() == Ended()
    assert script.numbers() == []


def test_newstyle_knows_export_name_only() -> None:
    script = Script(struct.pack(">QH", 5, TOLD) + bytes(124), greeting=NEWSTYLE, extended=True, tls="prefer")
    for command in (script.client.list_exports, script.client.describe, script.client.list_meta_contexts):
        command()
        event = script.event()
        assert isinstance(event, Refused)
        assert "EXPORT_NAME only" in event.text
    assert script.client.style == "newstyle"
    event = connect(script)
    assert isinstance(event, Established)
    assert event.option == Option.EXPORT_NAME
    assert script.options == [(Option.EXPORT_NAME, b"disk")]


@pytest.mark.parametrize(
    ("told", "mode_options", "usable"),
    [
        (FLAGS.SEND_TRIM, [], FLAGS(0)),
        (FLAGS(0xFFFF), [], FLAGS(0xFFFF) & ~FLAGS.SEND_DF & ~FLAGS.BLOCK_STATUS_PAYLOAD),
        (FLAGS(0xFFFF), [ack(8)], FLAGS(0xFFFF) & ~FLAGS.BLOCK_STATUS_PAYLOAD),
        (FLAGS.HAS_FLAGS | FLAGS.SEND_FAST_ZERO, [], FLAGS.HAS_FLAGS),
    ],
)
def test_conformance_10_only_flags_that_were_negotiated_for_are_believed(
    told: TransmissionFlag, mode_options: list[bytes], usable: TransmissionFlag
) -> None:
    script = Script(*mode_options, info_export(7, 1, told) + ack(7), structured=bool(mode_options))
    event = connect(script, contexts=())
    assert isinstance(event, Established)
    assert event.info.flags == usable


def test_should_reconnect_before_the_strictest_server_hangs_up() -> None:
    script = Script(*[unsup(6)] * OPTIONS_PER_CONNECTION)
    while not script.client.should_reconnect:
        script.client.describe("x")
        script.event()
    assert len(script.numbers()) == OPTIONS_PER_CONNECTION - 2


# Liars ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        (b"SSH-2.0-OpenSSH", "no NBD server: it greets with b'SSH-2.0"),
        (b"S", "no NBD server"),
        (b"NBDMAGIX", "no NBD server"),
        (b"NBDMAGICNBDMAGIC", "no NBD server: after b'NBDMAGIC' comes 0x4e42444d41474943"),
        (b"", "the server closed the connection, awaited was the server's greeting"),
        (FIXED[:-1], "awaited was the server's greeting"),
        (oldstyle()[:-1], "awaited was the server's greeting"),
        (oldstyle(1 << 63), "export size 9223372036854775808"),
        (FIXED + b"x", "1 bytes unasked"),
    ],
)
def test_conformance_24_lies_in_the_greeting(greeting: bytes, says: str) -> None:
    script = Script(greeting=greeting)
    with pytest.raises(RemoteProtocolError, match=says):
        connect(script, "")
    assert script.client.state is State.ENDED


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"\0" * 20, "malformed option reply header"),
        (reply(6, REPLY.ACK), "asked was GO"),
        (ack(7), "answered without its size"),
        (reply(7, REPLY.INFO, b"\0\1disk") + ack(7), "answered without its size"),
        (reply(7, REPLY.ACK, b"x"), "expected no payload"),
        (reply(7, REPLY.SERVER, b"\0\0\0\0"), "which has no such reply"),
        (reply(7, REPLY.META_CONTEXT, b"\0\0\0\0a:b"), "which has no such reply"),
        (reply(7, 99), "which has no such reply"),
        (reply(7, 0), "which has no such reply"),
        (
            struct.pack(">QIII", 0x3E889045565A9, 7, REPLY.INFO, 0xFFFFFFFF),
            f"expected at most {MAX_OPTION_REPLY_BYTES}",
        ),
        (struct.pack(">QIII", 0x3E889045565A9, 7, REPLY.ERR_UNKNOWN, 65537), "expected at most"),
        (info_export(7) * (MAX_INFOS + 1), f"is number {MAX_INFOS + 1}"),
        (reply(7, REPLY.INFO, b"\0\0short") + ack(7), "malformed NBD_INFO_EXPORT"),
        (reply(7, REPLY.INFO, b"\0") + ack(7), "malformed NBD_REP_INFO"),
        (info_export(7) + reply(7, REPLY.INFO, b"\0\3" + bytes(11)) + ack(7), "malformed NBD_INFO_BLOCK_SIZE"),
        (info_export(7) + reply(7, REPLY.INFO, b"\0\3" + bytes(12)) + ack(7), "minimum block size 0"),
        (info_export(7) + reply(7, REPLY.INFO, struct.pack(">HIII", 3, 3, 4, 5)) + ack(7), "minimum block size 3"),
        (
            info_export(7) + reply(7, REPLY.INFO, struct.pack(">HIII", 3, 512, 256, 512)) + ack(7),
            "preferred block size",
        ),
        (info_export(7) + reply(7, REPLY.INFO, struct.pack(">HIII", 3, 512, 512, 0)) + ack(7), "maximum payload 0"),
        (info_export(7) + reply(7, REPLY.INFO, b"\0\1\xff") + ack(7), "not UTF-8"),
        (info_export(7, 1 << 63) + ack(7), "export size 9223372036854775808"),
        (info_export(7), "closed the connection, awaited was the reply to an option GO"),
    ],
)
def test_conformance_24_lies_about_an_export(said: bytes, says: str) -> None:
    script = Script(said)
    with pytest.raises(RemoteProtocolError, match=says):
        connect(script, contexts=())
    assert script.client.state is State.ENDED
    assert script.client.data_to_send() == b""


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (context(10, b"other:context") + ack(10), "context 'other:context' was selected, asked was"),
        (context(10, b"base:allocation", 1) + context(10, b"base:allocation", 2) + ack(10), "selected twice"),
        (context(10, b"base:allocation", 1) + context(10, b"x:y", 1) + ack(10), "with id 1 was selected twice"),
        (context(10, b"\xff") + ack(10), "not UTF-8"),
        (reply(10, REPLY.META_CONTEXT, b"\0") + ack(10), "malformed NBD_REP_META_CONTEXT"),
        (context(10, b"base:allocation") * 1025, "is number 1025"),
        (ack(10) + ack(10), "20 bytes unasked"),
    ],
)
def test_conformance_24_lies_about_contexts(said: bytes, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        connect(Script(ack(8), said, structured=True), contexts=("base:allocation", "x:y"))


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (reply(3, REPLY.SERVER, b"\0\0\0\5a") + ack(3), "malformed NBD_REP_SERVER"),
        (reply(3, REPLY.SERVER, b"\xff\xff\xff\xffa") + ack(3), "malformed NBD_REP_SERVER"),
        (reply(3, REPLY.SERVER, struct.pack(">I", 4097) + b"n" * 4097) + ack(3), "at most 4096"),
        (reply(3, REPLY.SERVER, b"\0\0\0\1a" + b"d" * 60000) * (MAX_LISTING_BYTES // 60000 + 1), "more than"),
    ],
)
def test_conformance_24_lies_about_the_list(said: bytes, says: str) -> None:
    script = Script(said)
    script.client.list_exports()
    with pytest.raises(RemoteProtocolError, match=says):
        script.event()


def test_conformance_24_an_endless_list_is_given_up() -> None:
    client = ClientNegotiation(structured=False, extended=False)
    client.list_exports()
    client.receive_data(FIXED)
    for _ in range(65536 // 4096):
        assert client.next_event() is NEED_DATA
        client.receive_data(reply(3, REPLY.SERVER, b"\0\0\0\0") * 4096)
    assert client.next_event() is NEED_DATA
    client.receive_data(reply(3, REPLY.SERVER, b"\0\0\0\0"))
    with pytest.raises(RemoteProtocolError, match="is number 65537, expected at most 65536"):
        client.next_event()


def test_conformance_24_a_server_that_sends_ahead_is_bounded() -> None:
    client = ClientNegotiation()
    client.receive_data(bytes(MAX_AHEAD_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="ahead"):
        client.receive_data(b"x")


def test_conformance_24_export_name_reply_cut_short() -> None:
    script = Script(b"\0" * 9, greeting=NEWSTYLE)
    with pytest.raises(RemoteProtocolError, match="awaited was the reply to EXPORT_NAME"):
        connect(script)


def test_damaged_words_for_people_are_shown_all_the_same() -> None:
    script = Script(
        reply(3, REPLY.SERVER, b"\0\0\0\1a\xff\0") + ack(3),
        info_export(6) + reply(6, 3, b"\0\2\xff") + ack(6),
        unsup(6),
    )
    script.client.list_exports()
    assert script.event() == ExportsListed((ServerReply("a", "\ufffd\ufffd"),))
    script.client.describe("a")
    event = script.event()
    assert isinstance(event, ExportDescribed)
    assert event.info.description == "\ufffd"


def test_what_cannot_be_said_is_refused_at_once() -> None:
    client = ClientNegotiation()
    for wrong in ("n" * 4097, "a\0b", "\udcff"):
        with pytest.raises(LocalProtocolError):
            client.connect(wrong)
        with pytest.raises(LocalProtocolError):
            client.describe(wrong)
        with pytest.raises(LocalProtocolError):
            client.list_meta_contexts("", [wrong])
    client.receive_data(FIXED)
    assert client.data_to_send() == b""


def test_without_a_command_there_is_no_event() -> None:
    client = ClientNegotiation(structured=False, extended=False)
    assert client.next_event() is NEED_DATA
    client.receive_data(FIXED)
    with pytest.raises(LocalProtocolError, match="awaited is a command of the caller"):
        client.next_event()
    client.abort()
    assert client.next_event() is NEED_DATA


def test_after_established_the_bytes_are_not_ours() -> None:
    script = Script(info_export(7) + ack(7))
    connect(script, contexts=())
    with pytest.raises(LocalProtocolError, match="not of the negotiation"):
        script.client.receive_data(b"x")
    with pytest.raises(LocalProtocolError, match="no next event"):
        script.client.next_event()


def test_the_tables_are_whole() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {State.GREETING}.union(*TRANSITIONS.values())
    assert reached == set(State)
    used = {then for sequel in SEQUELS.values() for then in sequel}
    assert set(Then) <= used
    assert {then for then in used if isinstance(then, Option)} <= set(SEQUELS) | {Option.EXPORT_NAME}
    assert set(ITEMS) <= set(SEQUELS)


# Laws ----------------------------------------------------------------------------------------------------------------

SERVER_TALK = [
    FIXED,
    unsup(11),
    ack(8),
    reply(3, REPLY.SERVER, b"\0\0\0\1awords") + ack(3),
    info_export(6) + reply(6, REPLY.INFO, b"\0\1real") + ack(6),
    context(9, b"base:allocation", 0) + ack(9),
    context(10, b"base:allocation") + ack(10),
    reply(7, REPLY.ERR_UNKNOWN, b"no"),
]


def talk(says: list[bytes], size: int) -> tuple[list[ClientEvent], bytes]:
    """The events and the bytes sent, where what the server says arrives in pieces of `size`."""
    client = ClientNegotiation()
    client.list_exports()
    client.describe("a")
    client.list_meta_contexts("a")
    client.connect("a")
    found: list[ClientEvent] = []
    sent = bytearray()
    for said in says:
        for start in range(0, len(said), size):
            client.receive_data(said[start : start + size])
            while not isinstance(event := client.next_event(), NeedData):
                found.append(event)
                if len(found) == 4:
                    return found, bytes(sent + client.data_to_send())
            sent += client.data_to_send()
    return found, bytes(sent)


def test_every_split_of_a_conversation_gives_the_same_events_and_bytes() -> None:
    whole = talk(SERVER_TALK, 1 << 16)
    assert [type(event) for event in whole[0]] == [ExportsListed, ExportDescribed, MetaContextsListed, Refused]
    for size in range(1, max(map(len, SERVER_TALK))):
        assert talk(SERVER_TALK, size) == whole


@st.composite
def mutated(draw: st.DrawFn) -> list[bytes]:
    says = [bytearray(said) for said in SERVER_TALK]
    for _ in range(draw(st.integers(1, 5))):
        said = says[draw(st.integers(0, len(says) - 1))]
        where = draw(st.integers(0, max(len(said) - 1, 0)))
        match draw(st.integers(0, 2)):
            case 0 if said:
                said[where] = draw(st.integers(0, 255))
            case 1:
                del said[where : where + draw(st.integers(1, 8))]
            case _:
                said[where:where] = draw(st.binary(max_size=8))
    return [bytes(said) for said in says]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6) | mutated(), st.integers(1, 100))
def test_garbage_gives_events_or_a_protocol_error(says: list[bytes], size: int) -> None:
    try:
        found, sent = talk(says, size)
    except RemoteProtocolError:
        return
    assert len(found) <= 4
    assert len(sent) <= 500
