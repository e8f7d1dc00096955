"""Arguments that verbs of `pynbd img` have in common, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pynbd.cli.objects import add_object_argument

if TYPE_CHECKING:
    from pynbd.block.graph import Graph


class CacheMode(NamedTuple):
    """How writes are cached.

    Args:
        direct: whether the page cache is gone around.
        no_flush: whether flushes are ignored.
        write_cache: whether a write may be answered before it is durable.
    """

    direct: bool = False
    no_flush: bool = False
    write_cache: bool = True


CACHE_MODES: Mapping[str, CacheMode] = {
    "none": CacheMode(direct=True),
    "off": CacheMode(direct=True),
    "writeback": CacheMode(),
    "writethrough": CacheMode(write_cache=False),
    "directsync": CacheMode(direct=True, write_cache=False),
    "unsafe": CacheMode(no_flush=True),
}
"""QEMU's cache modes."""

NAMES_WITH_NO = ("nocow",)
"""Options whose own names begin with what turns a switch off."""

PREALLOCATION_MODES = ("off", "metadata", "falloc", "full")


def add_image(parser: argparse.ArgumentParser, *, image_opts: bool = True) -> None:
    """`-f`, `--image-opts` and `--object`: how an image that is there is opened."""
    parser.add_argument("-f", "--format", dest="format", default="", metavar="FORMAT", help="its format (else probed)")
    if image_opts:
        parser.add_argument("--image-opts", action="store_true", help="FILENAME is driver=…,file.filename=…")
    add_object_argument(parser)


def add_force_share(parser: argparse.ArgumentParser) -> None:
    """`-U`."""
    parser.add_argument("-U", "--force-share", action="store_true", help="open it although somebody writes to it")


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output`."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help="the form of what is told")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`-q`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="tell nothing but errors")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """`-p`."""
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")


def add_cache(parser: argparse.ArgumentParser, flag: str, name: str, default: str, what: str) -> None:
    """`-t` or `-T`: a cache mode."""
    parser.add_argument(
        flag, dest=name, default=default, metavar="CACHE", help=f"cache mode of {what}: {', '.join(CACHE_MODES)}"
    )


def cache_mode(name: str) -> CacheMode:
    """What a cache mode stands for.

    Raises:
        OptionError: there is none of that name.
    """
    from pynbd.block.errors import OptionError

    if name not in CACHE_MODES:
        raise OptionError(f"cache mode {name!r} is unknown; there are: {', '.join(CACHE_MODES)}")
    return CACHE_MODES[name]


def add_creation_options(parser: argparse.ArgumentParser) -> None:
    """`-o`, any number of times."""
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="NAME=VALUE,…", help="options (-o help lists them)"
    )


def add_words(parser: argparse.ArgumentParser, metavar: str) -> None:
    """The words that are no options; `expect` says how many there must be."""
    parser.usage = f"%(prog)s [OPTIONS] {metavar}"
    parser.add_argument("words", nargs="*", metavar="…", help=argparse.SUPPRESS)


def expect(words: list[str], count: int, what: str) -> list[str]:
    """The words, if there are as many as expected.

    Raises:
        OptionError: there are not.
    """
    from pynbd.block.errors import OptionError

    if len(words) != count:
        raise OptionError(f"expected {what}, found {' '.join(map(repr, words)) or 'nothing'}")
    return words


def integer(text: str) -> int:
    """A number as C's strtol reads it: decimal, `0x10`, or octal with a 0 before it.

    Raises:
        ArgumentTypeError: it is none, or a number of more than 64 bits.
    """
    from pynbd.block.options import parse_integer

    value = parse_integer(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number")
    return value


def new_graph(arguments: argparse.Namespace) -> Graph:
    """A graph with the objects of the command line, in which no file is run because of its name.

    Images may have any names here, also such as somebody else gave them.

    Raises:
        OptionError: one of them is wrong, or options exclude each other.
    """
    from pynbd.block.errors import OptionError
    from pynbd.block.graph import Graph
    from pynbd.cli.objects import make_objects

    if getattr(arguments, "image_opts", False) and arguments.format:
        raise OptionError("--image-opts and -f exclude each other: write driver=FORMAT among the image options")
    return Graph(make_objects(arguments.object), runs_files=False)


def asks_for_help(texts: Iterable[str]) -> bool:
    """Whether somebody wrote `-o help` or `-o ?`, alone or among other options."""
    from pynbd.block.options import split_commas

    return any(part in ("help", "?") for text in texts for part in split_commas(text))


def parse_creation_options(texts: Iterable[str]) -> dict[str, Any]:
    """The tree of some `-o` options: the last of a name counts.

    A name alone is a switch turned on, and one with `no` before it a switch turned off.

    Raises:
        OptionError: they can't be understood.
    """
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_dotted, split_commas

    found: dict[str, str] = {}
    for text in texts:
        if (len(text) - len(text.rstrip(","))) % 2:
            raise OptionError(f"-o: {text[:80]!r} ends with a comma, and no option follows")
        for part in split_commas(text):
            key, equals, value = part.partition("=")
            if not equals:
                off = key.startswith("no") and key not in NAMES_WITH_NO
                key, value = (key[2:], "off") if off else (key, "on")
            found[key] = value
    return parse_dotted(",".join(f"{key}={value.replace(',', ',,')}" for key, value in found.items()))
