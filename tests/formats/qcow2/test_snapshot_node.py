"""`qcow2-snapshot`: a snapshot beside the live disk, in the graph and over NBD."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from tests.formats.qcow2.workload import Workload, in_file, is_sound, made, read_by_qemu
from tests.peers import CommandError, pynbd_serve, qemu_nbd, require_tool, run

SIZE = (1 << 20) + 1536


async def shown(graph: Graph, live: Node, **options: str) -> BlockBackend:
    """Somebody who looks at a snapshot of a disk."""
    backend = BlockBackend("reader")
    graph.attach(backend, await graph.open({"driver": "qcow2-snapshot", "file": live, **options}))
    return backend


async def content(backend: BlockBackend) -> bytes:
    found = bytearray(backend.size)
    await backend.read(0, memoryview(found))
    return bytes(found)


async def closed(graph: Graph, backend: BlockBackend) -> None:
    node = backend.node
    graph.detach(backend)
    await graph.close(node)


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,cluster_size=16k", "cluster_size=1k"])
async def test_a_snapshot_beside_the_disk_that_is_written(graph: Graph, tmp_path: Path, options: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(2).randbytes(SIZE // 2))
    path = made(tmp_path, options, SIZE, base)
    work = await Workload.opened(graph, in_file(path), read_by_qemu(path), seed=4)
    for _ in range(20):
        await work.round(4)
    await work.driver.snapshot_create("one")
    one = bytes(work.model)
    reader = await shown(graph, work.node, snapshot="one")

    async def read_on() -> None:
        for _ in range(20):
            assert await content(reader) == one
            await asyncio.sleep(0)

    async def write_on() -> None:
        for number in range(20):
            await work.round(4)
            if number in (5, 11):
                await work.driver.snapshot_create(f"more{number}")
            if number == 15:
                await work.driver.snapshot_delete("more5")

    await asyncio.gather(read_on(), write_on())
    assert (reader.node.read_only, reader.writable) == (True, False)
    with pytest.raises(BlockError, match="'one' is in use"):
        await work.driver.snapshot_delete("one")
    before = bytes(work.model)
    await work.driver.snapshot_goto("one")
    work.model[:] = one
    await work.check()
    await work.driver.snapshot_goto("more11")
    assert await content(reader) == one
    assert before != one
    await closed(graph, reader)
    await work.driver.snapshot_delete("one")
    await work.close()
    assert is_sound(path)


async def test_what_lies_where_is_told_of_the_whole_chain(graph: Graph, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    path = made(tmp_path, "", SIZE, base)
    run(require_tool("qemu-io"), "-c", "write -P 1 0 64k", "-c", "write -z 64k 64k", path)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    run(require_tool("qemu-io"), "-c", "write -P 2 0 1M", path)
    live = await graph.open(in_file(path))
    reader = await shown(graph, live, **{"snapshot-id": "1", "snapshot-name": "one"})
    told = await reader.block_status(0, SIZE)
    assert [(extent.length, extent.depth) for extent in told] == [(65536, 1), (65536, 1), (SIZE - 131072, 2)]
    await closed(graph, reader)
    assert live.name in graph.nodes or not live.opened


async def test_what_can_not_be_shown(graph: Graph, tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    live = await graph.open(in_file(path, **{"node-name": "live"}))
    wrong: list[tuple[dict[str, str], str]] = [
        ({"snapshot": "two"}, "no snapshot of name 'two'"),
        ({"snapshot-id": "1", "snapshot-name": "two"}, "of id '1' and name 'two'"),
        ({}, "give this, or snapshot-id"),
        ({"snapshot": "one", "snapshot-id": "1"}, "give this, or snapshot-id"),
    ]
    keeper = BlockBackend("keeper")
    graph.attach(keeper, live)
    for options, problem in wrong:
        with pytest.raises(BlockError, match=problem):
            await graph.open({"driver": "qcow2-snapshot", "file": "live", **options})
    graph.detach(keeper)
    with pytest.raises(OptionError, match="expected qcow2"):
        await graph.open({"driver": "qcow2-snapshot", "snapshot": "one", "file": {"driver": "null"}})


@pytest.mark.parametrize("which", ["1", "one", "snapshot.id=1", "snapshot.name=one", "snapshot.id=1,snapshot.name=one"])
def test_serve_load_snapshot_as_qemu_nbd_does(tmp_path: Path, which: str) -> None:
    path = made(tmp_path, "", SIZE)
    run(require_tool("qemu-io"), "-c", f"write -P 5 0 {SIZE}", path)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    run(require_tool("qemu-io"), "-c", f"write -P 6 0 {SIZE}", path)
    found = []
    for number, server in enumerate((pynbd_serve("-l", which, str(path)), qemu_nbd(path, "-f", "qcow2", "-l", which))):
        copy = tmp_path / f"copy{number}.raw"
        with server as peer:
            run(require_tool("qemu-img"), "convert", "-O", "raw", peer.uri(), copy)
        found.append(copy.read_bytes())
    assert found == [b"\5" * SIZE] * 2


def test_serve_a_snapshot_beside_the_live_disk(tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    qemu_io = require_tool("qemu-io")
    run(qemu_io, "-c", f"write -P 5 0 {SIZE}", path)
    run(require_tool("qemu-img"), "snapshot", "-c", "one", path)
    config = tmp_path / "pynbd.toml"
    config.write_text(
        f'[[node]]\nnode-name = "vm"\ndriver = "qcow2"\nfile = {{ driver = "file", filename = "{path}" }}\n'
        '[export.live]\ndisk = "vm"\n[export.old]\ndisk = "vm"\nload-snapshot = "one"\n'
    )
    with pynbd_serve("--config", str(config)) as peer:
        run(qemu_io, "-f", "raw", "-c", f"write -P 6 0 {SIZE}", peer.uri("live"))
        run(qemu_io, "-r", "-f", "raw", "-c", f"read -P 5 0 {SIZE}", peer.uri("old"))
        run(qemu_io, "-r", "-f", "raw", "-c", f"read -P 6 0 {SIZE}", peer.uri("live"))
        with pytest.raises(CommandError, match="Permission denied"):
            run(qemu_io, "-f", "raw", "-c", "write 0 512", peer.uri("old"))
    assert is_sound(path)


def test_wrong_snapshots_are_told_of(tmp_path: Path) -> None:
    path = made(tmp_path, "", SIZE)
    for which, problem in (("two", "no snapshot"), ("snapshot.nam=two", "expected snapshot.id")):
        with pytest.raises((CommandError, AssertionError), match=problem), pynbd_serve("-l", which, str(path)):
            pass
