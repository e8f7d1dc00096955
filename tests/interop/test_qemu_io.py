"""qemu-io against `pynbd serve`: patterns, zeroes, discard, flush, FUA, odd offsets, and what lies past the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.framing import FRAMINGS, framing_options
from tests.peers import Peer, pynbd_serve, require_tool, run

SIZE_BYTES = 64 << 20

EXTENT_TREE_BLOCKS = (64 << 10) // 512
"""What a file system may take for a list of more extents than the inode has room for."""


def qemu_io(uri: str, *commands: str, options: tuple[str, ...] = (), status: int = 0) -> str:
    """What qemu-io prints for some commands on one connection."""
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", "-f", "raw", *options, *words, uri, status=status)


@pytest.fixture(autouse=True)
def _qemu_io() -> None:
    require_tool("qemu-io", package="qemu-utils")


@pytest.fixture(params=FRAMINGS)
def peer(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[Peer]:
    """A file that reads as 0xff, in each framing, with discards passed on."""
    with pynbd_serve(*framing_options(request.param, tmp_path), "-f", "raw", "--discard=unmap", disk) as peer:
        yield peer


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\xff" * SIZE_BYTES)
    return path


def test_patterns_of_every_size(peer: Peer) -> None:
    """From one byte to 32 MiB, aligned and not, and the neighbours stay as they were."""
    places = [(0, 512), (513, 77), (4095, 2), (70_001, 200_000), (8 << 20, 32 << 20), (SIZE_BYTES - 1, 1)]
    for number, (offset, length) in enumerate(places, 1):
        commands = [f"write -P {number} {offset} {length}", f"read -P {number} {offset} {length}"]
        if offset:
            commands.append(f"read -P 0xff {offset - 1} 1")
        if offset + length < SIZE_BYTES:
            commands.append(f"read -P 0xff {offset + length} 1")
        said = qemu_io(peer.uri(), *commands)
        assert "Pattern verification failed" not in said


def test_more_than_one_request_can_carry(peer: Peer) -> None:
    """QEMU cuts at what the server says it takes."""
    qemu_io(peer.uri(), "write -P 7 1M 48M", "read -P 7 1M 48M", "read -P 0xff 0 1M", "read -P 0xff 49M 15M")


def test_many_at_once(peer: Peer) -> None:
    writes = [f"aio_write -P {number % 250 + 1} {number * 64}k 64k" for number in range(128)]
    reads = [f"read -P {number % 250 + 1} {number * 64}k 64k" for number in range(128)]
    said = qemu_io(peer.uri(), *writes, "aio_flush", *reads)
    assert said.count("wrote 65536/65536") == 128


def test_vectors(peer: Peer) -> None:
    qemu_io(peer.uri(), "writev -P 9 1M 512 4096 1024 65536", "readv -P 9 1M 65536 4096 1024 512")


def test_zeroes_that_stay_allocated(peer: Peer, disk: Path) -> None:
    """`write -z` forbids a hole (NO_HOLE)."""
    before = disk.stat().st_blocks
    qemu_io(peer.uri(), "write -z 4M 16M", "read -P 0 4M 16M", "read -P 0xff 0 4M", "read -P 0xff 20M 4M")
    assert disk.stat().st_blocks >= before


def test_zeroes_that_may_be_a_hole(peer: Peer, disk: Path) -> None:
    """`write -z -u` allows a hole, and a file makes one."""
    before = disk.stat().st_blocks
    qemu_io(peer.uri(), "write -z -u 4M 16M", "read -P 0 4M 16M", "read -P 0xff 0 4M", "read -P 0xff 20M 4M")
    assert disk.stat().st_blocks <= before - (16 << 20) // 512 + EXTENT_TREE_BLOCKS


def test_zeroes_of_odd_lengths(peer: Peer) -> None:
    commands = ["write -z 513 100", "read -P 0 513 100", "read -P 0xff 512 1", "read -P 0xff 613 1"]
    commands += ["write -z -u 70001 200001", "read -P 0 70001 200001", "read -P 0xff 70000 1", "read -P 0xff 270002 1"]
    qemu_io(peer.uri(), *commands)


def test_zeroes_or_nothing(peer: Peer) -> None:
    """`write -z -n`: quickly or not at all; a file can, and what is there afterwards is one or the other."""
    commands = ["write -P 3 0 1M", "write -z -u -n 0 1M"]
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw", *words, peer.uri())
    qemu_io(peer.uri(), "read -P 0 0 1M")


def test_discard(peer: Peer, disk: Path) -> None:
    before = disk.stat().st_blocks
    qemu_io(peer.uri(), "discard 1M 8M", "read -P 0xff 0 1M", "read -P 0xff 9M 1M", options=("-d", "unmap"))
    assert disk.stat().st_blocks <= before - (8 << 20) // 512 + EXTENT_TREE_BLOCKS


def test_flush_and_fua(peer: Peer) -> None:
    commands = ["write -f -P 1 0 4k", "write -f -z 8k 4k", "write -f -z -u 16k 64k", "flush"]
    said = qemu_io(peer.uri(), *commands, "read -P 1 0 4k", "read -P 0 8k 4k", "read -P 0 16k 64k")
    assert "failed" not in said


def test_every_write_with_fua(peer: Peer) -> None:
    """Without a write cache at the client, each write is one with FUA."""
    qemu_io(peer.uri(), "write -P 1 0 1M", "write -P 2 1M 100", "read -P 1 0 1M", options=("-t", "directsync"))


def test_nothing_at_all(peer: Peer) -> None:
    said = qemu_io(peer.uri(), "read 0 0", "write 0 0", "write -z 0 0", "discard 0 0", "read -P 0xff 0 512")
    assert "failed" not in said


def test_past_the_end(peer: Peer) -> None:
    """QEMU's own bounds check speaks: what the server told it of the size is right."""
    for command in ["read 64M 1", "read 67108863 2", "write 64M 512", "write 67108352 1024", "write -z 63M 2M"]:
        assert "failed" in qemu_io(peer.uri(), command, status=1)
    qemu_io(peer.uri(), f"read -P 0xff 0 {SIZE_BYTES // 2}", f"read -P 0xff {SIZE_BYTES // 2} {SIZE_BYTES // 2}")


def test_a_tail_that_is_no_whole_sector(tmp_path: Path) -> None:
    disk = tmp_path / "odd.raw"
    disk.write_bytes(b"\xff" * 1_000_001)
    with pynbd_serve("-f", "raw", disk) as peer:
        qemu_io(peer.uri(), "write -P 5 999900 101", "read -P 5 999900 101", "read -P 0xff 0 999900")
    assert disk.read_bytes() == b"\xff" * 999_900 + b"\x05" * 101


def test_a_read_only_export_is_not_written(disk: Path) -> None:
    with pynbd_serve("-f", "raw", "-r", disk) as peer:
        qemu_io(peer.uri(), "write -P 1 0 512", status=1)
        qemu_io(peer.uri(), "write -P 1 0 512", options=("-r",), status=1)
        qemu_io(peer.uri(), "read -P 0xff 0 1M", options=("-r",))
    assert disk.read_bytes() == b"\xff" * SIZE_BYTES


def test_options_and_qcow2_over_the_export(tmp_path: Path) -> None:
    """QEMU's blockdev options reach us as well as a URI does; a qcow2 on top survives a reopening."""
    disk = tmp_path / "holder.raw"
    disk.touch()
    with disk.open("r+b") as file:
        file.truncate(32 << 20)
    with pynbd_serve("-f", "raw", "-x", "q", disk, tcp=True) as peer:
        run("qemu-img", "create", "-q", "-f", "qcow2", peer.uri("q"), "1G")
        server = f"server.type=inet,server.host=127.0.0.1,server.port={peer.endpoint.port}"
        image = f"driver=qcow2,file.driver=nbd,file.{server.replace(',', ',file.')},file.export=q"
        run("qemu-io", "--image-opts", "-c", "write -P 8 512M 2M", "-c", "write -z 513M 64k", image)
        commands = ["-c", "read -P 8 512M 1M", "-c", "read -P 0 513M 64k", "-c", "read -P 0 0 1M"]
        assert "failed" not in run("qemu-io", "--image-opts", *commands, image)
