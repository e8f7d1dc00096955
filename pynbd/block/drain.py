"""Drained sections: nothing is in flight at a node, and nothing starts until the section ends.

Requests are counted and parked where they enter the graph, at its users (`BlockBackend`). A section pauses all
users above its node; one that comes to stand above it meanwhile joins the section. Each is let go by the section
that paused it, whatever became of the graph in between.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable

from pynbd.block.child import User
from pynbd.block.node import Node


class DrainedSection:
    """A drained section of one node, and the users that it has paused."""

    def __init__(self) -> None:
        self.paused: dict[User, None] = {}

    def include(self, users: Iterable[User]) -> None:
        """Pause these users, too."""
        for user in users:
            if user not in self.paused:
                self.paused[user] = None
                user.begin_drain()


@contextlib.asynccontextmanager
async def drained(node: Node) -> AsyncIterator[None]:
    """A section in which nothing is in flight at a node: everybody above starts nothing new until it ends.

    Sections may be nested and may overlap. Must not be entered from within a request on that node. If the wait for
    what is in flight is cancelled, everybody goes on.
    """
    section = DrainedSection()
    node.drained_sections.append(section)
    try:
        section.include(node.users())
        for user in list(section.paused):
            await user.idle()
        yield
    finally:
        node.drained_sections.remove(section)
        for user in section.paused:
            user.end_drain()


def join_sections(node: Node, users: Iterable[User]) -> None:
    """These users have come to stand above a node: the drained sections of all nodes that they reach now hold them."""
    joining = list(users)
    for below in downwards([node]):
        for section in below.drained_sections:
            section.include(joining)


def downwards(nodes: Iterable[Node]) -> list[Node]:
    """These nodes and all below them, each before its children."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for edge in node.children.values():
                visit(edge.node)
            order.append(node)

    for node in nodes:
        visit(node)
    return order[::-1]
