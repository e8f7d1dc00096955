"""`Child`: an edge of the graph, and `DataPath`: what requests that travel along it call."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pynbd.block.driver import Location
from pynbd.block.extents import Extent
from pynbd.block.permissions import ChildRole, Permission

if TYPE_CHECKING:
    from pynbd.block.node import Node


class DataPath(NamedTuple):
    """The functions that serve requests to a node, with every node that adds nothing left out.

    They are bound anew whenever the graph below changes, which happens only while nothing is in flight.
    """

    read: Callable[[int, memoryview, int], Coroutine[Any, Any, None]]
    write: Callable[[int, memoryview, int], Coroutine[Any, Any, None]]
    write_zeroes: Callable[[int, int, int], Coroutine[Any, Any, None]]
    discard: Callable[[int, int], Coroutine[Any, Any, None]]
    cache: Callable[[int, int], Coroutine[Any, Any, None]]
    flush: Callable[[], Coroutine[Any, Any, None]]
    locate: Callable[[int, int], Location | None]


class Parent(Protocol):
    """Who holds an edge from above: a node or a `BlockBackend`."""

    def describe(self) -> str:
        """Its name for messages: `node 'disk0'`, `export 'disk0'`."""

    def below_changed(self, edge: "Child") -> None:
        """The data path below has been bound anew."""

    def below_resized(self, edge: "Child") -> None:
        """The node below has another size."""

    def below_drained(self, edge: "Child") -> Awaitable[None]:
        """Start nothing new through this edge, and come back when nothing is in flight."""

    def below_resumed(self, edge: "Child") -> None:
        """The opposite of `below_drained`, which may be nested."""


class Child:
    """An edge of the graph: somebody's use of a node.

    Args:
        name: what the parent calls it: `file`, `backing` …
        role: what the parent needs it for.
        parent: who holds the edge.
        node: the node below.
    """

    __slots__ = (
        "cache",
        "discard",
        "flush",
        "held",
        "locate",
        "name",
        "node",
        "parent",
        "read",
        "role",
        "shared",
        "write",
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

    def bind(self) -> None:
        """Take the data path of the node below."""
        self.read, self.write, self.write_zeroes, self.discard, self.cache, self.flush, self.locate = self.node.path

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
