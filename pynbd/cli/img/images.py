"""`Image`: an open image as the verbs of `pynbd img` use it, and its name as QEMU tells it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from pynbd.block import probing
from pynbd.block.backend import BlockBackend
from pynbd.block.extents import ChainExtent, Status
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions
from pynbd.block.permissions import Permission
from pynbd.cli.img.arguments import cache_mode

if TYPE_CHECKING:
    from pynbd.block.driver import Location

SECTOR_BYTES = 512
"""Disks end with a whole sector for QEMU: what is missing of the last one reads as zeroes."""

NAMELESS = frozenset({"node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache", "force-share"})
"""Options that say how a node is used, not what it is: a name goes without them."""


SAID_BY_THE_IMAGE = frozenset({"encrypt.format"})
"""Options that must be as the image is: a name goes without them, too."""


def whole_sectors(size: int) -> int:
    """A size in bytes, rounded up to whole sectors."""
    return -(-size // SECTOR_BYTES) * SECTOR_BYTES


class Image:
    """An open image.

    Args:
        name: as it was given.
        node: its top node.
        backend: who reads and writes it.
    """

    def __init__(self, name: str, node: Node, backend: BlockBackend) -> None:
        self.name = name
        self.node = node
        self.backend = backend

    @property
    def size(self) -> int:
        """The length of the disk in bytes, whole sectors."""
        return whole_sectors(self.node.size)

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`; the part of the last sector that is not there is zeroes."""
        inside = self.node.size - offset
        if len(into) > inside:
            inside = max(inside, 0)
            into[inside:] = bytes(len(into) - inside)
            into = into[:inside]
        if len(into):
            await self.backend.read(offset, into)

    def locate(self, offset: int, length: int) -> Location | None:
        """Where the bytes lie verbatim; see `Driver.locate`."""
        return self.backend.locate(offset, length) if length else None

    async def block_status(self, offset: int, length: int, base: Node | None = None) -> Sequence[ChainExtent]:
        """As `BlockBackend.block_status`; the part of the last sector that is not there reads as zeroes."""
        inside = self.node.size - offset
        if inside <= 0:
            return (ChainExtent(length, Status.ZERO | Status.ALLOCATED, 1),)
        return await self.backend.block_status(offset, min(length, inside), base)


# --- opening ------------------------------------------------------------------------------------------------------


def describe(graph: Graph, name: str, format: str, *, image_opts: bool) -> dict[str, Any]:
    """The tree of an image that a command line names.

    Raises:
        OptionError: it can't be understood.
    """
    from pynbd.block import options as opt
    from pynbd.block.errors import OptionError

    if not image_opts:
        return graph.describe(name, format=format)
    tree = opt.parse_dotted(name)
    if "driver" not in tree and "file" not in tree and "filename" not in tree:
        raise OptionError(f"{name}: image options name neither a driver nor a file")
    return graph.describe(tree)


@contextlib.asynccontextmanager
async def open_node(
    graph: Graph,
    tree: Mapping[str, Any],
    *,
    writing: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    **more: Any,
) -> AsyncIterator[Node]:
    """A node that is closed on leaving.

    Args:
        graph: where.
        tree: what `describe` gave.
        writing: whether it is opened for writing.
        cache: a cache mode, by its name.
        force_share: open it although somebody else writes to it.
        more: other options of the node, and arguments of `Graph.open`.

    Raises:
        OptionError, OSError, BlockError: it can't be opened, or what was written can't be made durable.
    """
    mode = cache_mode(cache)
    options: dict[str, Any] = {"cache": {"direct": mode.direct, "no-flush": mode.no_flush}, **more}
    if force_share:
        options["force_share"] = True
    node = await graph.open(tree, read_only=not writing, **options)
    try:
        if writing and "driver" not in tree and node.driver.name == probing.RAW:
            print(
                f"warning: {node.filename()}: nobody said its format, and it looks raw. Writes that would make it look "
                f"like something else are refused; -f raw allows them.",
                file=sys.stderr,
            )
        yield node
    finally:
        if node.opened:  # an image over it takes it along when it is closed
            await graph.close(node)


@contextlib.asynccontextmanager
async def attached(
    graph: Graph,
    node: Node,
    name: str,
    *,
    writing: bool = False,
    resizing: bool = False,
    cache: str = "writeback",
    shared: Permission = Permission.ALL & ~Permission.RESIZE,
) -> AsyncIterator[Image]:
    """A user of a node, that lets go of it on leaving.

    Raises:
        PermissionConflict: somebody else's use of it, here or in another process, stands against this one.
    """
    held = Permission.CONSISTENT_READ
    if writing:
        held |= Permission.WRITE
    if resizing:
        held |= Permission.RESIZE
    backend = BlockBackend(name)
    backend.write_cache = cache_mode(cache).write_cache
    graph.attach(backend, node, held, shared)
    try:
        yield Image(name, node, backend)
    finally:
        graph.detach(backend)


@contextlib.asynccontextmanager
async def open_image(
    graph: Graph,
    name: str,
    *,
    format: str = "",
    image_opts: bool = False,
    writing: bool = False,
    resizing: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    shared: Permission = Permission.ALL & ~Permission.RESIZE,
    snapshot: str | None = None,
    **more: Any,
) -> AsyncIterator[Image]:
    """An image that is closed on leaving; see `describe`, `open_node` and `attached`.

    With `snapshot` it is the internal snapshot of that name or id, as `-l` takes them.

    Raises:
        OptionError, OSError, BlockError: it can't be opened, or what was written can't be made durable.
    """
    tree = describe(graph, name, format, image_opts=image_opts)
    async with (
        open_node(graph, tree, writing=writing or resizing, cache=cache, force_share=force_share, **more) as whole,
        _shown(graph, whole, snapshot) as node,
        attached(graph, node, name, writing=writing, resizing=resizing, cache=cache, shared=shared) as image,
    ):
        yield image


@contextlib.asynccontextmanager
async def _shown(graph: Graph, node: Node, snapshot: str | None) -> AsyncIterator[Node]:
    """A node, or one that shows an internal snapshot of it."""
    if snapshot is None:
        yield node
        return
    from pynbd.server.check import snapshot_tree

    shown = await graph.open({**snapshot_tree(snapshot), "file": node})
    try:
        yield shown
    finally:
        await graph.close(shown)


# --- names --------------------------------------------------------------------------------------------------------


def filename_of(node: Node) -> str:
    """The name of an image as QEMU tells it: that of its file where this is enough to open it again, else `json:…`."""
    options = node.options
    own = _own_options(options)
    own.pop("filename", None)
    named = node.driver.filename()
    if named:
        return named
    child = node.children.get("file")
    if node.driver.is_format and child is not None and not own:
        name = filename_of(child.node)
        if not name.startswith("json:"):
            return name
    from pynbd.cli.img import qemu_json

    return "json:" + qemu_json.compact(_tree_of(node))


def _own_options(options: NodeOptions) -> dict[str, Any]:
    """What was said of a node that makes it another than others of its driver."""
    given = msgspec.to_builtins(options)
    defaults = {
        field.encode_name: field.default if field.default is not msgspec.NODEFAULT else None
        for field in msgspec.structs.fields(options)
    }
    plain = msgspec.to_builtins(defaults)
    return {
        name: value
        for name, value in given.items()
        if name != "driver" and name not in NAMELESS and value is not None and value != plain.get(name)
    }


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of options as dotted keys, without what nobody gave."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in _flat(value).items()})
        elif value is not None:
            flat[name] = value
    return flat


def _tree_of(node: Node) -> dict[str, Any]:
    children = {name: _tree_of(edge.node) for name, edge in node.children.items() if name != "backing"}
    own = {name: value for name, value in _flat(_own_options(node.options)).items() if name not in SAID_BY_THE_IMAGE}
    return {**own, "driver": node.driver.name, **children}
