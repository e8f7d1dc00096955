"""The client's end of the negotiation: from the server's greeting to the first request (proto.md, "Handshake phase").

Say what is wanted with a command, then ask `next_event()` until it gives the command's answer; each command has exactly
one. The opening (greeting, TLS, extended headers or structured replies) happens by itself before the first command, and
what a server does not know is done without, in the way that the table SEQUELS tells. An asyncio caller needs this::

    async def answer(negotiation, wire):
        while True:
            event = negotiation.next_event()
            await wire.send(negotiation.data_to_send())
            if event is NEED_DATA:
                negotiation.receive_data(await wire.receive())      # b"" at the end
            elif isinstance(event, TlsWanted):
                await wire.make_tls_handshake()
                negotiation.tls_established()
            else:
                return event

    negotiation.connect("disk")                  → Established | Refused
    negotiation.describe("disk")                 → ExportDescribed | Refused
    negotiation.list_exports()                   → ExportsListed | Refused
    negotiation.list_meta_contexts("disk")       → MetaContextsListed | Refused
    negotiation.abort()                          → Ended: close the connection

After Established, `trailing_data` (usually nothing) and all that follows belongs to the transmission phase; `connect()`
and `abort()` are last commands. A server that breaks the protocol is a RemoteProtocolError: close the connection.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from nbd_protocol import messages as m
from nbd_protocol.constants import (
    IHAVEOPT,
    MAX_LISTED_EXPORTS,
    MAX_META_CONTEXTS,
    MAX_OPTION_REPLY_BYTES,
    META_BASE_ALLOCATION,
    NBDMAGIC,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_ERROR_BIT,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReplyType,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.negotiation import NEED_DATA, ExportInfo, NeedData, advertised_flags, info_from_told, name_of
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

TlsWish = Literal["off", "prefer", "require"]


class State(enum.Enum):
    """What the machine waits for."""

    GREETING = "the server's greeting"
    COMMAND = "a command of the caller"
    REPLY = "the reply to an option"
    EXPORT_NAME_REPLY = "the reply to EXPORT_NAME"
    HANDSHAKE = "the caller's TLS handshake"
    TRANSMISSION = "nothing: the negotiation has led to an export"
    ENDED = "nothing: the negotiation is over"


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.GREETING: frozenset({State.COMMAND, State.REPLY, State.ENDED}),
    State.COMMAND: frozenset({State.REPLY, State.EXPORT_NAME_REPLY, State.TRANSMISSION, State.ENDED}),
    State.REPLY: frozenset(
        {State.REPLY, State.COMMAND, State.EXPORT_NAME_REPLY, State.HANDSHAKE, State.TRANSMISSION, State.ENDED}
    ),
    State.EXPORT_NAME_REPLY: frozenset({State.TRANSMISSION, State.ENDED}),
    State.HANDSHAKE: frozenset({State.REPLY, State.COMMAND}),
    State.TRANSMISSION: frozenset(),
    State.ENDED: frozenset(),
}


class Then(enum.Enum):
    """What follows an option, if it is not another option."""

    HANDSHAKE = enum.auto()
    OPENED = enum.auto()
    ANSWERED = enum.auto()
    REFUSED = enum.auto()
    ESTABLISHED = enum.auto()
    ENDED = enum.auto()


class Sequel(NamedTuple):
    """What follows an option, by the last reply to it."""

    ack: Option | Then
    unsup: Option | Then
    """After ERR_UNSUP, and where the option is of no use in this negotiation and so was never sent."""
    error: Option | Then
    """After any other error."""


SEQUELS: Final[Mapping[Option, Sequel]] = {
    # The opening, begun with STARTTLS. Where TLS is demanded the machine does not go on after an error to it.
    Option.STARTTLS: Sequel(Then.HANDSHAKE, Option.EXTENDED_HEADERS, Option.EXTENDED_HEADERS),
    Option.EXTENDED_HEADERS: Sequel(Then.OPENED, Option.STRUCTURED_REPLY, Option.STRUCTURED_REPLY),
    Option.STRUCTURED_REPLY: Sequel(Then.OPENED, Then.OPENED, Then.OPENED),
    # connect(), begun with SET_META_CONTEXT. EXPORT_NAME has no replies of this kind: its sequel is in its state.
    Option.SET_META_CONTEXT: Sequel(Option.GO, Option.GO, Option.GO),
    Option.GO: Sequel(Then.ESTABLISHED, Option.EXPORT_NAME, Then.REFUSED),
    # The other commands.
    Option.INFO: Sequel(Then.ANSWERED, Then.REFUSED, Then.REFUSED),
    Option.LIST: Sequel(Then.ANSWERED, Then.REFUSED, Then.REFUSED),
    Option.LIST_META_CONTEXT: Sequel(Then.ANSWERED, Then.REFUSED, Then.REFUSED),
    Option.ABORT: Sequel(Then.ENDED, Then.ENDED, Then.ENDED),
}

MAX_INFOS: Final = 64
"""Replies to one INFO or GO. Four kinds are defined; a server without end must not hold a client for ever."""
MAX_LISTING_BYTES: Final = 16 * 1024 * 1024
"""Names and descriptions of one listing, all together: they are kept until its end."""

ITEMS: Final[Mapping[Option, tuple[OptionReplyType, int]]] = {
    Option.LIST: (OptionReplyType.SERVER, MAX_LISTED_EXPORTS),
    Option.INFO: (OptionReplyType.INFO, MAX_INFOS),
    Option.GO: (OptionReplyType.INFO, MAX_INFOS),
    Option.LIST_META_CONTEXT: (OptionReplyType.META_CONTEXT, MAX_META_CONTEXTS),
    Option.SET_META_CONTEXT: (OptionReplyType.META_CONTEXT, MAX_META_CONTEXTS),
}
"""The replies that may come before the last one, and how many of them; other options have their last one only."""

MAX_AHEAD_BYTES: Final = 1024 * 1024
"""What a server may send before it is looked at; it never has reason to send more than one listing's part."""
OPTIONS_PER_CONNECTION: Final = 32
"""Options that every known server serves on one connection (nbdkit stops there)."""
_INFOS_ASKED: Final = (InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)


class Command(NamedTuple):
    """What the caller wants: the option that it begins with, and what is needed to say it."""

    option: Option
    export: str = ""
    contexts: tuple[str, ...] = ()


class ClientNegotiation:
    """The client's state machine for one connection; see the module's text for its use.

    Arguments:
        structured: whether structured replies are asked for (where extended headers are not granted).
        extended: whether extended headers are asked for.
        tls: `off`: never; `prefer`: if the server will; `require`: nothing is said to a server that will not.
        no_zeroes: whether to do without the 124 zeroes after EXPORT_NAME.
    """

    def __init__(
        self, *, structured: bool = True, extended: bool = True, tls: TlsWish = "off", no_zeroes: bool = True
    ) -> None:
        self._structured: Final = structured
        self._extended: Final = extended
        self._tls: Final = tls
        self._no_zeroes: Final = no_zeroes
        self._state = State.GREETING
        self._received = bytearray()
        self._at_eof = False
        self._outgoing = bytearray()
        self._events: deque[ClientEvent] = deque()
        self._commands: deque[Command] = deque()
        self._command = Command(Option.STARTTLS)
        self._asked = Option.STARTTLS
        self._items: list[bytes] = []
        self._items_bytes = 0
        self._options_sent = 0
        self._oldstyle: m.OldstyleGreeting | None = None
        self._client_flags = ClientFlag(0)
        self._mode = ReplyMode.SIMPLE
        self._secure = False
        self._contexts: dict[int, str] = {}
        self._steps: Final[Mapping[State, Callable[[], bool]]] = {
            State.GREETING: self._read_greeting,
            State.COMMAND: self._begin_command,
            State.REPLY: self._read_reply,
            State.EXPORT_NAME_REPLY: self._read_export_name_reply,
        }

    # What is known so far ---------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the machine waits for."""
        return self._state

    @property
    def style(self) -> Literal["oldstyle", "newstyle", "fixed newstyle"]:
        """How the server negotiates; known once a command has been answered."""
        if self._oldstyle is not None:
            return "oldstyle"
        return "fixed newstyle" if self._is_fixed else "newstyle"

    @property
    def mode(self) -> ReplyMode:
        """What was negotiated for the replies of the transmission phase; known once a command has been answered."""
        return self._mode

    @property
    def secure(self) -> bool:
        """Whether the connection runs through TLS; known once a command has been answered."""
        return self._secure

    @property
    def should_reconnect(self) -> bool:
        """Whether INFO, LIST_META_CONTEXT and ABORT might be more options than a server serves on one connection.

        Whoever asks about many exports looks at it before each, and goes on with a new connection.
        """
        return self._options_sent + 3 > OPTIONS_PER_CONNECTION

    @property
    def trailing_data(self) -> bytes:
        """After Established: what the server sent behind it; it belongs to the transmission phase."""
        return bytes(self._received) if self._state is State.TRANSMISSION else b""

    # Commands -----------------------------------------------------------------------------------------------------

    def connect(self, export: str = "", *, contexts: Sequence[str] = (META_BASE_ALLOCATION,)) -> None:
        """Use `export` ("" is the default one): Established or Refused.

        Of `contexts`, full names, the server selects those that it has; with simple replies none. Raises, as all
        commands do, LocalProtocolError where an argument cannot be said or the negotiation is over.
        """
        self._give(Command(Option.SET_META_CONTEXT, export, tuple(contexts)))

    def describe(self, export: str = "") -> None:
        """Ask what `export` is, without using it: ExportDescribed or Refused."""
        self._give(Command(Option.INFO, export))

    def list_exports(self) -> None:
        """Ask which exports there are: ExportsListed or Refused."""
        self._give(Command(Option.LIST))

    def list_meta_contexts(self, export: str = "", queries: Sequence[str] = ()) -> None:
        """Ask for the metadata contexts of `export`: MetaContextsListed or Refused.

        No queries ask for all; a query that ends in a colon (`qemu:`) for all beneath it. Servers refuse it without
        structured replies or extended headers.
        """
        self._give(Command(Option.LIST_META_CONTEXT, export, tuple(queries)))

    def abort(self) -> None:
        """End the negotiation politely: Ended, after which the connection is to be closed."""
        self._give(Command(Option.ABORT))

    def tls_established(self) -> None:
        """Answer TlsWanted when the TLS handshake is made. Where it has failed the connection must be closed instead.

        Raises LocalProtocolError if no handshake was asked for.
        """
        if self._state is not State.HANDSHAKE or self._events:
            raise LocalProtocolError(f"no TLS handshake was asked for, awaited is {self._state.value}")
        self._secure = True
        self._proceed(Option.EXTENDED_HEADERS)

    # Bytes in, events and bytes out -------------------------------------------------------------------------------

    def data_to_send(self) -> bytes:
        """What is to be sent, once. Ask for it before each wait and after the last event."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent, in pieces of any size; empty means that it has hung up.

        Raises LocalProtocolError after Established and during the TLS handshake, when its bytes are not ours, and
        RemoteProtocolError if more than MAX_AHEAD_BYTES were sent that nobody has looked at.
        """
        if self._state in {State.TRANSMISSION, State.HANDSHAKE}:
            raise LocalProtocolError(f"bytes that are not of the negotiation, awaited is {self._state.value}")
        if self._state is State.ENDED:
            return  # late bytes of a server that is being left
        if len(self._received) > MAX_AHEAD_BYTES:
            raise self._broken(f"the server sent {len(self._received)} bytes ahead")
        self._received += data
        self._at_eof = self._at_eof or not data

    def next_event(self) -> ClientEvent | Literal[NeedData.NEED_DATA]:
        """The next event, or NEED_DATA.

        Raises RemoteProtocolError if the server broke the protocol or hung up: close the connection.
        Raises LocalProtocolError while no command waits for its answer.
        """
        while not self._events:
            step = self._steps.get(self._state)
            if step is None or (self._state is State.COMMAND and not self._commands):
                raise LocalProtocolError(f"no next event, awaited is {self._state.value}")
            try:
                if not step():
                    if not self._at_eof:
                        return NEED_DATA
                    self._hang_up()
            except RemoteProtocolError as error:
                raise self._broken(str(error)) from error
        return self._events.popleft()

    # The steps of the machine: each takes what its state waits for, and tells whether there was enough ---------------

    def _read_greeting(self) -> bool:
        if not NBDMAGIC.startswith(bytes(self._received[: len(NBDMAGIC)])):
            raise RemoteProtocolError(f"no NBD server: it greets with {bytes(self._received[:16])!r}")
        if len(self._received) < m.GREETING_MAGICS.size_bytes:
            return False
        style = m.GREETING_MAGICS.parse(self._received[: m.GREETING_MAGICS.size_bytes]).style
        if style == m.NEWSTYLE:
            return self._read_newstyle_greeting()
        if style == OLDSTYLE_MAGIC:
            return self._read_oldstyle_greeting()
        raise RemoteProtocolError(
            f"no NBD server: after {NBDMAGIC!r} comes {style:#018x}, expected {IHAVEOPT!r} or {OLDSTYLE_MAGIC:#018x}"
        )

    def _read_newstyle_greeting(self) -> bool:
        data = self._take(m.GREETING.size_bytes)
        if data is None:
            return False
        offered = m.GREETING.parse(data).flags
        if offered & HandshakeFlag.FIXED_NEWSTYLE:
            self._client_flags |= ClientFlag.FIXED_NEWSTYLE
        if offered & HandshakeFlag.NO_ZEROES and self._no_zeroes:
            self._client_flags |= ClientFlag.NO_ZEROES
        self._outgoing += m.CLIENT_FLAGS.build(m.ClientFlags(self._client_flags))
        if self._tls == "require" and not self._is_fixed:
            self._refuse_without_tls(OptionReplyType.ERR_UNSUP, "the server negotiates in newstyle, which has no TLS")
        else:
            self._proceed(Option.STARTTLS)
        return True

    def _read_oldstyle_greeting(self) -> bool:
        data = self._take(m.OLDSTYLE_GREETING.size_bytes)
        if data is None:
            return False
        self._oldstyle = m.OLDSTYLE_GREETING.parse(data)
        if self._tls == "require":
            self._refuse_without_tls(OptionReplyType.ERR_UNSUP, "the server negotiates in oldstyle, which has no TLS")
        else:
            self._enter(State.COMMAND)
        return True

    def _begin_command(self) -> bool:
        self._command = self._commands.popleft()
        if self._oldstyle is not None:
            self._answer_for_oldstyle(self._oldstyle)
        elif self._is_fixed or self._command.option == Option.SET_META_CONTEXT:
            self._proceed(self._command.option)
        elif self._command.option == Option.ABORT:
            self._end()
        else:
            self._refuse_here("the server negotiates in newstyle, which knows EXPORT_NAME only")
        return True

    def _answer_for_oldstyle(self, greeting: m.OldstyleGreeting) -> None:
        match self._command.option:
            case Option.ABORT:
                self._end()
            case Option.SET_META_CONTEXT | Option.INFO if self._command.export:
                self._refuse_here("the server negotiates in oldstyle, which has one export without a name")
            case Option.SET_META_CONTEXT:
                self._establish(None, self._checked(ExportInfo(greeting.size, greeting.flags)))
            case Option.INFO:
                self._events.append(ExportDescribed("", self._checked(ExportInfo(greeting.size, greeting.flags))))
            case _:
                self._refuse_here("the server negotiates in oldstyle, which has no options")

    def _read_reply(self) -> bool:
        if len(self._received) < _REPLY_HEADER_BYTES:
            return False
        header = m.OPTION_REPLY_HEADER.parse(self._received[:_REPLY_HEADER_BYTES])
        self._check_reply(header)
        data = self._take(_REPLY_HEADER_BYTES + header.length)
        if data is None:
            return False
        payload = data[_REPLY_HEADER_BYTES:]
        if header.type == OptionReplyType.ACK:
            self._acknowledged()
        elif header.type & OPTION_REPLY_ERROR_BIT:
            self._refused(header.type, m.ERROR_TEXT.parse(payload).text)
        else:
            self._items.append(payload)
            self._items_bytes += len(payload)
        return True

    def _check_reply(self, header: m.OptionReplyHeader) -> None:
        """Refuse a reply as soon as its header is there: what is wrong need not be waited for."""
        where = f"reply {name_of(header.type)} of {header.length} bytes to {name_of(header.option)}"
        if header.option != self._asked:
            raise RemoteProtocolError(f"{where}, asked was {self._asked.name}")
        if header.length > MAX_OPTION_REPLY_BYTES:
            raise RemoteProtocolError(f"{where}, expected at most {MAX_OPTION_REPLY_BYTES}")
        if header.type & OPTION_REPLY_ERROR_BIT:
            return
        if header.type == OptionReplyType.ACK:
            if header.length:
                raise RemoteProtocolError(f"{where}, expected no payload")
            return
        expected, limit = ITEMS.get(self._asked, (None, 0))
        if header.type != expected:
            raise RemoteProtocolError(f"{where}, which has no such reply")
        if len(self._items) >= limit:
            raise RemoteProtocolError(f"{where} is number {limit + 1}, expected at most {limit}")
        if self._items_bytes + header.length > MAX_LISTING_BYTES:
            raise RemoteProtocolError(f"{where}, together with those before it more than {MAX_LISTING_BYTES}")

    def _read_export_name_reply(self) -> bool:
        with_zeroes = not self._client_flags & ClientFlag.NO_ZEROES
        message = m.EXPORT_NAME_REPLY_WITH_ZEROES if with_zeroes else m.EXPORT_NAME_REPLY
        data = self._take(message.size_bytes)
        if data is None:
            return False
        reply: m.ExportNameReply = message.parse(data)
        info = self._checked(ExportInfo(reply.size, reply.flags))
        self._establish(Option.EXPORT_NAME, info)
        return True

    def _hang_up(self) -> None:
        if self._state is State.EXPORT_NAME_REPLY and not self._received:
            self._refused_for_good(Option.EXPORT_NAME, OptionReplyType.ERR_UNKNOWN, "the server closed the connection")
        elif self._state is State.REPLY and self._asked == Option.ABORT:
            self._end()
        else:
            asked = f" {self._asked.name}" if self._state is State.REPLY else ""
            raise RemoteProtocolError(f"the server closed the connection, awaited was {self._state.value}{asked}")

    # What an option has led to ---------------------------------------------------------------------------------------

    def _acknowledged(self) -> None:
        match self._asked:
            case Option.EXTENDED_HEADERS:
                self._mode = ReplyMode.EXTENDED
            case Option.STRUCTURED_REPLY:
                self._mode = ReplyMode.STRUCTURED
            case Option.SET_META_CONTEXT:
                self._contexts = self._selected_contexts()
        self._proceed(SEQUELS[self._asked].ack)

    def _refused(self, reply_type: int, text: str) -> None:
        if self._asked == Option.STARTTLS and self._tls == "require":
            self._refuse_without_tls(reply_type, text)
            return
        unsup = reply_type == OptionReplyType.ERR_UNSUP
        sequel = SEQUELS[self._asked].unsup if unsup else SEQUELS[self._asked].error
        if sequel is Option.EXPORT_NAME and self._mode is ReplyMode.EXTENDED:
            sequel = Then.REFUSED  # extended headers come with GO, and EXPORT_NAME is forbidden after them
        if sequel is Then.REFUSED:
            self._events.append(Refused(self._asked, reply_type, text))
        self._proceed(sequel)

    def _proceed(self, sequel: Option | Then) -> None:
        while isinstance(sequel, Option) and self._is_useless(sequel):
            sequel = SEQUELS[sequel].unsup
        match sequel:
            case Option():
                self._send(sequel)
            case Then.OPENED | Then.REFUSED:
                self._enter(State.COMMAND)
            case Then.HANDSHAKE:
                self._begin_handshake()
            case Then.ESTABLISHED:
                self._establish(Option.GO, self._described())
            case Then.ANSWERED:
                self._events.append(self._answer())
                self._enter(State.COMMAND)
            case Then.ENDED:
                self._end()

    def _is_useless(self, option: Option) -> bool:
        match option:
            case Option.STARTTLS:
                return not self._is_fixed or self._tls == "off"
            case Option.EXTENDED_HEADERS:
                return not self._is_fixed or not self._extended
            case Option.STRUCTURED_REPLY:
                return not self._is_fixed or not self._structured
            case Option.SET_META_CONTEXT:
                return self._mode is ReplyMode.SIMPLE or not self._command.contexts
            case Option.GO:
                return not self._is_fixed
        return False

    def _answer(self) -> ClientEvent:
        match self._asked:
            case Option.LIST:
                return ExportsListed(tuple(m.SERVER_REPLY.parse(item) for item in self._items))
            case Option.LIST_META_CONTEXT:
                names = (m.META_CONTEXT_REPLY.parse(item).name for item in self._items)
                return MetaContextsListed(self._command.export, tuple(dict.fromkeys(names)))
            case _:
                return ExportDescribed(self._command.export, self._described())

    def _described(self) -> ExportInfo:
        info = info_from_told(m.parse_info(item) for item in self._items)
        if info is None:
            raise RemoteProtocolError(f"{self._asked.name} of {self._command.export!r} was answered without its size")
        return self._checked(info)

    def _selected_contexts(self) -> dict[int, str]:
        selected: dict[int, str] = {}
        for item in self._items:
            reply: m.MetaContextReply = m.META_CONTEXT_REPLY.parse(item)
            if reply.name not in self._command.contexts:
                raise RemoteProtocolError(f"context {reply.name!r} was selected, asked was {self._command.contexts!r}")
            if reply.id in selected or reply.name in selected.values():
                raise RemoteProtocolError(f"context {reply.name!r} with id {reply.id} was selected twice")
            selected[reply.id] = reply.name
        return selected

    # What the steps are made of ------------------------------------------------------------------------------------

    @property
    def _is_fixed(self) -> bool:
        return bool(self._client_flags & ClientFlag.FIXED_NEWSTYLE)

    def _usable_flags(self, told: TransmissionFlag) -> TransmissionFlag:
        """What the server's flags mean here: nothing without HAS_FLAGS, and no feature that was not negotiated."""
        if not told & TransmissionFlag.HAS_FLAGS:
            return TransmissionFlag(0)
        return advertised_flags(told, self._mode, resize=True)

    def _checked(self, told: ExportInfo) -> ExportInfo:
        if fault := told.fault():
            raise RemoteProtocolError(f"the server says of export {self._command.export!r}: {fault}")
        return msgspec.structs.replace(told, flags=self._usable_flags(told.flags))

    def _give(self, command: Command) -> None:
        if self._state in {State.TRANSMISSION, State.ENDED}:
            raise LocalProtocolError(f"{command.option.name} comes too late, awaited is {self._state.value}")
        if self._commands and self._commands[-1].option in {Option.SET_META_CONTEXT, Option.ABORT}:
            raise LocalProtocolError(f"{command.option.name} after connect() or abort()")
        _build_payload(command.option, command)
        self._commands.append(command)

    def _send(self, option: Option) -> None:
        if self._received:
            raise RemoteProtocolError(f"the server sent {len(self._received)} bytes unasked")
        payload = _build_payload(option, self._command)
        self._asked = option
        self._items, self._items_bytes = [], 0
        self._options_sent += 1
        self._outgoing += m.OPTION_HEADER.build(m.OptionHeader(option, len(payload))) + payload
        self._enter(State.EXPORT_NAME_REPLY if option == Option.EXPORT_NAME else State.REPLY)

    def _begin_handshake(self) -> None:
        if self._received:
            # Whoever put bytes before the handshake, it was not the server inside TLS (CVE-2021-3716).
            raise RemoteProtocolError(f"{len(self._received)} bytes in plain text after STARTTLS was acknowledged")
        self._enter(State.HANDSHAKE)
        self._events.append(TlsWanted())

    def _establish(self, option: Option | None, info: ExportInfo) -> None:
        self._enter(State.TRANSMISSION)
        self._events.append(Established(option, self._command.export, info, self._mode, self._contexts, self._secure))

    def _end(self) -> None:
        self._received.clear()
        self._enter(State.ENDED)
        self._events.append(Ended())

    def _refuse_here(self, text: str) -> None:
        option = Option.EXPORT_NAME if self._command.option == Option.SET_META_CONTEXT else self._command.option
        self._events.append(Refused(option, OptionReplyType.ERR_UNSUP, text))

    def _refuse_without_tls(self, reply_type: int, text: str) -> None:
        if self._is_fixed:
            self._outgoing += m.OPTION_HEADER.build(m.OptionHeader(Option.ABORT, 0))
        self._refused_for_good(Option.STARTTLS, reply_type, text)

    def _refused_for_good(self, option: Option, reply_type: int, text: str) -> None:
        self._commands.clear()
        self._received.clear()
        self._enter(State.ENDED)
        self._events.append(Refused(option, reply_type, text))

    def _take(self, count: int) -> bytes | None:
        if len(self._received) < count:
            return None
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _enter(self, state: State) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} → {state}"
        self._state = state

    def _broken(self, fault: str) -> RemoteProtocolError:
        self._state = State.ENDED
        self._commands.clear()
        self._received.clear()
        return RemoteProtocolError(fault)


_REPLY_HEADER_BYTES: Final = m.OPTION_REPLY_HEADER.size_bytes


def _build_payload(option: Option, command: Command) -> bytes:
    match option:
        case Option.INFO | Option.GO:
            return m.INFO_REQUEST.build(m.InfoRequest(command.export, _INFOS_ASKED))
        case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
            return m.META_CONTEXT_REQUEST.build(m.MetaContextRequest(command.export, command.contexts))
        case Option.EXPORT_NAME:
            return m.EXPORT_NAME.build(m.ExportName(command.export))
        case _:
            return b""
