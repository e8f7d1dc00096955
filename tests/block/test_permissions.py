"""Permissions: QEMU's rules for children, conflicts that name both sides, changes that happen whole or not at all."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend
from pynbd.block.child import Child
from pynbd.block.errors import PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.permissions import ChildRole, Permission, default_permissions
from tests.block.drivers import Model, attach, driver, opened

READ, WRITE = Permission.CONSISTENT_READ, Permission.WRITE
UNCHANGED, RESIZE = Permission.WRITE_UNCHANGED, Permission.RESIZE
NONE, ALL = Permission.NONE, Permission.ALL

EVERY = [Permission(bits) for bits in range(int(ALL) + 1)]

DISK = {"driver": "model", "size": 4096}


@pytest.mark.parametrize(
    ("role", "writable", "held", "shared", "expected_held", "expected_shared"),
    [
        # A filter asks for what it is asked for.
        (ChildRole.FILTERED, True, READ | WRITE, READ, READ | WRITE, READ),
        (ChildRole.FILTERED | ChildRole.DATA, True, NONE, ALL, NONE, ALL),
        # A backing file is read, if at all; others may change it if our users can bear that.
        (ChildRole.COW, True, READ | WRITE | RESIZE, ALL, READ, ALL),
        (ChildRole.COW, True, WRITE, READ | UNCHANGED | RESIZE, NONE, READ | UNCHANGED),
        (ChildRole.COW, True, NONE, NONE, NONE, READ | UNCHANGED),
        # A format's own structures: read and written by nobody else, whatever our users do.
        (ChildRole.METADATA, True, NONE, ALL, READ | WRITE | RESIZE, READ | UNCHANGED),
        (ChildRole.METADATA, False, NONE, ALL, READ, READ | UNCHANGED),
        (ChildRole.METADATA | ChildRole.DATA, True, READ, ALL, READ | WRITE | RESIZE, READ | UNCHANGED),
        (ChildRole.METADATA | ChildRole.DATA, False, READ | UNCHANGED, READ, READ | UNCHANGED, READ),
        # The guest's bytes alone: whoever writes may grow the file.
        (ChildRole.DATA, True, READ, ALL, READ, READ | WRITE | UNCHANGED),
        (ChildRole.DATA, True, WRITE, ALL, WRITE | RESIZE, READ | WRITE | UNCHANGED),
        (ChildRole.DATA, False, READ, READ, READ, READ),
    ],
)
def test_what_a_node_asks_of_a_child(
    role: ChildRole,
    writable: bool,
    held: Permission,
    shared: Permission,
    expected_held: Permission,
    expected_shared: Permission,
) -> None:
    assert default_permissions(role, held, shared, writable=writable) == (expected_held, expected_shared)


@pytest.mark.parametrize("role", [ChildRole.FILTERED, ChildRole.COW, ChildRole.METADATA, ChildRole.DATA])
@pytest.mark.parametrize("writable", [False, True])
def test_more_users_never_ask_for_less(role: ChildRole, writable: bool) -> None:
    """Another user above adds to what is held below, and takes from what is shared."""
    for (held, shared), (more, less) in itertools.product(itertools.product(EVERY, EVERY[::3]), repeat=2):
        if held in more and less in shared:
            asked, given_up = default_permissions(role, held, shared, writable=writable)
            asked_more, given_less = default_permissions(role, more, less, writable=writable)
            assert asked in asked_more
            assert given_less in given_up


def test_names() -> None:
    assert ALL.describe() == "consistent-read, write, write-unchanged, resize"
    assert NONE.describe() == "nothing"
    assert (WRITE | RESIZE).describe() == "write, resize"


# --- in a graph -----------------------------------------------------------------------------------------------


def user(graph: Graph, node: Any, name: str, held: Permission, shared: Permission = ALL) -> BlockBackend:
    """A user with these permissions."""
    backend = BlockBackend(name)
    graph.attach(backend, node, held, shared)
    return backend


@settings(max_examples=150, deadline=None)
@given(users=st.lists(st.tuples(st.sampled_from(EVERY), st.sampled_from(EVERY)), max_size=6))
def test_what_one_holds_every_other_shares(users: list[tuple[Permission, Permission]]) -> None:
    """A user gets in if and only if all pairs agree; whoever is refused leaves no trace."""

    async def law() -> None:
        async with opened(DISK) as (graph, node):
            inside: list[tuple[Permission, Permission]] = []
            for number, (held, shared) in enumerate(users):
                agreed = all(not held & ~theirs and not their & ~shared for their, theirs in inside)
                backend = BlockBackend(f"user {number}")
                if agreed:
                    graph.attach(backend, node, held, shared)
                    inside.append((held, shared))
                else:
                    with pytest.raises(PermissionConflict):
                        graph.attach(backend, node, held, shared)
                    assert backend.root is None
                assert [(edge.held, edge.shared) for edge in node.parents] == inside
                assert node.held_by_parents() == (
                    Permission(sum({bit for held, _ in inside for bit in held})),
                    Permission(sum(bit for bit in ALL if all(bit in shared for _, shared in inside))),
                )

    asyncio.run(law())


async def test_a_conflict_names_both_and_what_it_is_about(graph: Graph) -> None:
    node = await graph.open({**DISK, "node-name": "disk"})
    user(graph, node, "export 'one'", READ | WRITE, READ | UNCHANGED)
    with pytest.raises(PermissionConflict) as caught:
        user(graph, node, "export 'two'", READ | WRITE | RESIZE)
    assert str(caught.value) == ("export 'two' needs write, resize on node 'disk', which export 'one' does not share")
    with pytest.raises(PermissionConflict) as caught:
        user(graph, node, "job 'three'", READ, UNCHANGED)
    assert "export 'one' needs consistent-read, write on node 'disk', which job 'three' does not" in str(caught.value)
    assert len(node.parents) == 1


async def test_conflicts_reach_through_the_graph(graph: Graph) -> None:
    """Two formats on one file; a format and a guest on its file; a guest on somebody's backing file."""
    await graph.open({**DISK, "node-name": "disk"})
    wallet = await graph.open({"driver": "wallet", "file": "disk", "node-name": "one"})
    with pytest.raises(PermissionConflict, match=r"node 'one' \(as its file\) needs write.*node 'two' \(as its file\)"):
        await graph.open({"driver": "wallet", "file": "disk", "node-name": "two"})
    assert list(graph.nodes) == ["disk", "one"]
    with pytest.raises(PermissionConflict, match=r"guest needs write on node 'disk', which node 'one' \(as its file\)"):
        user(graph, graph.nodes["disk"], "guest", READ | WRITE)
    reader = user(graph, graph.nodes["disk"], "reader", READ)
    await graph.close(await graph.open({"driver": "through", "file": wallet}))
    graph.detach(reader)
    backing = await graph.open({**DISK, "node-name": "base"})
    overlay = await graph.open({"driver": "layer", "size": 64, "backing": "base"})
    guest = user(graph, overlay, "guest", READ | WRITE, READ | UNCHANGED)
    with pytest.raises(PermissionConflict, match=r"writer needs write on node 'base', which node '#layer.*\(as its b"):
        user(graph, backing, "writer", WRITE)
    graph.detach(guest)
    user(graph, backing, "writer", WRITE)


async def test_a_refused_user_leaves_every_permission_below_as_it_was(graph: Graph) -> None:
    tree = {"driver": "layer", "size": 64, "file": {"driver": "watcher", "file": DISK}, "backing": DISK}
    node = await graph.open(tree)
    user(graph, node, "first", READ, READ)

    def permissions() -> list[tuple[Permission, Permission]]:
        return [(e.held, e.shared) for each in graph.nodes.values() for e in each.parents]

    before = permissions()
    with pytest.raises(PermissionConflict):
        user(graph, node, "second", READ | WRITE)
    assert permissions() == before


async def test_permissions_reach_all_the_way_down_and_are_given_back(graph: Graph) -> None:
    tree = {"driver": "watcher", "file": {"driver": "through", "file": DISK}}
    node = await graph.open(tree)
    disk = node.children["file"].node.children["file"].node
    assert disk.held_by_parents() == (NONE, ALL)
    backend = user(graph, node, "guest", READ | WRITE, READ)
    assert disk.held_by_parents() == (READ | WRITE, READ)
    graph.detach(backend)
    assert disk.held_by_parents() == (NONE, ALL)
    wallet = await graph.open({"driver": "wallet", "file": node})
    assert disk.held_by_parents() == (READ | WRITE | RESIZE, READ | UNCHANGED)
    other = await graph.open(DISK)
    await graph.replace(wallet.children["file"], other)
    assert disk.held_by_parents() == (NONE, ALL)
    assert other.held_by_parents() == (READ | WRITE | RESIZE, READ | UNCHANGED)


class Refusing:
    """What a driver with a locked file does, and what it is told."""

    def __init__(self, model: Model, refuse: bool) -> None:
        self.told: list[tuple[str, Permission, Permission]] = []
        self.refuse = refuse
        for name in ("check", "commit", "abort"):
            setattr(model, f"{name}_permissions", self._note(name))

    def _note(self, name: str) -> Any:
        def note(held: Permission, shared: Permission) -> None:
            self.told.append((name, held, shared))
            if name == "check" and self.refuse:
                raise PermissionConflict("the file is locked by another process")

        return note


async def test_a_locked_file_refuses_for_all(graph: Graph) -> None:
    """Those that were asked before it are told that nothing came of it."""
    node = await graph.open({"driver": "twin", "file": DISK, "other": DISK})
    willing, locked = (
        Refusing(driver(node.children["file"].node), False),
        Refusing(driver(node.children["other"].node), True),
    )
    before = [driver(node.children[name].node).node.held_by_parents() for name in ("file", "other")]
    with pytest.raises(PermissionConflict, match="locked by another process"):
        user(graph, node, "guest", READ | WRITE, READ)
    for one, permissions in zip((willing, locked), before, strict=True):
        if one.told:
            assert [step[0] for step in one.told] == ["check", "abort"]
            assert one.told[-1][1:] == permissions
    assert locked.told
    assert node.held_by_parents() == (NONE, ALL)
    locked.refuse = False
    user(graph, node, "guest", READ | WRITE, READ)
    assert willing.told[-1] == ("commit", READ | WRITE, READ)
    assert locked.told[-1] == ("commit", READ | WRITE | RESIZE, READ & ~RESIZE)


# --- read-only ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [WRITE, RESIZE])
async def test_nobody_writes_to_what_is_read_only(graph: Graph, held: Permission) -> None:
    node = await graph.open({**DISK, "read-only": True, "node-name": "disk"})
    with pytest.raises(PermissionConflict, match="guest wants to write to node 'disk', which is read-only"):
        attach(graph, node, "guest", READ | held)
    attach(graph, node, "reader", READ | UNCHANGED)


async def test_read_only_far_below(graph: Graph) -> None:
    tree = {"driver": "watcher", "file": {"driver": "through", "file": {**DISK, "read-only": True, "node-name": "d"}}}
    node = await graph.open(tree)
    with pytest.raises(PermissionConflict, match=r"\(as its file\) wants to write to node 'd', which is read-only"):
        attach(graph, node, "guest", WRITE)
    assert not node.parents
    with pytest.raises(PermissionConflict, match="wants to write to node 'd', which is read-only"):
        await graph.open({"driver": "wallet", "file": "d"})


async def test_auto_read_only_passes_up(graph: Graph) -> None:
    disk = {**DISK, "read-only": True, "node-name": "d"}
    node = await graph.open({"driver": "through", "file": {"driver": "wallet", "file": disk}, "auto-read-only": True})
    assert node.read_only
    assert node.children["file"].node.read_only
    with pytest.raises(PermissionConflict, match="read-only"):
        attach(graph, node, "guest", WRITE)
    attach(graph, node, "reader", READ)


async def test_may_write_follows_what_is_held(graph: Graph) -> None:
    node = await graph.open(DISK)
    edge = Child("root", ChildRole.DATA, BlockBackend("user"), node)
    for held in EVERY:
        edge.held = held
        assert edge.may_write == (WRITE in held)
