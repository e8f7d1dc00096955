"""The server's end of the negotiation against clients made of bytes. Line numbers are those of the conformance list."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol import messages as m
from nbd_protocol.constants import (
    MAX_OPTION_KEPT_BYTES,
    MAX_OPTION_SKIPPED_BYTES,
    MAX_OPTIONS,
    ClientFlag,
    InfoType,
    Option,
    OptionReplyType,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.negotiation import NEED_DATA, ExportInfo, NeedData, select_contexts
from nbd_protocol.negotiation_events import (
    Aborted,
    Closed,
    ExportQuery,
    ListExports,
    MetaContextQuery,
    Ready,
    ServerEvent,
    StartTls,
)
from nbd_protocol.server_negotiation import MAX_AHEAD_BYTES, RULES, TRANSITIONS, ServerNegotiation, State, TlsPolicy

ACK = OptionReplyType.ACK
UNSUP = OptionReplyType.ERR_UNSUP
INVALID = OptionReplyType.ERR_INVALID
TLS_REQD = OptionReplyType.ERR_TLS_REQD

BOTH_FLAGS = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
FLAGS = TransmissionFlag
ALL_FLAGS = FLAGS(0x1FFF) & ~FLAGS.READ_ONLY
DISK = ExportInfo(
    size=1_000_001,
    flags=FLAGS.SEND_FLUSH | FLAGS.SEND_FUA | FLAGS.SEND_DF,
    canonical_name="disk",
    description="a disk",
    min_block=512,
    preferred_block=65536,
    max_payload=32 << 20,
)

Reply = tuple[int, int, bytes]


def flags(value: int = BOTH_FLAGS) -> bytes:
    return struct.pack(">I", value)


def option(number: int, payload: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(payload)) + payload


def info_payload(name: str, *infos: int) -> bytes:
    return m.INFO_REQUEST.build(m.InfoRequest(name, infos))


def meta_payload(name: str, *queries: str) -> bytes:
    return m.META_CONTEXT_REQUEST.build(m.MetaContextRequest(name, queries))


def replies(data: bytes) -> list[Reply]:
    """All replies to options in `data`, which must be nothing else."""
    found: list[Reply] = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert len(data) >= 20 + length
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


class Session:
    """A server behind its greeting and the client's flags; answers questions from one export called "disk"."""

    def __init__(
        self, client_flags: int = BOTH_FLAGS, *, exports: dict[str, ExportInfo] | None = None, **arguments: object
    ):
        self.server = ServerNegotiation(**arguments)  # type: ignore[arg-type]  # passed through as the tests give them
        assert self.server.data_to_send() == b"NBDMAGICIHAVEOPT\x00\x03"
        self.exports = {"disk": DISK, "": DISK} if exports is None else exports
        self.contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
        self.sent = bytearray()
        self.server.receive_data(flags(client_flags))

    def events(self, data: bytes) -> list[ServerEvent]:
        """Every event until more bytes are needed or the end; what was sent is in `sent`."""
        if data:
            self.server.receive_data(data)
        found: list[ServerEvent] = []
        while True:
            event = self.server.next_event()
            if isinstance(event, NeedData):
                break
            found.append(event)
            if isinstance(event, Ready | Aborted | Closed):
                break
            self.answer(event)
            self.sent += self.server.data_to_send()
        self.sent += self.server.data_to_send()
        return found

    def answer(self, event: ServerEvent) -> None:
        match event:
            case ListExports():
                self.server.send_export_list([("disk", "a disk"), ("other", "")])
            case ExportQuery(name=name):
                if name in self.exports:
                    self.server.accept_export(self.exports[name])
                else:
                    self.server.refuse(OptionReplyType.ERR_UNKNOWN, f"no export is called {name!r}")
            case MetaContextQuery():
                names = select_contexts(event.option, event.queries, self.contexts)
                self.server.send_meta_contexts([(10 + self.contexts.index(name), name) for name in names])
            case StartTls():
                self.server.accept_tls()

    def ask(self, data: bytes) -> list[Reply]:
        """The replies to the option(s) in `data`."""
        self.sent.clear()
        self.events(data)
        return replies(bytes(self.sent))

    def verdict(self, data: bytes) -> int:
        """The type of the last reply to the option in `data`."""
        return self.ask(data)[-1][1]

    def ready(self, data: bytes) -> Ready:
        self.sent.clear()
        last = self.events(data)[-1]
        assert isinstance(last, Ready)
        return last

    def closed(self, data: bytes) -> str:
        self.sent.clear()
        last = self.events(data)[-1]
        assert isinstance(last, Closed)
        return last.reason


def test_greeting_is_the_specification_s() -> None:
    server = ServerNegotiation()
    assert server.data_to_send() == bytes.fromhex("4e42444d41474943 49484156454f5054 0003")
    assert server.data_to_send() == b""
    assert server.next_event() is NEED_DATA


@pytest.mark.parametrize("value", [4, 1 << 31, 0xFFFFFFFF, BOTH_FLAGS | 8])
def test_conformance_01_unknown_client_flag_drops_the_connection(value: int) -> None:
    session = Session(value)
    with pytest.raises(RemoteProtocolError, match="client flags 0x"):
        session.events(option(Option.LIST))
    assert session.sent == b""
    assert session.server.state is State.ENDED


@pytest.mark.parametrize("number", [0, 4, 12, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "length", [0, 1, 4096, MAX_OPTION_KEPT_BYTES, MAX_OPTION_KEPT_BYTES + 1, MAX_OPTION_SKIPPED_BYTES]
)
def test_conformance_02_unknown_option_is_consumed_whole_and_unsup(number: int, length: int) -> None:
    session = Session()
    (reply,) = session.ask(option(number, b"I" * length))
    assert reply[:2] == (number, UNSUP)
    assert session.verdict(option(Option.LIST)) == ACK


def test_conformance_02_an_option_beyond_the_cap_closes() -> None:
    session = Session()
    with pytest.raises(RemoteProtocolError, match=f"at most {MAX_OPTION_SKIPPED_BYTES} are read"):
        session.events(b"IHAVEOPT" + struct.pack(">II", 99, MAX_OPTION_SKIPPED_BYTES + 1))


@pytest.mark.parametrize("payload", [b"", b"bye"])
def test_conformance_03_abort_is_acknowledged_then_closed(payload: bytes) -> None:
    session = Session()
    assert session.events(option(Option.ABORT, payload)) == [Aborted()]
    assert replies(bytes(session.sent)) == [(Option.ABORT, ACK, b"")]
    session.server.receive_data(b"whatever comes now")
    session.server.receive_data(b"")
    with pytest.raises(LocalProtocolError, match="nothing"):
        session.server.next_event()


@pytest.mark.parametrize("data", [b"", option(Option.LIST)[:7], option(Option.GO, info_payload("disk"))[:-1]])
def test_conformance_03_a_client_that_hangs_up_is_closed_without_an_error(data: bytes) -> None:
    session = Session()
    session.events(data)
    session.server.receive_data(b"")
    event = session.server.next_event()
    assert isinstance(event, Closed)
    assert "hung up" in event.reason


def test_conformance_03_hanging_up_during_a_question_is_told_after_the_answer() -> None:
    session = Session()
    session.server.receive_data(option(Option.LIST))
    assert isinstance(session.server.next_event(), ListExports)
    session.server.receive_data(b"")
    session.server.send_export_list([])
    assert isinstance(session.server.next_event(), Closed)


@pytest.mark.parametrize("number", [Option.LIST, Option.STRUCTURED_REPLY, Option.STARTTLS, Option.EXTENDED_HEADERS])
@pytest.mark.parametrize("length", [1, 4096, MAX_OPTION_KEPT_BYTES + 1])
@pytest.mark.parametrize("tls", ["off", "allowed"])
def test_conformance_04_options_without_payload_refuse_one(number: int, length: int, tls: str) -> None:
    session = Session(tls=tls)
    assert session.verdict(option(number, bytes(length))) == INVALID
    assert session.verdict(option(Option.LIST)) == ACK


def test_conformance_04_list_has_32_bit_name_lengths_and_ends_with_ack() -> None:
    assert Session().ask(option(Option.LIST)) == [
        (Option.LIST, OptionReplyType.SERVER, b"\0\0\0\x04diska disk"),
        (Option.LIST, OptionReplyType.SERVER, b"\0\0\0\x05other"),
        (Option.LIST, ACK, b""),
    ]


def test_conformance_04_an_empty_list_is_just_ack() -> None:
    session = Session()
    session.server.receive_data(option(Option.LIST))
    session.server.next_event()
    session.server.send_export_list([])
    assert replies(session.server.data_to_send()) == [(Option.LIST, ACK, b"")]


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\x04disk",
        b"\0\0\0\x04disk\0",
        b"\0\0\0\x05disk\0\0",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\0\0\0\x04disk\0\x01",
        b"\0\0\0\x04disk\0\x02\0\x01",
        b"\0\0\0\x04disk\xff\xff\0\x01",
    ],
)
def test_conformance_05_go_with_short_payload_is_invalid(number: int, payload: bytes) -> None:
    session = Session()
    (reply,) = session.ask(option(number, payload))
    assert reply[:2] == (number, INVALID)
    assert reply[2]
    assert b"\n" not in reply[2]
    assert session.ready(option(Option.GO, info_payload("disk"))).info.size == DISK.size


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "payload", [b"\0\0\0\x04disk\0\0\0", b"\0\0\0\x04disk\0\x01\0\x03\0\x03", b"\0\0\0\x03disk\0\0"]
)
def test_conformance_05_go_with_overlong_payload_is_invalid(number: int, payload: bytes) -> None:
    session = Session()
    assert session.verdict(option(number, payload)) == INVALID
    assert session.verdict(option(Option.LIST)) == ACK


@pytest.mark.parametrize("length", [4097, 65000, MAX_OPTION_KEPT_BYTES, MAX_OPTION_SKIPPED_BYTES - 6])
@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_conformance_05_a_name_over_4096_bytes_is_refused(number: int, length: int) -> None:
    session = Session()
    payload = struct.pack(">I", length) + b"n" * length + b"\0\0"
    assert session.verdict(option(number, payload)) in {INVALID, OptionReplyType.ERR_TOO_BIG}
    assert session.verdict(option(Option.LIST)) == ACK


def test_conformance_05_a_name_of_4096_bytes_is_served() -> None:
    name = "ü" * 2048
    session = Session(exports={name: DISK})
    assert session.ready(option(Option.GO, info_payload(name))).export_name == name


@pytest.mark.parametrize("name", [b"\xff", b"di\0sk"])
def test_conformance_05_a_name_that_is_no_string_is_invalid(name: bytes) -> None:
    payload = struct.pack(">I", len(name)) + name + b"\0\0"
    assert Session().verdict(option(Option.GO, payload)) == INVALID


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_conformance_05_unknown_info_requests_are_ignored_and_export_comes_before_ack(number: int) -> None:
    answer = Session().ask(option(number, info_payload("disk", 77, 0xFFFF, InfoType.EXPORT)))
    assert [kind for _, kind, _ in answer] == [OptionReplyType.INFO] * 2 + [ACK]
    assert answer[0][2] == struct.pack(">HQH", 0, DISK.size, DISK.flags & ~FLAGS.SEND_DF | FLAGS.HAS_FLAGS)
    assert answer[1][2] == struct.pack(">HIII", 3, 512, 65536, 32 << 20)


def test_conformance_05_all_infos_that_are_asked_for() -> None:
    answer = Session().ask(option(Option.INFO, info_payload("disk", 1, 2, 3)))
    assert [reply[2][2:] for reply in answer if reply[2][:2] in {b"\0\1", b"\0\2"}] == [b"disk", b"a disk"]


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_conformance_05_unknown_export_keeps_the_connection_usable(number: int) -> None:
    session = Session()
    ((_, kind, text),) = session.ask(option(number, info_payload("nothing")))
    assert (kind, text) == (OptionReplyType.ERR_UNKNOWN, b"no export is called 'nothing'")
    assert session.ready(option(Option.GO, info_payload("disk"))).export_name == "disk"


@pytest.mark.parametrize("before", [(), (Option.STRUCTURED_REPLY,), (Option.EXTENDED_HEADERS,)])
def test_conformance_05_info_and_then_go_tell_the_same(before: tuple[int, ...]) -> None:
    session = Session(exports={"disk": ExportInfo(5, ALL_FLAGS, "disk", "d", 1, 512, 1024)})
    for number in before:
        assert session.verdict(option(number)) == ACK
    payload = info_payload("disk", 0, 1, 2, 3)
    told = session.ask(option(Option.INFO, payload))
    same = session.ask(option(Option.GO, payload))
    assert [reply[1:] for reply in told] == [reply[1:] for reply in same]


@pytest.mark.parametrize(("client_flags", "zeroes"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_conformance_06_export_name_has_exactly_124_zeroes_unless_both_said_no_zeroes(
    client_flags: int, zeroes: int
) -> None:
    session = Session(client_flags)
    ready = session.ready(option(Option.EXPORT_NAME, b"disk"))
    assert bytes(session.sent) == struct.pack(">QH", DISK.size, ready.info.flags) + bytes(zeroes)
    assert ready.mode is ReplyMode.SIMPLE
    assert ready.option == Option.EXPORT_NAME
    assert ready.client_flags == client_flags


def test_conformance_06_unknown_name_closes() -> None:
    session = Session()
    assert "'nothing' was refused" in session.closed(option(Option.EXPORT_NAME, b"nothing"))
    assert session.sent == b""


@pytest.mark.parametrize("name", [b"\xff", b"di\0sk", b"n" * 4097])
def test_conformance_06_a_name_that_is_no_string_closes(name: bytes) -> None:
    session = Session()
    with pytest.raises(RemoteProtocolError, match="NBD_OPT_EXPORT_NAME"):
        session.events(option(Option.EXPORT_NAME, name))
    assert session.sent == b""


def test_conformance_06_a_name_beyond_all_bounds_closes() -> None:
    assert "TOO_BIG" in Session().closed(option(Option.EXPORT_NAME, b"n" * (MAX_OPTION_KEPT_BYTES + 1)))


def test_conformance_07_kernel_client_without_info_requests_is_served() -> None:
    session = Session(exports={"disk": ExportInfo(4096, FLAGS.SEND_FLUSH)})
    ready = session.ready(option(Option.GO, info_payload("disk")))
    assert (ready.info.min_block, ready.info.preferred_block, ready.info.max_payload) == (1, 4096, 32 << 20)
    assert replies(bytes(session.sent))[-1][1] == ACK


def test_conformance_08_starttls_forgets_all_that_was_negotiated() -> None:
    session = Session(tls="allowed")
    session.ask(option(Option.STRUCTURED_REPLY))
    session.ask(option(Option.SET_META_CONTEXT, meta_payload("disk", "base:allocation")))
    assert session.ask(option(Option.STARTTLS)) == [(Option.STARTTLS, ACK, b"")]
    assert session.verdict(option(Option.SET_META_CONTEXT, meta_payload("disk", "base:allocation"))) == INVALID
    ready = session.ready(option(Option.GO, info_payload("disk")))
    assert (ready.mode, ready.contexts, ready.secure) == (ReplyMode.SIMPLE, {}, True)
    assert not ready.info.flags & FLAGS.SEND_DF


@pytest.mark.parametrize("when", ["with the option", "before the answer"])
def test_conformance_08_plaintext_injected_before_the_handshake_is_thrown_away(when: str) -> None:
    session = Session(tls="allowed")
    injected = option(Option.STRUCTURED_REPLY) + option(Option.GO, info_payload("disk"))
    session.server.receive_data(option(Option.STARTTLS) + (injected if when == "with the option" else b""))
    assert isinstance(session.server.next_event(), StartTls)
    if when == "before the answer":
        session.server.receive_data(injected)
    session.server.accept_tls()
    assert replies(session.server.data_to_send()) == [(Option.STARTTLS, ACK, b"")]
    assert session.server.next_event() is NEED_DATA
    assert session.server.data_to_send() == b""
    assert session.ready(option(Option.GO, info_payload("disk"))).mode is ReplyMode.SIMPLE


@pytest.mark.parametrize("tls", ["allowed", "required"])
def test_conformance_08_a_second_starttls_is_invalid(tls: TlsPolicy) -> None:
    session = Session(tls=tls)
    assert session.verdict(option(Option.STARTTLS)) == ACK
    assert session.verdict(option(Option.STARTTLS)) == INVALID
    assert session.verdict(option(Option.LIST)) == ACK


def test_conformance_08_required_tls_is_told_to_every_option_but_abort() -> None:
    session = Session(tls="required")
    for number in (*RULES, 4, 99):
        if number not in {Option.EXPORT_NAME, Option.ABORT, Option.STARTTLS}:
            for payload in (b"", b"x", info_payload("disk"), bytes(MAX_OPTION_KEPT_BYTES + 1)):
                assert session.verdict(option(number, payload)) == TLS_REQD
    assert session.events(option(Option.ABORT)) == [Aborted()]
    assert "TLS_REQD" in Session(tls="required").closed(option(Option.EXPORT_NAME, b"disk"))
    begun = Session(tls="required")
    begun.ask(option(Option.STARTTLS))
    assert begun.ready(option(Option.EXPORT_NAME, b"disk")).secure


def test_conformance_08_where_there_is_no_tls_it_is_never_required() -> None:
    session = Session()
    assert session.verdict(option(Option.STARTTLS)) == OptionReplyType.ERR_POLICY
    session.server.receive_data(option(Option.LIST))
    session.server.next_event()
    with pytest.raises(LocalProtocolError, match="TLS_REQD"):
        session.server.refuse(TLS_REQD)
    secured = Session(tls="required")
    secured.ask(option(Option.STARTTLS))
    secured.server.receive_data(option(Option.LIST))
    secured.server.next_event()
    with pytest.raises(LocalProtocolError, match="TLS_REQD"):
        secured.server.refuse(TLS_REQD)


def test_conformance_08_a_refused_starttls_changes_nothing() -> None:
    session = Session(tls="allowed")
    session.ask(option(Option.STRUCTURED_REPLY))
    session.server.receive_data(option(Option.STARTTLS))
    session.server.next_event()
    session.server.refuse(OptionReplyType.ERR_POLICY, "not today")
    assert replies(session.server.data_to_send()) == [(Option.STARTTLS, OptionReplyType.ERR_POLICY, b"not today")]
    ready = session.ready(option(Option.GO, info_payload("disk")))
    assert (ready.mode, ready.secure) == (ReplyMode.STRUCTURED, False)


@pytest.mark.parametrize("number", [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
def test_conformance_09_meta_context_before_structured_replies_is_invalid(number: int) -> None:
    session = Session()
    assert session.verdict(option(number, meta_payload("disk", "base:allocation"))) == INVALID
    session.ask(option(Option.STRUCTURED_REPLY))
    assert session.verdict(option(number, meta_payload("disk", "base:allocation"))) == ACK


def test_conformance_09_extended_headers_then_set_meta_context_as_qemu_10_does() -> None:
    session = Session()
    assert session.verdict(option(Option.EXTENDED_HEADERS)) == ACK
    assert session.ask(option(Option.SET_META_CONTEXT, meta_payload("disk", "base:allocation"))) == [
        (Option.SET_META_CONTEXT, OptionReplyType.META_CONTEXT, b"\0\0\0\x0abase:allocation"),
        (Option.SET_META_CONTEXT, ACK, b""),
    ]
    ready = session.ready(option(Option.GO, info_payload("disk", InfoType.BLOCK_SIZE)))
    assert (ready.mode, ready.contexts) == (ReplyMode.EXTENDED, {10: "base:allocation"})


def structured_session_with_context() -> Session:
    session = Session()
    session.ask(option(Option.STRUCTURED_REPLY))
    payload = meta_payload("disk", "base:allocation", "qemu:dirty-bitmap:b0")
    assert len(session.ask(option(Option.SET_META_CONTEXT, payload))) == 3
    return session


def test_conformance_09_the_set_contexts_are_those_of_go() -> None:
    ready = structured_session_with_context().ready(option(Option.GO, info_payload("disk")))
    assert ready.contexts == {10: "base:allocation", 12: "qemu:dirty-bitmap:b0"}
    ready = structured_session_with_context().ready(option(Option.EXPORT_NAME, b"disk"))
    assert ready.contexts == {10: "base:allocation", 12: "qemu:dirty-bitmap:b0"}


def test_conformance_09_contexts_set_for_another_export_are_not_valid() -> None:
    assert structured_session_with_context().ready(option(Option.GO, info_payload(""))).contexts == {}


@pytest.mark.parametrize(
    "payload",
    [
        meta_payload("disk"),
        meta_payload("disk", "base:"),
        meta_payload("disk", "x-unknown:thing"),
        b"",
        b"\0\0\0\x04disk\0\0\0\x01",
        meta_payload("disk", "base:allocation") + b"\0",
        bytes(MAX_OPTION_KEPT_BYTES + 1),
    ],
)
def test_conformance_09_set_meta_context_replaces_the_earlier_set_even_when_it_fails(payload: bytes) -> None:
    session = structured_session_with_context()
    session.ask(option(Option.SET_META_CONTEXT, payload))
    assert session.ready(option(Option.GO, info_payload("disk"))).contexts == {}


def test_conformance_09_a_refused_set_meta_context_replaces_too() -> None:
    session = structured_session_with_context()
    session.server.receive_data(option(Option.SET_META_CONTEXT, meta_payload("none", "base:allocation")))
    assert isinstance(session.server.next_event(), MetaContextQuery)
    session.server.refuse(OptionReplyType.ERR_UNKNOWN)
    assert session.ready(option(Option.GO, info_payload("disk"))).contexts == {}


def test_conformance_09_listing_contexts_selects_none_and_tells_no_ids() -> None:
    session = structured_session_with_context()
    listed = session.ask(option(Option.LIST_META_CONTEXT, meta_payload("disk")))
    assert [reply[2] for reply in listed[:-1]] == [b"\0\0\0\0" + name.encode() for name in session.contexts]
    assert len(session.ready(option(Option.GO, info_payload("disk"))).contexts) == 2


@pytest.mark.parametrize(
    ("number", "queries", "selected"),
    [
        (Option.SET_META_CONTEXT, (), []),
        (Option.SET_META_CONTEXT, ("base:",), []),
        (Option.SET_META_CONTEXT, ("qemu:", "qemu:dirty-bitmap:"), []),
        (Option.SET_META_CONTEXT, ("base:allocation", "base:allocation"), ["base:allocation"]),
        (Option.SET_META_CONTEXT, ("nbd-server:x", "x-a:b", "nocolon", "", "base:alloc"), []),
        (
            Option.SET_META_CONTEXT,
            ("qemu:dirty-bitmap:b", "base:allocation"),
            ["base:allocation", "qemu:dirty-bitmap:b"],
        ),
        (Option.LIST_META_CONTEXT, (), ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]),
        (Option.LIST_META_CONTEXT, ("base:",), ["base:allocation"]),
        (Option.LIST_META_CONTEXT, ("qemu:",), ["qemu:allocation-depth", "qemu:dirty-bitmap:b"]),
        (Option.LIST_META_CONTEXT, ("qemu:dirty-bitmap:",), ["qemu:dirty-bitmap:b"]),
        (
            Option.LIST_META_CONTEXT,
            ("qemu:allocation-depth", "qemu:"),
            ["qemu:allocation-depth", "qemu:dirty-bitmap:b"],
        ),
        (Option.LIST_META_CONTEXT, ("x-unknown:", "", "base"), []),
    ],
)
def test_conformance_09_queries_match_names_and_only_list_matches_namespaces(
    number: Option, queries: tuple[str, ...], selected: list[str]
) -> None:
    available = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]
    assert select_contexts(number, queries, available) == selected


@pytest.mark.parametrize("number", [Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT])
@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xff\xff\xffdisk\0\0\0\0",
        b"\0\0\0\x04disk\xff\xff\xff\xff",
        b"\0\0\0\x04disk\0\0\0\x01\xff\xff\xff\xffx:y",
        b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x03x:y",
        b"\0\0\0\x04disk\0\0\0\0\0\0\0\x03x:y",
        b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x02\xff:",
        b"\0\0\0\x04disk",
    ],
)
def test_conformance_09_lengths_that_overflow_are_invalid(number: int, payload: bytes) -> None:
    session = Session()
    session.ask(option(Option.STRUCTURED_REPLY))
    assert session.verdict(option(number, payload)) == INVALID
    assert session.verdict(option(Option.LIST)) == ACK


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ((), ALL_FLAGS & ~(FLAGS.SEND_DF | FLAGS.BLOCK_STATUS_PAYLOAD | FLAGS.SEND_RESIZE)),
        ((Option.STRUCTURED_REPLY,), ALL_FLAGS & ~(FLAGS.BLOCK_STATUS_PAYLOAD | FLAGS.SEND_RESIZE)),
        ((Option.EXTENDED_HEADERS,), ALL_FLAGS & ~FLAGS.SEND_RESIZE),
        ((Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS), ALL_FLAGS & ~FLAGS.SEND_RESIZE),
    ],
)
def test_conformance_10_flags_are_told_only_where_they_were_negotiated_for(
    before: tuple[int, ...], told: TransmissionFlag
) -> None:
    session = Session(exports={"disk": ExportInfo(512, ALL_FLAGS)})
    for number in before:
        assert session.verdict(option(number)) == ACK
    assert session.ready(option(Option.GO, info_payload("disk"))).info.flags == told
    assert replies(bytes(session.sent))[0][2] == struct.pack(">HQH", 0, 512, told)


def test_conformance_10_fast_zero_only_with_write_zeroes() -> None:
    session = Session(exports={"disk": ExportInfo(512, FLAGS.SEND_FAST_ZERO | FLAGS.SEND_TRIM)})
    ready = session.ready(option(Option.GO, info_payload("disk")))
    assert ready.info.flags == FLAGS.HAS_FLAGS | FLAGS.SEND_TRIM


def test_experimental_resize_is_told_only_if_wanted() -> None:
    session = Session(exports={"disk": ExportInfo(512, FLAGS.SEND_RESIZE)}, resize=True)
    assert session.ready(option(Option.GO, info_payload("disk"))).info.flags == FLAGS.HAS_FLAGS | FLAGS.SEND_RESIZE


def test_conformance_11_nothing_is_asked_of_the_caller_before_an_export_is_chosen() -> None:
    session = Session()
    assert session.events(option(Option.STRUCTURED_REPLY) + option(99) + option(Option.STARTTLS)) == []
    assert session.events(option(Option.LIST)) == [ListExports(secure=False)]
    query, ready = session.events(option(Option.GO, info_payload("disk", 3)))
    assert query == ExportQuery(Option.GO, "disk", (3,), secure=False)
    assert isinstance(ready, Ready)


def test_conformance_12_the_65th_option_closes() -> None:
    session = Session()
    for _ in range(MAX_OPTIONS):
        assert session.verdict(option(99)) == UNSUP
    with pytest.raises(RemoteProtocolError, match="option number 65"):
        session.events(option(99))


def test_conformance_12_starttls_does_not_begin_a_new_count() -> None:
    session = Session(tls="allowed")
    session.ask(option(Option.STARTTLS))
    for _ in range(MAX_OPTIONS - 1):
        session.ask(option(99))
    with pytest.raises(RemoteProtocolError, match="option number 65"):
        session.events(option(99))


def test_conformance_12_a_known_option_over_64_kib_is_skipped_without_being_kept() -> None:
    session = Session()
    session.events(b"IHAVEOPT" + struct.pack(">II", Option.GO, MAX_OPTION_SKIPPED_BYTES))
    for _ in range(16):
        session.events(bytes(MAX_OPTION_SKIPPED_BYTES // 16))
        assert len(session.server._received) == 0
    assert replies(bytes(session.sent))[-1][1] == OptionReplyType.ERR_TOO_BIG
    assert session.verdict(option(Option.LIST)) == ACK


def test_conformance_12_what_is_sent_ahead_of_an_answer_is_bounded() -> None:
    session = Session()
    session.server.receive_data(option(Option.LIST))
    session.server.next_event()
    session.server.receive_data(bytes(MAX_AHEAD_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="ahead of the answer"):
        session.server.receive_data(b"x")


def test_conformance_12_where_only_some_exports_need_tls_only_they_are_refused() -> None:
    session = Session(tls="allowed")
    for number in (Option.INFO, Option.GO):
        session.server.receive_data(option(number, info_payload("secret")))
        query = session.server.next_event()
        assert isinstance(query, ExportQuery)
        assert not query.secure
        session.server.refuse(TLS_REQD, "secret needs TLS")
        assert replies(session.server.data_to_send()) == [(number, TLS_REQD, b"secret needs TLS")]
    assert session.verdict(option(Option.LIST)) == ACK
    assert session.ready(option(Option.GO, info_payload("disk"))).export_name == "disk"


def test_conformance_23_export_name_after_extended_headers_closes() -> None:
    session = Session()
    session.ask(option(Option.EXTENDED_HEADERS))
    assert "after EXTENDED_HEADERS" in session.closed(option(Option.EXPORT_NAME, b"disk"))
    assert session.sent == b""


def test_conformance_23_structured_reply_after_extended_headers_is_ext_header_reqd() -> None:
    session = Session()
    session.ask(option(Option.EXTENDED_HEADERS))
    assert session.verdict(option(Option.STRUCTURED_REPLY)) == OptionReplyType.ERR_EXT_HEADER_REQD
    assert session.ready(option(Option.GO, info_payload("disk"))).mode is ReplyMode.EXTENDED


def test_conformance_23_extended_headers_take_precedence_over_structured_replies() -> None:
    session = Session()
    session.ask(option(Option.STRUCTURED_REPLY) + option(Option.EXTENDED_HEADERS))
    assert session.ready(option(Option.GO, info_payload("disk"))).mode is ReplyMode.EXTENDED


def test_switched_off_reply_modes_are_unsup() -> None:
    session = Session(structured=False, extended=False)
    assert session.verdict(option(Option.STRUCTURED_REPLY)) == UNSUP
    assert session.verdict(option(Option.EXTENDED_HEADERS)) == UNSUP
    assert session.ready(option(Option.GO, info_payload("disk"))).mode is ReplyMode.SIMPLE


def test_a_client_without_fixed_newstyle_may_use_options_all_the_same() -> None:
    assert Session(0).verdict(option(Option.LIST)) == ACK


def test_shutting_down_refuses_all_but_abort() -> None:
    session = Session()
    session.server.shut_down()
    for data in (option(Option.LIST), option(99, b"x"), option(Option.GO, info_payload("disk"))):
        assert session.verdict(data) == OptionReplyType.ERR_SHUTDOWN
    assert session.events(option(Option.ABORT)) == [Aborted()]


def test_wrong_option_magic_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="malformed option header"):
        Session().events(b"IHAVENOT" + bytes(8))


def test_requests_sent_right_behind_go_are_handed_on() -> None:
    session = Session()
    session.ready(option(Option.GO, info_payload("disk")) + b"first request")
    assert session.server.trailing_data == b"first request"
    with pytest.raises(LocalProtocolError, match="transmission phase"):
        session.server.receive_data(b"more")


def test_answers_to_nothing_are_our_error() -> None:
    server = Session().server
    answers: list[Callable[[], None]] = [
        lambda: server.send_export_list([]),
        lambda: server.accept_export(DISK),
        lambda: server.send_meta_contexts([]),
        server.accept_tls,
        lambda: server.refuse(UNSUP),
    ]
    for answer in answers:
        with pytest.raises(LocalProtocolError, match="answers no question"):
            answer()


def test_wrong_answers_leave_the_question_open() -> None:
    session = Session()
    server = session.server
    server.receive_data(option(Option.GO, info_payload("disk")))
    with pytest.raises(LocalProtocolError, match="answers no question"):
        server.accept_export(DISK)
    assert isinstance(server.next_event(), ExportQuery)
    with pytest.raises(LocalProtocolError, match="awaited is an answer of the caller to ExportQuery"):
        server.next_event()
    wrong: list[Callable[[], None]] = [
        lambda: server.send_export_list([]),
        lambda: server.refuse(ACK),
        lambda: server.accept_export(ExportInfo(-1, FLAGS(0))),
        lambda: server.accept_export(ExportInfo(1 << 63, FLAGS(0))),
        lambda: server.accept_export(ExportInfo(1, FLAGS(0), min_block=3)),
        lambda: server.accept_export(ExportInfo(1, FLAGS(0), min_block=1 << 17)),
        lambda: server.accept_export(ExportInfo(1, FLAGS(0), min_block=4096, preferred_block=512)),
        lambda: server.accept_export(ExportInfo(1, FLAGS(0), max_payload=1 << 32)),
    ]
    for answer in wrong:
        with pytest.raises(LocalProtocolError):
            answer()
    assert server.data_to_send() == b""
    server.accept_export(DISK)
    assert isinstance(server.next_event(), Ready)


def test_wrong_names_and_contexts_leave_the_question_open() -> None:
    session = Session()
    server = session.server
    session.ask(option(Option.STRUCTURED_REPLY))
    server.receive_data(option(Option.LIST))
    server.next_event()
    with pytest.raises(LocalProtocolError, match="4097 bytes"):
        server.send_export_list([("good", ""), ("n" * 4097, "")])
    assert server.data_to_send() == b""
    server.send_export_list([("good", "d" * 5000)])
    assert [len(reply[2]) for reply in replies(server.data_to_send())] == [4 + 4 + 4096, 0]
    server.receive_data(option(Option.SET_META_CONTEXT, meta_payload("disk")))
    server.next_event()
    for contexts in ([(1, "a:b"), (1, "a:c")], [(1, "a:b"), (2, "a:b")], [(1 << 32, "a:b")]):
        with pytest.raises(LocalProtocolError):
            server.send_meta_contexts(contexts)
    assert server.data_to_send() == b""


def test_error_texts_are_cut_to_a_string_of_the_protocol() -> None:
    session = Session()
    session.server.receive_data(option(Option.LIST))
    session.server.next_event()
    session.server.refuse(OptionReplyType.ERR_POLICY, "ü\0" * 3000 + "\udcff")
    ((_, _, text),) = replies(session.server.data_to_send())
    assert text == "ü".encode() * 2048


def test_the_table_of_states_is_whole() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {State.CLIENT_FLAGS}.union(*TRANSITIONS.values())
    assert reached == set(State)


# Laws --------------------------------------------------------------------------------------------------------------


def everything() -> bytes:
    return b"".join(
        [
            option(99, b"skip me"),
            option(Option.LIST),
            option(Option.STRUCTURED_REPLY),
            option(Option.INFO, info_payload("disk", 1, 2, 3)),
            option(Option.LIST_META_CONTEXT, meta_payload("disk")),
            option(Option.SET_META_CONTEXT, meta_payload("disk", "base:allocation")),
            option(Option.GO, info_payload("nothing")),
            option(Option.GO, b"short"),
            option(Option.GO, info_payload("disk", 3)),
            b"trailing",
        ]
    )


def run(pieces: Iterator[bytes]) -> tuple[list[ServerEvent], bytes, bytes]:
    session = Session()
    found: list[ServerEvent] = []
    over = False
    trailing = b""
    for piece in pieces:
        if over:
            trailing += piece
        else:
            found += session.events(piece)
            over = session.server.state is State.TRANSMISSION
    return found, bytes(session.sent), session.server.trailing_data + trailing


def test_every_split_of_a_conversation_gives_the_same_events_and_bytes() -> None:
    data = everything()
    whole = run(iter([data]))
    assert whole[2] == b"trailing"
    assert isinstance(whole[0][-1], Ready)
    for cut in range(1, len(data)):
        assert run(iter([data[:cut], data[cut:]])) == whole
    assert run(data[i : i + 1] for i in range(len(data))) == whole


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.integers(0, 3).map(flags)) + everything())
    for _ in range(draw(st.integers(1, 6))):
        where = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 2)):
            case 0:
                data[where] = draw(st.integers(0, 255))
            case 1:
                del data[where : where + draw(st.integers(1, 8))]
            case _:
                data[where:where] = draw(st.binary(max_size=8))
    return bytes(data)


options = st.lists(
    st.tuples(st.sampled_from([*Option, 0, 12, 0xFFFFFFFF]), st.binary(max_size=40)), max_size=MAX_OPTIONS + 5
).map(lambda found: flags() + b"".join(option(number, payload) for number, payload in found))


@settings(deadline=None)
@given(st.binary(max_size=300) | mutated() | options, st.sampled_from(["off", "allowed", "required"]), st.data())
def test_garbage_gives_events_or_a_protocol_error_and_never_grows(
    data: bytes, tls: TlsPolicy, more: st.DataObject
) -> None:
    session = Session.__new__(Session)
    session.server = ServerNegotiation(tls=tls)
    session.exports, session.contexts, session.sent = {"disk": DISK}, ["base:allocation"], bytearray()
    size = more.draw(st.integers(1, 400))
    try:
        for start in range(0, len(data), size):
            session.events(data[start : start + size])
            if session.server.state in {State.TRANSMISSION, State.ENDED}:
                return
            assert len(session.server._received) <= MAX_OPTION_KEPT_BYTES + 16
        session.server.receive_data(b"")
        assert isinstance(session.server.next_event(), Closed)
    except RemoteProtocolError:
        assert session.server.state is State.ENDED
