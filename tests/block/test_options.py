"""Options: the text forms, typed values, and what is said of wrong ones."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block import options
from pynbd.block.errors import OptionError
from pynbd.block.options import (
    MAX_LIST_ITEMS,
    MAX_OPTION_DEPTH,
    MAX_OPTION_TEXT,
    MAX_SIZE_BYTES,
    NodeOptions,
    OnOff,
    OnOffAuto,
    Size,
    convert,
    parse_dotted,
    parse_json,
    parse_size,
    parse_switch,
)


class Server(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A group of options."""

    host: str
    keep_alive: OnOff = True


class DiskOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of every type."""

    size: Size = 0
    part: Size | None = None
    count: int = 0
    small: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    rate: float = 0.0
    sparse: OnOff = False
    locking: OnOffAuto = "auto"
    server: Server | None = None
    paths: list[str] = msgspec.field(default_factory=list)
    sizes: tuple[Size, ...] = ()
    mode: Literal["none", "all"] | Server = "all"


class NeedyOptions(NodeOptions, frozen=True, kw_only=True):
    """Options one of which must be given."""

    file_name: str


def made(**values: Any) -> DiskOptions:
    return convert(values, DiskOptions, driver="disk")


# --- dotted keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", {}),
        ("driver=raw", {"driver": "raw"}),
        ("driver=raw,", {"driver": "raw"}),
        ("a=", {"a": ""}),
        ("a=,b=", {"a": "", "b": ""}),
        ("a=x=y", {"a": "x=y"}),
        ("a=x,,y", {"a": "x,y"}),
        ("a=,,", {"a": ","}),
        ("a=,,,b=1", {"a": ",", "b": "1"}),
        ("a=,,,,", {"a": ",,"}),
        ("a.b.c=1,a.b.d=2,a.e=3", {"a": {"b": {"c": "1", "d": "2"}, "e": "3"}}),
        ("c.0=x,c.1=y", {"c": ["x", "y"]}),
        ("c.1.k=y,c.0.k=x", {"c": [{"k": "x"}, {"k": "y"}]}),
        ("c.0x=1", {"c": {"0x": "1"}}),
        ("c.0=1,c.k=2", {"c": {"0": "1", "k": "2"}}),
    ],
)
def test_dotted(text: str, tree: dict[str, Any]) -> None:
    assert parse_dotted(text) == tree


def test_a_first_part_without_a_key() -> None:
    assert parse_dotted("delay,read=1", implied_key="driver") == {"driver": "delay", "read": "1"}
    assert parse_dotted("a,,b", implied_key="filename") == {"filename": "a,b"}
    with pytest.raises(OptionError, match="'delay': expected KEY=VALUE"):
        parse_dotted("delay")
    with pytest.raises(OptionError, match="'fast': expected KEY=VALUE"):
        parse_dotted("delay,fast", implied_key="driver")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("=1", "'': an empty name in a dotted key"),
        ("a..b=1", "'a..b': an empty name in a dotted key"),
        (".a=1", "an empty name"),
        ("a=1,a=2", "'a' is given twice"),
        ("a=1,a.b=2", "'a.b': 'a' is given as a value and as a group of options"),
        ("a.b=2,a=1", "'a' is given twice"),
        ("c.0=a,c.2=b", "list items must be numbered 0 to 1, not 0, 2"),
        ("c.1=a", "list items must be numbered 0 to 0, not 1"),
        ("c.0=a,c.00=b", "list items must be numbered 0 to 1, not 0, 00"),
        ("0=a,1=b", r"expected options with names, found a list \(0 to 1\)"),
        ("a=x\0y", "can't hold a NUL character"),
    ],
)
def test_wrong_dotted_keys(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_dotted(text)


def test_a_description_is_bounded() -> None:
    deep = ".".join("k" * MAX_OPTION_DEPTH)
    assert parse_dotted(f"{deep}=1")
    with pytest.raises(OptionError, match=f"more than {MAX_OPTION_DEPTH} levels"):
        parse_dotted(f"{deep}.k=1")
    fits = "a=" + "x" * (MAX_OPTION_TEXT - 2)
    assert len(parse_dotted(fits)["a"]) == MAX_OPTION_TEXT - 2
    with pytest.raises(OptionError, match=f"of {MAX_OPTION_TEXT + 1} characters is too long"):
        parse_dotted(fits + "x")
    items = [f"c.{number}=" for number in range(MAX_LIST_ITEMS + 1)]
    assert len(parse_dotted(",".join(items[:-1]))["c"]) == MAX_LIST_ITEMS
    with pytest.raises(OptionError, match=f"numbered 0 to {MAX_LIST_ITEMS}"):
        parse_dotted(",".join(items))


NAMES = st.text(st.characters(exclude_characters=".,=\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: not name.isdecimal()
)
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        VALUES,
        lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)


def dotted(tree: Any, path: str = "") -> list[str]:
    """KEY=VALUE of every value of a tree."""
    if isinstance(tree, str):
        return [f"{path}={tree.replace(',', ',,')}"]
    inner = enumerate(tree) if isinstance(tree, list) else tree.items()
    return [part for key, value in inner for part in dotted(value, f"{path}.{key}" if path else str(key))]


@given(tree=TREES, shuffled=st.randoms(use_true_random=False))
def test_a_tree_comes_back_from_its_text(tree: dict[str, Any], shuffled: Any) -> None:
    parts = dotted(tree)
    shuffled.shuffle(parts)
    assert parse_dotted(",".join(parts)) == tree


@given(tree=TREES)
def test_a_tree_comes_back_from_its_json(tree: dict[str, Any]) -> None:
    assert parse_json("json:" + json.dumps(tree)) == tree
    flat = dict(part.split("=", 1) for part in dotted(tree))
    assert parse_json(json.dumps(flat).replace(",,", ",")) == tree


@settings(max_examples=300)
@given(text=st.text("ab.,=01\0", max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        tree = parse_dotted(text, implied_key="k")
    except OptionError:
        return
    parts = dotted(tree)
    if not any("," in part.partition("=")[0] for part in parts):  # a name with a comma can't be told from a value's end
        assert parse_dotted(",".join(parts)) == tree


# --- json ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("{}", {}),
        ('json:{"driver": "raw", "size": 512}', {"driver": "raw", "size": 512}),
        ('{"file.driver": "x", "file.cache.direct": true}', {"file": {"driver": "x", "cache": {"direct": True}}}),
        ('{"file.filename": "a", "file": {"driver": "file"}}', {"file": {"filename": "a", "driver": "file"}}),
        ('{"file": {"driver": "file"}, "file.filename": "a"}', {"file": {"driver": "file", "filename": "a"}}),
        ('{"c.1": "y", "c.0": "x"}', {"c": ["x", "y"]}),
        ('{"c": [{"a.b": 1}, null]}', {"c": [{"a": {"b": 1}}, None]}),
    ],
)  # fmt: skip
def test_json(text: str, tree: dict[str, Any]) -> None:
    assert parse_json(text) == tree


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("json:", "json: "),
        ("json:{", "json: .*'{'"),
        ("json:[1]", r"json: expected an object of options, found '\[1\]'"),
        ('json:"raw"', "expected an object of options"),
        ('{"0": 1}', r"expected options with names, found a list \(0 to 0\)"),
        ('{"a": 1, "a.b": 2}', "'a' is given as a value and as a group of options"),
        ('{"a.b": 2, "a": 1}', "'a' is given twice"),
        ('{"a": {"b": 1}, "a.b": 2}', "'a.b' is given twice"),
        ('{"": 1}', "an empty name"),
        ('{"c.1": 1}', "list items must be numbered 0 to 0, not 1"),
        ('{"a": "\ud800"}', "json: .*surrogates not allowed"),
        ("[" * 100_000, "json: "),
    ],
)
def test_wrong_json(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_json(text)


def nested(levels: int, key: str) -> str:
    return f'{{"{key}": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize("key", ["k", "k.k", ".".join("k" * 60)], ids=["plain", "two", "sixty"])
def test_json_is_bounded_however_its_levels_are_written(key: str) -> None:
    """Dotted keys inside each other make as many levels as they have dots."""
    most = MAX_OPTION_DEPTH // len(key.split("."))
    assert parse_json(nested(most, key))
    for levels in (most + 1, 60, 500):
        with pytest.raises(OptionError, match=f"more than {MAX_OPTION_DEPTH} levels"):
            parse_json(nested(max(levels, most + 1), key))
    with pytest.raises(OptionError, match="is too long"):
        parse_json('{"a": "' + "x" * MAX_OPTION_TEXT + '"}')


# --- sizes and switches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("512", 512), (" \t512", 512), ("+512", 512), (" +0x10", 16),
        ("512b", 512), ("1k", 1024), ("1K", 1024), ("64M", 64 << 20),
        ("2g", 2 << 30), ("1T", 1 << 40), ("1P", 1 << 50), ("1e", 1 << 60), ("1.5G", 3 << 29), (".5M", 1 << 19),
        ("0.1k", 102), ("0x1000", 4096), ("0XfF", 255), (str(MAX_SIZE_BYTES), MAX_SIZE_BYTES),
        ("7.99999999999999999999E", MAX_SIZE_BYTES),
    ],
)  # fmt: skip
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes
    assert made(size=text, part=text, sizes=[text]) == made(size=size_bytes, part=size_bytes, sizes=[size_bytes])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no size; write a number of bytes with an optional suffix k, M, G, T, P or E"),
        ("k", "is no size"), (".", "is no size"), (".k", "is no size"), ("1x", "is no size"), ("1kk", "is no size"),
        ("0x", "is no size"), ("0x10k", "is no size"), ("-1", "is no size"), ("++1", "is no size"),
        ("+ 1", "is no size"), ("+-1", "is no size"), ("1k ", "is no size"), ("\u00a01", "is no size"),
        ("1_000", "is no size"), ("1 k", "is no size"), ("\u0661", "is no size"), ("1e3", "is no size"),
        ("9" * 21, "is no size"), ("1.5", "there are no parts of bytes"), ("1.5b", "there are no parts of bytes"),
        ("8E", "is out of range"), (str(MAX_SIZE_BYTES + 1), "is out of range"), ("0x8000000000000000", "out of range"),
    ],
)  # fmt: skip
def test_what_is_no_size(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_size(text)
    with pytest.raises(OptionError, match=rf"^size: .*{said}.*\(driver 'disk'\)"):
        made(size=text)


@given(whole=st.integers(0, 4095), part=st.integers(0, 10**20 - 1), suffix=st.sampled_from("kmgtp"))
def test_parts_are_exact(whole: int, part: int, suffix: str) -> None:
    unit = 1 << 10 * (1 + "kmgtp".index(suffix))
    assert parse_size(f"{whole}.{part:020}{suffix}") == (whole * 10**20 + part) * unit // 10**20


@pytest.mark.parametrize("words", [("on", "yes", "true", "ON", "True"), ("off", "no", "false", "OFF", "No")], ids=str)
def test_switches(words: tuple[str, ...]) -> None:
    for word in words:
        assert parse_switch(word, what="sparse") is (words[0] == "on")
        assert made(sparse=word) == made(sparse=words[0] == "on")


@pytest.mark.parametrize("word", ["", "1", "0", "maybe", "on "])
def test_what_is_no_switch(word: str) -> None:
    with pytest.raises(OptionError, match=rf"^sparse: '{word}' is neither 'on' nor 'off' \(driver 'disk'\)"):
        made(sparse=word)


# --- typed values ----------------------------------------------------------------------------------------------------


def test_text_becomes_what_the_option_is() -> None:
    tree = parse_dotted(
        "node-name=d,size=1M,count=-3,small=9,rate=2.5,sparse=on,locking=off,server.host=h,server.keep-alive=no,"
        "paths.0=a,,b,paths.1=c,sizes.0=1k,sizes.1=2,cache.direct=on"
    )
    assert convert(tree, DiskOptions, driver="disk") == DiskOptions(
        node_name="d", size=1 << 20, count=-3, small=9, rate=2.5, sparse=True, locking="off",
        server=Server(host="h", keep_alive=False), paths=["a,b", "c"], sizes=(1024, 2),
        cache=options.CacheOptions(direct=True),
    )  # fmt: skip
    assert made() == DiskOptions()
    assert made(part=None, server=None) == DiskOptions()


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("0x1F", 31), ("-0X10", -16), ("+3", 3), (" 7", 7), ("010", 8), ("0", 0)]
)
def test_numbers(text: str, number: int) -> None:
    """Decimal, hexadecimal and octal."""
    assert convert({"count": text}, DiskOptions, driver="disk").count == number


@pytest.mark.parametrize("text", ["", "0x", "08", "1 ", "16k", "1_6", "0b1", "--1", "٣", "0x" + "1" * 17])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(OptionError, match=r"^count: expected `int`"):
        convert({"count": text}, DiskOptions, driver="disk")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sise": 1}, r"^sise: driver 'disk' has no such option \(did you mean 'size'\?\); it takes: auto-read-only, "),
        ({"xyzzy": 1}, "^xyzzy: driver 'disk' has no such option; it takes: "),
        ({"node_name": "x"}, r"^node_name: .*did you mean 'node-name'\?"),
        ({"server": {"hots": "x"}}, r"^server.hots: driver 'disk' has no such option \(did you mean 'host'"),
        ({"server": {}}, "^server.host: driver 'disk' needs this option"),
        ({"server": "x"}, r"^server: expected `object \| null`, got `str` \(driver 'disk'\)"),
        ({"server": {"host": "h", "keep-alive": "si"}}, r"^server.keep-alive: 'si' is neither 'on' nor 'off' \(driver"),
        ({"cache": {"direct": 3}}, r"^cache.direct: expected `bool`, got `int` \(driver 'disk'\)"),
        ({"locking": "maybe"}, r"^locking: 'maybe' is not one of 'auto', 'off', 'on' \(driver 'disk'\)"),
        ({"locking": []}, r"^locking: \[\] is not one of"),
        ({"size": -1}, r"^size: expected `int` >= 0 \(driver 'disk'\)"),
        ({"size": MAX_SIZE_BYTES + 1}, rf"^size: expected `int` <= {MAX_SIZE_BYTES}"),
        ({"size": 1.5}, "^size: expected `int`, got `float`"),
        ({"size": True}, "^size: expected `int`, got `bool`"),
        ({"size": None}, "^size: expected `int`, got `null`"),
        ({"sizes": ["1k", "x"]}, r"^sizes\.1: 'x' is no size"),
        ({"count": "many"}, "^count: expected `int`, got `str`"),
        ({"count": "9" * 5000}, "^count: integer value out of range"),
        ({"small": 10}, "^small: expected `int` <= 9"),
        ({"paths": "a"}, "^paths: expected `array`, got `str`"),
        ({"paths": [1]}, r"paths\[0\]: expected `str`, got `int`"),
        ({"discard": "yes"}, "^discard: 'yes' is not one of 'ignore', 'off', 'on', 'unmap'"),
    ],
)  # fmt: skip
def test_what_is_said_of_wrong_values(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        convert(values, DiskOptions, driver="disk")


def test_where_an_option_stands_is_said() -> None:
    with pytest.raises(OptionError, match=r"^file\.backing\.count: expected `int`"):
        convert({"count": []}, DiskOptions, path="file.backing.", driver="disk")
    with pytest.raises(OptionError, match=r"^file\.file-name: driver 'needy' needs this option"):
        convert({}, NeedyOptions, path="file.", driver="needy")
    with pytest.raises(OptionError, match=r"^x: table \[server\] has no such option"):
        convert({"x": 1}, DiskOptions, driver="[server]")


def test_a_value_or_a_group() -> None:
    assert made(mode="none").mode == "none"
    assert made(mode={"host": "here", "keep-alive": "off"}).mode == Server(host="here", keep_alive=False)
    with pytest.raises(OptionError, match="mode: 'some' is not one of 'all', 'none'"):
        made(mode="some")
    with pytest.raises(OptionError, match=r"mode\.port: driver 'disk' has no such option"):
        made(mode={"port": 1})


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.sampled_from(["on", "1k"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["host", "keep-alive", "direct"]), inner)
    ),
    max_leaves=5,
)
FIELDS = [field.encode_name for field in msgspec.structs.fields(DiskOptions)]


@settings(max_examples=300)
@given(values=st.dictionaries(st.sampled_from([*FIELDS, "other"]), ANYTHING, max_size=3))
def test_any_values_are_taken_or_refused_by_name(values: dict[str, Any]) -> None:
    said = None
    try:
        taken = convert(values, DiskOptions, driver="disk")
    except OptionError as problem:
        said = str(problem)
    if said is not None:
        assert any(name in said for name in values)
        assert "disk" in said
    else:
        assert msgspec.convert(msgspec.to_builtins(taken), DiskOptions, strict=True) == taken
