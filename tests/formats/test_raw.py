"""The format raw: a file as it is, or a part of it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import OptionError
from pynbd.block.extents import merged
from pynbd.block.graph import Graph
from pynbd.block.holding import hold_nothing
from pynbd.block.permissions import Permission
from pynbd.formats.raw import Raw
from tests.conftest import DiskMaker
from tests.peers import require_tool, run

SIZE = 1 << 20


async def opened(graph: Graph, path: Path, **options: object) -> BlockBackend:
    tree = {"driver": "raw", "file": {"driver": "file", "filename": str(path), "node-name": "below"}, **options}
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(tree), Permission.ALL)
    return backend


@pytest.fixture
def graph() -> Graph:
    return Graph()


async def closed(graph: Graph, backend: BlockBackend) -> None:
    graph.detach(backend)
    await graph.close_all()


def test_anything_may_be_raw() -> None:
    assert Raw.probe(b"", "") == Raw.probe(b"QFI\xfb", "x.qcow2") == 1


async def test_a_whole_file_is_not_on_the_path(graph: Graph, make_disk: DiskMaker) -> None:
    """Requests to the node are requests to the file."""
    backend = await opened(graph, make_disk(SIZE), discard="unmap")
    below = graph.nodes["below"]
    assert backend.node.path == below.path
    assert backend.node.driver.located_for_good() == below.driver.located_for_good()
    assert backend.node.driver.hold_located(hold_nothing) is hold_nothing
    await closed(graph, backend)


async def test_a_window(graph: Graph, make_disk: DiskMaker) -> None:
    path = make_disk(SIZE)
    content = path.read_bytes()
    backend = await opened(graph, path, offset=4097, size=100000)
    assert backend.size == 100000
    into = memoryview(bytearray(100000))
    await backend.read(0, into)
    assert into == content[4097:104097]
    found = backend.locate(10, 1 << 20)
    if found is not None:
        assert found.length == 99990
        assert os.pread(found.fd, 100, found.host_offset) == content[4107:4207]
    await backend.write(0, memoryview(b"first"), 1)
    await backend.write_zeroes(100, 50)
    await backend.write(99996, memoryview(b"last"))
    await backend.discard(200, 50)
    await backend.cache(0, 100000)
    await backend.flush()
    await closed(graph, backend)
    wanted = bytearray(content)
    wanted[4097:4102] = b"first"
    wanted[4197:4247] = bytes(50)
    wanted[104093:104097] = b"last"
    assert path.read_bytes() == wanted


async def test_nothing_is_written_behind_a_window(graph: Graph, make_disk: DiskMaker) -> None:
    """Its size is fixed, even for who may resize the node and writes past its end."""
    path = make_disk(SIZE)
    content = path.read_bytes()
    backend = await opened(graph, path, offset=4096, size=8192)
    for request in (
        backend.node.path.write(8192, memoryview(b"x"), 0),
        backend.node.path.write(8000, memoryview(bytes(193)), 0),
        backend.node.path.write_zeroes(8192, 1, 0),
    ):
        with pytest.raises(OSError) as caught:
            await request
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="fixed by the option size") as caught:
        await backend.truncate(16384)
    assert caught.value.errno == errno.ENOTSUP
    past = memoryview(bytearray(b"?" * 10))
    await backend.node.path.read(8190, past, 0)
    assert past == content[4096 + 8190 : 4096 + 8192] + bytes(8)
    await closed(graph, backend)
    assert path.read_bytes() == content


async def test_a_window_to_the_end_grows_with_its_file(graph: Graph, make_disk: DiskMaker) -> None:
    path = make_disk(SIZE)
    backend = await opened(graph, path, offset=1000)
    assert backend.size == SIZE - 1000
    sizes: list[int] = []
    backend.on_resize.append(sizes.append)
    await backend.truncate(5000)
    assert path.stat().st_size == 6000
    await backend.node.path.write(5000, memoryview(b"more"), 0)
    assert path.stat().st_size == 6004
    await graph.nodes["below"].truncate(500)
    assert backend.size == 0
    assert list(dict.fromkeys(sizes)) == [5000, 5004, 0]
    with pytest.raises(OSError) as caught:
        await backend.truncate((1 << 63) - 1000)
    assert caught.value.errno == errno.EFBIG
    await closed(graph, backend)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offset": SIZE + 1}, "offset 1048577 lies behind the end of the file .1048576 bytes"),
        ({"size": SIZE + 1}, "offset 0 and size 1048577 together exceed the file .1048576 bytes"),
        ({"offset": 512, "size": SIZE}, "offset 512 and size 1048576 together exceed the file"),
        ({"offset": -1}, "offset"),
        ({"size": "1X"}, "size"),
    ],
)
async def test_windows_that_do_not_fit(
    options: dict[str, object], said: str, graph: Graph, make_disk: DiskMaker
) -> None:
    path = make_disk(SIZE)
    with pytest.raises(OptionError, match=said):
        await opened(graph, path, **options)
    assert not graph.nodes


async def test_an_empty_window(graph: Graph, make_disk: DiskMaker) -> None:
    backend = await opened(graph, make_disk(SIZE), offset=SIZE)
    assert backend.size == 0
    assert backend.locate(0, 1) is None
    await closed(graph, backend)


async def test_the_map_of_a_window_is_qemus(graph: Graph, sparse_disk: Path) -> None:
    require_tool("qemu-img", package="qemu-utils")
    window = {"driver": "raw", "offset": 65536, "size": 32 << 20}
    name = "json:" + json.dumps(window | {"file": {"driver": "file", "filename": str(sparse_disk)}})
    theirs = json.loads(run("qemu-img", "map", "--output=json", name))
    backend = await opened(graph, sparse_disk, offset=65536, size=32 << 20)
    found = list(merged(await backend.block_status(0, backend.size)))
    below = graph.nodes["below"]
    assert all(extent.where is below for extent in found)
    assert [(e.host_offset, e.length, e.zero, e.data) for e in found] == [
        (e["offset"], e["length"], e["zero"], e["data"]) for e in theirs
    ]
    await closed(graph, backend)


async def test_raw_asks_for_no_more_than_its_users(graph: Graph, make_disk: DiskMaker) -> None:
    """A guest that writes does not make the file resizable, as other formats do."""
    path = make_disk(SIZE)
    for options in ({}, {"offset": 512, "size": 512}):
        tree = {"driver": "raw", "file": {"driver": "file", "filename": str(path), "node-name": "below"}, **options}
        backend = BlockBackend("test")
        writing = Permission.CONSISTENT_READ | Permission.WRITE
        graph.attach(backend, await graph.open(tree), writing, Permission.CONSISTENT_READ)
        assert graph.nodes["below"].held_by_parents() == (writing, Permission.CONSISTENT_READ)
        await closed(graph, backend)


async def test_events_are_told_where_they_are_heard(graph: Graph, make_disk: DiskMaker) -> None:
    """With blkdebug below, raw stays on the path and tells it what comes."""
    rules = [
        {"event": "read_aio", "errno": errno.EIO, "once": True},
        {"event": "write_aio", "errno": errno.ENOSPC, "once": True},
    ]
    tree = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "inject-error": rules,
            "image": {"driver": "file", "filename": str(make_disk(SIZE))},
        },
    }
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(tree), Permission.ALL)
    into = memoryview(bytearray(512))
    for request, code in ((backend.read, errno.EIO), (backend.write, errno.ENOSPC)):
        with pytest.raises(OSError) as caught:
            await request(0, into)
        assert caught.value.errno == code
        await request(0, into)
    await backend.flush()
    await closed(graph, backend)


async def test_many_requests_through_a_window(graph: Graph, make_disk: DiskMaker) -> None:
    path = make_disk(SIZE)
    content = path.read_bytes()
    backend = await opened(graph, path, offset=333, size=SIZE - 333)
    buffers = [memoryview(bytearray(1 << 14)) for _ in range(60)]
    await asyncio.gather(*(backend.read(i << 14, into) for i, into in enumerate(buffers)))
    assert b"".join(buffers) == content[333 : 333 + (60 << 14)]
    await closed(graph, backend)
