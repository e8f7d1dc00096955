"""What a user of a node may do with it, and what it lets others do meanwhile.

The model is QEMU's: every edge of the graph *holds* permissions on the node below and *shares* others.
What one edge holds, every other edge to the same node must share.
"""

from collections.abc import Mapping
from enum import Flag, IntFlag
from typing import TYPE_CHECKING

from pynbd.block.errors import PermissionConflict

if TYPE_CHECKING:
    from pynbd.block.child import Child
    from pynbd.block.node import Node


class Permission(IntFlag):
    """What an edge of the graph may do to the node below it."""

    NONE = 0
    CONSISTENT_READ = 1  # read, and see what a guest would see
    WRITE = 2
    WRITE_UNCHANGED = 4  # write bytes that are there already
    RESIZE = 8
    ALL = 15

    def describe(self) -> str:
        """The names, as options and messages spell them: `consistent-read, write`."""
        return ", ".join(str(p.name).lower().replace("_", "-") for p in Permission if p in self and p) or "nothing"


class ChildRole(Flag):
    """What a node needs a child for."""

    DATA = 1  # the guest's bytes
    METADATA = 2  # the format's own structures
    FILTERED = 4  # exactly the same bytes as the parent
    COW = 8  # what is read where the parent holds nothing (a backing file)


def default_permissions(
    role: ChildRole, held: Permission, shared: Permission, *, writable: bool
) -> tuple[Permission, Permission]:
    """What a node asks of a child, given what its own parents hold and share.

    Args:
        role: what the child is for.
        held: all that the node's parents hold on it, together.
        shared: what every one of its parents shares.
        writable: whether the node itself is open for writing.

    Returns:
        (held, shared) of the edge to the child.
    """
    if role & ChildRole.FILTERED:
        return held, shared
    if role & ChildRole.COW:
        # A backing file is only read. Who may change it depends on whether our own users bear changes.
        bearable = Permission.WRITE | Permission.RESIZE if Permission.WRITE in shared else Permission.NONE
        return held & Permission.CONSISTENT_READ, bearable | Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    changing = Permission.WRITE | Permission.RESIZE
    if role & ChildRole.METADATA:
        # A format writes its own structures even when its guest does not, and nobody else may touch them.
        wanted = Permission.CONSISTENT_READ | (changing if writable else Permission.NONE)
        return held | wanted, shared & ~changing
    growing = Permission.RESIZE if Permission.WRITE in held else Permission.NONE
    return held | growing, shared & ~Permission.RESIZE


def check_conflicts(node: "Node", new: "Mapping[Child, tuple[Permission, Permission]]") -> None:
    """Check that what each parent holds is shared by every other, and that nobody writes to what is read-only.

    Raises:
        PermissionConflict: naming both, and what they differ about.
    """
    for edge in node.parents:
        held = new.get(edge, (edge.held, edge.shared))[0]
        if node.read_only and held & (Permission.WRITE | Permission.RESIZE):
            raise PermissionConflict(f"{edge.describe()} wants to write to {node.describe()}, which is read-only")
        for other in node.parents:
            shared = new.get(other, (other.held, other.shared))[1]
            if other is not edge and held & ~shared:
                raise PermissionConflict(
                    f"{edge.describe()} needs {Permission(held & ~shared).describe()} on {node.describe()}, "
                    f"which {other.describe()} does not share"
                )
