"""Zeroes and holes of files: made quickly, or refused, and found again."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from pynbd.block.extents import merged
from pynbd.block.requests import RequestFlag
from pynbd.storage import linux, sparse
from tests.conftest import DiskMaker
from tests.peers import require_tool, run
from tests.storage.conftest import SIZE, OpenDisk, description


async def test_zeroes_keep_their_space_unless_told(disk: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(disk, discard="unmap")) as backend:
        full = await backend.node.allocated_size()
        await backend.write_zeroes(0, SIZE // 2)
        assert await backend.node.allocated_size() == full
        await backend.write_zeroes(0, SIZE // 2, RequestFlag.MAY_UNMAP)
        half = await backend.node.allocated_size()
        assert half == SIZE // 2
        await backend.discard(SIZE // 2, SIZE // 2)
        assert await backend.node.allocated_size() == 0
        assert backend.size == disk.stat().st_size == SIZE


async def test_zeroes_where_the_file_system_has_no_way(
    disk: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once, then written; and refused with nothing changed if they must be quick."""
    asked: list[int] = []

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        asked.append(mode)
        raise OSError(errno.EOPNOTSUPP, "none here")

    monkeypatch.setattr(linux, "fallocate", refuse)
    content = disk.read_bytes()
    async with open_disk(description(disk, discard="unmap")) as backend:
        for flags in (RequestFlag.NO_FALLBACK, RequestFlag.NO_FALLBACK | RequestFlag.MAY_UNMAP):
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    await backend.write_zeroes(0, 65536, flags)
                assert caught.value.errno == errno.ENOTSUP
        assert disk.read_bytes() == content
        before = len(asked)
        await backend.write_zeroes(4096, 65536)
        await backend.discard(0, 4096)
        assert disk.read_bytes() == content[:4096] + bytes(65536) + content[4096 + 65536 :]
        assert len(asked) == before == len(set(asked)) + 1  # punching is a part of two ways


async def test_zeroes_on_tmpfs_which_can_only_punch(small_tmpfs: Path, open_disk: OpenDisk) -> None:
    path = small_tmpfs / "disk.raw"
    path.write_bytes(b"x" * 65536)
    async with open_disk(description(path, discard="unmap")) as backend:
        await backend.write_zeroes(0, 32768, RequestFlag.NO_FALLBACK)
        assert await backend.node.allocated_size() == 65536
        await backend.write_zeroes(0, 32768, RequestFlag.NO_FALLBACK | RequestFlag.MAY_UNMAP)
        assert await backend.node.allocated_size() == 32768
    assert path.read_bytes() == bytes(32768) + b"x" * 32768


async def test_the_map_is_qemus(sparse_disk: Path, open_disk: OpenDisk) -> None:
    require_tool("qemu-img", package="qemu-utils")
    theirs = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", sparse_disk))
    async with open_disk({"driver": "raw", "file": description(sparse_disk)}) as backend:
        found = list(merged(await backend.block_status(0, backend.size)))
        assert all(extent.where is backend.node.children["file"].node for extent in found)
        assert [(e.host_offset, e.length, e.zero, e.data) for e in found] == [
            (e["offset"], e["length"], e["zero"], e["data"]) for e in theirs
        ]


async def test_a_map_of_many_holes_comes_in_parts(make_disk: DiskMaker, open_disk: OpenDisk) -> None:
    wanted = [(i << 16, 1 << 12) for i in range(600)]
    path = make_disk(600 << 16, extents=wanted)
    async with open_disk(description(path)) as backend:
        data: list[tuple[int, int]] = []
        offset = calls = 0
        while offset < backend.size:
            found = await backend.block_status(offset, backend.size - offset)
            assert 0 < len(found) <= sparse.MAX_EXTENTS_PER_CALL + 1
            calls += 1
            for extent in found:
                data += [(offset, extent.length)] if extent.data else []
                offset += extent.length
        assert offset == backend.size
        assert data == wanted
        assert calls > 3
