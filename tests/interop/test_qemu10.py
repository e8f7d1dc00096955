"""A QEMU that speaks extended headers: its clients against our server, our client against its server."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from tests.interop.contents import sha256, write_random
from tests.peers import Peer, pynbd_serve, qemu_nbd, require_qemu10, run

TIB = 1 << 40
GIB = 1 << 30
MIB = 1 << 20

PYNBD = (sys.executable, "-m", "pynbd")


@pytest.fixture
def qemu_img() -> str:
    return require_qemu10("qemu-img")


@pytest.fixture
def qemu_io() -> str:
    return require_qemu10("qemu-io")


def commands(*texts: str) -> list[str]:
    """qemu-io's arguments for some commands."""
    return [word for text in texts for word in ("-c", text)]


def image_map(qemu_img: str, *image: str) -> list[tuple[int, int, bool]]:
    """(start, length, data) of each extent of an image."""
    extents: list[dict[str, Any]] = json.loads(run(qemu_img, "map", "--output=json", *image))
    return [(extent["start"], extent["length"], extent["data"]) for extent in extents]


def assert_extended(peer: Peer) -> None:
    """Every client of a verbose server of ours has negotiated extended headers."""
    used = [line for line in peer.log().splitlines() if "uses export" in line]
    assert used
    assert all(line.endswith("(extended)") for line in used), used


# Its clients, our server ------------------------------------------------------------------------------------


def test_its_qemu_io_does_everything(qemu_io: str, tmp_path: Path) -> None:
    """Reads, writes with and without FUA, zeroes, discards, flushes, at odd places too."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xff" * (64 << 20))
    with pynbd_serve("-v", "-f", "raw", "--discard=unmap", disk) as peer:
        said = run(
            qemu_io,
            *("-f", "raw", "-d", "unmap"),
            *commands("write -P 1 0 4k", "read -P 1 0 4k", "write -P 2 513 77", "read -P 2 513 77"),
            *commands("write -f -P 3 1M 48M", "read -P 3 1M 48M", "read -P 0xff 49M 15M", "flush"),
            *commands("write -z 2M 3M", "read -P 0 2M 3M", "write -z -u 6M 3M", "read -P 0 6M 3M"),
            *commands("discard 10M 1M", "read -P 3 11M 1M", "write -z -f 12345 1", "read -P 0 12345 1"),
            peer.uri(),
        )
        assert "failed" not in said
        assert_extended(peer)


def test_its_qemu_img_copies_both_ways(qemu_img: str, sparse_disk: Path, tmp_path: Path) -> None:
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    write_random(served, sparse_disk.stat().st_size)
    with pynbd_serve("-v", "-f", "raw", served) as peer:
        run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", sparse_disk, peer.uri())
        run(qemu_img, "compare", "-f", "raw", "-F", "raw", sparse_disk, peer.uri())
        run(qemu_img, "convert", "-f", "raw", "-O", "raw", peer.uri(), copy)
        assert_extended(peer)
    assert sha256(copy) == sha256(served) == sha256(sparse_disk)


def test_its_map_is_the_map_of_the_file(qemu_img: str, sparse_disk: Path) -> None:
    with pynbd_serve("-v", "-f", "raw", sparse_disk) as peer:
        assert image_map(qemu_img, "-f", "raw", peer.uri()) == image_map(qemu_img, "-f", "raw", str(sparse_disk))
        assert_extended(peer)


def test_its_bench_writes_through(qemu_img: str, empty_disk: Path) -> None:
    with pynbd_serve("-v", "-f", "raw", empty_disk) as peer:
        run(qemu_img, "bench", "-w", "-c", "1000", "-d", "64", "-t", "writethrough", "-f", "raw", peer.uri())
        assert_extended(peer)


def test_zeroes_and_status_of_a_terabyte_in_one_request(qemu_img: str, qemu_io: str) -> None:
    """64-bit lengths: one request each, where 32 bits would take 256."""
    with pynbd_serve("-v", "driver=memory,size=1T") as peer:
        said = run(
            qemu_io,
            *("-f", "raw"),
            *commands("write -P 7 600G 1M", "write -P 8 1023G 1M", "write -z -u -n 4k 1000G", "read -P 0 600G 1M"),
            *commands("read -P 8 1023G 1M", "write -z -n 0 64G", "read -P 0 63G 64k"),
            peer.uri(),
        )
        assert "failed" not in said
        data = [(start, length) for start, length, data in image_map(qemu_img, "-f", "raw", peer.uri()) if data]
        assert data == [(1023 * GIB, MIB)]
        run(qemu_io, "-f", "raw", *commands("write -z -u -n 0 1T"), peer.uri())
        assert image_map(qemu_img, "-f", "raw", peer.uri()) == [(0, TIB, False)]
        assert_extended(peer)


def test_its_bitmap_reader(qemu_img: str, qemu_io: str) -> None:
    """QEMU's own way to read a dirty bitmap over NBD: dirty is what the map calls no data."""
    with pynbd_serve("-v", "-B", "since", "driver=memory,size=1T") as peer:
        run(qemu_io, "-f", "raw", *commands("write -P 7 600G 1M"), peer.uri())
        server = f"driver=nbd,server.type=unix,server.path={peer.endpoint.socket_path}"
        found = image_map(qemu_img, "--image-opts", f"{server},x-dirty-bitmap=qemu:dirty-bitmap:since")
        assert [(start, length) for start, length, data in found if not data] == [(600 * GIB, MIB)]
        assert_extended(peer)


# Our client, its server -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(uri: str) -> AsyncIterator[BlockBackend]:
    """Our NBD client on an export, to read and write."""
    graph, backend = Graph(), BlockBackend("test")
    node = await graph.open(uri, format="raw", discard="unmap")
    try:
        graph.attach(backend, node, Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL & ~Permission.RESIZE)
        yield backend
    finally:
        if backend.root is not None:
            graph.detach(backend)
        await graph.close_all()


def holey(path: Path) -> Path:
    """A file of 1 TiB with 1 MiB of 0xff at 600 GiB and at its end."""
    with path.open("wb") as file:
        file.truncate(TIB)
        for offset in (600 * GIB, TIB - MIB):
            file.seek(offset)
            file.write(b"\xff" * MIB)
    return path


def test_our_info_tells_that_headers_are_extended(empty_disk: Path) -> None:
    with qemu_nbd(empty_disk, qemu10=True) as peer:
        told = json.loads(run(*PYNBD, "info", "--json", peer.uri()))
    assert (told["replies"], told["exports"][0]["export-size"]) == ("extended", 64 * MIB)


async def test_our_client_asks_about_a_terabyte(tmp_path: Path) -> None:
    """Status, zeroes and discards that are longer than 4 GiB."""
    disk = holey(tmp_path / "disk.raw")
    with qemu_nbd(disk, "--discard=unmap", qemu10=True) as peer:
        async with opened(peer.uri()) as backend:
            (hole, *_) = await backend.block_status(0, TIB)
            assert (hole.length, hole.zero) == (600 * GIB, True)
            await backend.discard(500 * GIB, 200 * GIB)
            (hole, *_) = await backend.block_status(0, TIB)
            assert (hole.length, hole.zero) == (TIB - MIB, True)
            await backend.write_zeroes(8 * GIB, TIB - 8 * GIB, int(RequestFlag.MAY_UNMAP))
            await backend.write(5 * GIB + 1, memoryview(b"here"), int(RequestFlag.FUA))
            found = bytearray(6)
            await backend.read(5 * GIB, memoryview(found))
            assert found == b"\0here\0"
            await backend.flush()
    with disk.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) // 4096 == 5 * GIB // 4096
        assert os.lseek(file.fileno(), 6 * GIB, os.SEEK_HOLE) == 6 * GIB
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(file.fileno(), 6 * GIB, os.SEEK_DATA)


def test_our_copy_both_ways(tmp_path: Path, sparse_disk: Path) -> None:
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    write_random(served, sparse_disk.stat().st_size)
    with qemu_nbd(served, qemu10=True) as peer:
        run(*PYNBD, "copy", "--flush", sparse_disk, peer.uri())
        run(*PYNBD, "copy", peer.uri(), copy)
    assert sha256(copy) == sha256(served) == sha256(sparse_disk)


def test_both_at_once(qemu_img: str, qemu_io: str, tmp_path: Path) -> None:
    """Its client, our server, our client, its server: a chain in which every length has 64 bits."""
    disk = holey(tmp_path / "disk.raw")
    with (
        qemu_nbd(disk, "--discard=unmap", qemu10=True) as below,
        pynbd_serve("-v", "-f", "raw", "--discard=unmap", below.uri()) as peer,
    ):
        expected = image_map(qemu_img, "-f", "raw", str(disk))
        assert image_map(qemu_img, "-f", "raw", peer.uri()) == expected
        said = run(
            qemu_io,
            *("-f", "raw", "-d", "unmap"),
            *commands("write -P 5 599G 2M", "write -z -u -n 1M 999G", "read -P 0 599G 2M", "read -P 0xff 1048575M 1M"),
            *commands("write -f -P 6 3M 1M", "flush", "read -P 6 3M 1M", "discard 1023G 1G"),
            peer.uri(),
        )
        assert "failed" not in said
        assert [(start, length) for start, length, data in image_map(qemu_img, "-f", "raw", peer.uri()) if data] == [
            (3 * MIB, MIB)
        ]
        assert_extended(peer)
