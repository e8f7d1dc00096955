"""`Child`: an edge of the graph."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from pynbd.block.extents import Extent
from pynbd.block.permissions import ChildRole, Permission

if TYPE_CHECKING:
    from pynbd.block.node import Node


class Parent(Protocol):
    """Who holds an edge from above: a node or a `BlockBackend`."""

    def describe(self) -> str:
        """Its name for messages: `node 'disk0'`, `export 'disk0'`."""

    def below_changed(self, edge: "Child") -> None:
        """The data path below has been bound anew."""

    def below_resized(self, edge: "Child") -> None:
        """The node below has another size."""

    def users(self) -> Iterable["User"]:
        """Everybody whose requests come through this parent: itself, or those above it."""


class User(Protocol):
    """Where requests enter the graph; see `drain.drained`."""

    def begin_drain(self) -> None:
        """Start nothing new until as many `end_drain` have come."""

    async def idle(self) -> None:
        """Wait until nothing is in flight."""

    def end_drain(self) -> None:
        """The opposite of `begin_drain`."""


class Child:
    """An edge of the graph: somebody's use of a node.

    Args:
        name: what the parent calls it: `file`, `backing` …
        role: what the parent needs it for.
        parent: who holds the edge.
        node: the node below.
    """

    __slots__ = (
        "_held",
        "cache",
        "discard",
        "fill_now",
        "finder",
        "flush",
        "locate",
        "may_write",
        "name",
        "node",
        "parent",
        "place_writes",
        "read",
        "role",
        "shared",
        "write",
        "write_by",
        "write_now",
        "write_zeroes",
    )

    def __init__(self, name: str, role: ChildRole, parent: Parent, node: "Node") -> None:
        self.name = name
        self.role = role
        self.parent = parent
        self.node = node
        self.held = Permission.NONE
        self.shared = Permission.ALL
        self.bind()

    @property
    def held(self) -> Permission:
        """What the parent may do to the node."""
        return self._held

    @held.setter
    def held(self, held: Permission) -> None:
        self._held = held
        # Asked for every write, where looking into a flag would cost as much as the write.
        self.may_write = Permission.WRITE in held

    def bind(self) -> None:
        """Take the data path of the node below."""
        path = self.node.path
        self.read, self.write, self.write_zeroes, self.discard = path.read, path.write, path.write_zeroes, path.discard
        self.cache, self.flush, self.locate, self.write_now = path.cache, path.flush, path.locate, path.write_now
        self.finder = path.finder
        self.place_writes, self.fill_now, self.write_by = path.place_writes, path.fill_now, path.write_by

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """What the layer below holds in a range; see `Driver.block_status`."""
        return await self.node.layer_status(offset, length)

    @property
    def size(self) -> int:
        """The length of the node below in bytes."""
        return self.node.size

    def describe(self) -> str:
        """For messages: `node 'qcow2-0' (as its file)`."""
        return f"{self.parent.describe()} (as its {self.name})" if self.name != "root" else self.parent.describe()
