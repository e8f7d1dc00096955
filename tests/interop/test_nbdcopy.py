"""nbdcopy against `pynbd serve`: both ways, four connections, sparse, verified by checksum."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.interop.contents import is_all_zero, sha256, write_random
from tests.interop.framing import FRAMINGS, framing_options
from tests.peers import Peer, nbdkit, pynbd_serve, require_tool, run

FOUR = ("--connections=4", "--threads=4")
"""nbdcopy uses no more connections than threads, and no more threads than processors unless told."""

SIZE_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def _nbdcopy() -> None:
    require_tool("nbdcopy", package="libnbd-bin")


def connections_at_once(peer: Peer) -> int:
    """The most clients that the server's log has at one time."""
    now = most = 0
    for event in re.findall(r"uses export|: gone", peer.log()):
        now += 1 if event == "uses export" else -1
        most = max(most, now)
    return most


@pytest.mark.parametrize("framing", FRAMINGS)
def test_there_and_back_with_four_connections(framing: str, tmp_path: Path) -> None:
    source = write_random(tmp_path / "source.raw", SIZE_BYTES)
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    served.touch()
    with served.open("r+b") as file:
        file.truncate(SIZE_BYTES)
    with pynbd_serve(*framing_options(framing, tmp_path), "-v", "-f", "raw", served) as peer:
        run("nbdcopy", *FOUR, "--flush", source, peer.uri())
        run("nbdcopy", *FOUR, peer.uri(), copy)
        assert connections_at_once(peer) == 4
    assert sha256(copy) == sha256(served) == sha256(source)


def test_many_requests_over_tcp(tmp_path: Path) -> None:
    """Four connections with 64 requests of 1 MiB each: more than the server takes into memory at once."""
    source = write_random(tmp_path / "source.raw", SIZE_BYTES)
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    shutil.copyfile(source, served)
    with pynbd_serve("-f", "raw", served, tcp=True) as peer:
        run("nbdcopy", *FOUR, "--requests=64", "--request-size=1048576", "--no-extents", peer.uri(), copy)
        assert sha256(copy) == sha256(source)
        write_random(source, SIZE_BYTES)
        run("nbdcopy", *FOUR, "--requests=64", "--request-size=1048576", "--flush", source, peer.uri())
    assert sha256(served) == sha256(source)


def test_sparse_stays_sparse_both_ways(sparse_disk: Path, tmp_path: Path) -> None:
    served, copy = tmp_path / "served.raw", tmp_path / "copy.raw"
    write_random(served, SIZE_BYTES)
    with pynbd_serve("-f", "raw", "--discard=unmap", served) as peer:
        run("nbdcopy", *FOUR, sparse_disk, peer.uri())
        run("nbdcopy", *FOUR, peer.uri(), copy)
    assert sha256(served) == sha256(copy) == sha256(sparse_disk)
    assert served.stat().st_blocks <= sparse_disk.stat().st_blocks
    assert copy.stat().st_blocks <= sparse_disk.stat().st_blocks


def test_allocated_makes_no_holes(empty_disk: Path, tmp_path: Path) -> None:
    served = tmp_path / "served.raw"
    write_random(served, SIZE_BYTES)
    with pynbd_serve("-f", "raw", "--discard=unmap", served) as peer:
        run("nbdcopy", "--allocated", empty_disk, peer.uri())
    assert is_all_zero(served)
    assert served.stat().st_blocks * 512 >= SIZE_BYTES


def test_synchronous(random_disk: Path, tmp_path: Path) -> None:
    """nbdcopy's other loop: one request after another."""
    copy = tmp_path / "copy.raw"
    with pynbd_serve("-f", "raw", random_disk) as peer:
        run("nbdcopy", "--synchronous", peer.uri(), copy)
    assert sha256(copy) == sha256(random_disk)


def test_an_odd_size_to_a_pipe(tmp_path: Path) -> None:
    disk = tmp_path / "odd.raw"
    disk.write_bytes(bytes(range(251)) * 4001)
    with pynbd_serve("-f", "raw", disk) as peer:
        run("sh", "-c", 'nbdcopy "$0" - | cmp - "$1"', peer.uri(), disk)


def test_from_another_server_into_ours(tmp_path: Path) -> None:
    """Server to server, with nbdkit's pattern as the source: nothing but the network in between."""
    with nbdkit("pattern", "size=32M") as source, pynbd_serve("driver=memory,size=32M") as target:
        run("nbdcopy", *FOUR, source.uri(), target.uri())
        run("nbdcopy", *FOUR, source.uri(), tmp_path / "expected.raw")
        run("nbdcopy", *FOUR, target.uri(), tmp_path / "found.raw")
    assert sha256(tmp_path / "found.raw") == sha256(tmp_path / "expected.raw")


def test_from_one_of_our_exports_into_another(random_disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(random_disk.stat().st_size))
    with pynbd_serve("-f", "raw", f"a={random_disk}", f"b={other}") as peer:
        run("nbdcopy", *FOUR, peer.uri("a"), peer.uri("b"))
    assert sha256(other) == sha256(random_disk)
