"""`pynbd img commit`: write what an image holds into one of its backing files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.graph import Graph
    from pynbd.block.node import Node
    from pynbd.cli.img.chain import BackingFile
    from pynbd.cli.interruption import Interruption
    from pynbd.cli.progress import Progress

REQUESTS = 8
PIECE_BYTES = 2 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    common.add_cache(parser, "-t", "cache", "writeback", "the image")
    parser.add_argument("-b", dest="base", metavar="FILE", help="the backing file that is written to (the nearest)")
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    parser.add_argument("-r", dest="rate", metavar="SIZE", help="bytes per second, at the most")
    common.add_progress(parser)
    common.add_quiet(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.errors import BlockError
    from pynbd.block.options import parse_size
    from pynbd.cli.img.chain import backing_files
    from pynbd.cli.img.images import describe
    from pynbd.cli.interruption import Interruption
    from pynbd.cli.progress import Progress

    graph = common.new_graph(arguments)
    rate = parse_size(arguments.rate, what="-r") if arguments.rate is not None else 0
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    below = await backing_files(graph, tree)
    if not below:
        raise BlockError(f"{filename}: the image has no backing file")
    depth = _depth(tree, below, arguments.base, filename)
    trees = [one.tree for one in below]
    interruption = Interruption()
    with interruption.listening(), Progress(wanted=arguments.progress and not arguments.quiet) as progress:
        progress.tell(0)
        async with contextlib.AsyncExitStack() as opened:
            base, top = await _open(graph, tree, trees, depth, arguments.cache, opened)
            await _commit(graph, arguments, top, base, rate, interruption, progress)
    if not arguments.quiet:
        print("Image committed.")
    return 0


def _depth(tree: Mapping[str, Any], below: Sequence[BackingFile], base: str | None, filename: str) -> int:
    """Which of the backing files is meant: the first that the image right above has by that name.

    It is the name that stands in that image, or another one of the same file, which starts from where that image is.

    Raises:
        BlockError: none is.
    """
    from pynbd.block.errors import BlockError
    from pynbd.block.image_names import named_from, same_file

    if base is None:
        return 0
    above = _filename(tree)
    for depth, one in enumerate(below):
        name = _filename(one.tree)
        if base == one.name or (name and same_file(named_from(above, base), name)):
            return depth
        above = name
    raise BlockError(f"{base!r} is not among the backing files of {filename}")


def _filename(tree: Mapping[str, Any]) -> str:
    return str(tree.get("file", tree).get("filename", ""))


async def _open(
    graph: Graph,
    tree: dict[str, Any],
    below: Sequence[dict[str, Any]],
    depth: int,
    cache: str,
    opened: contextlib.AsyncExitStack,
) -> tuple[Node, Node]:
    """(base, top): the chain, with the base open for writing and what is below it as always."""
    from pynbd.cli.img.chain import opened_over
    from pynbd.cli.img.images import open_node

    base = await opened.enter_async_context(open_node(graph, below[depth], writing=True, cache=cache, trusted=False))
    node = base
    for between in reversed(below[:depth]):
        node = await opened.enter_async_context(
            opened_over(graph, between, node, writing=False, cache=cache, trusted=False)
        )
    top = await opened.enter_async_context(opened_over(graph, tree, node, writing=True, cache=cache, trusted=True))
    return base, top


async def _commit(
    graph: Graph,
    arguments: argparse.Namespace,
    top: Node,
    base: Node,
    rate: int,
    interruption: Interruption,
    progress: Progress,
) -> None:
    from pynbd.block.drain import drained
    from pynbd.block.families import Emptiable
    from pynbd.block.permissions import Permission
    from pynbd.cli.copier import Copier
    from pynbd.cli.img.images import attached
    from pynbd.cli.img.sources import Above

    async with (
        # The base changes under the image, but only to what the image shows already.
        attached(graph, top, "commit (source)", shared=Permission.ALL) as source,
        attached(
            graph, base, "commit (target)", writing=True, resizing=True, cache=arguments.cache, shared=Permission.ALL
        ) as target,
    ):
        if target.node.size < source.size:
            await target.backend.truncate(source.size)
        copier = Copier(
            Above(source, base),
            target.backend,
            requests=REQUESTS,
            request_bytes=PIECE_BYTES,
            in_order=base.driver.name != "raw",
            bytes_per_s=rate,
        )
        with interruption.stops(copier), progress.follow(source.size, lambda: copier.done_bytes):
            await copier.run()
            if copier.stopped:
                raise interruption.stopped(f"{arguments.words[0]} is as it was, its base holds a part of it")
            await target.backend.flush()
        progress.tell(100)
    if not arguments.keep and arguments.base is None and isinstance(top.driver, Emptiable):
        async with drained(top):
            await top.driver.make_empty()
