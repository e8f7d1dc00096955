"""What several processes may have open at once, and what changes for a process that is one of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pynbd.block import registry
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Filter
from pynbd.block.errors import OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.server.export import Export
from pynbd.server.workers import block_bytes, check_alignment, check_shareable

RAW = {"driver": "raw", "file": {"driver": "file", "filename": "disk.raw"}}
DIRECT: dict[str, Any] = {**RAW, "cache": {"direct": "on"}}

WRITING = Permission.CONSISTENT_READ | Permission.WRITE
ALONE = Permission.ALL & ~(Permission.WRITE | Permission.RESIZE)


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("disk.raw")
    path.write_bytes(bytes(1 << 20))
    return path


def attached(graph: Graph, node: Node, held: Permission = WRITING, shared: Permission = ALONE) -> BlockBackend:
    backend = BlockBackend("test")
    graph.attach(backend, node, held, shared)
    return backend


def storage(node: Node) -> Node:
    return storage(node.children["file"].node) if node.children else node


async def closed(*graphs: Graph) -> None:
    for graph in graphs:
        for node in list(graph.nodes.values()):
            for edge in list(node.parents):
                if isinstance(edge.parent, BlockBackend):
                    graph.detach(edge.parent)
        await graph.close_all()


# --- which disks ----------------------------------------------------------------------------------------------


def test_who_says_nothing_is_for_one_process() -> None:
    assert Filter.several_processes == "never"
    kinds = {name: registry.driver_class(name).several_processes for name in registry.BUILT_IN}
    assert {name for name, can in kinds.items() if can == "always"} == {
        "file", "host_device", "luks", "nofilter", "null", "raw"
    }  # fmt: skip
    assert {name for name, can in kinds.items() if can == "reading"} == {"qcow2", "qcow2-snapshot"}


async def test_a_node_that_is_for_one_process_is_named() -> None:
    graph = Graph()
    await graph.open({"driver": "memory", "size": "1M", "node-name": "ram"})
    with pytest.raises(OptionError, match=r"^node 'ram' \(driver memory\) is for one process"):
        check_shareable(graph.nodes.values())
    await closed(graph)


async def test_a_guessed_format_is_watched_by_one_process() -> None:
    """But nobody watches what nobody writes."""
    graph = Graph()
    await graph.open("disk.raw")
    with pytest.raises(OptionError, match=r"its format was guessed.* \(-f raw\)"):
        check_shareable(graph.nodes.values())
    await closed(graph)
    await graph.open("disk.raw", read_only=True)
    check_shareable(graph.nodes.values())
    await closed(graph)


@pytest.mark.parametrize(
    ("tree", "options", "size", "fits"),
    [
        (RAW, {}, 1 << 20, True),
        (RAW, {}, 1000, True),
        (DIRECT, {}, 1 << 20, False),
        (DIRECT, {"read_only": True}, 1 << 20, True),
        (DIRECT, {"min_block": 65536}, 1 << 20, True),
        (DIRECT, {"min_block": 65536}, (1 << 20) + 100, False),
        ({**DIRECT, "offset": 65536}, {"min_block": 65536}, 1 << 20, False),
        ({"driver": "nofilter", "file": DIRECT}, {"min_block": 65536}, 1 << 20, True),
        ({"driver": "nofilter", "file": DIRECT}, {}, 1 << 20, False),
    ],
)
async def test_blocks_are_not_written_in_part_by_several(
    tree: dict[str, Any], options: dict[str, Any], size: int, fits: bool, disk: Path
) -> None:
    """Reading a block, changing a part of it and writing it back must not be done by two at one time."""
    disk.write_bytes(bytes(size))
    graph = Graph()
    try:
        node = await graph.open(tree)
    except OSError as problem:
        pytest.skip(f"no direct I/O here: {problem}")
    if "cache" in str(tree) and storage(node).driver.limits.request_alignment == 1:
        await closed(graph)
        pytest.skip("direct I/O of single bytes")
    export = Export("", attached(graph, node), **options)
    if fits:
        check_alignment(export)
    else:
        with pytest.raises(OptionError, match="several workers must not"):
            check_alignment(export)
    await closed(graph)


async def test_where_blocks_begin_elsewhere_no_minimum_helps() -> None:
    graph = Graph()
    node = await graph.open({**DIRECT, "offset": 512})
    if storage(node).driver.limits.request_alignment > 1:
        assert block_bytes(node) is None
    await closed(graph)


# --- one of several processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "syncs"), [(False, 2), (True, 3)])
async def test_a_flush_covers_what_others_have_written(
    shared: bool, syncs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it can't be left out because nothing was written here: a client's writes may have been made elsewhere."""
    made = list[int]()
    monkeypatch.setattr(os, "fdatasync", made.append)
    graph = Graph(shared=shared)
    backend = attached(graph, await graph.open(RAW))
    await backend.flush()
    await backend.write(0, memoryview(b"x"))
    await backend.flush()
    await backend.flush()
    assert len(made) == syncs
    await closed(graph)


async def test_locks_keep_strangers_off_as_long_as_one_is_left() -> None:
    first, second, stranger = Graph(), Graph(shared=True), Graph()
    attached(first, await first.open(RAW))
    attached(second, await second.open(RAW))
    await closed(first)
    with pytest.raises(PermissionConflict, match="Is another process using the image"):
        attached(stranger, await stranger.open(RAW))
    await closed(second)
    attached(stranger, stranger.nodes[next(reversed(stranger.nodes))])
    await closed(stranger)
