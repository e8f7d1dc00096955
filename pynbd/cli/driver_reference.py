"""What a driver is and takes, told from its class: the source of `pynbd drivers` in all its forms."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pynbd.block import registry
from pynbd.block.driver import ChildSpec, Driver, Filter
from pynbd.block.errors import OptionError
from pynbd.block.options import SIZE_SUFFIXES, NodeOptions

ARGUMENT = re.compile(r"\s{4}(\w+(?:, \w+)*): (.*)")


class Option(NamedTuple):
    """One option of a driver.

    Args:
        name: as it is written.
        kind: what its value is, in words: `size`, `on|off` …
        default: as it would be written; "" if it has none to speak of.
        required: whether it must be given.
        summary: what it does.
        own: whether it is the driver's own, not one that every node takes.
    """

    name: str
    kind: str
    default: str
    required: bool
    summary: str
    own: bool


class DriverFacts(NamedTuple):
    """A driver, described.

    Args:
        name: its name.
        kind: `storage`, `format` or `filter`.
        summary: the first paragraph of its docstring.
        limits: what it can't do, from its module's docstring.
        aliases, schemes: other names and URI schemes.
        children: what nodes it takes.
        child_aliases: other names of these.
        options: what options.
        problem: why it can't be loaded; all else but the name is empty then.
    """

    name: str
    kind: str = ""
    summary: str = ""
    limits: str = ""
    aliases: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    children: dict[str, ChildSpec] = {}  # noqa: RUF012  # the default of a tuple's field, never changed
    child_aliases: dict[str, str] = {}  # noqa: RUF012  # the default of a tuple's field, never changed
    options: tuple[Option, ...] = ()
    problem: str = ""


def all_drivers() -> list[DriverFacts]:
    """Every driver that can be named, those that can't be loaded too."""
    found = []
    for name in registry.all_names():
        try:
            found.append(describe(registry.driver_class(name), name))
        except OptionError as problem:
            found.append(DriverFacts(name, problem=str(problem)))
    return found


def describe(kind: type[Driver], name: str = "") -> DriverFacts:
    """The facts about one driver.

    Args:
        kind: its class.
        name: under which it is registered, if that is not its own.
    """
    return DriverFacts(
        name=name or kind.name,
        kind="filter" if issubclass(kind, Filter) else "format" if kind.is_format else "storage",
        summary=paragraphs(kind.__doc__)[0],
        limits=_limits_of(kind),
        aliases=tuple(alias for alias, name in registry.ALIASES.items() if name == kind.name),
        schemes=tuple(scheme for scheme, name in registry.SCHEMES.items() if name == kind.name),
        children=dict(kind.children),
        child_aliases=dict(kind.child_aliases),
        options=options_of(kind.Options),
    )


def paragraphs(docstring: str | None) -> list[str]:
    """The paragraphs of a docstring, each in one line; one empty paragraph if there are none."""
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring or "")]
    return [part for part in found if part] or [""]


def _limits_of(kind: type[Driver]) -> str:
    """The paragraph about limits in the docstring of the driver's class or module."""
    module = sys.modules.get(kind.__module__)
    for part in paragraphs(kind.__doc__) + paragraphs(module.__doc__ if module is not None else None):
        if part.startswith("Limits:"):
            return part.removeprefix("Limits:").strip()
    return ""


def argument_texts(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What the docstring of a struct (and those of its bases) says of each field."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = (base.__doc__ or "").partition("Args:\n")
        names: list[str] = []
        for line in section.splitlines():
            if not line.strip():
                break
            line = re.sub(r"^\s{4}(?=\s{4})", "", line)  # the docstring's own indentation
            if match := ARGUMENT.fullmatch(line):
                names = match[1].split(", ")
                texts.update(dict.fromkeys(names, match[2].strip()))
            else:
                texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return texts


def options_of(kind: type[NodeOptions]) -> tuple[Option, ...]:
    """The options of a driver, its own first; groups of options are followed by what they hold."""
    common = {field.name for field in msgspec.structs.fields(NodeOptions)}
    names = [field.name for field in msgspec.structs.fields(kind)]
    own = _options_in(kind, [name for name in names if name not in common], "", own=True)
    return (*own, *_options_in(kind, [name for name in names if name in common], "", own=False))


def _options_in(kind: type[msgspec.Struct], names: Sequence[str], prefix: str, *, own: bool) -> Iterator[Option]:
    """The options of these names in a struct, each followed by those that it holds."""
    texts = argument_texts(kind)
    for field in msgspec.structs.fields(kind):
        if field.name not in names:
            continue
        info = msgspec.inspect.type_info(field.type)
        yield Option(
            name=prefix + field.encode_name,
            kind=kind_of(info),
            default="" if field.required else default_text(field.default, info),
            required=field.required,
            summary=texts.get(field.name, ""),
            own=own,
        )
        group, number = _group_of(info)
        if group is not None:
            inside = [held.name for held in msgspec.structs.fields(group)]
            yield from _options_in(group, inside, f"{prefix}{field.encode_name}.{number}", own=own)


def _group_of(info: msgspec.inspect.Type) -> tuple[type[msgspec.Struct] | None, str]:
    """The struct that an option's value is (or a list of), and how its items are numbered in dotted keys."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _group_of(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        found = [_group_of(kind) for kind in info.types]
        return next((group for group in found if group[0] is not None), (None, ""))
    if isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        return _group_of(info.item_type)[0], "N."
    return (info.cls, "") if isinstance(info, msgspec.inspect.StructType) else (None, "")


def is_size(info: msgspec.inspect.Type) -> bool:
    """Whether a value is a number of bytes that may be written with a suffix."""
    return isinstance(info, msgspec.inspect.Metadata) and bool((info.extra or {}).get("size"))


def kind_of(info: msgspec.inspect.Type) -> str:
    """What a value of a type is, in words."""
    if is_size(info):
        return "size"
    if isinstance(info, msgspec.inspect.Metadata):
        return kind_of(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        kinds = [kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType)]
        return " or ".join(kind_of(kind) for kind in kinds)
    if isinstance(info, msgspec.inspect.LiteralType):
        return "|".join(str(value) for value in info.values)
    if isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        item = kind_of(info.item_type)
        return "groups" if item == "group" else f"list of {item}"
    if isinstance(info, msgspec.inspect.StructType):
        return "group"
    names = {"BoolType": "on|off", "IntType": "number", "FloatType": "number", "StrType": "text"}
    return names.get(type(info).__name__, type(info).__name__.removesuffix("Type").lower())


def default_text(value: Any, info: msgspec.inspect.Type) -> str:
    """A default as it would be written; "" for what amounts to nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return size_text(value) if is_size(info) and isinstance(value, int) else f"{value:g}"
    return value if isinstance(value, str) else ""


def size_text(size: int) -> str:
    """A number of bytes with the largest suffix that leaves it whole."""
    for suffix, factor in sorted(SIZE_SUFFIXES.items(), key=lambda item: -item[1]):
        if size and size % factor == 0 and factor > 1:
            return f"{size // factor}{suffix.upper() if suffix != 'k' else suffix}"
    return str(size)
