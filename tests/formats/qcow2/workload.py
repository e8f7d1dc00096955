"""Random work on a qcow2 disk, beside a row of bytes that says what the disk must hold."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any, cast

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.formats.qcow2.driver import Qcow2
from tests.peers import CommandError, require_tool, run
from tests.restless import RESTLESS, restless

NAMES = itertools.count()

COMPRESSED, UNMAP = int(RequestFlag.COMPRESSED), int(RequestFlag.MAY_UNMAP)

OPTIONS = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=1k,refcount_bits=2",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=2M,refcount_bits=64",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on",
    "compression_type=zstd,cluster_size=8k",
    "preallocation=metadata,cluster_size=32k",
]
"""Of images that are made for tests: each kind once."""


def made(tmp_path: Path, options: str = "", size: int = 1 << 20, backing: Path | None = None) -> Path:
    """A new image of qemu-img's."""
    path = tmp_path / f"image{next(NAMES)}.qcow2"
    extra = ["-o", options] if options else []
    if backing is not None:
        extra += ["-b", str(backing), "-F", "raw" if backing.suffix == ".raw" else "qcow2"]
    run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", *extra, path, str(size))
    return path


def size_for(options: str, size: int) -> int:
    """That of a disk that has more than one cluster."""
    return 8 << 20 if "2M" in options else size


def in_file(path: Path, **options: Any) -> dict[str, Any]:
    """How an image in a file is opened."""
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options}


def is_sound(path: Path, *, leaks: bool = False) -> bool:
    """Whether qemu-img check finds nothing wrong, beside clusters that leak (where they may)."""
    command = (require_tool("qemu-img"), "check", "-q", path)
    try:
        run(*command)
    except CommandError:
        if not leaks:
            raise
        run(*command, status=3)  # leaks only
    return True


def read_by_qemu(path: Path) -> bytes:
    """What QEMU finds on the disk."""
    raw = path.with_suffix(".read")
    run(require_tool("qemu-img"), "convert", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def snapshot_by_qemu(path: Path, name: str) -> bytes:
    """What QEMU finds in a snapshot."""
    raw = path.with_suffix(".snapshot")
    run(require_tool("qemu-img"), "convert", "-l", f"snapshot.name={name}", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


class Workload:
    """A disk that is opened over some storage, and what it must hold.

    Args:
        graph: where it is opened.
        node: the disk.
        model: its content.
        seed: of everything random.
    """

    def __init__(self, graph: Graph, node: Node, model: bytearray, seed: int) -> None:
        self.graph = graph
        self.node = node
        self.model = model
        self.random = random.Random(seed)
        self.backend = BlockBackend("workload")
        graph.attach(self.backend, node, Permission.ALL)

    @classmethod
    async def opened(cls, graph: Graph, description: dict[str, Any], model: bytes | bytearray, seed: int) -> Workload:
        """Open the disk."""
        return cls(graph, await graph.open({"discard": "unmap", **description}), bytearray(model), seed)

    @property
    def driver(self) -> Qcow2:
        """The disk's driver."""
        return cast(Qcow2, self.node.driver)

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        into = bytearray(length)
        await self.backend.read(offset, memoryview(into))
        return bytes(into)

    async def round(self, most: int, *, compressed: bool = True) -> None:
        """Up to `most` requests at once, none of which touches a byte of another, but often its cluster."""
        cluster = self.driver.header.cluster_size
        size = len(self.model)
        at = self.random.randrange(size)
        requests = []
        for _ in range(self.random.randint(1, most)):
            length = self.random.choice(
                [512, cluster // 2, cluster, 3 * cluster, self.random.randrange(1, 2 * cluster)]
            )
            at += self.random.choice([0, 0, 1, 512, cluster])
            if self.random.random() < 0.3:
                at, length = -(-at // cluster) * cluster, cluster
            if at + length > size:
                break
            requests.append(self.request(at, length, compressed=compressed))
            at += length
        await asyncio.gather(*requests)

    async def request(self, offset: int, length: int, *, compressed: bool = True) -> None:
        """One request of any kind."""
        kind, end = self.random.random(), offset + length
        cluster = self.driver.header.cluster_size
        if kind < 0.5:
            data = self.random.randbytes(length)
            await self.put(offset, data)
            self.model[offset:end] = data
        elif kind < 0.65:
            await self.backend.write_zeroes(offset, length, self.random.choice([0, UNMAP]))
            self.model[offset:end] = bytes(length)
        elif kind < 0.75:
            await self._discard(-(-offset // cluster) * cluster, end // cluster * cluster)
        elif kind < 0.85 and compressed and self._can_compress(offset, length):
            data = (self.random.randbytes(32) * (cluster // 32))[:length]
            await self.backend.write(offset, memoryview(data), COMPRESSED)
            self.model[offset:end] = data
        elif kind < 0.9:
            await self.backend.flush()
        else:
            assert await self.read(offset, length) == self.model[offset:end]

    def _can_compress(self, offset: int, length: int) -> bool:
        header = self.driver.header
        return offset % header.cluster_size == 0 and length == header.cluster_size and not header.has_data_file

    async def put(self, offset: int, data: bytes) -> None:
        """A write, in place if that can be: as a server does it."""
        if len(data) > 4096 or not self.backend.write_now(offset, memoryview(data)):
            await self.backend.write(offset, memoryview(data))

    async def _discard(self, offset: int, end: int) -> None:
        if offset >= end:
            return
        await self.backend.discard(offset, end - offset)
        if self.driver.header.version >= 3 or "backing" not in self.node.children:
            self.model[offset:end] = bytes(end - offset)

    async def check(self) -> None:
        """The whole disk is as it must be."""
        assert await self.read(0, len(self.model)) == self.model

    async def close(self) -> None:
        """Let go of the disk, and close it."""
        self.graph.detach(self.backend)
        await self.graph.close(self.node)


async def work_over_restless_storage(
    graph: Graph, path: Path, size: int, *, suspends: float, requests: int, **options: object
) -> None:
    """Requests that wait for each other, over storage that lets others run in the middle of everything.

    Args:
        graph: closed by its owner.
        path: the image; what became of it lies there afterwards, and QEMU has found it good.
        size: bytes of the disk, which is empty.
        suspends: how likely each request of the storage waits.
        requests: so many at a time.
        options: of the driver.
    """
    storage = await graph.open({"driver": RESTLESS, "size": 0, "seed": 5, "suspends": suspends, "node-name": "storage"})
    restless(storage).data[:] = path.read_bytes()
    work = await Workload.opened(graph, {"driver": "qcow2", "file": "storage", **options}, bytes(size), seed=7)
    for _ in range(60):
        await work.round(requests)
    await work.check()
    await work.close()
    path.write_bytes(restless(storage).data)
    assert is_sound(path)
    assert read_by_qemu(path) == work.model
