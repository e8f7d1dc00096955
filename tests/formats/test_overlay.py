"""`overlay`: the bytes, against a model; who waits for whom; what lies where."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Preallocation
from pynbd.block.errors import OptionError, PermissionConflict
from pynbd.block.extents import Status
from pynbd.block.graph import Graph
from pynbd.block.holding import hold_nothing
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.filters.blkdebug import BlkDebug
from tests.restless import RESTLESS, Restless, restless

CLUSTER = 4096
SIZE = 16 * CLUSTER

QUICK = int(RequestFlag.NO_FALLBACK)
UNMAP = int(RequestFlag.MAY_UNMAP)


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await graph.close_all()


async def overlaid(graph: Graph, **options: object) -> tuple[Node, Restless, Restless]:
    """(overlay, its file's driver, its backing file's driver), over random bytes."""
    node = await graph.open(
        {
            "driver": "overlay",
            "cluster-size": CLUSTER,
            "file": {"driver": RESTLESS, "size": 0, "seed": 1},
            "backing": {"driver": RESTLESS, "size": SIZE, "seed": 2},
            "discard": "unmap",
            **options,
        }
    )
    return node, restless(node.children["file"].node), restless(node.children["backing"].node)


async def content(node: Node, offset: int = 0, length: int | None = None) -> bytes:
    found = memoryview(bytearray(node.size - offset if length is None else length))
    await node.path.read(offset, found, 0)
    return bytes(found)


async def layers(node: Node) -> list[tuple[int, str, int]]:
    """(length, kind, depth) of the whole disk."""
    found: list[tuple[int, str, int]] = []
    offset = 0
    while offset < node.size:
        for extent in await node.block_status(offset, node.size - offset):
            kind = "zero" if extent.zero else "data" if extent.data else "nothing"
            if found and found[-1][1:] == (kind, extent.depth):
                found[-1] = (found[-1][0] + extent.length, kind, extent.depth)
            else:
                found.append((extent.length, kind, extent.depth))
            offset += extent.length
    return found


# --- bytes -----------------------------------------------------------------------------------------------------


async def test_untouched_it_is_the_backing_file(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    assert node.size == SIZE
    assert await content(node) == backing.data
    assert file.calls == []
    assert await layers(node) == [(SIZE, "data", 2)]


async def test_a_small_write_copies_its_cluster_up_in_one_write(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    model = bytearray(backing.data)
    await node.path.write(CLUSTER + 10, memoryview(b"new"), 0)
    model[CLUSTER + 10 : CLUSTER + 13] = b"new"
    assert file.calls == [("write", CLUSTER, CLUSTER)]
    assert await content(node) == model
    assert await layers(node) == [(CLUSTER, "data", 2), (CLUSTER, "data", 1), (SIZE - 2 * CLUSTER, "data", 2)]
    file.calls.clear()
    backing.calls.clear()
    await node.path.write(CLUSTER, memoryview(b"again"), 0)
    assert (file.calls, backing.calls) == ([("write", CLUSTER, 5)], [])


async def test_a_large_write_copies_up_its_ends_only(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    model = bytearray(backing.data)
    data = bytes(range(256)) * 64
    await node.path.write(100, memoryview(data), 0)
    model[100 : 100 + len(data)] = data
    assert file.calls == [
        ("write", 0, CLUSTER),
        ("write", CLUSTER, 3 * CLUSTER),
        ("write", 4 * CLUSTER, CLUSTER),
    ]
    assert backing.calls == [("read", 0, 100), ("read", 100 + len(data), CLUSTER - 100)]
    assert await content(node) == model


async def test_the_last_cluster_may_be_short(graph: Graph) -> None:
    size = 3 * CLUSTER + 1000
    node, file, backing = await overlaid(graph, backing={"driver": RESTLESS, "size": size, "seed": 2})
    model = bytearray(backing.data)
    await node.path.write(3 * CLUSTER, memoryview(b"e" * 1000), 0)
    assert file.calls == [("write", 3 * CLUSTER, 1000)]
    assert backing.calls == []
    model[3 * CLUSTER :] = b"e" * 1000
    await node.path.write(size - 1, memoryview(b"!"), 0)
    model[-1:] = b"!"
    assert await content(node) == model
    await node.path.write_zeroes(3 * CLUSTER, 1000, QUICK)
    assert await layers(node) == [(3 * CLUSTER, "data", 2), (1000, "zero", 1)]


async def test_backing_file_and_its_end(graph: Graph) -> None:
    """A disk that is longer than its backing file is zero there, also where a cluster is copied up."""
    node, _, backing = await overlaid(graph, size=SIZE + 3 * CLUSTER)
    model = bytearray(backing.data) + bytes(3 * CLUSTER)
    assert await content(node) == model
    await node.path.write(SIZE - 1, memoryview(b"xy"), 0)
    await node.path.write(SIZE + 2 * CLUSTER + 7, memoryview(b"z"), 0)
    model[SIZE - 1 : SIZE + 1] = b"xy"
    model[SIZE + 2 * CLUSTER + 7] = ord("z")
    assert await content(node) == model


async def test_the_file_s_former_content_is_not_seen(graph: Graph) -> None:
    node, file, backing = await overlaid(graph, file={"driver": RESTLESS, "size": SIZE, "seed": 3})
    assert await content(node) == backing.data
    await node.path.write_zeroes(0, 3 * CLUSTER, 0)
    await node.path.write(10, memoryview(b"x"), 0)
    assert await content(node, 0, 3 * CLUSTER) == bytes(10) + b"x" + bytes(3 * CLUSTER - 11)
    assert file.data[CLUSTER : 3 * CLUSTER] != bytes(2 * CLUSTER)


FIXED_DISK = """
from pynbd.block.driver import Driver

class Fixed(Driver):
    size = 4096
    async def read(self, offset, into): into[:] = bytes(len(into))
    async def write(self, offset, data): pass
"""


async def test_a_file_that_does_not_grow_is_made_long_enough(graph: Graph, tmp_path: Path) -> None:
    node, _, _ = await overlaid(graph, file={"driver": "null", "size": 0})
    assert node.children["file"].size == SIZE
    fixed = tmp_path / "fixed.py"
    fixed.write_text(FIXED_DISK)
    await overlaid(graph, file={"driver": str(fixed)}, size=4096)
    with pytest.raises(OSError, match="has 4096 bytes, needed are 65536, and it can't be made longer") as failure:
        await overlaid(graph, file={"driver": str(fixed)})
    assert failure.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("size", [0, 100, 511, 3000, 4 << 20, "1.5k"])
async def test_cluster_size_is_a_power_of_two_in_range(graph: Graph, size: object) -> None:
    with pytest.raises(OptionError, match="is no power of two from 512 to 2097152"):
        await overlaid(graph, **{"cluster-size": size})
    assert not graph.nodes


async def test_read_only(graph: Graph) -> None:
    node, _, backing = await overlaid(graph, **{"read-only": True})
    assert await content(node) == backing.data
    with pytest.raises(OSError, match="read-only node") as failure:
        await node.path.write(0, memoryview(b"x"), 0)
    assert failure.value.errno == errno.EROFS


async def test_nobody_else_writes_to_the_file(graph: Graph) -> None:
    node, _, _ = await overlaid(graph)
    intruder = BlockBackend("intruder")
    with pytest.raises(PermissionConflict, match="as its file"):
        graph.attach(intruder, node.children["file"].node, Permission.WRITE)


async def test_the_backing_file_is_read_only(graph: Graph) -> None:
    node, _, _ = await overlaid(graph)
    assert node.children["backing"].node.read_only
    assert not node.children["backing"].held & (Permission.WRITE | Permission.RESIZE)


async def test_info(graph: Graph) -> None:
    node, _, _ = await overlaid(graph)
    await node.path.write(0, memoryview(b"x" * 2 * CLUSTER), 0)
    await node.path.write_zeroes(3 * CLUSTER, 5 * CLUSTER, 0)
    info = await node.info()
    assert info.cluster_size == CLUSTER
    assert info.specific == {"data-clusters": 2, "zero-clusters": 5}


# --- zeroes and discards -----------------------------------------------------------------------------------------


async def test_whole_clusters_become_zero_without_io(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    await node.path.write_zeroes(CLUSTER, 2 * CLUSTER, QUICK | UNMAP)
    assert (file.calls, backing.calls) == ([], [])
    assert await content(node) == backing.data[:CLUSTER] + bytes(2 * CLUSTER) + backing.data[3 * CLUSTER :]
    assert await layers(node) == [(CLUSTER, "data", 2), (2 * CLUSTER, "zero", 1), (SIZE - 3 * CLUSTER, "data", 2)]


async def test_parts_of_clusters_are_written(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    model = bytearray(backing.data)
    await node.path.write_zeroes(CLUSTER - 1, CLUSTER + 2, 0)
    model[CLUSTER - 1 : 2 * CLUSTER + 1] = bytes(CLUSTER + 2)
    assert await content(node) == model
    assert await layers(node) == [
        (CLUSTER, "data", 1),
        (CLUSTER, "zero", 1),
        (CLUSTER, "data", 1),
        (SIZE - 3 * CLUSTER, "data", 2),
    ]
    file.calls.clear()
    await node.path.write_zeroes(CLUSTER + 5, 5, 0)
    await node.path.write_zeroes(5, 5, QUICK)
    assert file.calls == [("write_zeroes", 5, 5)]


async def test_quick_zeroes_change_all_or_nothing(graph: Graph) -> None:
    node, _, _ = await overlaid(graph)
    await node.path.write(2 * CLUSTER, memoryview(b"x" * CLUSTER), 0)
    await node.path.write(0, memoryview(b"x" * CLUSTER), 0)
    model = await content(node)
    for offset, length in ((CLUSTER // 2 * 3, CLUSTER * 3), (10, 3 * CLUSTER - 20), (5 * CLUSTER + 1, 1)):
        with pytest.raises(OSError, match="copy of clusters") as failure:
            await node.path.write_zeroes(offset, length, QUICK)
        assert failure.value.errno == errno.ENOTSUP
        assert await content(node) == model
    await node.path.write_zeroes(10, 2 * CLUSTER - 10, QUICK)
    assert await content(node, 0, 2 * CLUSTER) == b"x" * 10 + bytes(2 * CLUSTER - 10)


async def test_discard_zeroes_whole_clusters_and_frees_the_file(graph: Graph) -> None:
    node, file, backing = await overlaid(graph)
    await node.path.write(0, memoryview(b"x" * 4 * CLUSTER), 0)
    file.calls.clear()
    await node.path.discard(CLUSTER - 1, 4 * CLUSTER + 2)
    assert file.calls == [("discard", CLUSTER, 3 * CLUSTER)]
    assert await content(node) == b"x" * CLUSTER + bytes(4 * CLUSTER) + backing.data[5 * CLUSTER :]
    assert await layers(node) == [(CLUSTER, "data", 1), (4 * CLUSTER, "zero", 1), (SIZE - 5 * CLUSTER, "data", 2)]
    await node.path.write(2 * CLUSTER + 1, memoryview(b"y"), 0)
    assert await content(node, 2 * CLUSTER, CLUSTER) == b"\0y" + bytes(CLUSTER - 2)


async def test_zeroes_keep_the_space_unless_it_may_be_unmapped(graph: Graph) -> None:
    node, file, _ = await overlaid(graph)
    for flags, freed in ((0, []), (UNMAP, [("discard", 0, CLUSTER)])):
        await node.path.write(0, memoryview(b"x" * CLUSTER), 0)
        file.calls.clear()
        await node.path.write_zeroes(0, CLUSTER, flags)
        assert file.calls == freed


# --- size ----------------------------------------------------------------------------------------------------------


async def test_what_is_grown_again_is_zero(graph: Graph) -> None:
    """Neither the backing file's old bytes nor the file's come back."""
    node, file, backing = await overlaid(graph)
    await node.path.write(4 * CLUSTER, memoryview(b"x" * 4 * CLUSTER), 0)
    await node.truncate(5 * CLUSTER + 100)
    assert node.size == 5 * CLUSTER + 100
    assert file.calls[-1] == ("discard", 6 * CLUSTER, 2 * CLUSTER)
    await node.truncate(SIZE + CLUSTER)
    model = backing.data[: 4 * CLUSTER] + b"x" * (CLUSTER + 100)
    model += bytes(SIZE + CLUSTER - len(model))
    assert await content(node) == model
    await node.truncate(CLUSTER + 10)
    await node.truncate(2 * CLUSTER)
    model = model[: CLUSTER + 10] + bytes(CLUSTER - 10)
    assert await content(node) == model
    await node.path.write(2 * CLUSTER - 5, memoryview(b"y"), 0)
    model[-5:-4] = b"y"
    assert await content(node) == model


async def test_a_write_that_waited_while_the_disk_shrank_fails(graph: Graph) -> None:
    node, _, _ = await overlaid(graph, file=held())
    debug = cast(BlkDebug, node.children["file"].node.driver)
    await node.path.write(SIZE - CLUSTER, memoryview(b"x" * CLUSTER), 0)
    debug.breakpoint("cow_write", "A")
    first = asyncio.create_task(node.path.write(SIZE - 2 * CLUSTER, memoryview(b"y"), 0))
    await debug.wait_suspended("A")
    shrink = asyncio.create_task(node.truncate(CLUSTER))
    await asyncio.sleep(0)
    late = [
        asyncio.create_task(node.path.write(SIZE - CLUSTER, memoryview(b"z"), 0)),
        asyncio.create_task(node.path.write_zeroes(SIZE - CLUSTER, 5, 0)),
    ]
    discard = asyncio.create_task(node.path.discard(SIZE - CLUSTER, CLUSTER))
    await asyncio.sleep(0)
    debug.resume("A")
    await asyncio.gather(first, shrink, discard)
    assert node.size == CLUSTER
    for request in late:
        with pytest.raises(OSError, match="size 4096") as failure:
            await request
        assert failure.value.errno == errno.ENOSPC
    await node.truncate(SIZE)
    assert await content(node, CLUSTER) == bytes(SIZE - CLUSTER)


async def test_preallocation_is_refused(graph: Graph) -> None:
    node, _, _ = await overlaid(graph)
    with pytest.raises(OSError, match="preallocation 'full'") as failure:
        await node.truncate(2 * SIZE, Preallocation.FULL)
    assert failure.value.errno == errno.ENOTSUP
    assert node.size == SIZE


# --- who waits for whom ----------------------------------------------------------------------------------------------


def held() -> dict[str, Any]:
    """A file under blkdebug, whose requests can be held."""
    return {"driver": "blkdebug", "image": {"driver": RESTLESS, "size": SIZE, "seed": 1}}


async def test_a_second_writer_of_a_cluster_waits_until_it_is_copied_up(graph: Graph) -> None:
    node, _, backing = await overlaid(graph, file=held())
    debug = cast(BlkDebug, node.children["file"].node.driver)
    debug.breakpoint("cow_write", "A")
    first = asyncio.create_task(node.path.write(10, memoryview(b"first"), 0))
    await debug.wait_suspended("A")
    second = asyncio.create_task(node.path.write(100, memoryview(b"second"), 0))
    await node.path.write(CLUSTER, memoryview(b"elsewhere"), 0)  # another cluster: nobody waits
    assert not second.done()
    assert await content(node, 0, CLUSTER) == backing.data[:CLUSTER]
    debug.resume("A")
    await asyncio.gather(first, second)
    model = bytearray(backing.data[:CLUSTER])
    model[10:15] = b"first"
    model[100:106] = b"second"
    assert await content(node, 0, CLUSTER) == model


async def test_writers_into_clusters_of_the_file_go_side_by_side(graph: Graph) -> None:
    node, file, _ = await overlaid(graph)
    await node.path.write(0, memoryview(bytes(CLUSTER)), 0)
    file.options = type(file.options)(suspends=1.0)
    await asyncio.gather(*(node.path.write(n * 16, memoryview(bytes([n]) * 16), 0) for n in range(256)))
    assert file.most_in_flight > 200
    assert await content(node, 0, CLUSTER) == b"".join(bytes([n]) * 16 for n in range(256))


async def test_writers_of_different_clusters_allocate_side_by_side(graph: Graph) -> None:
    node, file, _ = await overlaid(graph)
    file.options = type(file.options)(suspends=1.0)
    await asyncio.gather(*(node.path.write(n * CLUSTER + 5, memoryview(b"x"), 0) for n in range(16)))
    assert file.most_in_flight > 8


async def test_a_write_finds_its_cluster_discarded_when_its_turn_comes(graph: Graph) -> None:
    node, _, _ = await overlaid(graph, file=held())
    debug = cast(BlkDebug, node.children["file"].node.driver)
    await node.path.write(0, memoryview(b"x" * CLUSTER), 0)
    debug.breakpoint("write_aio", "A")
    first = asyncio.create_task(node.path.write(0, memoryview(b"a"), 0))
    await debug.wait_suspended("A")
    discard = asyncio.create_task(node.path.discard(0, CLUSTER))
    await asyncio.sleep(0)
    second = asyncio.create_task(node.path.write(5, memoryview(b"b"), 0))
    await asyncio.sleep(0)
    assert not discard.done()
    debug.resume("A")
    await asyncio.gather(first, discard, second)
    assert await content(node, 0, CLUSTER) == b"\0\0\0\0\0b" + bytes(CLUSTER - 6)


async def test_writes_in_place(graph: Graph) -> None:
    """Into clusters of the file, unless somebody is changing their state."""
    node = await graph.open(
        {
            "driver": "overlay",
            "cluster-size": CLUSTER,
            "file": {"driver": "memory", "size": SIZE},
            "backing": {"driver": "delay", "read": 0.001, "file": {"driver": RESTLESS, "size": SIZE, "seed": 2}},
            "discard": "unmap",
        }
    )
    now = node.path.write_now
    assert not now(5, memoryview(b"x"))
    await node.path.write(0, memoryview(b"a" * CLUSTER), 0)
    assert now(5, memoryview(b"x"))
    assert await content(node, 0, 10) == b"aaaaaxaaaa"
    assert not now(CLUSTER - 1, memoryview(b"xy"))
    copying = asyncio.create_task(node.path.write(CLUSTER - 1, memoryview(b"xy"), 0))
    await asyncio.sleep(0)
    assert not now(5, memoryview(b"y"))
    await copying
    assert now(CLUSTER - 1, memoryview(b"yx"))
    assert await content(node, CLUSTER - 2, 3) == b"ayx"


@pytest.mark.parametrize("event", ["cow_write", "cow_read", "cluster_alloc"])
async def test_a_failed_allocation_changes_nothing(graph: Graph, event: str) -> None:
    rules = [{"event": event, "errno": errno.ENOSPC, "once": True}]
    node, _, backing = await overlaid(graph, file={**held(), "inject-error": rules})
    model = bytes(backing.data)
    with pytest.raises(OSError, match="injected into write") as failure:
        await node.path.write(5, memoryview(b"x"), 0)
    assert failure.value.errno == errno.ENOSPC
    assert await content(node) == model
    assert await layers(node) == [(SIZE, "data", 2)]
    await node.path.write(5, memoryview(b"x"), 0)
    assert await content(node) == model[:5] + b"x" + model[6:]


async def test_events(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    node, _, _ = await overlaid(graph, file=held())
    debug = cast(BlkDebug, node.children["file"].node.driver)
    events: list[str] = []

    def note(event: str) -> list[str]:
        events.append(event)
        return []

    monkeypatch.setattr(debug.engine, "trigger", note)
    await node.path.write(5, memoryview(b"x"), 0)
    await content(node)
    events = [event for event in events if not event.startswith("pwritev")]
    assert events == ["cluster_alloc", "cow_read", "cow_read", "cow_write", "read_aio", "read_backing_aio"]


# --- where ---------------------------------------------------------------------------------------------------------


async def test_locate(graph: Graph) -> None:
    node = await graph.open(
        {
            "driver": "overlay",
            "cluster-size": CLUSTER,
            "file": {"driver": "memory", "size": 0},
            "backing": {"driver": "memory", "size": SIZE},
            "size": SIZE + CLUSTER,
        }
    )
    file, backing = node.children["file"], node.children["backing"]
    await node.path.write(CLUSTER, memoryview(b"x" * CLUSTER), 0)
    await node.path.write_zeroes(3 * CLUSTER, CLUSTER, 0)
    locate = node.path.locate
    assert locate(0, SIZE) == backing.locate(0, CLUSTER)
    assert locate(CLUSTER + 5, 10) == file.locate(CLUSTER + 5, 10)
    assert locate(CLUSTER + 5, SIZE) == file.locate(CLUSTER + 5, CLUSTER - 5)
    assert locate(3 * CLUSTER, 10) is None
    assert locate(SIZE - 10, 20) == backing.locate(SIZE - 10, 10)
    assert locate(SIZE, 10) is None
    assert locate(SIZE + CLUSTER, 10) is None
    assert not node.driver.located_for_good()
    assert node.driver.hold_located(hold_nothing) is hold_nothing


async def test_status_tells_holes_of_the_file_and_where_bytes_lie(graph: Graph) -> None:
    file = {"driver": RESTLESS, "size": 0, "holes": True}
    node, _, _ = await overlaid(graph, file=file)
    await node.path.write(0, memoryview(b"x" * 512 + bytes(CLUSTER - 512)), 0)
    first, second, *_ = await node.block_status(0, SIZE)
    below = node.children["file"].node
    assert (first.length, first.status, first.depth) == (512, Status.DATA | Status.ALLOCATED, 1)
    assert (first.where, first.host_offset) == (below, 0)
    assert second.zero
    assert (second.where, second.host_offset) == (below, 512)


async def test_allocated_size_is_the_file_s(graph: Graph) -> None:
    node = await graph.open(
        {
            "driver": "overlay",
            "file": {"driver": "memory", "size": 0},
            "backing": {"driver": "memory", "size": "1G"},
            "discard": "unmap",
        }
    )
    assert await node.allocated_size() == 0
    await node.path.write(1 << 29, memoryview(b"x"), 0)
    assert await node.allocated_size() == 64 << 10
    await node.path.discard(1 << 29, 64 << 10)
    assert await node.allocated_size() == 0


async def test_huge_disks_cost_what_is_changed(graph: Graph) -> None:
    huge = 1 << 62
    node = await graph.open(
        {
            "driver": "overlay",
            "file": {"driver": "null", "size": huge},
            "backing": {"driver": "null", "size": huge},
        }
    )
    await node.path.write(huge - 5, memoryview(b"x"), 0)
    assert [extent.depth for extent in await node.block_status(huge - (1 << 20), 1 << 20)] == [2, 1]
    with pytest.raises(OSError, match="too many clusters") as failure:
        await node.path.write_zeroes(0, huge, 0)
    assert failure.value.errno == errno.ENOSPC
