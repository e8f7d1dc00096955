"""Zeroes at the end of a disk that ends inside a cluster, beside QEMU's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pynbd.block.graph import Graph
from tests.formats.qcow2.workload import UNMAP, Workload, in_file, is_sound, made
from tests.peers import require_tool, run

CLUSTER = 16 << 10
SIZE = 21 * CLUSTER + CLUSTER // 2


def grown_and_mapped(path: Path) -> str:
    """What `qemu-img map` tells when the disk has become longer: the rest of its last cluster is shown then."""
    run(require_tool("qemu-img"), "resize", "-q", path, str(SIZE + 3 * CLUSTER))
    return run(require_tool("qemu-img"), "map", "--output=json", path)


@pytest.mark.parametrize("before", ["write -P 5", "write -c -P 5", ""])
@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize(
    "offset", [SIZE - CLUSTER // 2, SIZE - CLUSTER // 2 + 512, SIZE - 2048, SIZE - CLUSTER * 3 // 2, SIZE - CLUSTER]
)
@pytest.mark.parametrize("options", ["extended_l2=on,cluster_size=16k", "cluster_size=16k"])
async def test_zeroes_reach_to_the_end_of_the_cluster(
    graph: Graph, tmp_path: Path, options: str, offset: int, unmap: bool, before: str
) -> None:
    if "-c" in before and "extended" in options and offset % CLUSTER:
        pytest.skip("QEMU writes all of the request as data where a part of a compressed cluster becomes zero")
    path, theirs = made(tmp_path, options, SIZE), tmp_path / "theirs.qcow2"
    model = bytearray(SIZE)
    if before:
        start = SIZE - CLUSTER // 2 - CLUSTER
        run(require_tool("qemu-io"), "-c", f"{before} {start} {SIZE - start}", path)
        model[start:] = b"\5" * (SIZE - start)
    shutil.copy(path, theirs)
    work = await Workload.opened(graph, in_file(path), model, seed=1)
    await work.backend.write_zeroes(offset, SIZE - offset, UNMAP if unmap else 0)
    work.model[offset:] = bytes(SIZE - offset)
    await work.check()
    await work.close()
    how = "-d unmap" if unmap else "-d ignore"
    flag = "-u" if unmap else ""
    run(require_tool("qemu-io"), *how.split(), "-c", f"write -z {flag} {offset} {SIZE - offset}", theirs)
    assert is_sound(path)
    assert grown_and_mapped(path) == grown_and_mapped(theirs)
    run(require_tool("qemu-img"), "compare", "-q", path, theirs)
