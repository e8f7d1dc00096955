"""Both ends of the negotiation talk to each other in memory, through every path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol.client_negotiation import ClientNegotiation, TlsWish
from nbd_protocol.client_negotiation import State as ClientState
from nbd_protocol.constants import HandshakeFlag, Option, OptionReplyType, ReplyMode, TransmissionFlag
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.messages import ServerReply
from nbd_protocol.negotiation import ExportInfo, NeedData, advertised_flags, select_contexts
from nbd_protocol.negotiation_events import (
    Aborted,
    ClientEvent,
    Closed,
    Ended,
    Established,
    ExportDescribed,
    ExportQuery,
    ExportsListed,
    ListExports,
    MetaContextQuery,
    MetaContextsListed,
    Ready,
    Refused,
    StartTls,
    TlsWanted,
)
from nbd_protocol.server_negotiation import ServerNegotiation, TlsPolicy
from nbd_protocol.server_negotiation import State as ServerState

FLAGS = TransmissionFlag
EXPORTS = {
    "": ExportInfo(1, FLAGS.READ_ONLY, canonical_name="disk"),
    "disk": ExportInfo(1 << 40, FLAGS(0x1FFF) & ~FLAGS.READ_ONLY, "disk", "a disk", 512, 4096, 1 << 20),
    "ünïcode 💾": ExportInfo((1 << 63) - 1, FLAGS(0)),
    "n" * 4096: ExportInfo(0, FLAGS(0), description="d" * 4096),
}
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
SECRET = "secret"
"""An export that is there for secure connections only."""


class Conversation:
    """A client and a server with EXPORTS behind it; each message is delivered in pieces of `piece_bytes`."""

    has_tls = True

    def __init__(self, client: ClientNegotiation, server: ServerNegotiation, piece_bytes: int = 1 << 20) -> None:
        self.client = client
        self.server = server
        self.piece_bytes = piece_bytes
        self.ready: Ready | None = None
        self.server_end: Aborted | Closed | None = None
        self.from_client = bytearray()
        self.from_server = bytearray()

    def answer(self) -> ClientEvent:
        """What the client's next event is, TlsWanted apart."""
        while True:
            event = self.client.next_event()
            if data := self.to_server(self.client.data_to_send()):
                self._serve(data)
            if isinstance(event, TlsWanted):
                self.client.tls_established()
            elif not isinstance(event, NeedData):
                return event
            else:
                data = self.to_client(self.server.data_to_send())
                self.from_server += data
                assert data or self.is_end_expected(), "both ends wait"
                # With nothing to deliver the server has hung up.
                for piece in self._pieces(data):
                    self.client.receive_data(piece)

    def to_server(self, data: bytes) -> bytes:
        """What becomes of the client's bytes on their way."""
        return data

    def to_client(self, data: bytes) -> bytes:
        """What becomes of the server's bytes on their way."""
        return data

    def is_end_expected(self) -> bool:
        return self.server_end is not None

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        return (data[start : start + self.piece_bytes] for start in range(0, max(len(data), 1), self.piece_bytes))

    def _serve(self, data: bytes) -> None:
        self.from_client += data
        for piece in self._pieces(data):
            if self.server_end is None and self.ready is None:
                self.server.receive_data(piece)
                self._answer_questions()

    def _answer_questions(self) -> None:
        while True:
            match self.server.next_event():
                case NeedData.NEED_DATA:
                    return
                case ListExports(secure=secure):
                    self.server.send_export_list([(name, info.description or "") for name, info in EXPORTS.items()])
                    assert secure == self.client.secure
                case ExportQuery(name=name, secure=secure):
                    self._answer_export_query(name, secure)
                case MetaContextQuery(option, export, queries):
                    if export not in EXPORTS:
                        self.server.refuse(OptionReplyType.ERR_UNKNOWN, "no such export")
                    else:
                        self.server.send_meta_contexts(list(enumerate(select_contexts(option, queries, CONTEXTS))))
                case StartTls():
                    self.server.accept_tls()
                case Ready() as ready:
                    self.ready = ready
                    return
                case Aborted() | Closed() as end:
                    self.server_end = end
                    return

    def _answer_export_query(self, name: str, secure: bool) -> None:
        if name in EXPORTS or (name == SECRET and secure):
            self.server.accept_export(EXPORTS.get(name, ExportInfo(7, FLAGS(0))))
        elif name == SECRET and self.has_tls:
            self.server.refuse(OptionReplyType.ERR_TLS_REQD, "secret is for secure connections")
        else:
            self.server.refuse(OptionReplyType.ERR_UNKNOWN, f"no export {name!r}")


MODES = {(True, True): ReplyMode.EXTENDED, (False, True): ReplyMode.STRUCTURED}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("client_tls", ["off", "prefer", "require"])
@pytest.mark.parametrize("server_tls", ["off", "allowed", "required"])
def test_connecting_through_every_pair_of_abilities(name: str, client_tls: TlsWish, server_tls: TlsPolicy) -> None:
    for client_extended, client_structured, extended, structured in itertools.product((True, False), repeat=4):
        conversation = Conversation(
            ClientNegotiation(extended=client_extended, structured=client_structured, tls=client_tls),
            ServerNegotiation(extended=extended, structured=structured, tls=server_tls),
        )
        conversation.client.connect(name, contexts=(*CONTEXTS, "x-none:at all"))
        event = conversation.answer()
        secure = client_tls != "off" and server_tls != "off"
        if server_tls == "required" and not secure:
            assert isinstance(event, Refused)
            assert event.reply_type == OptionReplyType.ERR_TLS_REQD
            continue
        if client_tls == "require" and not secure:
            assert event == Refused(Option.STARTTLS, OptionReplyType.ERR_POLICY, "this server has no TLS")
            continue
        mode = ReplyMode.SIMPLE
        if client_structured and structured:
            mode = ReplyMode.STRUCTURED
        if client_extended and extended:
            mode = ReplyMode.EXTENDED
        check_established(conversation, event, name, mode, secure)


def check_established(conversation: Conversation, event: ClientEvent, name: str, mode: ReplyMode, secure: bool) -> None:
    offered = EXPORTS[name]
    ready = conversation.ready
    assert ready is not None
    assert isinstance(event, Established)
    assert event.mode is ready.mode is mode
    assert event.contexts == ready.contexts == ({} if mode is ReplyMode.SIMPLE else dict(enumerate(CONTEXTS)))
    assert event.secure is ready.secure is secure
    assert event.export_name == ready.export_name == name
    assert event.info == ready.info
    assert event.info.flags == advertised_flags(offered.flags, mode)
    assert (event.info.size, event.info.canonical_name, event.info.description) == (
        offered.size,
        offered.canonical_name,
        offered.description,
    )
    assert conversation.client.trailing_data == conversation.server.trailing_data == b""


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("tls", ["off", "prefer"])
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20])
def test_info_and_then_go_tell_the_same(structured: bool, extended: bool, tls: TlsWish, piece_bytes: int) -> None:
    for name in EXPORTS:
        conversation = Conversation(
            ClientNegotiation(structured=structured, extended=extended, tls=tls),
            ServerNegotiation(tls="allowed"),
            piece_bytes,
        )
        conversation.client.describe(name)
        described = conversation.answer()
        conversation.client.connect(name)
        established = conversation.answer()
        assert isinstance(described, ExportDescribed)
        assert isinstance(established, Established)
        assert described.info == established.info


def test_listing_every_export_and_what_it_has_on_one_connection() -> None:
    conversation = Conversation(ClientNegotiation(), ServerNegotiation())
    client = conversation.client
    client.list_exports()
    assert conversation.answer() == ExportsListed(
        tuple(ServerReply(name, info.description or "") for name, info in EXPORTS.items())
    )
    for name, info in EXPORTS.items():
        client.describe(name)
        described = conversation.answer()
        assert isinstance(described, ExportDescribed)
        assert described.info.size == info.size
        client.list_meta_contexts(name)
        assert conversation.answer() == MetaContextsListed(name, CONTEXTS)
        client.list_meta_contexts(name, ["qemu:", "base:alloc"])
        assert conversation.answer() == MetaContextsListed(name, CONTEXTS[1:])
    client.list_meta_contexts("nothing")
    assert conversation.answer() == Refused(Option.LIST_META_CONTEXT, OptionReplyType.ERR_UNKNOWN, "no such export")
    client.abort()
    assert conversation.answer() == Ended()
    assert conversation.server_end == Aborted()


def test_meta_contexts_need_more_than_simple_replies() -> None:
    conversation = Conversation(ClientNegotiation(), ServerNegotiation(structured=False, extended=False))
    conversation.client.list_meta_contexts("disk")
    event = conversation.answer()
    assert isinstance(event, Refused)
    assert event.reply_type == OptionReplyType.ERR_INVALID


def test_an_unknown_export_is_refused_and_another_chosen() -> None:
    conversation = Conversation(ClientNegotiation(), ServerNegotiation())
    conversation.client.connect("nothing")
    assert conversation.answer() == Refused(Option.GO, OptionReplyType.ERR_UNKNOWN, "no export 'nothing'")
    conversation.client.connect("disk")
    assert isinstance(conversation.answer(), Established)


@pytest.mark.parametrize(("tls", "shown"), [("off", False), ("prefer", True), ("require", True)])
def test_an_export_for_secure_connections_only(tls: TlsWish, shown: bool) -> None:
    conversation = Conversation(ClientNegotiation(tls=tls), ServerNegotiation(tls="allowed"))
    conversation.client.connect(SECRET)
    event = conversation.answer()
    if shown:
        assert isinstance(event, Established)
    else:
        assert event == Refused(Option.GO, OptionReplyType.ERR_TLS_REQD, "secret is for secure connections")


def test_a_server_that_shuts_down_says_so_and_lets_the_client_leave() -> None:
    conversation = Conversation(ClientNegotiation(), ServerNegotiation())
    conversation.client.list_exports()
    conversation.answer()
    conversation.server.shut_down()
    conversation.client.connect("disk")
    event = conversation.answer()
    assert isinstance(event, Refused)
    assert event.reply_type == OptionReplyType.ERR_SHUTDOWN
    conversation.client.abort()
    assert conversation.answer() == Ended()


class OldServer(Conversation):
    """A server with other handshake flags, to which some options are unknown."""

    NO_OPTION = (0x7777).to_bytes(4, "big")

    def __init__(self, client: ClientNegotiation, unknown: set[Option], flags: HandshakeFlag) -> None:
        super().__init__(client, ServerNegotiation())
        self.unknown = unknown
        self.flags = flags
        self.asked = b""

    def to_server(self, data: bytes) -> bytes:
        start = data.find(b"IHAVEOPT") + 8
        self.asked = data[start : start + 4]
        if start >= 8 and int.from_bytes(self.asked, "big") in self.unknown:
            return data[:start] + self.NO_OPTION + data[start + 4 :]
        return data

    def to_client(self, data: bytes) -> bytes:
        if data.startswith(b"NBDMAGIC"):
            return data[:16] + self.flags.to_bytes(2, "big")
        return data[:8] + self.asked + data[12:] if data[8:12] == self.NO_OPTION else data


@pytest.mark.parametrize("no_zeroes", [True, False])
@pytest.mark.parametrize("flags", [HandshakeFlag(1), HandshakeFlag(3)])
@pytest.mark.parametrize(
    "unknown",
    [
        {Option.GO, Option.EXTENDED_HEADERS},
        {Option.GO, Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY},
        {Option.GO, Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT},
        {Option.SET_META_CONTEXT},
        {Option.EXTENDED_HEADERS},
        {Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY},
    ],
)
def test_every_fallback_ends_in_the_same_export(unknown: set[Option], flags: HandshakeFlag, no_zeroes: bool) -> None:
    conversation = OldServer(ClientNegotiation(no_zeroes=no_zeroes), unknown, flags)
    conversation.client.connect("disk")
    event = conversation.answer()
    ready = conversation.ready
    assert isinstance(event, Established)
    assert ready is not None
    assert event.option == ready.option == (Option.EXPORT_NAME if Option.GO in unknown else Option.GO)
    assert event.mode is ready.mode
    assert event.contexts == ready.contexts
    assert bool(event.contexts) == (Option.SET_META_CONTEXT not in unknown and event.mode is not ReplyMode.SIMPLE)
    assert (event.info.size, event.info.flags) == (ready.info.size, ready.info.flags)
    assert conversation.client.trailing_data == b""
    zeroes = 0 if flags & HandshakeFlag.NO_ZEROES and no_zeroes else 124
    if Option.GO in unknown:
        assert conversation.from_server.endswith(event.info.flags.to_bytes(2, "big") + bytes(zeroes))


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_newstyle_that_is_not_fixed(no_zeroes: bool) -> None:
    conversation = OldServer(ClientNegotiation(no_zeroes=no_zeroes, tls="prefer"), set(), HandshakeFlag(0))
    conversation.client.connect("disk")
    event = conversation.answer()
    assert isinstance(event, Established)
    assert event.option == Option.EXPORT_NAME
    assert conversation.from_client == bytes(4) + b"IHAVEOPT" + b"\0\0\0\1\0\0\0\4disk"
    assert event.info.size == EXPORTS["disk"].size
    unknown = OldServer(ClientNegotiation(no_zeroes=no_zeroes), set(), HandshakeFlag(0))
    unknown.client.connect("nothing")
    refused = unknown.answer()
    assert isinstance(refused, Refused)
    assert refused.option == Option.EXPORT_NAME


def record(piece_bytes: int, tls: TlsWish) -> tuple[list[ClientEvent], bytes, bytes]:
    conversation = Conversation(ClientNegotiation(tls=tls), ServerNegotiation(tls="allowed"), piece_bytes)
    client = conversation.client
    client.list_exports()
    client.describe("disk")
    client.list_meta_contexts("disk")
    client.connect("disk", contexts=CONTEXTS)
    events = [conversation.answer() for _ in range(4)]
    return events, bytes(conversation.from_client), bytes(conversation.from_server)


@pytest.mark.parametrize("tls", ["off", "prefer"])
def test_every_split_of_every_message_gives_the_same_events_and_bytes(tls: TlsWish) -> None:
    whole = record(1 << 20, tls)
    assert isinstance(whole[0][-1], Established)
    for piece_bytes in range(1, 80):
        assert record(piece_bytes, tls) == whole


Damages = list[tuple[int, int, bytes]]


class DamagedLine(Conversation):
    """A conversation over a line that loses and changes bytes; who waits in vain hangs up."""

    def __init__(
        self, client: ClientNegotiation, server: ServerNegotiation, piece_bytes: int, up: Damages, down: Damages
    ) -> None:
        super().__init__(client, server, piece_bytes)
        self.up = up
        self.down = down

    def to_server(self, data: bytes) -> bytes:
        return damaged(data, len(self.from_client), self.up)

    def to_client(self, data: bytes) -> bytes:
        return damaged(data, len(self.from_server), self.down)

    def is_end_expected(self) -> bool:
        return True


def damaged(data: bytes, position: int, damages: Damages) -> bytes:
    """`data`, which begins at `position` of its stream, where for each damage some bytes are replaced by others."""
    changed = bytearray(data)
    for place, cut, inserted in sorted(damages, reverse=True):
        if position <= place < position + len(data):
            changed[place - position : place - position + cut] = inserted
    return bytes(changed)


damages = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.binary(max_size=9)), max_size=2)


@settings(max_examples=300, deadline=None)
@given(
    wanted=st.lists(st.sampled_from(["list_exports", "describe", "list_meta_contexts"]), max_size=4),
    last=st.sampled_from(["connect", "abort"]),
    name=st.sampled_from([*EXPORTS, SECRET, "nothing"]),
    client_tls=st.sampled_from(["off", "prefer", "require"]),
    server_tls=st.sampled_from(["off", "allowed", "required"]),
    up=damages,
    down=damages,
    piece_bytes=st.integers(1, 200),
)
def test_over_a_damaged_line_there_are_events_or_a_protocol_error(
    wanted: list[str],
    last: str,
    name: str,
    client_tls: TlsWish,
    server_tls: TlsPolicy,
    up: Damages,
    down: Damages,
    piece_bytes: int,
) -> None:
    conversation = DamagedLine(
        ClientNegotiation(tls=client_tls), ServerNegotiation(tls=server_tls), piece_bytes, up, down
    )
    conversation.has_tls = server_tls != "off"
    client, server = conversation.client, conversation.server
    event: ClientEvent | None = None
    try:
        for command in (*wanted, last):
            getattr(client, command)(*([] if command in {"list_exports", "abort"} else [name]))
            event = conversation.answer()
            if client.state is ClientState.ENDED:
                break
    except RemoteProtocolError:
        assert ServerState.ENDED is server.state or ClientState.ENDED is client.state
    else:
        assert isinstance(event, ClientEvent)
    assert len(conversation.from_client) + len(conversation.from_server) < 100_000
