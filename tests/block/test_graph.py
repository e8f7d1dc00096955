"""Graphs are opened, changed and closed as a whole, or not at all."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend
from pynbd.block.chains import MAX_CHAIN_DEPTH, chain_depth
from pynbd.block.drain import drained
from pynbd.block.driver import Driver
from pynbd.block.errors import BlockError, OptionError, PermissionConflict
from pynbd.block.graph import MAX_BITMAPS, Graph
from pynbd.block.node import Node
from pynbd.block.options import MAX_OPTION_DEPTH, MAX_SIZE_BYTES
from pynbd.block.permissions import Permission
from tests.block.drivers import OPEN_DRIVERS, READ_WRITE, Call, attach, close, driver, model

DISK = {"driver": "model", "size": 4096}


def tree_of(depth: int, breadth: int = 2) -> dict[str, Any]:
    """A graph of layers, each with a file and a backing layer."""
    if not depth:
        return dict(DISK)
    return {"driver": "layer", "size": 64, "file": dict(DISK), "backing": tree_of(depth - 1)}


def parts(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The description of every node in a description."""
    yield tree
    for value in tree.values():
        if isinstance(value, dict) and "driver" in value:
            yield from parts(value)


# --- opening --------------------------------------------------------------------------------------------------


async def test_children_are_opened_first_and_closed_last(graph: Graph) -> None:
    node = await graph.open({**tree_of(2), "node-name": "top"})
    assert [type(each).name for each in OPEN_DRIVERS] == ["model", "model", "model", "layer", "layer"]
    assert OPEN_DRIVERS[-1] is node.driver
    assert set(graph.nodes.values()) == {each.node for each in OPEN_DRIVERS}
    await graph.close(node)
    assert not OPEN_DRIVERS
    assert not graph.nodes


@settings(max_examples=60, deadline=None)
@given(depth=st.integers(0, 4), where=st.integers(0, 12), close_fails=st.sets(st.integers(0, 12)))
def test_a_failure_to_open_leaves_nothing_open(depth: int, where: int, close_fails: set[int]) -> None:
    """Wherever in the graph it fails, and even if what was open already fails to close."""

    async def law() -> None:
        tree = tree_of(depth)
        every = list(parts(tree))
        for number, part in enumerate(every):
            part["fail-close"] = number in close_fails
        every[where % len(every)]["fail-open"] = True
        graph = Graph()
        user = await graph.open({**DISK, "node-name": "bystander"})
        with pytest.raises(OSError, match="told not to") as caught:
            await graph.open(tree)
        problem: BaseException | None = caught.value
        codes = []
        while isinstance(problem, OSError):
            codes.append(problem.errno)
            problem = problem.__context__
        assert errno.EACCES in codes
        assert list(graph.nodes) == ["bystander"]
        assert [user.driver] == OPEN_DRIVERS
        await close(graph)

    asyncio.run(law())


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(1, 3), turns=st.integers(0, 12))
def test_giving_up_an_opening_leaves_nothing_open(depth: int, turns: int) -> None:
    """Cancelled at any point."""

    async def law() -> None:
        graph = Graph()
        opening = asyncio.create_task(graph.open(tree_of(depth)))
        for _ in range(turns):
            await asyncio.sleep(0)
        # The drivers of these tests have taken what they take before they first wait.
        if not opening.done():
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            # Only the one that was opening may be left: its own contract is to release what it had taken.
            assert len(OPEN_DRIVERS) <= 1
            OPEN_DRIVERS.clear()
        await close(graph)
        assert not graph.nodes

    asyncio.run(law())


@pytest.mark.parametrize("position", ["size", "limits"])
async def test_a_driver_that_opens_with_nonsense_is_closed_again(
    graph: Graph, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = -1 if position == "size" else MAX_SIZE_BYTES + 1
    before = Driver.child_resized
    monkeypatch.setattr("tests.block.drivers.Layer.child_resized", before, raising=False)

    def wrong(self: Any, name: str) -> None:
        self.size = size

    monkeypatch.setattr("tests.block.drivers.Layer.child_resized", wrong, raising=False)
    with pytest.raises(BlockError, match=f"driver layer has a size of {size}, expected 0 to {MAX_SIZE_BYTES}"):
        await graph.open({"driver": "layer", "file": DISK})
    assert not graph.nodes


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "no driver is given (options: none)"),
        ({"size": 1}, "no driver is given (options: size)"),
        ({"driver": "through"}, "file: driver 'through' needs a node here"),
        ({"driver": "through", "file": None}, "file: driver 'through' needs a node here"),
        ({"driver": "through", "file": "nowhere"}, "file: there is no node 'nowhere'; open are: none"),
        ({"driver": "through", "file": 7}, "file: expected the name of a node or its options, found 7"),
        ({"driver": "through", "file": {}}, "file.driver: the driver's name is missing"),
        ({"driver": 5}, "driver: the driver's name is missing"),
        ({"driver": "through", "file": {"driver": "modle"}}, "driver 'modle' is unknown (did you mean 'model'?)"),
        (
            {"driver": "through", "file": {"driver": "model", "sise": 5}},
            "file.sise: driver 'model' has no such option (did you mean 'size'?)",
        ),
        (
            {"driver": "model", "file": {"driver": "model"}},
            "file: driver 'model' has no such option",
        ),
        ({"driver": "model", "node-name": "#1"}, "node-name: '#1' is no name"),
        ({"driver": "model", "node-name": "a b"}, "node-name: 'a b' is no name"),
        ({"driver": "model", "node-name": "x" * 256}, "is no name"),
        (
            {"driver": "through", "node-name": "twice", "file": {"driver": "model", "node-name": "twice"}},
            "node-name: 'twice' is given to two nodes",
        ),
    ],
)
async def test_a_wrong_description_opens_nothing(graph: Graph, tree: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        await graph.open(tree)
    assert said in str(caught.value)
    assert not graph.nodes
    if "file" not in tree or "driver" in tree:
        with pytest.raises(OptionError):
            graph.check(tree)


async def test_a_name_is_given_once(graph: Graph) -> None:
    named = {**DISK, "node-name": "disk"}
    results = await asyncio.gather(*(graph.open(named) for _ in range(3)), return_exceptions=True)
    nodes = [result for result in results if isinstance(result, Node)]
    refused = [result for result in results if isinstance(result, OptionError)]
    assert len(nodes) == 1
    assert len(refused) == 2
    assert graph.nodes == {"disk": nodes[0]}
    with pytest.raises(OptionError, match="node-name: there is a node 'disk' already"):
        await graph.open(named)
    await graph.close(nodes[0])
    await graph.open(named)


async def test_nodes_without_a_name_get_one_of_their_own(graph: Graph) -> None:
    names = {(await graph.open(dict(DISK))).name for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("#model") for name in names)


async def test_defaults_and_what_overrides_them(graph: Graph) -> None:
    assert (await graph.open(DISK, read_only=True)).read_only
    assert not (await graph.open({**DISK, "read-only": False}, read_only=True)).read_only


async def test_options_that_children_inherit(graph: Graph) -> None:
    tree = {
        "driver": "layer",
        "size": 64,
        "read-only": True,
        "cache": {"no-flush": True},
        "file": {**DISK, "read-only": "off"},
        "backing": dict(DISK),
    }
    node = await graph.open(tree)
    file, backing = node.children["file"].node, node.children["backing"].node
    assert (node.read_only, file.read_only, backing.read_only) == (True, False, True)
    assert file.options.cache.no_flush
    assert file.options.discard == "unmap"
    assert node.options.discard == "ignore"
    writable = await graph.open({"driver": "layer", "size": 64, "backing": dict(DISK)})
    assert writable.children["backing"].node.read_only, "a backing file is read-only, whatever is above it"


async def test_a_child_may_be_an_open_node(graph: Graph) -> None:
    disk = await graph.open({**DISK, "node-name": "disk"})
    one = await graph.open({"driver": "through", "file": "disk"})
    two = await graph.open({"driver": "through", "file": disk})
    with pytest.raises(BlockError, match="node 'disk' is in use by node '#through"):
        await graph.close(disk)
    await graph.close(one)
    assert "disk" in graph.nodes
    await graph.close(two)
    assert not graph.nodes


# --- limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 512])
@pytest.mark.parametrize("kind", ["through", "watcher", "wallet", "layer"])
async def test_the_deepest_chain_works_and_no_deeper(graph: Graph, kind: str, alignment: int) -> None:
    """Reads, writes, flushes and status go all the way down; one node more is refused."""
    name = "backing" if kind == "layer" else "file"
    own = {"size": 4096, "unit": 16} if kind == "layer" else {}
    node = await graph.open({**DISK, "limits": {"request_alignment": alignment}})
    disk = driver(node)
    disk.data[:] = b"x" * 4096
    for _ in range(MAX_CHAIN_DEPTH - 1):
        node = await graph.open({"driver": kind, name: node, **own})
    assert chain_depth(node) == MAX_CHAIN_DEPTH
    backend = attach(graph, node)
    into = memoryview(bytearray(64))
    await backend.read(64, into)
    assert bytes(into) == b"x" * 64
    extents = await backend.block_status(64, 64)
    assert extents[0].depth == (MAX_CHAIN_DEPTH if kind == "layer" else 1)
    await backend.write(64, memoryview(b"y" * 64))
    await backend.flush()
    if kind != "layer":
        assert disk.durable[64:128] == b"y" * 64
    with pytest.raises(BlockError, match=f"a chain of more than {MAX_CHAIN_DEPTH} nodes"):
        await graph.open({"driver": kind, name: node, **own})


async def test_the_deepest_description(graph: Graph) -> None:
    tree = dict(DISK)
    for _ in range(MAX_OPTION_DEPTH):
        tree = {"driver": "through", "file": tree}
    await graph.open(tree)
    with pytest.raises(OptionError, match=f"more than {MAX_OPTION_DEPTH} levels"):
        await graph.open({"driver": "through", "file": tree})


async def test_diamonds_are_measured_in_time(graph: Graph) -> None:
    """Each level twice over the one below: ways down double, nodes do not."""
    node = await graph.open({**DISK, "read-only": True})
    for _ in range(60):
        node = await graph.open({"driver": "twin", "read-only": True, "file": node, "other": node})
    assert chain_depth(node) == 61
    backend = attach(graph, node, held=Permission.CONSISTENT_READ)
    async with drained(node):
        assert backend.paused


async def test_bitmaps_of_a_node_are_bounded(graph: Graph) -> None:
    node = await graph.open(dict(DISK))
    first = await graph.add_bitmap(node, "first")
    node.bitmaps.update({f"b{number}": first for number in range(MAX_BITMAPS - 1)})
    with pytest.raises(BlockError, match=f"{MAX_BITMAPS} bitmaps"):
        await graph.add_bitmap(node, "one more")
    node.bitmaps.clear()


# --- closing --------------------------------------------------------------------------------------------------


async def test_closing_flushes(graph: Graph) -> None:
    node = await graph.open({"driver": "watcher", "file": DISK})
    disk = model(node)
    await node.path.write(0, memoryview(b"x"), 0)
    await graph.close(node)
    assert disk.durable[:1] == b"x"
    reader = await graph.open({**DISK, "read-only": True})
    disk = model(reader)
    await graph.close(reader)
    assert not disk.calls


async def test_what_fails_as_it_is_closed_is_closed_all_the_same(graph: Graph) -> None:
    tree = tree_of(3)
    for part in parts(tree):
        part["fail-close"] = True
    node = await graph.open(tree)
    for each in list(OPEN_DRIVERS):
        if isinstance(each, type(model(node.children["file"].node))):
            each.fails = 100
    with pytest.raises(OSError, match="told not to close well"):
        await graph.close(node)
    assert not graph.nodes
    assert not OPEN_DRIVERS


async def test_close_all_closes_all(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    await graph.open({**DISK, "fail-close": True, "node-name": "first"})
    await graph.open({**DISK, "node-name": "second"})
    used = await graph.open({**DISK, "node-name": "used"})
    backend = attach(graph, used)
    with pytest.raises(OSError, match="first: told not to close well"):
        await graph.close_all()
    assert list(graph.nodes) == ["used"]
    assert "closing first" in caplog.text
    graph.detach(backend)


async def test_a_node_is_closed_once_and_then_not_used(graph: Graph) -> None:
    node = await graph.open({**DISK, "node-name": "disk"})
    gate = model(node).gates["flush"] = asyncio.Event()
    closing = asyncio.create_task(graph.close(node))
    await asyncio.sleep(0)
    with pytest.raises(BlockError, match="node 'disk' is being closed"):
        await graph.close(node)
    with pytest.raises(BlockError, match="node 'disk' is being closed"):
        attach(graph, node)
    with pytest.raises(BlockError, match="node 'disk' is being closed"):
        await graph.open({"driver": "through", "file": "disk"})
    await graph.close_all()
    gate.set()
    await closing
    assert not node.parents


# --- replacing ------------------------------------------------------------------------------------------------


async def test_a_replaced_node_of_another_size(graph: Graph) -> None:
    small, large = await graph.open({**DISK, "size": 512}), await graph.open({**DISK, "size": 8192})
    top = await graph.open({"driver": "watcher", "file": small})
    backend = attach(graph, top)
    told: list[int] = []
    backend.on_resize.append(told.append)
    await graph.replace(top.children["file"], large)
    assert (backend.size, told) == (8192, [8192])
    await graph.close(small)


async def test_no_loops(graph: Graph) -> None:
    disk = await graph.open(dict(DISK))
    lower = await graph.open({"driver": "through", "file": disk, "node-name": "lower"})
    upper = await graph.open({"driver": "through", "file": lower, "node-name": "upper"})
    for target in (upper, lower):
        with pytest.raises(BlockError, match="that would make a loop"):
            await graph.replace(lower.children["file"], target)
    assert lower.children["file"].node is disk
    assert upper.path == disk.path or upper.path.read == disk.path.read


async def test_a_refused_replace_changes_nothing(graph: Graph) -> None:
    """The path, the edges, the permissions, and what the drivers were told of them."""
    node, other = await graph.open(dict(DISK)), await graph.open({**DISK, "node-name": "other"})
    user, owner = attach(graph, node, "user"), BlockBackend("owner")
    graph.attach(owner, other, READ_WRITE, Permission.CONSISTENT_READ)
    told: dict[Node, tuple[Permission, Permission]] = {}

    def note(node: Node) -> None:
        def commit(held: Permission, shared: Permission) -> None:
            told[node] = (held, shared)

        node.driver.commit_permissions = commit  # type: ignore[method-assign]  # to see what it is told
        node.driver.abort_permissions = commit  # type: ignore[method-assign]

    for each in (node, other):
        note(each)
        told[each] = each.held_by_parents()
    before = dict(told)
    assert user.root is not None
    with pytest.raises(PermissionConflict, match="user needs write, resize on node 'other', which owner does not"):
        await graph.replace(user.root, other)
    assert user.node is node
    assert node.parents == [user.root]
    assert other.parents == [owner.root]
    assert told == before
    assert not user.paused
    await user.write(0, memoryview(b"x"))
    assert driver(node).calls == [Call("write", 0, 1)]
