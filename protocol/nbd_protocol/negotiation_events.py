"""What the negotiation comes to, on either end: the events of ServerNegotiation and of ClientNegotiation."""

from __future__ import annotations

import msgspec

from nbd_protocol.constants import ClientFlag, Option, ReplyMode
from nbd_protocol.errors import OptionRefused
from nbd_protocol.messages import ServerReply
from nbd_protocol.negotiation import ExportInfo

# The server's -------------------------------------------------------------------------------------------------------


class ListExports(msgspec.Struct, frozen=True):
    """The client asks which exports there are (NBD_OPT_LIST); `secure`: whether it asks through TLS."""

    secure: bool


class ExportQuery(msgspec.Struct, frozen=True):
    """The client asks about an export (INFO) or wants to use it (GO, EXPORT_NAME).

    Attributes:
        option: Option.INFO, Option.GO or Option.EXPORT_NAME.
        name: as the client said it; "" is the default export.
        infos: what it asks for (numbers, InfoType where known); never needs to be looked at: accept_export() does.
        secure: whether it asks through TLS.
    """

    option: Option
    name: str
    infos: tuple[int, ...]
    secure: bool


class MetaContextQuery(msgspec.Struct, frozen=True):
    """The client asks which metadata contexts an export has (LIST_META_CONTEXT) or selects some (SET_META_CONTEXT)."""

    option: Option
    export: str
    queries: tuple[str, ...]
    secure: bool


class StartTls(msgspec.Struct, frozen=True):
    """The client wants TLS."""


class Ready(msgspec.Struct, frozen=True):
    """The negotiation is over and has led to an export; the transmission phase begins with `trailing_data`.

    Attributes:
        option: Option.GO or Option.EXPORT_NAME.
        export_name: as the client said it.
        info: as it was told: its flags are those that were negotiated.
        mode: of all replies.
        contexts: id → name of the metadata contexts that BLOCK_STATUS may be asked for; may be empty.
        client_flags: what the client said of itself.
        secure: whether the connection runs through TLS.
    """

    option: Option
    export_name: str
    info: ExportInfo
    mode: ReplyMode
    contexts: dict[int, str]
    client_flags: ClientFlag
    secure: bool


class Aborted(msgspec.Struct, frozen=True):
    """The client has ended the negotiation politely (NBD_OPT_ABORT): send what is left, then close."""


class Closed(msgspec.Struct, frozen=True):
    """Nobody broke the protocol, but the connection must be closed: the client hung up, or cannot be answered."""

    reason: str


ServerEvent = ListExports | ExportQuery | MetaContextQuery | StartTls | Ready | Aborted | Closed
Question = ListExports | ExportQuery | MetaContextQuery | StartTls


# The client's -------------------------------------------------------------------------------------------------------


class TlsWanted(msgspec.Struct, frozen=True):
    """The server has agreed to TLS: send what is left, make the TLS handshake, then call tls_established()."""


class Established(msgspec.Struct, frozen=True):
    """The negotiation is over and has led to an export: the transmission phase begins.

    Attributes:
        option: Option.GO, Option.EXPORT_NAME, or None where the server negotiates in oldstyle.
        export_name: as it was asked for.
        info: what the server tells of it; its flags are those that may be used in `mode`, none without HAS_FLAGS.
        mode: of all replies.
        contexts: id → name of the metadata contexts that were selected; may be empty.
        secure: whether the connection runs through TLS.
    """

    option: Option | None
    export_name: str
    info: ExportInfo
    mode: ReplyMode
    contexts: dict[int, str]
    secure: bool


class ExportDescribed(msgspec.Struct, frozen=True):
    """What the server tells of an export that it was asked about; the flags are those that GO would give."""

    export_name: str
    info: ExportInfo


class ExportsListed(msgspec.Struct, frozen=True):
    """The server's exports: `name` and `details` (words for people, may be empty) of each."""

    exports: tuple[ServerReply, ...]


class MetaContextsListed(msgspec.Struct, frozen=True):
    """The metadata contexts that an export has, or those of them that the queries asked for."""

    export_name: str
    contexts: tuple[str, ...]


class Refused(msgspec.Struct, frozen=True):
    """The server said no; further commands may follow unless the state is ENDED.

    Attributes:
        option: what was refused. For connect() it is GO, or EXPORT_NAME where the server only knows that.
        reply_type: an OptionReplyType where it is a known one. ERR_UNSUP is also what this end says for a server whose
            style of negotiation has no such option, and ERR_UNKNOWN for one that hung up on EXPORT_NAME.
        text: why, in words; may be empty.
    """

    option: Option
    reply_type: int
    text: str

    def exception(self) -> OptionRefused:
        """The same as an exception, for callers that would rather raise it."""
        return OptionRefused(self.reply_type, self.text)


class Ended(msgspec.Struct, frozen=True):
    """The negotiation is over as abort() wanted: close the connection."""


ClientEvent = TlsWanted | Established | ExportDescribed | ExportsListed | MetaContextsListed | Refused | Ended
