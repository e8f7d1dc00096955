"""Options: how a disk is described, and how a description is checked.

One tree, four ways to write it:

    disk.raw                                             a file name, whose format is probed
    nbd://localhost/export                               a URI of some driver's scheme
    driver=raw,file.driver=file,file.filename=disk.raw   dotted keys; a comma in a value is written twice
    json:{"driver": "raw", "file": {…}}                  and the same tree in TOML

The first two are turned into the same tree by the registry. This module knows the text forms and how a
value of text becomes a typed one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pynbd.block.errors import OptionError

MAX_OPTION_TEXT = 1 << 20
"""Characters of one description; a graph is described in a few hundred."""

MAX_OPTION_DEPTH = 64
"""Levels of one description, and so of a graph that a single description can make."""

LIST_INDEX = re.compile(r"[0-9]{1,9}")

MAX_LIST_ITEMS = 1024
"""Items of a list that is written with dotted keys (`children.0`, `children.1` …)."""

SIZE_SUFFIXES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
MAX_SIZE_BYTES = (1 << 63) - 1

SIZE_TEXT = re.compile(
    r"0x(?P<hex>[0-9a-f]{1,20})|(?P<whole>[0-9]{1,20})?(?:(?<=[0-9])|(?=\.[0-9]))(?:\.(?P<part>[0-9]{0,20}))?"
    r"(?P<suffix>[bkmgtpe]?)"
)
"""`4096`, `0x1000`, `64k`, `1.5G`, `.5M`; digits beyond those that fit anyhow are no size."""

SIZE_BEFORE = " \t\n\v\f\r"
"""What may stand before a size, and a plus sign behind it: what C's strtoull passes over, for QEMU takes it."""

INTEGER_TEXT = re.compile(r"[ \t\n\v\f\r]*(?P<sign>[+-]?)(?:0[xX](?P<hex>[0-9a-fA-F]{1,16})|(?P<digits>[0-9]{1,20}))")
"""`4096`, `0x1000`, `010000`."""

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE_BYTES, extra={"size": True})]
"""A number of bytes, which may be written with a suffix: `64k`, `1.5G`."""

OnOff = bool
"""A switch, which may be written `on`, `off`, `true`, `false`, `yes`, `no`."""

OnOffAuto = Literal["on", "off", "auto"]

SWITCH_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}

AnyOptions = TypeVar("AnyOptions", bound=msgspec.Struct)


class CacheOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How writes are cached.

    Args:
        direct: go around the host's page cache (O_DIRECT).
        no_flush: ignore flushes: fast, and lost when the machine goes down.
    """

    direct: OnOff = False
    no_flush: OnOff = False


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What every node takes, whatever its driver; the names are those of QEMU's `-blockdev`.

    Args:
        driver: the driver's name.
        node_name: the node's own name; one is made up if it is not given.
        read_only: never write.
        auto_read_only: fall back to read-only if the storage can't be opened for writing.
        discard: `unmap` hands discards down, `ignore` drops them.
        detect_zeroes: `on` turns writes of zeroes into write_zeroes, `unmap` also gives the space back.
        cache: how writes are cached.
        force_share: open although somebody else writes to it (read-only nodes).
    """

    driver: str = ""
    node_name: str = ""
    read_only: OnOff = False
    auto_read_only: OnOff = False
    discard: Literal["ignore", "unmap", "off", "on"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    cache: CacheOptions = CacheOptions()
    force_share: OnOff = False


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes from `1048576`, `1M`, `1.5G`, `+1M` (suffixes are powers of 1024).

    Raises:
        OptionError: it is no size, or does not fit in 63 bits.
    """
    match = SIZE_TEXT.fullmatch(text.lstrip(SIZE_BEFORE).removeprefix("+").lower())
    if match is None:
        raise OptionError(
            f"{what}: {text[:80]!r} is no size; write a number of bytes with an optional suffix k, M, G, T, P or E"
        )
    if match["hex"]:
        value = int(match["hex"], 16)
    else:
        factor, part = SIZE_SUFFIXES[match["suffix"]], match["part"] or ""
        if part and factor == 1:
            raise OptionError(f"{what}: {text!r} is no size; there are no parts of bytes")
        scale: int = 10 ** len(part)
        value = (int(match["whole"] or "0") * scale + int(part or "0")) * factor // scale
    if not 0 <= value <= MAX_SIZE_BYTES:
        raise OptionError(f"{what}: {text!r} is out of range (0 to {MAX_SIZE_BYTES} bytes)")
    return value


def parse_integer(text: str) -> int | None:
    """A number as C's strtol reads it: decimal, `0x10`, or octal with a 0 before it; None if it is none."""
    match = INTEGER_TEXT.fullmatch(text)
    if match is None:
        return None
    base = 16 if match["hex"] else 8 if match["digits"].startswith("0") else 10
    try:
        value = int(match["hex"] or match["digits"], base)
    except ValueError:  # a digit that is none in octal
        return None
    return -value if match["sign"] == "-" else value


def parse_switch(text: str, *, what: str) -> bool:
    """True or False from `on`, `off` and their like.

    Raises:
        OptionError: it is none of them.
    """
    value = SWITCH_WORDS.get(text.lower())
    if value is None:
        raise OptionError(f"{what}: {text!r} is neither 'on' nor 'off'")
    return value


def split_commas(text: str) -> list[str]:
    """The parts of `a=1,b=2`, where `,,` stands for one comma in a value."""
    # No option can hold a NUL (file names can't), so it may stand for the doubled comma meanwhile.
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    return parts if parts[-1] else parts[:-1]


def parse_dotted(text: str, *, implied_key: str = "") -> dict[str, Any]:
    """The tree that dotted keys stand for: `driver=raw,file.driver=file,file.filename=a,,b`.

    Args:
        text: the description.
        implied_key: the key of a first part that has none.

    Raises:
        OptionError: a part has no key, a key is given twice, the keys are those of a list, or it is too long or too
            deep.
    """
    if len(text) > MAX_OPTION_TEXT:
        raise OptionError(f"a description of {len(text)} characters is too long (at most {MAX_OPTION_TEXT})")
    if "\0" in text:
        raise OptionError(f"{text[:60]!r}: a description can't hold a NUL character")
    tree: dict[str, Any] = {}
    for number, part in enumerate(split_commas(text)):
        key, equals, value = part.partition("=")
        if not equals and number == 0 and implied_key:
            key, value = implied_key, part
        elif not equals:
            raise OptionError(f"{part!r}: expected KEY=VALUE")
        _put(tree, key.split("."), value, key)
    return _named(_lists(tree))


def _named(tree: Any) -> dict[str, Any]:
    """The whole tree, whose top must be options with names."""
    if not isinstance(tree, dict):
        raise OptionError(f"expected options with names, found a list (0 to {len(tree) - 1})")
    return tree


def _put(tree: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    if len(path) > MAX_OPTION_DEPTH:
        raise OptionError(f"{key[:60]}…: more than {MAX_OPTION_DEPTH} levels")
    if not all(path):
        raise OptionError(f"{key[:60]!r}: an empty name in a dotted key")
    for name in path[:-1]:
        branch = tree.setdefault(name, {})
        if not isinstance(branch, dict):
            raise OptionError(f"{key!r}: {name!r} is given as a value and as a group of options")
        tree = branch
    if path[-1] in tree:
        raise OptionError(f"{key!r} is given twice")
    tree[path[-1]] = value


def _lists(tree: Any) -> Any:
    """The same tree, with groups whose keys are 0, 1, 2 … made lists."""
    if not isinstance(tree, dict):
        return tree
    branches = {name: _lists(value) for name, value in tree.items()}
    if branches and all(LIST_INDEX.fullmatch(name) for name in branches):
        if len(branches) > MAX_LIST_ITEMS or sorted(map(int, branches)) != list(range(len(branches))):
            raise OptionError(f"list items must be numbered 0 to {len(branches) - 1}, not {', '.join(branches)[:80]}")
        return [branches[name] for name in sorted(branches, key=int)]
    return branches


def parse_json(text: str) -> dict[str, Any]:
    """The tree of a `json:{…}` description (or of the JSON alone).

    Raises:
        OptionError: it is no JSON object of options with names, or it is too long or too deep.
    """
    body = text.removeprefix("json:")
    if len(body) > MAX_OPTION_TEXT:
        raise OptionError(f"a description of {len(body)} characters is too long (at most {MAX_OPTION_TEXT})")
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as problem:
        raise OptionError(f"json: {problem}: {body[:60]!r}") from None
    if not isinstance(tree, dict):
        raise OptionError(f"json: expected an object of options, found {body[:60]!r}")
    return _named(_undotted(tree, 0))


def _undotted(tree: Any, depth: int) -> Any:
    """Dotted keys inside JSON (`{"file.driver": "file"}`), which QEMU also takes, made groups and lists."""
    if depth > MAX_OPTION_DEPTH:
        raise OptionError(f"json: more than {MAX_OPTION_DEPTH} levels")
    if isinstance(tree, list):
        return [_undotted(item, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    result: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _undotted(value, depth + 1 + key.count("."))
        if isinstance(inner, dict) and isinstance(result.get(key), dict):
            # {"file.filename": …, "file": {…}} speaks of one group.
            for name, option in inner.items():
                _put(result, (key, name), option, f"{key}.{name}")
        else:
            _put(result, key.split("."), inner, key)
    return _lists(result)


def _owner(driver: str) -> str:
    """Whose options they are: a driver's, an object's, or those of a table of a file (`[server]`)."""
    if driver.startswith("object "):
        return driver
    return f"table {driver}" if driver.startswith("[") else f"driver {driver!r}"


def unknown_option(path: str, key: str, driver: str, allowed: Sequence[str]) -> OptionError:
    """The error for a key that a driver does not know: with what it knows, and the nearest of it."""
    import difflib  # for the few who mistype

    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return OptionError(
        f"{path}{key}: {_owner(driver)} has no such option{hint}; it takes: {', '.join(sorted(allowed))}"
    )


def convert(tree: Mapping[str, Any], kind: type[AnyOptions], *, path: str = "", driver: str = "") -> AnyOptions:
    """Checked, typed options from a tree of text or JSON values.

    Args:
        tree: the values, by option name.
        kind: the struct of options.
        path: what to put before option names in messages: `file.server.`.
        driver: the driver's name, for messages; or that of a table in brackets, `[server]`; or `object 'sec0'`.

    Raises:
        OptionError: naming the option, the driver, and what was allowed.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            raise unknown_option(path, key, driver or kind.__name__, list(fields))
        values[key] = _typed(value, msgspec.inspect.type_info(fields[key].type), path + key, driver)
    for name, field in fields.items():
        if field.required and name not in values:
            raise OptionError(f"{path}{name}: {_owner(driver)} needs this option")
    try:
        return msgspec.convert(values, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as problem:
        raise OptionError(_explained(str(problem), path, driver)) from None


def _explained(problem: str, path: str, driver: str) -> str:
    what, _, where = problem.partition(" - at `$.")
    option = path + where.rstrip("`") if where else path.rstrip(".")
    return f"{option}: {what[:1].lower()}{what[1:]} ({_owner(driver)})" if option else f"{_owner(driver)}: {problem}"


def _typed(value: Any, info: msgspec.inspect.Type, path: str, driver: str) -> Any:
    """Text turned into what the option's type expects; anything else as it is."""
    if isinstance(info, msgspec.inspect.Metadata):
        if isinstance(value, str) and (info.extra or {}).get("size"):
            return _of_driver(parse_size, value, path, driver)
        return _typed(value, info.type, path, driver)
    if isinstance(info, msgspec.inspect.UnionType):
        kinds = [kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType)]
        if len(kinds) > 1:  # a value, or a group
            is_group = isinstance(value, Mapping)
            kinds = [kind for kind in kinds if isinstance(kind, msgspec.inspect.StructType) == is_group]
        return _typed(value, kinds[0], path, driver) if len(kinds) == 1 else value
    if isinstance(info, msgspec.inspect.BoolType) and isinstance(value, str):
        return _of_driver(parse_switch, value, path, driver)
    if isinstance(info, msgspec.inspect.IntType) and isinstance(value, str):
        number = parse_integer(value)
        return value if number is None else number  # what is no number is told as other wrong values are
    if isinstance(info, msgspec.inspect.LiteralType) and value not in info.values:
        allowed = ", ".join(repr(v) for v in info.values)
        raise OptionError(f"{path}: {value!r} is not one of {allowed} ({_owner(driver)})")
    if isinstance(info, msgspec.inspect.StructType) and isinstance(value, Mapping):
        return convert(value, info.cls, path=path + ".", driver=driver)
    if isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType) and isinstance(value, list):
        return [_typed(item, info.item_type, f"{path}.{number}", driver) for number, item in enumerate(value)]
    return value


def _of_driver(parse: Callable[..., int], text: str, path: str, driver: str) -> int:
    """What `parse_size` or `parse_switch` makes of a text; if it is wrong, the error also says whose option it is."""
    try:
        return parse(text, what=path)
    except OptionError as problem:
        raise OptionError(f"{problem} ({_owner(driver)})") from None
