"""Derived codecs are equal to the construct declarations that they come from."""

from typing import Any

import construct
import pytest
from construct import Array, Bytes, Const, Default, Int8ub, Int16ub, Int32sb, Int32ub, Int64ub, Rebuild, Struct, this
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol import messages
from nbd_protocol.codec import derive
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError

DECLARED = {name: value for name, value in vars(messages).items() if type(value) is Struct}
RECORDS = {name: declaration for name, declaration in DECLARED.items() if not name.startswith("_")}
HOT = {
    "REQUEST": 28,
    "EXTENDED_REQUEST": 32,
    "SIMPLE_REPLY": 16,
    "STRUCTURED_CHUNK": 20,
    "EXTENDED_CHUNK": 32,
    "OFFSET_DATA": 8,
    "OFFSET_HOLE": 12,
    "STRUCTURED_DATA_CHUNK": 28,
    "EXTENDED_DATA_CHUNK": 40,
    "BLOCK_STATUS": 4,
    "EXTENT": 8,
    "BLOCK_STATUS_EXT": 8,
    "EXTENT_EXT": 16,
}
ALL_KINDS = Struct(
    "magic" / Const(b"MAGI"),
    "version" / Const(7, Int16ub),
    "name" / Bytes(5),
    "level" / Default(Int32sb, -3),
    "doubled" / Rebuild(Int32ub, this.nested.low + this.nested.low),
    "nested" / Struct("low" / Int8ub, "check" / Const(0x55, Int8ub), "deep" / Struct("ratio" / construct.Float64b)),
)


def values_of(declaration: construct.Construct) -> st.SearchStrategy[dict[str, Any]]:
    """Values for all fields of a declaration that are not computed."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for member in declaration.subcons:
        part = member.subcon
        if type(part) is Struct:
            fields[member.name] = values_of(part)
        elif type(part) is Default:
            fields[member.name] = st.none() | integers_of(part.subcon)
        elif type(part) is Bytes:
            fields[member.name] = st.binary(min_size=part.length, max_size=part.length)
        elif type(part) is construct.FormatField:
            fields[member.name] = integers_of(part)
    return st.fixed_dictionaries(fields)


def integers_of(part: construct.FormatField) -> st.SearchStrategy[Any]:
    code, bits = part.fmtstr[1], 8 * part.length
    if code in "fd":
        return st.floats(width=bits, allow_nan=False)
    if code.islower():
        return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    return st.integers(0, (1 << bits) - 1)


def flattened(container: construct.Container) -> tuple[Any, ...]:
    flat: list[Any] = []
    for name, value in container.items():
        if name != "_io":
            flat.extend(flattened(value) if isinstance(value, construct.Container) else (value,))
    return tuple(flat)


def test_every_hot_record_has_the_size_of_the_specification() -> None:
    assert {name: derive(declaration).size for name, declaration in RECORDS.items()} == HOT


@pytest.mark.parametrize("name", [*RECORDS, "ALL_KINDS"])
@given(data=st.data())
def test_derived_codec_equals_construct(name: str, data: st.DataObject) -> None:
    declaration = RECORDS.get(name, ALL_KINDS)
    codec = derive(declaration, name)
    values = data.draw(values_of(declaration))
    built = declaration.build(values)
    assert codec.build(values) == built
    assert codec.size == declaration.sizeof()
    unpacked = codec.unpack(b"??" + built, 2)
    assert unpacked == flattened(declaration.parse(built))
    variable = [value for i, value in enumerate(unpacked) if i not in codec.constants]
    assert codec.pack(*variable) == built


@pytest.mark.parametrize("name", [*RECORDS, "ALL_KINDS"])
@given(data=st.data())
def test_derived_codec_refuses_what_construct_refuses(name: str, data: st.DataObject) -> None:
    declaration = RECORDS.get(name, ALL_KINDS)
    codec = derive(declaration, name)
    raw = data.draw(st.binary(max_size=codec.size))
    try:
        expected = flattened(declaration.parse(raw))
    except construct.ConstructError:
        with pytest.raises(RemoteProtocolError):
            codec.unpack(raw)
    else:
        assert repr(codec.unpack(raw)) == repr(expected)


def test_a_wrong_constant_is_named() -> None:
    with pytest.raises(RemoteProtocolError, match="reply: magic is 0x1020304, expected 0x67446698"):
        derive(messages.SIMPLE_REPLY, "reply").unpack(bytes([1, 2, 3, 4]) + bytes(12))


def test_names_are_paths() -> None:
    codec = derive(ALL_KINDS)
    assert codec.names[-3:] == ("nested.low", "nested.check", "nested.deep.ratio")
    assert codec.constants == {0: b"MAGI", 1: 7, 6: 0x55}


@pytest.mark.parametrize(
    "values",
    [(), (1,), (1, 2, 3), (1 << 32, 0), (-1, 0), ("one", 2)],
    ids=repr,
)
def test_values_that_do_not_fit_are_a_local_error(values: tuple[Any, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        derive(messages.SIMPLE_REPLY).pack(*values)


def test_a_byte_string_of_the_wrong_length_is_not_padded() -> None:
    codec = derive(Struct("name" / Bytes(5)))
    assert codec.pack(b"12345") == b"12345"
    for wrong in (b"1234", b"123456"):
        with pytest.raises(LocalProtocolError, match="name needs 5 bytes"):
            codec.pack(wrong)


def test_build_names_a_missing_field() -> None:
    with pytest.raises(LocalProtocolError, match="cookie"):
        derive(messages.SIMPLE_REPLY).build({"error": 0})


@pytest.mark.parametrize(
    "part",
    [
        Array(2, Int8ub),
        construct.Int24ub,
        construct.BytesInteger(3),
        construct.Padding(4),
        construct.Padded(4, Int8ub),
        construct.BitStruct("a" / construct.BitsInteger(8)),
        construct.PascalString(Int8ub, "utf8"),
        construct.CString("utf8"),
        construct.Bytes(this.length),
        construct.GreedyBytes,
        construct.VarInt,
        construct.Enum(Int8ub, one=1),
        construct.FlagsEnum(Int8ub, one=1),
        construct.Optional(Int8ub),
        construct.Prefixed(Int8ub, construct.GreedyBytes),
        construct.If(True, Int8ub),
        construct.Computed(1),
        messages.Utf8(construct.GreedyBytes),
    ],
    ids=lambda part: type(part).__name__,
)
def test_deriving_from_anything_else_is_refused(part: construct.Construct) -> None:
    for declaration in (Struct("part" / part), Struct("outer" / Struct("part" / part)), part):
        with pytest.raises(LocalProtocolError, match="no struct format"):
            derive(declaration)


def test_mixed_byte_orders_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="byte orders"):
        derive(Struct("big" / Int32ub, "little" / construct.Int32ul))


def test_fields_without_a_name_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="without a name"):
        derive(Struct(Const(b"magic"), "size" / Int64ub))


def test_computed_fields_of_nested_records_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="computed"):
        derive(Struct("inner" / Struct("sum" / Rebuild(Int8ub, this.low), "low" / Int8ub)))
