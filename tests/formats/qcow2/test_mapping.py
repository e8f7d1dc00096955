"""Where the disk's bytes lie: entries that can't be true are errors, whoever comes across them."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2.layout import COPIED, ZERO
from tests.formats.qcow2.damage import Image, qemu_io
from tests.formats.qcow2.workload import in_file, made
from tests.peers import CommandError

CLUSTER = 64 << 10

Use = Callable[[BlockBackend], Awaitable[object]]

USES: dict[str, Use] = {
    "read": lambda backend: backend.read(100, memoryview(bytearray(4096))),
    "long read": lambda backend: backend.read(0, memoryview(bytearray(3 * CLUSTER))),
    "write": lambda backend: backend.write(4096, memoryview(b"x" * 512)),
    "long write": lambda backend: backend.write(0, memoryview(b"x" * 2 * CLUSTER)),
    "zeroes": lambda backend: backend.write_zeroes(0, CLUSTER, 0),
    "discard": lambda backend: backend.discard(0, CLUSTER),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("entry", [COPIED | 0x20000, COPIED | 0x20000 | ZERO])
@pytest.mark.parametrize("options", ["", "extended_l2=on", "data_file_raw=on"])
async def test_in_a_data_file_bytes_lie_where_they_are_on_the_disk(
    graph: Graph, tmp_path: Path, options: str, entry: int, use: str
) -> None:
    """Elsewhere would be another cluster's place: nothing is read from it or written to it."""
    data = tmp_path / "data.raw"
    path = made(tmp_path, ",".join(filter(None, (f"data_file={data}", options))))
    qemu_io(path, ["write -P 1 0 64k", "write -P 2 64k 64k", "write -P 3 128k 64k"])
    image = Image(path)
    if options == "extended_l2=on" and entry & ZERO:
        entry ^= ZERO  # which has no meaning there
        image.put(next(image.l2_words()) + 8, 0xFFFFFFFF << 32)
    image.put(next(image.l2_words()), entry)
    before = data.read_bytes()
    node = await graph.open(in_file(path, discard="unmap"))
    backend = BlockBackend("test")
    graph.attach(backend, node, Permission.ALL)
    with pytest.raises(OSError, match="but in a data file they lie at 0") as caught:
        await USES[use](backend)
    assert caught.value.errno == errno.EIO
    graph.detach(backend)
    await graph.close_all()
    assert data.read_bytes() == before


@pytest.mark.parametrize("use", ["read", "long read", "write", "long write"])
@pytest.mark.parametrize("cluster", [0, 1])
async def test_no_zeroes_in_version_2(graph: Graph, tmp_path: Path, cluster: int, use: str) -> None:
    """It knows no such clusters: an entry that tells of one is as wrong as it is for QEMU."""
    path = made(tmp_path, "compat=0.10")
    qemu_io(path, ["write -P 1 0 64k"])
    image = Image(path)
    first, at = next(image.l2_words()), cluster * CLUSTER
    image.put(first + 8 * cluster, image.get(first + 8 * cluster) | ZERO)
    before = path.read_bytes()
    with pytest.raises(CommandError, match=r"pre-v3|Input/output error"):
        qemu_io(path, [f"read {at} 4k"])
    path.write_bytes(before)
    backend = BlockBackend("test")
    graph.attach(backend, await graph.open(in_file(path)), Permission.CONSISTENT_READ | Permission.WRITE)
    into = memoryview(bytearray(2 * CLUSTER))
    with pytest.raises(OSError, match=r"bytes at \d+ is 0x[0-9a-f]*1, which breaks the format's rules") as caught:
        await {
            "read": lambda: backend.read(at, into[:4096]),
            "long read": lambda: backend.read(0, into),
            "write": lambda: backend.write(at + 512, memoryview(b"x" * 512)),
            "long write": lambda: backend.write(0, memoryview(b"x" * 2 * CLUSTER)),
        }[use]()
    assert caught.value.errno == errno.EIO
    graph.detach(backend)
