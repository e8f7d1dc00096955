"""Compressed writes of many clusters: what QEMU reads of them, and how they are packed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import cast

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2.driver import Qcow2
from tests.formats.qcow2.damage import checked_by_qemu
from tests.formats.qcow2.workload import COMPRESSED, in_file, made, read_by_qemu

KINDS = ("noise", "text", "zeroes")


def content(source: random.Random, cluster: int, length: int) -> bytes:
    """Clusters that get smaller and clusters that do not, in no order."""
    data = bytearray()
    while len(data) < length:
        kind = source.choice(KINDS)
        if kind == "noise":
            data += source.randbytes(cluster)
        elif kind == "zeroes":
            data += bytes(cluster)
        else:
            data += source.randbytes(source.randint(0, cluster * 7 // 8)).ljust(cluster, b"x")
    return bytes(data[:length])


@pytest.mark.parametrize("refcount_bits", [1, 2, 16])
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 4096, 64 << 10, 2 << 20])
async def test_what_is_written_is_read_by_qemu(
    graph: Graph, tmp_path: Path, cluster: int, compression: str, refcount_bits: int
) -> None:
    """First in one request, up to the end of the disk, then again over parts of that."""
    source = random.Random(cluster + refcount_bits)
    size = max(9 * cluster, 1 << 20) + cluster // 2 // 512 * 512
    options = f"cluster_size={cluster},compression_type={compression},refcount_bits={refcount_bits}"
    path = made(tmp_path, options, size)
    node = await graph.open(in_file(path))
    backend = BlockBackend("test")
    graph.attach(backend, node, Permission.ALL)
    disk = bytearray(content(source, cluster, size))
    await backend.write(0, memoryview(disk), COMPRESSED)
    for _ in range(5):
        first = source.randrange(size // cluster)
        start = first * cluster
        length = min(source.randint(1, 8) * cluster, size - start)
        data = content(source, cluster, length)
        await backend.write(start, memoryview(data), COMPRESSED)
        disk[start : start + length] = data
    read = bytearray(size)
    await backend.read(0, memoryview(read))
    assert read == disk
    graph.detach(backend)
    await graph.close_all()
    assert read_by_qemu(path) == disk
    found = checked_by_qemu(path)
    assert found is not None
    assert (found["corruptions"], found["leaks"]) == (0, 0)
    assert found["compressed_clusters"] > 0


async def test_what_is_written_at_once_lies_in_order(graph: Graph, tmp_path: Path) -> None:
    """One cluster's bytes begin where those of the one before end; where they end is told in sectors."""
    path = made(tmp_path, "", 4 << 20)
    node = await graph.open(in_file(path))
    backend = BlockBackend("test")
    graph.attach(backend, node, Permission.ALL)
    data = b"".join(random.Random(number).randbytes(6000).ljust(64 << 10, b"\0") for number in range(64))
    await backend.write(0, memoryview(data), COMPRESSED)
    mapping = cast(Qcow2, node.driver).map
    entries = [await mapping.entry(number << 16) for number in range(64)]
    places = [mapping.compressed_place(entry) for entry, _ in entries]
    for (place, length), (following, _) in itertools.pairwise(places):
        assert place + 6000 <= following <= place + length
    graph.detach(backend)
    await graph.close_all()
    assert read_by_qemu(path) == data
