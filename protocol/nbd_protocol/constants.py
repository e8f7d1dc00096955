"""Every number of the NBD protocol, with the names that the specification gives them.

Source: ``doc/proto.md`` of the NetworkBlockDevice/nbd project; extended headers, from its branch
``extension-ext-header``, are included. Values that a peer may send and that are unknown here are kept
as plain integers (enumerations) or as unnamed bits (flags); nothing is lost by parsing.
"""

import enum
from typing import Final

# Magics -------------------------------------------------------------------------------------------------

NBDMAGIC: Final = b"NBDMAGIC"
"""The first eight bytes of every server."""
IHAVEOPT: Final = b"IHAVEOPT"
"""Follows NBDMAGIC in newstyle, and begins every option."""
OLDSTYLE_MAGIC: Final = 0x00420281861253
"""Follows NBDMAGIC in oldstyle."""
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809
"""The TCP port that IANA gave to NBD."""


class ReplyMode(enum.Enum):
    """Which framing a connection negotiated for its transmission phase."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


# Handshake ----------------------------------------------------------------------------------------------


class HandshakeFlag(enum.IntFlag):
    """What the server says of itself in its greeting (16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """What the client answers to the greeting (32 bits); the server drops a client that sets others."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(enum.IntEnum):
    """What a client asks for during option haggling."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    """Withdrawn from the specification; no server answers it."""
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


OPTION_REPLY_ERROR_BIT: Final = 1 << 31
"""Set in every option reply type that is an error."""


class OptionReplyType(enum.IntEnum):
    """What a server answers to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = OPTION_REPLY_ERROR_BIT + 1
    ERR_POLICY = OPTION_REPLY_ERROR_BIT + 2
    ERR_INVALID = OPTION_REPLY_ERROR_BIT + 3
    ERR_PLATFORM = OPTION_REPLY_ERROR_BIT + 4
    ERR_TLS_REQD = OPTION_REPLY_ERROR_BIT + 5
    ERR_UNKNOWN = OPTION_REPLY_ERROR_BIT + 6
    ERR_SHUTDOWN = OPTION_REPLY_ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = OPTION_REPLY_ERROR_BIT + 8
    ERR_TOO_BIG = OPTION_REPLY_ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = OPTION_REPLY_ERROR_BIT + 10


class InfoType(enum.IntEnum):
    """What INFO and GO can tell about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """What an export can do (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    """Experimental: the RESIZE extension."""
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


# Transmission -------------------------------------------------------------------------------------------


class Command(enum.IntEnum):
    """The type of a request."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8
    """Experimental: the RESIZE extension; the wanted size travels in the offset field, the only one of 64 bits."""


class CommandFlag(enum.IntFlag):
    """Modifiers of a request (16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkFlag(enum.IntFlag):
    """Flags of a chunk of a structured or extended reply."""

    DONE = 1 << 0


CHUNK_ERROR_BIT: Final = 1 << 15
"""Set in every chunk type that is an error."""


class ChunkType(enum.IntEnum):
    """The type of a chunk of a structured or extended reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR_BIT + 1
    ERROR_OFFSET = CHUNK_ERROR_BIT + 2


class Errno(enum.IntEnum):
    """The errors that NBD knows; on the wire there is no other."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# Metadata contexts --------------------------------------------------------------------------------------

META_BASE_ALLOCATION: Final = "base:allocation"
META_QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
META_QEMU_DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"


class AllocationState(enum.IntFlag):
    """The status bits of ``base:allocation``; none of them means allocated data."""

    HOLE = 1 << 0
    ZERO = 1 << 1


DIRTY: Final = 1
"""The one status bit of ``qemu:dirty-bitmap:NAME``."""

# Limits -------------------------------------------------------------------------------------------------

KIB: Final = 1024
MIB: Final = 1024 * KIB

MAX_STRING_BYTES: Final = 4096
"""The specification's cap for every string: names, descriptions, contexts, error texts."""
MAX_OPTIONS: Final = 64
"""Options of one connection. A client that needs a dozen is already unusual; more is somebody probing."""
MAX_OPTION_KEPT_BYTES: Final = 64 * KIB
"""Payload of one option that is held in memory: room for a name and fifteen context queries of the longest kind."""
MAX_OPTION_SKIPPED_BYTES: Final = 1 * MIB
"""Payload of one option that is read and thrown away so that the connection survives; more closes it."""
NEGOTIATION_TIMEOUT_S: Final = 10.0
"""Time a peer has for its whole negotiation: long for a slow network, short for a connection held open idly."""
MAX_OPTION_REPLY_BYTES: Final = 64 * KIB
"""What a client accepts as one option reply: two longest strings and their lengths need 8 KiB."""
MAX_LISTED_EXPORTS: Final = 65536
"""Exports that a client accepts in one listing; at the longest names that is 256 MiB of traffic, never held here."""
MAX_META_CONTEXTS: Final = 1024
"""Metadata contexts selected on one connection; QEMU has one per bitmap, and few bitmaps."""

MAX_PAYLOAD_BYTES: Final = 32 * MIB
"""Payload of one request or reply that every peer may rely on (section "Block size constraints")."""
LARGE_PAYLOAD_BYTES: Final = 64 * KIB
"""From here up, a payload that has not arrived whole is received into a buffer of its own, not beside others."""
MAX_SWALLOWED_PAYLOAD_BYTES: Final = 64 * MIB
"""Payload of one refused request that is read and thrown away; more than this and the connection is closed instead."""
MAX_DF_BYTES: Final = 64 * KIB
"""Reads up to this length must be answerable without fragmentation when the client sets DF."""
MAX_EXTENTS: Final = 1 << 20
"""Extents in one block status chunk (section "Structured reply types")."""
MAX_READ_FRAGMENTS: Final = 65536
"""Disjoint pieces of one read that a client keeps count of: one for each sector of the largest read."""
MAX_LENGTH_32: Final = (1 << 32) - 1
"""The longest effect of a request without extended headers."""
MAX_EXTENT_LENGTH_32: Final = (1 << 32) - 64 * KIB
"""The longest extent told in 32 bits: still a multiple of every minimum block (at most 64 KiB)."""
MAX_OFFSET: Final = (1 << 64) - 1
