"""`pynbd img amend`: other options for an image that is there."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.driver import Driver

PARTS = 1000
"""In which the length of an amendment is told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "-o OPTIONS FILENAME")
    common.add_image(parser)
    common.add_creation_options(parser)
    common.add_cache(parser, "-t", "cache", "writeback", "the image")
    common.add_progress(parser)
    common.add_quiet(parser)
    parser.add_argument("--force", action="store_true", help="erase the last key, or fill a key slot in use")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block import registry
    from pynbd.block.drain import drained
    from pynbd.block.errors import OptionError
    from pynbd.block.families import Amendable
    from pynbd.cli.img.images import describe, open_node
    from pynbd.cli.progress import Progress

    if not arguments.options:
        raise OptionError("the options are missing: give -o")
    wants_help = common.asks_for_help(arguments.options)
    if wants_help and arguments.format:
        _help(registry.driver_class(arguments.format))
        return 0
    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    if wants_help:
        async with open_node(graph, {"backing": None, **tree}) as node:
            _help(type(node.driver))
        return 0
    if not all(arguments.options):
        raise OptionError("-o: there are no options in ''")
    changes = common.parse_creation_options(arguments.options)
    done, total = 0, 1

    def progress(now: int, whole: int) -> None:
        nonlocal done, total
        done, total = now, max(whole, 1)

    async with contextlib.AsyncExitStack() as opened:
        shown = opened.enter_context(Progress(wanted=arguments.progress and not arguments.quiet))
        node = await opened.enter_async_context(open_node(graph, tree, writing=True, cache=arguments.cache))
        if not isinstance(node.driver, Amendable):
            raise OptionError(f"{filename}: format {node.driver.name!r} has no options that can be changed")
        _keep_disk(node.driver, changes, filename)
        with shown.follow(PARTS, lambda: PARTS * done // total):
            async with drained(node):
                await node.driver.amend(changes, progress, force=arguments.force)
        shown.tell(100)
    return 0


def _help(kind: type[Driver]) -> None:
    """Tell what can be changed in images of a format.

    Raises:
        OptionError: nothing.
    """
    from pynbd.block.errors import OptionError
    from pynbd.cli.img.create import option_lines_of

    options = getattr(kind, "AmendOptions", None)
    if options is None:
        raise OptionError(f"format {kind.name!r} has no options that can be changed")
    print(f"Amend options for '{kind.name}':")
    print("\n".join(option_lines_of(options)))


def _keep_disk(driver: Driver, changes: dict[str, Any], filename: str) -> None:
    """Take out what changes nothing, and refuse what only a rebase does without another disk as its result.

    A size of 0 is none: as for qemu-img, the disk keeps its own.

    Raises:
        OptionError: another backing file is wanted.
    """
    from pynbd.block.errors import OptionError
    from pynbd.block.families import Backed
    from pynbd.block.options import parse_size

    if "size" in changes and not parse_size(str(changes["size"])):
        del changes["size"]
    if not isinstance(driver, Backed) or not {"backing_file", "backing_fmt"} & changes.keys():
        return
    if (changes.pop("backing_file", ""), changes.pop("backing_fmt", "")) != driver.backing_name():
        raise OptionError(f"{filename}: the backing file is not changed by amend; use `pynbd img rebase`")
