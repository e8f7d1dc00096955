"""`pynbd img create`: a new image."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common
from pynbd.cli.objects import add_object_argument

if TYPE_CHECKING:
    from msgspec import Struct

    from pynbd.block.graph import Graph
    from pynbd.cli.img.creation import NewImage

QCOW2_ORDER = (
    "encryption",
    "encrypt",
    "cluster_size",
    "extended_l2",
    "preallocation",
    "compression_type",
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
)
"""The order in which qemu-img tells the options of a new qcow2 image; other formats have that of their declaration."""

ENCRYPT_ORDER = (
    "format",
    "key-secret",
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "iter-time",
)
"""The same of the options of `encrypt`."""

FILE_ORDER = ("nocow", "preallocation", "extent_size_hint")
"""The order of a file's own options, behind those of the format."""

TOLD_ANYWAY = frozenset({"cluster_size", "extended_l2", "compression_type", "lazy_refcounts", "refcount_bits"})
"""Options that are told even if nobody gave them."""

NAME_WIDTH = 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME [SIZE]")
    parser.add_argument("-f", "--format", dest="format", default="raw", metavar="FORMAT", help="its format (raw)")
    common.add_creation_options(parser)
    parser.add_argument("-b", dest="backing", metavar="FILE", help="what is read where nothing is written")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="format of the backing file")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="do not look whether the backing file is there")
    common.add_quiet(parser)
    add_object_argument(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.errors import OptionError
    from pynbd.cli.img import creation
    from pynbd.cli.interruption import Interruption

    if common.asks_for_help(arguments.options):
        print("\n".join(option_lines(arguments.format, arguments.words[0] if arguments.words else "")))
        return 0
    graph = common.new_graph(arguments)
    if not 1 <= len(arguments.words) <= 2:
        common.expect(arguments.words, 1, "an image file name and its size")
    filename = arguments.words[0]
    given = common.parse_creation_options(arguments.options)
    for option, value in (("backing_file", arguments.backing), ("backing_fmt", arguments.backing_format)):
        if value is not None and option in given:
            raise OptionError(f"{option} is given twice")
        if value is not None:
            given[option] = value
    if len(arguments.words) == 2:
        if "size" in given:
            raise OptionError("the size of the image is given twice")
        given["size"] = arguments.words[1]
    new = creation.plan(graph, filename, arguments.format, await _with_size(graph, filename, given, arguments))
    if not arguments.quiet:
        print(formatting_line(new), flush=True)
    with Interruption().listening():
        await creation.make(graph, new)
    return 0


async def _with_size(
    graph: Graph, filename: str, given: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The options with a size, which may be that of the backing file.

    Raises:
        OptionError: nothing tells the size, or the backing file is given without its format.
        OSError, BlockError: the backing file can't be opened.
    """
    from pynbd.block import registry
    from pynbd.block.errors import OptionError
    from pynbd.cli.img import creation

    backing = given.get("backing_file")
    kind = creation.format_class(arguments.format)
    if backing is not None and creation.takes(kind, "backing_file"):
        if not backing:
            raise OptionError("backing_file: the name of the backing file is empty")
        if "backing_fmt" not in given:
            raise OptionError(f"backing file {backing!r} without its format: give it with -F")
        registry.driver_class(given["backing_fmt"])
        if not arguments.unsafe:
            size = await creation.backing_size(graph, filename, backing, given["backing_fmt"])
            return {"size": size, **given}
    elif backing is None and "size" not in given:
        raise OptionError(f"{filename}: the new image needs a size")
    if "size" not in given:
        raise OptionError(f"{filename}: the new image needs a size")
    return given


# --- what is told -------------------------------------------------------------------------------------------------


def formatting_line(new: NewImage) -> str:
    """What `create` says before it begins."""
    words = [f"Formatting '{new.filename}', fmt={new.format}"]
    for name, value in _told(new):
        text = ("on" if value else "off") if isinstance(value, bool) else str(value)
        words.append(f"{name}={text.replace(',', ',,')}")
    return " ".join(words)


def _told(new: NewImage) -> Iterator[tuple[str, Any]]:
    import msgspec

    further = {} if new.further is None else msgspec.to_builtins(new.further)
    values = msgspec.to_builtins(new.options) | further
    names = [field.encode_name for field in msgspec.structs.fields(new.options)] + list(further)
    order = (*QCOW2_ORDER, *FILE_ORDER) if new.kind.name == "qcow2" else FILE_ORDER
    names.sort(key=lambda name: order.index(name) if name in order else -1)
    for name in names:
        value = values.get(name)
        if name in new.given and isinstance(value, Mapping):
            keys = [key for key in ENCRYPT_ORDER if key in new.given[name]]
            yield from ((f"{name}.{key}", value[key]) for key in keys if key in value)
        elif name in new.given or (name in TOLD_ANYWAY and value is not None):
            yield name, value


def option_lines(format: str, filename: str) -> Iterator[str]:
    """What `-o help` tells of a format, and of the storage that a file name calls for.

    Raises:
        OptionError: there is no such format, or it can't make images; or no such storage.
    """
    from pynbd.block.graph import Graph
    from pynbd.cli.img import creation

    kind = creation.format_class(format)
    assert kind.CreateOptions is not None
    yield "Supported options:" if filename else f"Supported {kind.name} options:"
    further = (
        creation.storage_class(Graph(runs_files=False).storage_tree(filename)).FurtherCreateOptions
        if filename
        else None
    )
    yield from option_lines_of(kind.CreateOptions, *(() if further is None else (further,)))
    if not filename:
        yield "\nThe storage may take more options: with the name of the new image they are listed, too."


def option_lines_of(*options: type[Struct]) -> Iterator[str]:
    """A line for each option of some structs, those of structs inside them as well, in alphabetical order."""
    from pynbd.cli.driver_reference import argument_texts

    yield from sorted(line for kind in options for line in _option_lines(kind, argument_texts(kind), ""))


def _option_lines(options: Any, texts: Mapping[str, str], prefix: str) -> Iterator[str]:
    import msgspec

    from pynbd.cli.driver_reference import argument_texts

    for field in msgspec.structs.fields(options):
        info = msgspec.inspect.type_info(field.type)
        inner = _struct_of(info)
        if inner is not None:
            yield from _option_lines(inner, argument_texts(inner), f"{prefix}{field.encode_name}.")
            continue
        name = f"{prefix}{field.encode_name}=<{_kind_of(info)}>"
        yield f"  {name:{NAME_WIDTH}} - {texts.get(field.name, '')}".rstrip(" -")


def _struct_of(info: Any) -> Any:
    import msgspec

    if isinstance(info, msgspec.inspect.UnionType):
        return next((found for kind in info.types if (found := _struct_of(kind)) is not None), None)
    return info.cls if isinstance(info, msgspec.inspect.StructType) else None


def _kind_of(info: Any) -> str:
    import msgspec

    if isinstance(info, msgspec.inspect.Metadata):
        return "size" if (info.extra or {}).get("size") else _kind_of(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        return _kind_of(info.types[0])
    if isinstance(info, msgspec.inspect.BoolType):
        return "bool (on/off)"
    return "num" if isinstance(info, msgspec.inspect.IntType) else "str"
