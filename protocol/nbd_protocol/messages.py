"""Every structure of the NBD protocol, declared once, in construct.

Names of layouts are the specification's, in capitals; each of them is either a plain construct
(fixed-size records of the transmission phase, whose fast codecs are derived in ``codec.py``) or a
:class:`Message`, which parses into and builds from a typed record. Sections named below are those of
``doc/proto.md``.
"""

import enum
import io
from collections.abc import Mapping
from typing import Any, Final, Generic, TypeVar

import construct
import msgspec
from construct import Const, GreedyBytes, GreedyRange, Int16ub, Int32ub, Int64ub, Padding, Prefixed, Struct

from nbd_protocol import constants as c
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError

# How single fields are read -------------------------------------------------------------------------------


class OpenEnum(construct.Adapter):  # type: ignore[misc]  # construct is untyped
    """An integer that is a member of `members` where there is one, and stays an int where there is none."""

    def __init__(self, subcon: construct.Construct, members: type[enum.IntEnum]) -> None:
        super().__init__(subcon)
        self._members: Mapping[int, int] = {member.value: member for member in members}

    def _decode(self, obj: int, context: object, path: str) -> int:
        return self._members.get(obj, obj)

    def _encode(self, obj: int, context: object, path: str) -> int:
        return int(obj)


class OpenFlags(construct.Adapter):  # type: ignore[misc]  # construct is untyped
    """An integer as an IntFlag; bits without a name are kept."""

    def __init__(self, subcon: construct.Construct, flags: type[enum.IntFlag]) -> None:
        super().__init__(subcon)
        self._flags = flags

    def _decode(self, obj: int, context: object, path: str) -> int:
        return self._flags(obj)

    def _encode(self, obj: int, context: object, path: str) -> int:
        return int(obj)


class Utf8(construct.Adapter):  # type: ignore[misc]  # construct is untyped
    """A string as the specification's section "Conventions" has it: UTF-8, no NUL, at most 4096 bytes.

    With `lenient` text from a peer that breaks those rules is repaired rather than refused: for words
    meant for a human's eyes it is better to show them damaged than to lose them.
    """

    def __init__(self, subcon: construct.Construct, *, lenient: bool = False) -> None:
        super().__init__(subcon)
        self._lenient = lenient

    def _decode(self, obj: bytes, context: object, path: str) -> str:
        if self._lenient:
            return obj[: c.MAX_STRING_BYTES].decode(errors="replace").replace("\0", "\ufffd")
        self._check(obj, path)
        try:
            return obj.decode()
        except UnicodeDecodeError as error:
            raise construct.StringError(f"string {obj[:64]!r} is not UTF-8: {error.reason}", path=path) from error

    def _encode(self, obj: str, context: object, path: str) -> bytes:
        try:
            encoded = obj.encode()
        except UnicodeEncodeError as error:
            raise construct.StringError(f"string {obj[:64]!r} is not Unicode: {error.reason}", path=path) from error
        self._check(encoded, path)
        return encoded

    @staticmethod
    def _check(encoded: bytes, path: str) -> None:
        if len(encoded) > c.MAX_STRING_BYTES:
            raise construct.StringError(
                f"string of {len(encoded)} bytes, at most {c.MAX_STRING_BYTES} are allowed", path=path
            )
        if b"\0" in encoded:
            raise construct.StringError(f"string {encoded[:64]!r} contains NUL", path=path)


class TupleOf(construct.Adapter):  # type: ignore[misc]  # construct is untyped
    """A construct list as a tuple."""

    def _decode(self, obj: list[Any], context: object, path: str) -> tuple[Any, ...]:
        return tuple(obj)

    def _encode(self, obj: tuple[Any, ...], context: object, path: str) -> list[Any]:
        return list(obj)


def _string32(*, lenient: bool = False) -> construct.Construct:
    """A string with its length in bytes before it, in 32 bits."""
    return Utf8(Prefixed(Int32ub, GreedyBytes), lenient=lenient)


# Typed messages ---------------------------------------------------------------------------------------------

Record = TypeVar("Record", bound=msgspec.Struct)


class Message(Generic[Record]):
    """A layout and the record it is parsed into; parse and build are each other's inverse.

    Args:
        name: the specification's name for it, for error texts.
        layout: a construct Struct whose fields are named as those of the record.
        record: the type of record; fields of the layout that it lacks are constants or reserved.
    """

    def __init__(self, name: str, layout: construct.Construct, record: type[Record]) -> None:
        self.name = name
        self.layout = layout
        self.record = record
        self._fields = record.__struct_fields__

    def parse(self, data: bytes | bytearray | memoryview) -> Record:
        """Parse a whole message.

        Raises:
            RemoteProtocolError: it is too short, too long, or a constant or a string in it is wrong.
        """
        stream = io.BytesIO(data)
        try:
            container: Mapping[str, Any] = self.layout.parse_stream(stream)
        except construct.ConstructError as error:
            raise RemoteProtocolError(f"malformed {self.name} of {len(data)} bytes: {error}") from error
        if stream.tell() != len(data):
            raise RemoteProtocolError(f"{self.name} should end after {stream.tell()} bytes, but has {len(data)}")
        return self.record(**{field: container[field] for field in self._fields})

    def build(self, record: Record) -> bytes:
        """Build the message.

        Raises:
            LocalProtocolError: a value does not fit its field.
        """
        values = {field: getattr(record, field) for field in self._fields}
        try:
            built: bytes = self.layout.build(values)
        except construct.ConstructError as error:
            raise LocalProtocolError(f"cannot build {self.name} from {record!r}: {error}") from error
        return built

    @property
    def size_bytes(self) -> int:
        """The size of a fixed-size message; construct.SizeofError for others."""
        size: int = self.layout.sizeof()
        return size


# Greeting: sections "Oldstyle negotiation", "Newstyle negotiation" --------------------------------------------


class GreetingMagics(msgspec.Struct, frozen=True, gc=False):
    """The first 16 bytes of a server: `style` tells newstyle (IHAVEOPT) from oldstyle."""

    style: int


NEWSTYLE: Final = int.from_bytes(c.IHAVEOPT, "big")

GREETING_MAGICS: Final = Message(
    "greeting", Struct("magic" / Const(c.NBDMAGIC), "style" / Int64ub), GreetingMagics
)  # fmt: skip


class Greeting(msgspec.Struct, frozen=True, gc=False):
    """What a newstyle server says first."""

    flags: c.HandshakeFlag


GREETING: Final = Message(
    "newstyle greeting",
    Struct("magic" / Const(c.NBDMAGIC), "style" / Const(c.IHAVEOPT), "flags" / OpenFlags(Int16ub, c.HandshakeFlag)),
    Greeting,
)


class OldstyleGreeting(msgspec.Struct, frozen=True, gc=False):
    """All that an oldstyle server says; transmission follows at once."""

    size: int
    handshake_flags: c.HandshakeFlag
    flags: c.TransmissionFlag


OLDSTYLE_GREETING: Final = Message(
    "oldstyle greeting",
    Struct(
        "magic" / Const(c.NBDMAGIC),
        "style" / Const(c.OLDSTYLE_MAGIC, Int64ub),
        "size" / Int64ub,
        "handshake_flags" / OpenFlags(Int16ub, c.HandshakeFlag),
        "flags" / OpenFlags(Int16ub, c.TransmissionFlag),
        "reserved" / Padding(124),
    ),
    OldstyleGreeting,
)


class ClientFlags(msgspec.Struct, frozen=True, gc=False):
    """The client's answer to a newstyle greeting."""

    flags: c.ClientFlag


CLIENT_FLAGS: Final = Message("client flags", Struct("flags" / OpenFlags(Int32ub, c.ClientFlag)), ClientFlags)

# Option haggling: sections "Option types", "Option reply types" -------------------------------------------------


class OptionHeader(msgspec.Struct, frozen=True, gc=False):
    """What precedes the payload of an option."""

    option: int
    """An Option where it is a known one."""
    length: int


OPTION_HEADER: Final = Message(
    "option header",
    Struct("magic" / Const(c.IHAVEOPT), "option" / OpenEnum(Int32ub, c.Option), "length" / Int32ub),
    OptionHeader,
)


class OptionReplyHeader(msgspec.Struct, frozen=True, gc=False):
    """What precedes the payload of a reply to an option."""

    option: int
    type: int
    """An OptionReplyType where it is a known one."""
    length: int


OPTION_REPLY_HEADER: Final = Message(
    "option reply header",
    Struct(
        "magic" / Const(c.OPTION_REPLY_MAGIC, Int64ub),
        "option" / OpenEnum(Int32ub, c.Option),
        "type" / OpenEnum(Int32ub, c.OptionReplyType),
        "length" / Int32ub,
    ),
    OptionReplyHeader,
)


class ExportName(msgspec.Struct, frozen=True, gc=False):
    """Payload of NBD_OPT_EXPORT_NAME: the name alone."""

    name: str


EXPORT_NAME: Final = Message("NBD_OPT_EXPORT_NAME", Struct("name" / Utf8(GreedyBytes)), ExportName)


class ExportNameReply(msgspec.Struct, frozen=True, gc=False):
    """The answer to NBD_OPT_EXPORT_NAME; it has no header."""

    size: int
    flags: c.TransmissionFlag


_EXPORT_NAME_REPLY = Struct("size" / Int64ub, "flags" / OpenFlags(Int16ub, c.TransmissionFlag))

EXPORT_NAME_REPLY: Final = Message("reply to NBD_OPT_EXPORT_NAME", _EXPORT_NAME_REPLY, ExportNameReply)
"""Where both sides set NO_ZEROES."""
EXPORT_NAME_REPLY_WITH_ZEROES: Final = Message(
    "reply to NBD_OPT_EXPORT_NAME with zeroes",
    _EXPORT_NAME_REPLY + Struct("reserved" / Padding(124)),
    ExportNameReply,
)


class InfoRequest(msgspec.Struct, frozen=True, gc=False):
    """Payload of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    infos: tuple[int, ...] = ()
    """InfoType where they are known ones."""


INFO_REQUEST: Final = Message(
    "NBD_OPT_INFO or NBD_OPT_GO",
    Struct(
        "name" / _string32(),
        "infos" / TupleOf(construct.PrefixedArray(Int16ub, OpenEnum(Int16ub, c.InfoType))),
    ),
    InfoRequest,
)


class MetaContextRequest(msgspec.Struct, frozen=True, gc=False):
    """Payload of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    export: str
    queries: tuple[str, ...] = ()


META_CONTEXT_REQUEST: Final = Message(
    "NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT",
    Struct("export" / _string32(), "queries" / TupleOf(construct.PrefixedArray(Int32ub, _string32()))),
    MetaContextRequest,
)


class MetaContextReply(msgspec.Struct, frozen=True, gc=False):
    """Payload of NBD_REP_META_CONTEXT."""

    id: int
    name: str


META_CONTEXT_REPLY: Final = Message(
    "NBD_REP_META_CONTEXT", Struct("id" / Int32ub, "name" / Utf8(GreedyBytes)), MetaContextReply
)


class ServerReply(msgspec.Struct, frozen=True, gc=False):
    """Payload of NBD_REP_SERVER: one export of a listing; `details` are words for a human."""

    name: str
    details: str = ""


SERVER_REPLY: Final = Message(
    "NBD_REP_SERVER", Struct("name" / _string32(), "details" / Utf8(GreedyBytes, lenient=True)), ServerReply
)


class ErrorText(msgspec.Struct, frozen=True, gc=False):
    """Payload of an error reply to an option."""

    text: str


ERROR_TEXT: Final = Message("error reply", Struct("text" / Utf8(GreedyBytes, lenient=True)), ErrorText)


class InfoExport(msgspec.Struct, frozen=True, gc=False):
    """NBD_INFO_EXPORT: size in bytes and what the export can do."""

    size: int
    flags: c.TransmissionFlag


class InfoName(msgspec.Struct, frozen=True, gc=False):
    """NBD_INFO_NAME: the export's canonical name."""

    name: str


class InfoDescription(msgspec.Struct, frozen=True, gc=False):
    """NBD_INFO_DESCRIPTION: what the export is, for a human."""

    description: str


class InfoBlockSize(msgspec.Struct, frozen=True, gc=False):
    """NBD_INFO_BLOCK_SIZE, in bytes."""

    minimum: int
    preferred: int
    maximum_payload: int


class InfoUnknown(msgspec.Struct, frozen=True, gc=False):
    """An info that this version of the protocol does not know."""

    type: int
    payload: bytes


Info = InfoExport | InfoName | InfoDescription | InfoBlockSize | InfoUnknown

INFO_EXPORT: Final = Message(
    "NBD_INFO_EXPORT",
    Struct(
        "type" / Const(int(c.InfoType.EXPORT), Int16ub),
        "size" / Int64ub,
        "flags" / OpenFlags(Int16ub, c.TransmissionFlag),
    ),
    InfoExport,
)
INFO_NAME: Final = Message(
    "NBD_INFO_NAME",
    Struct("type" / Const(int(c.InfoType.NAME), Int16ub), "name" / Utf8(GreedyBytes)),
    InfoName,
)
INFO_DESCRIPTION: Final = Message(
    "NBD_INFO_DESCRIPTION",
    Struct("type" / Const(int(c.InfoType.DESCRIPTION), Int16ub), "description" / Utf8(GreedyBytes, lenient=True)),
    InfoDescription,
)
INFO_BLOCK_SIZE: Final = Message(
    "NBD_INFO_BLOCK_SIZE",
    Struct(
        "type" / Const(int(c.InfoType.BLOCK_SIZE), Int16ub),
        "minimum" / Int32ub,
        "preferred" / Int32ub,
        "maximum_payload" / Int32ub,
    ),
    InfoBlockSize,
)
INFO_UNKNOWN: Final = Message("NBD_REP_INFO", Struct("type" / Int16ub, "payload" / GreedyBytes), InfoUnknown)

_INFO_BY_TYPE: Final[dict[int, Message[Any]]] = {
    c.InfoType.EXPORT: INFO_EXPORT,
    c.InfoType.NAME: INFO_NAME,
    c.InfoType.DESCRIPTION: INFO_DESCRIPTION,
    c.InfoType.BLOCK_SIZE: INFO_BLOCK_SIZE,
}
_INFO_BY_RECORD: Final[dict[type, Message[Any]]] = {
    message.record: message for message in (*_INFO_BY_TYPE.values(), INFO_UNKNOWN)
}


def parse_info(data: bytes | bytearray | memoryview) -> Info:
    """Parse the payload of NBD_REP_INFO into the record of its type.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    info: Info = _INFO_BY_TYPE.get(INFO_UNKNOWN.parse(data).type, INFO_UNKNOWN).parse(data)
    return info


def build_info(info: Info) -> bytes:
    """Build the payload of NBD_REP_INFO from any of the info records.

    Raises:
        LocalProtocolError: a value does not fit its field.
    """
    return _INFO_BY_RECORD[type(info)].build(info)


# Transmission: section "Transmission phase". The fast codecs of these are derived in codec.py. --------------------

REQUEST: Final = Struct(
    "magic" / Const(c.REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
)

EXTENDED_REQUEST: Final = Struct(
    "magic" / Const(c.EXTENDED_REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)

SIMPLE_REPLY: Final = Struct(
    "magic" / Const(c.SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,
    "cookie" / Int64ub,
)

STRUCTURED_CHUNK: Final = Struct(
    "magic" / Const(c.STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "length" / Int32ub,
)

EXTENDED_CHUNK: Final = Struct(
    "magic" / Const(c.EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)

OFFSET_DATA: Final = Struct("offset" / Int64ub)
"""Payload of OFFSET_DATA; the data follow."""

OFFSET_HOLE: Final = Struct("offset" / Int64ub, "length" / Int32ub)
"""Payload of OFFSET_HOLE; 32 bits in extended replies too, since no read is longer."""

STRUCTURED_DATA_CHUNK: Final = Struct("chunk" / STRUCTURED_CHUNK, "data" / OFFSET_DATA)
"""All that precedes the data of a read in a structured reply."""

EXTENDED_DATA_CHUNK: Final = Struct("chunk" / EXTENDED_CHUNK, "data" / OFFSET_DATA)
"""All that precedes the data of a read in an extended reply."""

BLOCK_STATUS: Final = Struct("context_id" / Int32ub)
"""Begin of the payload of BLOCK_STATUS; EXTENT descriptors follow."""

EXTENT: Final = Struct("length" / Int32ub, "flags" / Int32ub)

BLOCK_STATUS_EXT: Final = Struct("context_id" / Int32ub, "count" / Int32ub)
"""Begin of the payload of BLOCK_STATUS_EXT; `count` EXTENT_EXT descriptors follow."""

EXTENT_EXT: Final = Struct("length" / Int64ub, "flags" / Int64ub)


class ErrorChunk(msgspec.Struct, frozen=True, gc=False):
    """Payload of an ERROR chunk."""

    error: int
    text: str = ""


ERROR_CHUNK: Final = Message(
    "NBD_REPLY_TYPE_ERROR",
    Struct("error" / Int32ub, "text" / Utf8(Prefixed(Int16ub, GreedyBytes), lenient=True)),
    ErrorChunk,
)


class ErrorOffsetChunk(msgspec.Struct, frozen=True, gc=False):
    """Payload of an ERROR_OFFSET chunk: the error and the first offset, in bytes, that it concerns."""

    error: int
    text: str
    offset: int


ERROR_OFFSET_CHUNK: Final = Message(
    "NBD_REPLY_TYPE_ERROR_OFFSET",
    Struct(
        "error" / Int32ub,
        "text" / Utf8(Prefixed(Int16ub, GreedyBytes), lenient=True),
        "offset" / Int64ub,
    ),
    ErrorOffsetChunk,
)


class UnknownErrorChunk(msgspec.Struct, frozen=True, gc=False):
    """Payload of any chunk whose type has the error bit: error and text come first in all of them."""

    error: int
    text: str
    rest: bytes = b""


UNKNOWN_ERROR_CHUNK: Final = Message(
    "error chunk of unknown type",
    Struct(
        "error" / Int32ub,
        "text" / Utf8(Prefixed(Int16ub, GreedyBytes), lenient=True),
        "rest" / GreedyBytes,
    ),
    UnknownErrorChunk,
)


class BlockStatusPayload(msgspec.Struct, frozen=True, gc=False):
    """Payload of a BLOCK_STATUS request with PAYLOAD_LEN: its effect length in bytes, and the contexts wanted."""

    effect_length: int
    context_ids: tuple[int, ...]


BLOCK_STATUS_PAYLOAD: Final = Message(
    "payload of NBD_CMD_BLOCK_STATUS",
    Struct("effect_length" / Int64ub, "context_ids" / TupleOf(GreedyRange(Int32ub))),
    BlockStatusPayload,
)
MAX_BLOCK_STATUS_PAYLOAD_BYTES: Final = 8 + 4 * c.MAX_META_CONTEXTS
