"""Images over backing files, opened by hand: so that a backing file can be written to, or another one be compared."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from pynbd.block.errors import BlockError
from pynbd.block.families import Backed
from pynbd.block.graph import Graph
from pynbd.block.image_names import named_from
from pynbd.block.node import Node
from pynbd.cli.img.images import open_node


class BackingFile(NamedTuple):
    """A backing file.

    Args:
        name: as it stands in the image that names it.
        tree: how it is opened, without its own backing file.
    """

    name: str
    tree: dict[str, Any]


def describe_backing(graph: Graph, node: Node) -> BackingFile | None:
    """The backing file that an image names; None if it names none.

    Raises:
        OptionError: it can't be understood.
    """
    if not isinstance(node.driver, Backed):
        return None
    name, name_format = node.driver.backing_name()
    if not name:
        return None
    tree = graph.describe(named_from(node.filename(), name), format=name_format, trusted=False)
    return BackingFile(name, tree)


async def backing_files(graph: Graph, tree: Mapping[str, Any]) -> list[BackingFile]:
    """All backing files of an image, from the top down.

    Raises:
        OSError, BlockError: one can't be opened, or there are too many.
    """
    from pynbd.block.chains import MAX_CHAIN_DEPTH

    found: list[BackingFile] = []
    below: Mapping[str, Any] | None = tree
    while below is not None:
        if len(found) > MAX_CHAIN_DEPTH:
            raise BlockError(f"a chain of more than {MAX_CHAIN_DEPTH} images")
        async with open_node(graph, {"backing": None, **below}, force_share=True, trusted=not found) as node:
            backing = describe_backing(graph, node)
        if backing is None:
            return found
        found.append(backing)
        below = backing.tree
    return found


@contextlib.asynccontextmanager
async def opened_over(
    graph: Graph, tree: Mapping[str, Any], backing: Node, *, writing: bool, cache: str, trusted: bool
) -> AsyncIterator[Node]:
    """An image over a backing node that is open already."""
    async with open_node(graph, {**tree, "backing": backing}, writing=writing, cache=cache, trusted=trusted) as node:
        yield node
