"""The server's end of the negotiation: from the greeting to the first request (proto.md, "Handshake phase").

Bytes go in by `receive_data()`, what they mean comes out of `next_event()`, and what is to be sent is handed out by
`data_to_send()`. Some events are questions that only the caller can answer (which exports are there? may this one be
used?): nothing further is looked at until the method that the table ANSWERS names for it has been called. So nothing
behind an export needs to be opened before a client has chosen it::

    negotiation = ServerNegotiation()
    while True:
        await send(negotiation.data_to_send())
        match negotiation.next_event():
            case NeedData.NEED_DATA:    negotiation.receive_data(await receive())          # b"" at the end
            case ListExports():         negotiation.send_export_list([("disk", "a disk")])
            case ExportQuery() as ask:  negotiation.accept_export(info) if … else negotiation.refuse(ERR_UNKNOWN, "…")
            case MetaContextQuery() as ask:
                names = select_contexts(ask.option, ask.queries, ["base:allocation"])
                negotiation.send_meta_contexts(list(enumerate(names, 1)))
            case StartTls():            negotiation.accept_tls(); …  # send, make the TLS handshake, go on in TLS
            case Ready() as ready:      break  # send what is left; negotiation.trailing_data are the first requests
            case Aborted() | Closed():  break  # send what is left and close

A client that breaks the protocol is a RemoteProtocolError out of next_event(): send what is left, and close.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

from nbd_protocol import messages as m
from nbd_protocol.constants import (
    MAX_META_CONTEXTS,
    MAX_OPTION_KEPT_BYTES,
    MAX_OPTION_SKIPPED_BYTES,
    MAX_OPTIONS,
    OPTION_REPLY_ERROR_BIT,
    ClientFlag,
    HandshakeFlag,
    Option,
    OptionReplyType,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError
from nbd_protocol.negotiation import (
    NEED_DATA,
    ExportInfo,
    NeedData,
    advertised_flags,
    infos_to_tell,
    name_of,
    text_for_people,
)
from nbd_protocol.negotiation_events import (
    Aborted,
    Closed,
    ExportQuery,
    ListExports,
    MetaContextQuery,
    Question,
    Ready,
    ServerEvent,
    StartTls,
)

TlsPolicy = Literal["off", "allowed", "required"]


class State(enum.Enum):
    """What the machine waits for."""

    CLIENT_FLAGS = "the client's flags"
    OPTION = "an option"
    PAYLOAD = "the payload of an option"
    SKIPPING = "the end of an option that is refused already"
    ANSWER = "an answer of the caller"
    TRANSMISSION = "nothing: the negotiation has led to an export"
    ENDED = "nothing: the negotiation has led nowhere"


TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    State.CLIENT_FLAGS: frozenset({State.OPTION, State.ENDED}),
    State.OPTION: frozenset({State.PAYLOAD, State.SKIPPING, State.ENDED}),
    State.PAYLOAD: frozenset({State.OPTION, State.ANSWER, State.ENDED}),
    State.SKIPPING: frozenset({State.OPTION, State.ENDED}),
    State.ANSWER: frozenset({State.OPTION, State.TRANSMISSION, State.ENDED}),
    State.TRANSMISSION: frozenset(),
    State.ENDED: frozenset(),
}


class Rule(NamedTuple):
    """What is known of an option before its payload is."""

    payload: bool
    """Whether it may have one; where it may not, one is answered INVALID."""
    before_tls: bool = False
    """Whether it is served although TLS is required and has not begun."""


RULES: Final[Mapping[int, Rule]] = {
    Option.EXPORT_NAME: Rule(payload=True),
    Option.ABORT: Rule(payload=True, before_tls=True),
    Option.LIST: Rule(payload=False),
    Option.STARTTLS: Rule(payload=False, before_tls=True),
    Option.INFO: Rule(payload=True),
    Option.GO: Rule(payload=True),
    Option.STRUCTURED_REPLY: Rule(payload=False),
    Option.LIST_META_CONTEXT: Rule(payload=True),
    Option.SET_META_CONTEXT: Rule(payload=True),
    Option.EXTENDED_HEADERS: Rule(payload=False),
}
"""Every option that is known here. PEEK_EXPORT is not: it was withdrawn, and is answered UNSUP as all others are."""


ANSWERS: Final[Mapping[type[Any], frozenset[str]]] = {
    ListExports: frozenset({"send_export_list", "refuse"}),
    ExportQuery: frozenset({"accept_export", "refuse"}),
    MetaContextQuery: frozenset({"send_meta_contexts", "refuse"}),
    StartTls: frozenset({"accept_tls", "refuse"}),
}

MAX_AHEAD_BYTES: Final = MAX_OPTION_SKIPPED_BYTES
"""What a client may send before it is answered. It should send nothing; more than this is an attempt on our memory."""


class ServerNegotiation:
    """The server's state machine for one connection; see the module's text for its use.

    Arguments:
        tls: `off`: STARTTLS is refused; `allowed`: the client may begin TLS; `required`: it must.
        structured: whether structured replies are offered.
        extended: whether extended headers are offered.
        resize: whether the experimental SEND_RESIZE may be told to a client.
    """

    def __init__(
        self, *, tls: TlsPolicy = "off", structured: bool = True, extended: bool = True, resize: bool = False
    ) -> None:
        self._tls: Final = tls
        self._structured: Final = structured
        self._extended: Final = extended
        self._resize: Final = resize
        self._state = State.CLIENT_FLAGS
        self._received = bytearray()
        self._at_eof = False
        self._outgoing = bytearray()
        self._events: deque[ServerEvent] = deque()
        self._question: Question | None = None
        self._header = m.OptionHeader(option=0, length=0)
        self._refusal: tuple[OptionReplyType, str] | None = None
        self._left_to_skip_bytes = 0
        self._option_count = 0
        self._shutting_down = False
        self._client_flags = ClientFlag(0)
        self._secure = False
        self._mode = ReplyMode.SIMPLE
        self._contexts_export: str | None = None
        self._contexts: dict[int, str] = {}
        self._steps: Final[Mapping[State, Callable[[], bool]]] = {
            State.CLIENT_FLAGS: self._read_client_flags,
            State.OPTION: self._read_header,
            State.PAYLOAD: self._read_payload,
            State.SKIPPING: self._skip,
        }
        self._handlers: Final[Mapping[int, Callable[[bytes], None]]] = {
            Option.EXPORT_NAME: self._on_export_name,
            Option.ABORT: self._on_abort,
            Option.LIST: self._on_list,
            Option.STARTTLS: self._on_starttls,
            Option.INFO: self._on_info_or_go,
            Option.GO: self._on_info_or_go,
            Option.STRUCTURED_REPLY: self._on_structured_reply,
            Option.LIST_META_CONTEXT: self._on_meta_context,
            Option.SET_META_CONTEXT: self._on_meta_context,
            Option.EXTENDED_HEADERS: self._on_extended_headers,
        }
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._outgoing += m.GREETING.build(m.Greeting(flags))

    # Bytes in, events and bytes out ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the machine waits for."""
        return self._state

    @property
    def trailing_data(self) -> bytes:
        """After Ready: what the client sent behind its last option; it belongs to the transmission phase."""
        return bytes(self._received) if self._state is State.TRANSMISSION else b""

    def data_to_send(self) -> bytes:
        """What is to be sent, once; the greeting at first. Ask for it before each wait and after the last event."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent, in pieces of any size; empty means that it has hung up.

        Raises RemoteProtocolError if the client has sent more than MAX_AHEAD_BYTES ahead of an answer, and
        LocalProtocolError after Ready, when its bytes belong to the transmission phase.
        """
        if self._state is State.TRANSMISSION:
            raise LocalProtocolError("the negotiation is over, what the client sends belongs to the transmission phase")
        if self._state is State.ENDED:
            return  # late bytes of a client that is being got rid of
        if len(self._received) > MAX_AHEAD_BYTES:
            raise self._broken(f"the client sent {len(self._received)} bytes ahead of the answer to an option")
        self._received += data
        self._at_eof = self._at_eof or not data

    def next_event(self) -> ServerEvent | Literal[NeedData.NEED_DATA]:
        """The next event, or NEED_DATA.

        Raises RemoteProtocolError if the client broke the protocol: send what is left to be sent, and close.
        Raises LocalProtocolError while an event waits for its answer, and after the last event.
        """
        while not self._events:
            step = self._steps.get(self._state)
            if step is None:
                asked = "" if self._question is None else f" to {self._question!r}"
                raise LocalProtocolError(f"no next event, awaited is {self._state.value}{asked}")
            if not step():
                if not self._at_eof:
                    return NEED_DATA
                self._close(f"the client hung up, awaited was {self._state.value}")
        return self._events.popleft()

    def shut_down(self) -> None:
        """From now on every option but ABORT is refused with ERR_SHUTDOWN; what is being answered still is."""
        self._shutting_down = True

    # The caller's answers ---------------------------------------------------------------------------------------

    def send_export_list(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answer ListExports with (name, description) of each export; an empty description is not sent.

        Raises LocalProtocolError if a name cannot be said; the question is then still open.
        """
        self._check_answer("send_export_list")
        replies = [m.SERVER_REPLY.build(m.ServerReply(name, text_for_people(details))) for name, details in exports]
        for reply in replies:
            self._reply(OptionReplyType.SERVER, reply)
        self._acknowledge()

    def accept_export(self, info: ExportInfo) -> None:
        """Answer ExportQuery: there is such an export, and this client may use it.

        Of `info.flags` those that the client did not negotiate for are taken out. GO and EXPORT_NAME end the
        negotiation: Ready is the next event.

        Raises LocalProtocolError if `info` cannot be said; the question is then still open.
        """
        query = cast(ExportQuery, self._check_answer("accept_export"))
        if fault := info.fault():
            raise LocalProtocolError(f"export {query.name!r}: {fault}")
        info = msgspec.structs.replace(info, flags=advertised_flags(info.flags, self._mode, resize=self._resize))
        if query.option == Option.EXPORT_NAME:
            with_zeroes = not self._client_flags & ClientFlag.NO_ZEROES
            message = m.EXPORT_NAME_REPLY_WITH_ZEROES if with_zeroes else m.EXPORT_NAME_REPLY
            self._outgoing += message.build(m.ExportNameReply(info.size, info.flags))
        else:
            replies = [m.build_info(told) for told in infos_to_tell(info, query.infos)]
            for reply in replies:
                self._reply(OptionReplyType.INFO, reply)
            self._reply(OptionReplyType.ACK)
        self._question = None
        if query.option == Option.INFO:
            self._enter(State.OPTION)
        else:
            self._begin_transmission(query, info)

    def send_meta_contexts(self, contexts: Sequence[tuple[int, str]]) -> None:
        """Answer MetaContextQuery with the (id, name) of what select_contexts() chose; to LIST the ids are not told.

        Raises LocalProtocolError if ids or names are told twice or cannot be said; the question is then still open.
        """
        query = cast(MetaContextQuery, self._check_answer("send_meta_contexts"))
        by_id = dict(contexts)
        if len(by_id) != len(contexts) or len(set(by_id.values())) != len(contexts):
            raise LocalProtocolError(f"metadata contexts with one id or name twice: {contexts!r}")
        if len(contexts) > MAX_META_CONTEXTS:
            raise LocalProtocolError(f"{len(contexts)} metadata contexts, at most {MAX_META_CONTEXTS} can be told")
        selecting = query.option == Option.SET_META_CONTEXT
        replies = [
            m.META_CONTEXT_REPLY.build(m.MetaContextReply(key if selecting else 0, name)) for key, name in contexts
        ]
        for reply in replies:
            self._reply(OptionReplyType.META_CONTEXT, reply)
        if selecting:
            self._contexts_export, self._contexts = query.export, by_id
        self._acknowledge()

    def accept_tls(self) -> None:
        """Answer StartTls: send data_to_send(), make the TLS handshake, then go on with what is inside TLS.

        Everything negotiated so far is forgotten, and so are bytes that have arrived already: whoever put them there,
        it was not the client inside TLS (CVE-2021-3716). If the TLS handshake fails the connection must be closed.
        """
        self._check_answer("accept_tls")
        self._received.clear()
        self._forget_contexts()
        self._mode = ReplyMode.SIMPLE
        self._acknowledge()
        self._secure = True

    def refuse(self, reply_type: OptionReplyType, text: str = "") -> None:
        """Answer any question with an error; the connection goes on, except after EXPORT_NAME, which knows no errors.

        Raises LocalProtocolError if `reply_type` is no error, or is ERR_TLS_REQD where TLS cannot be begun.
        """
        question = self._check_answer("refuse")
        if not reply_type & OPTION_REPLY_ERROR_BIT:
            raise LocalProtocolError(f"{name_of(reply_type)} is no error reply")
        if reply_type == OptionReplyType.ERR_TLS_REQD and (self._tls == "off" or self._secure):
            raise LocalProtocolError("ERR_TLS_REQD to a client that cannot begin TLS")
        self._question = None
        if isinstance(question, ExportQuery) and question.option == Option.EXPORT_NAME:
            self._close(f"export {question.name!r} was refused: {text or reply_type.name}")
        else:
            self._refuse(reply_type, text)
            self._enter(State.OPTION)

    # The steps of the machine: each takes what its state waits for, and tells whether there was enough -------------

    def _read_client_flags(self) -> bool:
        data = self._take(m.CLIENT_FLAGS.size_bytes)
        if data is None:
            return False
        self._client_flags = m.CLIENT_FLAGS.parse(data).flags
        known = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
        if int(self._client_flags) & ~int(known):
            raise self._broken(f"client flags {int(self._client_flags):#x}, known are {int(known):#x}")
        self._enter(State.OPTION)
        return True

    def _read_header(self) -> bool:
        data = self._take(_HEADER_BYTES)
        if data is None:
            return False
        try:
            self._header = m.OPTION_HEADER.parse(data)
        except RemoteProtocolError as error:
            raise self._broken(str(error)) from error
        self._option_count += 1
        if self._option_count > MAX_OPTIONS:
            raise self._broken(
                f"option number {self._option_count} of one connection, at most {MAX_OPTIONS} are served"
            )
        option, length = self._header.option, self._header.length
        if length > MAX_OPTION_SKIPPED_BYTES:
            raise self._broken(
                f"option {name_of(option)} of {length} bytes, at most {MAX_OPTION_SKIPPED_BYTES} are read"
            )
        if option == Option.SET_META_CONTEXT:
            self._forget_contexts()  # even where it is going to fail, it replaces what was set
        self._refusal = self._early_refusal(option, length)
        self._left_to_skip_bytes = length
        self._enter(State.PAYLOAD if self._refusal is None else State.SKIPPING)
        return True

    def _early_refusal(self, option: int, length: int) -> tuple[OptionReplyType, str] | None:
        rule = RULES.get(option)
        if self._shutting_down and option != Option.ABORT:
            return OptionReplyType.ERR_SHUTDOWN, "the server is shutting down"
        if self._tls == "required" and not self._secure and not (rule and rule.before_tls):
            return OptionReplyType.ERR_TLS_REQD, "this server requires TLS"
        if rule is None:
            return OptionReplyType.ERR_UNSUP, f"option {int(option)} is not known here"
        if length and not rule.payload:
            return OptionReplyType.ERR_INVALID, f"this option has no payload, but {length} bytes came with it"
        if length > MAX_OPTION_KEPT_BYTES:
            return (
                OptionReplyType.ERR_TOO_BIG,
                f"an option of {length} bytes, at most {MAX_OPTION_KEPT_BYTES} are served",
            )
        return None

    def _skip(self) -> bool:
        count = min(self._left_to_skip_bytes, len(self._received))
        del self._received[:count]
        self._left_to_skip_bytes -= count
        if self._left_to_skip_bytes:
            return False
        assert self._refusal is not None
        reply_type, text = self._refusal
        if self._header.option == Option.EXPORT_NAME:
            self._close(f"EXPORT_NAME cannot be answered with {reply_type.name}: {text}")
        else:
            self._refuse(reply_type, text)
            self._enter(State.OPTION)
        return True

    def _read_payload(self) -> bool:
        payload = self._take(self._header.length)
        if payload is None:
            return False
        self._handlers[self._header.option](payload)
        return True

    # One handler for each option ----------------------------------------------------------------------------------

    def _on_export_name(self, payload: bytes) -> None:
        if self._mode is ReplyMode.EXTENDED:
            self._close("EXPORT_NAME after EXTENDED_HEADERS")
            return
        try:
            name = m.EXPORT_NAME.parse(payload).name
        except RemoteProtocolError as error:
            raise self._broken(str(error)) from error
        self._ask(ExportQuery(Option.EXPORT_NAME, name, (), self._secure))

    def _on_abort(self, payload: bytes) -> None:
        self._reply(OptionReplyType.ACK)
        self._enter(State.ENDED)
        self._events.append(Aborted())

    def _on_list(self, payload: bytes) -> None:
        self._ask(ListExports(self._secure))

    def _on_starttls(self, payload: bytes) -> None:
        if self._secure:
            self._settle(OptionReplyType.ERR_INVALID, "TLS has begun already")
        elif self._tls == "off":
            self._settle(OptionReplyType.ERR_POLICY, "this server has no TLS")
        else:
            self._ask(StartTls())

    def _on_info_or_go(self, payload: bytes) -> None:
        try:
            request = m.INFO_REQUEST.parse(payload)
        except RemoteProtocolError as error:
            self._settle(OptionReplyType.ERR_INVALID, " ".join(str(error).split()))
        else:
            self._ask(ExportQuery(Option(self._header.option), request.name, request.infos, self._secure))

    def _on_structured_reply(self, payload: bytes) -> None:
        if not self._structured:
            self._settle(OptionReplyType.ERR_UNSUP, "structured replies are switched off")
        elif self._mode is ReplyMode.EXTENDED:
            self._settle(OptionReplyType.ERR_EXT_HEADER_REQD, "extended headers are in use already")
        else:
            self._mode = ReplyMode.STRUCTURED
            self._settle(OptionReplyType.ACK)

    def _on_extended_headers(self, payload: bytes) -> None:
        if self._extended:
            self._mode = ReplyMode.EXTENDED
            self._settle(OptionReplyType.ACK)
        else:
            self._settle(OptionReplyType.ERR_UNSUP, "extended headers are switched off")

    def _on_meta_context(self, payload: bytes) -> None:
        if self._mode is ReplyMode.SIMPLE:
            self._settle(OptionReplyType.ERR_INVALID, "metadata contexts need structured replies or extended headers")
            return
        try:
            request = m.META_CONTEXT_REQUEST.parse(payload)
        except RemoteProtocolError as error:
            self._settle(OptionReplyType.ERR_INVALID, " ".join(str(error).split()))
        else:
            self._ask(MetaContextQuery(Option(self._header.option), request.export, request.queries, self._secure))

    # What the steps and handlers are made of ------------------------------------------------------------------------

    def _take(self, count: int) -> bytes | None:
        if len(self._received) < count:
            return None
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _enter(self, state: State) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} → {state}"
        self._state = state

    def _ask(self, question: Question) -> None:
        self._question = question
        self._enter(State.ANSWER)
        self._events.append(question)

    def _check_answer(self, answer: str) -> Question:
        question = self._question
        if question is None or question in self._events or answer not in ANSWERS[type(question)]:
            raise LocalProtocolError(f"{answer}() answers no question, asked was {question!r}")
        return question

    def _settle(self, reply_type: OptionReplyType, text: str = "") -> None:
        if reply_type == OptionReplyType.ACK:
            self._reply(reply_type)
        else:
            self._refuse(reply_type, text)
        self._enter(State.OPTION)

    def _acknowledge(self) -> None:
        self._question = None
        self._reply(OptionReplyType.ACK)
        self._enter(State.OPTION)

    def _refuse(self, reply_type: OptionReplyType, text: str) -> None:
        self._reply(reply_type, m.ERROR_TEXT.build(m.ErrorText(text_for_people(text))))

    def _reply(self, reply_type: OptionReplyType, payload: bytes = b"") -> None:
        header = m.OptionReplyHeader(self._header.option, reply_type, len(payload))
        self._outgoing += m.OPTION_REPLY_HEADER.build(header) + payload

    def _begin_transmission(self, query: ExportQuery, info: ExportInfo) -> None:
        self._enter(State.TRANSMISSION)
        contexts = self._contexts if self._contexts_export == query.name else {}
        self._events.append(
            Ready(query.option, query.name, info, self._mode, contexts, self._client_flags, self._secure)
        )

    def _forget_contexts(self) -> None:
        self._contexts_export, self._contexts = None, {}

    def _close(self, reason: str) -> None:
        self._enter(State.ENDED)
        self._received.clear()
        self._events.append(Closed(reason))

    def _broken(self, fault: str) -> RemoteProtocolError:
        self._state = State.ENDED
        self._question = None
        self._received.clear()
        return RemoteProtocolError(fault)


_HEADER_BYTES: Final = m.OPTION_HEADER.size_bytes
