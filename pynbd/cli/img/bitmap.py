"""`pynbd img bitmap`: the dirty bitmaps that an image keeps."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.bitmaps import DirtyBitmap
    from pynbd.block.graph import Graph
    from pynbd.block.node import Node

MIN_DEFAULT_GRANULARITY = 4 << 10
MAX_DEFAULT_GRANULARITY = 64 << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "ACTION … FILENAME BITMAP")
    common.add_image(parser)
    for action, what in (
        ("add", "make it, enabled"),
        ("remove", "forget it"),
        ("clear", "say that nothing is dirty"),
        ("enable", "let it note what is written from now on"),
        ("disable", "let it note nothing"),
    ):
        parser.add_argument(f"--{action}", dest="actions", action="append_const", const=(action, ""), help=what)
    parser.add_argument(
        "--merge",
        dest="actions",
        action="append",
        type=lambda source: ("merge", source),
        metavar="BITMAP",
        help="add what is dirty in another one",
    )
    parser.add_argument("-g", dest="granularity", metavar="SIZE", help="bytes that a bit of a new one stands for")
    parser.add_argument("-b", dest="source", metavar="FILE", help="the image that --merge takes bitmaps from")
    parser.add_argument("-F", dest="source_format", metavar="FORMAT", help="its format")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.cli.img.images import attached, describe, open_image, open_node

    graph = common.new_graph(arguments)
    filename, name = common.expect(arguments.words, 2, "an image file name and the name of a bitmap")
    granularity = _granularity(arguments)
    async with contextlib.AsyncExitStack() as opened:
        tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
        # What lies below has no part in it, and may be missing.
        node = await opened.enter_async_context(open_node(graph, {"backing": None, **tree}, writing=True))
        # Nobody else may write meanwhile, who would not know of the bitmap.
        await opened.enter_async_context(attached(graph, node, filename, writing=True))
        source = node
        if arguments.source is not None:
            source = (
                await opened.enter_async_context(
                    open_image(graph, arguments.source, format=arguments.source_format or "")
                )
            ).node
        for action, other in arguments.actions:
            await _act(graph, node, name, action, granularity, source, other)
    return 0


def _granularity(arguments: argparse.Namespace) -> int | None:
    """That of a new bitmap, if it was given; and whether the options go together.

    Raises:
        OptionError: they do not.
    """
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_size

    actions = [action for action, _ in arguments.actions or ()]
    for wrong, why in (
        (not actions, "an action is missing: --add, --remove, --clear, --enable, --disable or --merge"),
        (arguments.granularity is not None and "add" not in actions, "-g is for --add only"),
        (arguments.source is not None and "merge" not in actions, "-b is for --merge only"),
        (arguments.source_format is not None and arguments.source is None, "-F tells of the image of -b"),
    ):
        if wrong:
            raise OptionError(why)
    return (parse_size(arguments.granularity, what="-g") or None) if arguments.granularity is not None else None


async def _act(
    graph: Graph, node: Node, name: str, action: str, granularity: int | None, source: Node, other: str
) -> None:
    from pynbd.block.errors import BlockError

    if action == "add":
        await _add(graph, node, name, granularity)
        return
    bitmap = _find(node, name)
    if bitmap.inconsistent and action != "remove":
        raise BlockError(f"{node.filename()}: bitmap {name!r} is inconsistent: it can only be removed")
    if action == "remove":
        await graph.remove_bitmap(node, name)
    elif action == "clear":
        bitmap.clear()
    elif action == "merge":
        bitmap.merge(_find(source, other))
    else:
        bitmap.enabled = action == "enable"


async def _add(graph: Graph, node: Node, name: str, granularity: int | None) -> None:
    from pynbd.block.errors import BlockError
    from pynbd.block.families import PersistentBitmaps

    if not isinstance(node.driver, PersistentBitmaps):
        raise BlockError(f"format {node.driver.name!r} can't keep bitmaps")
    if granularity is None:
        cluster = (await node.info()).cluster_size or MAX_DEFAULT_GRANULARITY
        granularity = min(max(cluster, MIN_DEFAULT_GRANULARITY), MAX_DEFAULT_GRANULARITY)
    if name in node.bitmaps:
        raise BlockError(f"there is a bitmap {name!r} already")
    node.driver.can_store_bitmap(name, granularity)
    (await graph.add_bitmap(node, name, granularity)).persistent = True


def _find(node: Node, name: str) -> DirtyBitmap:
    from pynbd.block.errors import BlockError

    if name not in node.bitmaps:
        known = ", ".join(node.bitmaps) or "none"
        raise BlockError(f"{node.filename()}: there is no bitmap {name!r} (there are: {known})")
    return node.bitmaps[name]
