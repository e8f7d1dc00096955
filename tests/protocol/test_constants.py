"""The numbers of the specification, written out a second time."""

from enum import IntEnum, IntFlag

import pytest

from nbd_protocol import constants as c

SPECIFIED: list[tuple[type[IntEnum] | type[IntFlag], dict[str, int]]] = [
    (c.HandshakeFlag, {"FIXED_NEWSTYLE": 1, "NO_ZEROES": 2}),
    (c.ClientFlag, {"FIXED_NEWSTYLE": 1, "NO_ZEROES": 2}),
    (
        c.TransmissionFlag,
        {
            "HAS_FLAGS": 1,
            "READ_ONLY": 2,
            "SEND_FLUSH": 4,
            "SEND_FUA": 8,
            "ROTATIONAL": 16,
            "SEND_TRIM": 32,
            "SEND_WRITE_ZEROES": 64,
            "SEND_DF": 128,
            "CAN_MULTI_CONN": 256,
            "SEND_RESIZE": 512,
            "SEND_CACHE": 1024,
            "SEND_FAST_ZERO": 2048,
            "BLOCK_STATUS_PAYLOAD": 4096,
        },
    ),
    (
        c.Option,
        {
            "EXPORT_NAME": 1,
            "ABORT": 2,
            "LIST": 3,
            "PEEK_EXPORT": 4,
            "STARTTLS": 5,
            "INFO": 6,
            "GO": 7,
            "STRUCTURED_REPLY": 8,
            "LIST_META_CONTEXT": 9,
            "SET_META_CONTEXT": 10,
            "EXTENDED_HEADERS": 11,
        },
    ),
    (
        c.OptionReplyType,
        {
            "ACK": 1,
            "SERVER": 2,
            "INFO": 3,
            "META_CONTEXT": 4,
            "ERR_UNSUP": 0x80000001,
            "ERR_POLICY": 0x80000002,
            "ERR_INVALID": 0x80000003,
            "ERR_PLATFORM": 0x80000004,
            "ERR_TLS_REQD": 0x80000005,
            "ERR_UNKNOWN": 0x80000006,
            "ERR_SHUTDOWN": 0x80000007,
            "ERR_BLOCK_SIZE_REQD": 0x80000008,
            "ERR_TOO_BIG": 0x80000009,
            "ERR_EXT_HEADER_REQD": 0x8000000A,
        },
    ),
    (c.InfoType, {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3}),
    (
        c.Command,
        {
            "READ": 0,
            "WRITE": 1,
            "DISC": 2,
            "FLUSH": 3,
            "TRIM": 4,
            "CACHE": 5,
            "WRITE_ZEROES": 6,
            "BLOCK_STATUS": 7,
            "RESIZE": 8,
        },
    ),
    (c.CommandFlag, {"FUA": 1, "NO_HOLE": 2, "DF": 4, "REQ_ONE": 8, "FAST_ZERO": 16, "PAYLOAD_LEN": 32}),
    (c.ChunkFlag, {"DONE": 1}),
    (
        c.ChunkType,
        {
            "NONE": 0,
            "OFFSET_DATA": 1,
            "OFFSET_HOLE": 2,
            "BLOCK_STATUS": 5,
            "BLOCK_STATUS_EXT": 6,
            "ERROR": 0x8001,
            "ERROR_OFFSET": 0x8002,
        },
    ),
    (
        c.Errno,
        {
            "OK": 0,
            "EPERM": 1,
            "EIO": 5,
            "ENOMEM": 12,
            "EINVAL": 22,
            "ENOSPC": 28,
            "EOVERFLOW": 75,
            "ENOTSUP": 95,
            "ESHUTDOWN": 108,
        },
    ),
    (c.AllocationState, {"HOLE": 1, "ZERO": 2}),
]


@pytest.mark.parametrize(("enumeration", "numbers"), SPECIFIED, ids=lambda value: getattr(value, "__name__", ""))
def test_numbers(enumeration: type[IntEnum] | type[IntFlag], numbers: dict[str, int]) -> None:
    assert {name: int(member) for name, member in enumeration.__members__.items()} == numbers


def test_magics() -> None:
    assert int.from_bytes(c.NBDMAGIC, "big") == 0x4E42444D41474943
    assert int.from_bytes(c.IHAVEOPT, "big") == 0x49484156454F5054
    assert c.OLDSTYLE_MAGIC == 0x00420281861253
    assert c.OPTION_REPLY_MAGIC == 0x0003E889045565A9
    assert (c.REQUEST_MAGIC, c.SIMPLE_REPLY_MAGIC) == (0x25609513, 0x67446698)
    assert (c.STRUCTURED_REPLY_MAGIC, c.EXTENDED_REQUEST_MAGIC, c.EXTENDED_REPLY_MAGIC) == (
        0x668E33EF,
        0x21E41C71,
        0x6E8A278C,
    )


def test_limits_of_the_specification() -> None:
    assert c.MAX_STRING_BYTES == 4096
    assert c.MAX_PAYLOAD_BYTES == 32 * 1024 * 1024
    assert c.MAX_EXTENTS == 2**20
    assert c.MAX_EXTENT_LENGTH_32 % 65536 == 0
    assert c.MAX_EXTENT_LENGTH_32 <= c.MAX_LENGTH_32 == 2**32 - 1
