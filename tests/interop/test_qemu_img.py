"""qemu-img against `pynbd serve`: info, map, convert to and from, compare, bench, measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.contents import is_all_zero, sha256
from tests.interop.framing import FRAMINGS, framing_options
from tests.peers import Peer, pynbd_serve, require_tool, run

EMPTY_BLOCKS = 8
"""Blocks of 512 bytes in a file of nothing that qemu-img has made: it writes the first 4 KiB to learn the alignment."""


@pytest.fixture(autouse=True)
def _qemu_img() -> None:
    require_tool("qemu-img", package="qemu-utils")


@pytest.fixture(params=FRAMINGS)
def framing(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Options of a server that offers no more than one of the framings."""
    return framing_options(request.param, tmp_path)


@pytest.fixture
def sparse_peer(sparse_disk: Path) -> Iterator[Peer]:
    with pynbd_serve("-f", "raw", "-r", sparse_disk) as peer:
        yield peer


def image_map(image: str | Path, *options: str) -> list[tuple[int, int, bool, bool]]:
    """(start, length, data, zero) of each extent, as qemu-img sees it; neighbours that are alike joined."""
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", *options, image))
    return [(extent["start"], extent["length"], extent["data"], extent["zero"]) for extent in extents]


def test_info_tells_size_and_format(sparse_peer: Peer, sparse_disk: Path) -> None:
    told = json.loads(run("qemu-img", "info", "--output=json", sparse_peer.uri()))
    assert (told["virtual-size"], told["format"]) == (sparse_disk.stat().st_size, "raw")


def test_info_of_a_named_export_over_tcp(sparse_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "-x", "a disk/ä", sparse_disk, tcp=True) as peer:
        told = json.loads(run("qemu-img", "info", "--output=json", peer.uri("a disk/ä")))
        assert told["virtual-size"] == sparse_disk.stat().st_size
        run("qemu-img", "info", peer.uri("another"), status=1)


def test_info_of_an_odd_size_is_told_in_whole_sectors(make_disk: Any) -> None:
    """qemu-img rounds up to sectors of 512 bytes what it is told exactly."""
    with pynbd_serve("-f", "raw", make_disk(1_000_001)) as peer:
        told = json.loads(run("qemu-img", "info", "--output=json", peer.uri()))
        assert told["virtual-size"] in (1_000_001, 1_000_448)


def test_map_is_the_map_of_the_file(sparse_peer: Peer, sparse_disk: Path) -> None:
    """Holes and data through the export are those that QEMU finds in the file itself."""
    expected = image_map(sparse_disk)
    assert len(expected) == 5
    assert image_map(sparse_peer.uri()) == expected


def test_map_of_a_range(sparse_peer: Peer, sparse_disk: Path) -> None:
    limits = ("--start-offset=65536", "--max-length=20M")
    assert image_map(sparse_peer.uri(), *limits) == image_map(sparse_disk, *limits)


def test_map_of_a_file_that_starts_and_ends_inside_blocks(make_disk: Any) -> None:
    """A file of no whole number of blocks: the tail belongs to the map."""
    disk = make_disk((1 << 20) + 512, extents=[(0, 4096), (1 << 20, 512)])
    with pynbd_serve("-f", "raw", disk) as peer:
        assert image_map(peer.uri()) == image_map(disk)


def test_convert_from_the_export(framing: list[str], sparse_disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    with pynbd_serve(*framing, "-f", "raw", "-r", sparse_disk) as peer:
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", peer.uri(), copy)
    assert sha256(copy) == sha256(sparse_disk)
    assert copy.stat().st_blocks <= sparse_disk.stat().st_blocks, "what were holes has become data"


def test_convert_to_the_export(framing: list[str], sparse_disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xff" * (1 << 20))
    with target.open("r+b") as file:
        file.truncate(sparse_disk.stat().st_size)
    with pynbd_serve(*framing, "-f", "raw", target) as peer:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", sparse_disk, peer.uri())
    assert sha256(target) == sha256(sparse_disk)


def test_convert_to_qcow2_through_the_export(tmp_path: Path, sparse_disk: Path) -> None:
    """An image format of QEMU on top of our raw export: small metadata writes, growth inside the disk, a check."""
    disk = tmp_path / "holder.raw"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(128 << 20)
    with pynbd_serve("-f", "raw", disk) as peer:
        run("qemu-img", "create", "-q", "-f", "qcow2", peer.uri(), "64M")
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", sparse_disk, peer.uri())
        run("qemu-img", "check", "-f", "qcow2", peer.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", sparse_disk, peer.uri())


def test_convert_with_target_is_zero_leaves_holes(sparse_disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    target.touch()
    with target.open("r+b") as file:
        file.truncate(sparse_disk.stat().st_size)
    with pynbd_serve("-f", "raw", target) as peer:
        run("qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", sparse_disk, peer.uri())
    assert sha256(target) == sha256(sparse_disk)
    assert target.stat().st_blocks <= sparse_disk.stat().st_blocks


def test_compare_finds_equal_and_different(sparse_peer: Peer, sparse_disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(sparse_disk.read_bytes())
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", sparse_peer.uri(), other)
    with other.open("r+b") as file:
        file.seek((16 << 20) + 512)
        file.write(b"\0" * 512)
    said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", sparse_peer.uri(), other, status=1)
    assert f"mismatch at offset {(16 << 20) + 512}" in said


def test_compare_of_two_exports(random_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "-r", f"one={random_disk}", f"two={random_disk}") as peer:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", "-s", peer.uri("one"), peer.uri("two"))


@pytest.mark.parametrize("cache", ["writethrough", "writeback", "none", "unsafe"])
def test_bench_writes_with_every_cache_mode(tmp_path: Path, cache: str) -> None:
    """64 writes in flight; with writethrough each of them carries FUA."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xff" * (4 << 20))
    with pynbd_serve("-f", "raw", disk) as peer:
        options = ["-w", "-c", "1024", "-d", "64", "-s", "4096", "--pattern=165", "-t", cache, "-f", "raw"]
        said = run("qemu-img", "bench", *options, peer.uri())
    assert "Run completed" in said
    assert disk.read_bytes() == b"\xa5" * (4 << 20)


def test_bench_with_flushes_in_between(empty_disk: Path) -> None:
    with pynbd_serve("-f", "raw", empty_disk) as peer:
        options = ["-w", "-c", "512", "-d", "16", "--flush-interval=16", "-f", "raw"]
        assert "Run completed" in run("qemu-img", "bench", *options, peer.uri())


def test_bench_reads(framing: list[str], random_disk: Path) -> None:
    with pynbd_serve(*framing, "-f", "raw", random_disk) as peer:
        said = run("qemu-img", "bench", "-c", "2000", "-d", "64", "-S", "65536", "-s", "65536", "-f", "raw", peer.uri())
    assert "Run completed" in said


def test_a_disk_in_memory_keeps_what_is_converted_to_it(sparse_disk: Path) -> None:
    """1 TiB of memory that costs nothing until it is written."""
    with pynbd_serve("driver=memory,size=1T") as peer:
        run("qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", sparse_disk, peer.uri())
        extents = [(start, length) for start, length, data, _ in image_map(peer.uri()) if data]
        assert sum(length for _, length in extents) < 4 << 20
        end = sparse_disk.stat().st_size
        said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", sparse_disk, peer.uri())
        assert "Images are identical" in said
        assert extents[-1][0] + extents[-1][1] == end


def test_dd_is_dd_of_the_file(random_disk: Path, tmp_path: Path) -> None:
    what = ["-f", "raw", "-O", "raw", "bs=64k", "count=16", "skip=3"]
    copy, expected = tmp_path / "copy.raw", tmp_path / "expected.raw"
    run("qemu-img", "dd", *what, f"if={random_disk}", f"of={expected}")
    with pynbd_serve("-f", "raw", random_disk) as peer:
        run("qemu-img", "dd", *what, f"if={peer.uri()}", f"of={copy}")
    assert sha256(copy) == sha256(expected)


def test_convert_of_a_disk_of_nothing_is_a_file_of_nothing(empty_disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    with pynbd_serve("-f", "raw", "-r", empty_disk) as peer:
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", peer.uri(), copy)
    assert is_all_zero(copy)
    assert copy.stat().st_blocks <= EMPTY_BLOCKS


def test_resize_is_refused_and_changes_nothing(empty_disk: Path) -> None:
    """QEMU's NBD client can't resize; the disk stays as it is, and stays served."""
    with pynbd_serve("-f", "raw", empty_disk) as peer:
        run("qemu-img", "resize", "-f", "raw", peer.uri(), "128M", status=1)
        assert json.loads(run("qemu-img", "info", "--output=json", peer.uri()))["virtual-size"] == 64 << 20
