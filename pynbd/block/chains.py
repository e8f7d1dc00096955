"""How deep a chain of nodes may be, and that it does not come back to where it was."""

import os
import sys
from collections.abc import Sequence

from pynbd.block.drain import downwards
from pynbd.block.errors import BlockError
from pynbd.block.node import Node

MAX_CHAIN_DEPTH = 200
"""Nodes from a user down to the last child; as QEMU's limit for backing chains."""

FRAMES_PER_NODE = 10
"""Function calls, one inside the other, that a request takes per node on its way down, at the most."""

FRAMES_ABOVE = 500
"""Function calls that are left for whoever sends the request."""


def chain_depth(node: Node) -> int:
    """Nodes on the longest way down from a node, itself included."""
    depths: dict[Node, int] = {}
    for below in reversed(downwards([node])):
        depths[below] = 1 + max((depths[edge.node] for edge in below.children.values()), default=0)
    return depths[node]


def allow_depth(depth: int) -> None:
    """Make room for calls through so many nodes: Python's own limit would end them in the middle of a deep chain."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), FRAMES_ABOVE + FRAMES_PER_NODE * depth))


def check_goes_on(filename: str, above: Sequence[str], node_name: str) -> None:
    """Check that an image may have a backing file opened.

    Args:
        filename: the image's, "" if it has none.
        above: those of the images that lie over it, from the top down.
        node_name: of the image.

    Raises:
        BlockError: it is one of those above, or there are too many.
    """
    for number, earlier in enumerate(above):
        if _is_same_file(earlier, filename):
            chain = " → ".join([*above[number:], filename])
            raise BlockError(f"{filename}: its chain of backing files comes back to it: {chain}")
    if len(above) >= MAX_CHAIN_DEPTH:
        raise BlockError(f"{filename or node_name}: a chain of more than {MAX_CHAIN_DEPTH} images")


def _is_same_file(one: str, other: str) -> bool:
    """Whether two names are of the same file, also where one takes a way round (`folder/../disk.qcow2`)."""
    if not one or not other:
        return False
    path = os.path
    return one == other or (path.normpath(one) == path.normpath(other) and path.realpath(one) == path.realpath(other))
