"""nbdinfo against `pynbd serve`: every flag, lists, JSON, and maps of each metadata context."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.framing import framing_options
from tests.peers import Peer, pynbd_serve, require_tool, run

SIZE_BYTES = 64 << 20
ALL_CAN = {
    "can_cache": True,
    "can_df": True,
    "can_fast_zero": True,
    "can_flush": True,
    "can_fua": True,
    "can_multi_conn": True,
    "can_trim": True,
    "can_zero": True,
    "is_rotational": False,
    "is_read_only": False,
}


@pytest.fixture(autouse=True)
def _nbdinfo() -> None:
    require_tool("nbdinfo", package="libnbd-bin")


@pytest.fixture
def peer(sparse_disk: Path) -> Iterator[Peer]:
    """A sparse file with a dirty bitmap, and everything that can be asked for."""
    options = ["-f", "raw", "-A", "-B", "since", "-D", "what it is", "-x", "disk", "--discard", "unmap"]
    with pynbd_serve(*options, sparse_disk) as peer:
        yield peer


def export_of(peer: Peer, name: str) -> dict[str, Any]:
    """What nbdinfo says of one export."""
    (told,) = json.loads(run("nbdinfo", "--json", peer.uri(name)))["exports"]
    assert isinstance(told, dict)
    return told


def nbd_map(peer: Peer, context: str, export: str = "disk") -> list[tuple[int, int, int]]:
    """(offset, length, state) of each extent of a metadata context."""
    extents: list[dict[str, int]] = json.loads(run("nbdinfo", "--json", f"--map={context}", peer.uri(export)))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in extents]


def test_all_flags_of_a_writable_export(peer: Peer) -> None:
    told = export_of(peer, "disk")
    assert {flag: told[flag] for flag in ALL_CAN} == ALL_CAN
    assert (told["export-name"], told["export-size"], told["description"]) == ("disk", SIZE_BYTES, "what it is")
    blocks = (told["block_size_minimum"], told["block_size_preferred"], told["block_size_maximum"])
    assert blocks == (1, 4096, 32 << 20)
    assert told["contexts"] == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:since"]


def test_all_flags_of_a_read_only_export(sparse_disk: Path) -> None:
    """What can't be done isn't offered."""
    with pynbd_serve("-f", "raw", "-r", sparse_disk) as peer:
        told = export_of(peer, "")
    expected = ALL_CAN | {"can_trim": False, "can_zero": False, "can_fast_zero": False, "is_read_only": True}
    assert {flag: told[flag] for flag in ALL_CAN} == expected


def test_without_structured_replies(sparse_disk: Path, tmp_path: Path) -> None:
    """No structured replies: neither DF nor metadata contexts."""
    with pynbd_serve(*framing_options("simple", tmp_path), "-f", "raw", sparse_disk) as peer:
        told = json.loads(run("nbdinfo", "--json", peer.uri()))
        run("nbdinfo", "--map", peer.uri(), status=1)
    assert told["structured"] is False
    assert told["exports"][0]["can_df"] is False
    assert told["exports"][0]["can_fua"] is True
    assert not told["exports"][0].get("contexts")


def test_one_question_at_a_time(peer: Peer) -> None:
    """`nbdinfo --can X` answers by its status."""
    for question in ["cache", "connect", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero"]:
        run("nbdinfo", "--can", question, peer.uri("disk"))


def test_is_read_only_and_size(peer: Peer) -> None:
    run("nbdinfo", "--is", "read-only", peer.uri("disk"), status=2)
    run("nbdinfo", "--is", "rotational", peer.uri("disk"), status=2)
    assert int(run("nbdinfo", "--size", peer.uri("disk"))) == SIZE_BYTES


def test_a_size_that_is_no_multiple_of_512(make_disk: Any) -> None:
    with pynbd_serve("-f", "raw", make_disk(1_000_001)) as peer:
        assert int(run("nbdinfo", "--size", peer.uri())) == 1_000_001
        assert nbd_map(peer, "base:allocation", "") == [(0, 1_000_001, 0)]


def test_an_empty_disk(tmp_path: Path) -> None:
    (tmp_path / "nothing.raw").touch()
    with pynbd_serve("-f", "raw", tmp_path / "nothing.raw") as peer:
        assert export_of(peer, "")["export-size"] == 0


def test_list_tells_all_exports(sparse_disk: Path, random_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "-r", f"first={sparse_disk}", f"second={random_disk}") as peer:
        told = json.loads(run("nbdinfo", "--json", "--list", peer.uri("")))["exports"]
        assert "second" in run("nbdinfo", "--list", peer.uri(""))
    sizes = {export["export-name"]: export["export-size"] for export in told}
    assert sizes == {"first": SIZE_BYTES, "second": 8 << 20}


def test_an_unknown_export(peer: Peer) -> None:
    run("nbdinfo", peer.uri("another"), status=1)
    run("nbdinfo", peer.uri(""), status=1)
    assert export_of(peer, "disk")["export-size"] == SIZE_BYTES


def test_map_of_allocation(peer: Peer) -> None:
    """Data where the file has data, holes that read as zeroes elsewhere."""
    last = SIZE_BYTES - (64 << 10)
    assert nbd_map(peer, "base:allocation") == [
        (0, 64 << 10, 0),
        (64 << 10, (16 << 20) - (64 << 10), 3),
        (16 << 20, 1 << 20, 0),
        (17 << 20, last - (17 << 20), 3),
        (last, 64 << 10, 0),
    ]


def test_map_of_allocation_depth(peer: Peer) -> None:
    """A raw file has one layer, and all of it is there."""
    assert nbd_map(peer, "qemu:allocation-depth") == [(0, SIZE_BYTES, 1)]


def test_map_of_the_depth_of_an_overlay(random_disk: Path) -> None:
    """What was written since is in the first layer, the rest in the one below."""
    require_tool("qemu-io", package="qemu-utils")
    with pynbd_serve("-f", "raw", "-s", "-A", random_disk) as peer:
        assert nbd_map(peer, "qemu:allocation-depth", "") == [(0, 8 << 20, 2)]
        run("qemu-io", "-f", "raw", "-c", "write 1M 64k", peer.uri())
        written = [
            (offset, length) for offset, length, depth in nbd_map(peer, "qemu:allocation-depth", "") if depth == 1
        ]
        assert written == [(1 << 20, 64 << 10)]
        assert nbd_map(peer, "base:allocation", "") == [(0, 8 << 20, 0)]


def test_map_of_a_dirty_bitmap(peer: Peer) -> None:
    """Clean at first; then dirty where something was written, zeroed or discarded, and nowhere else."""
    require_tool("qemu-io", package="qemu-utils")
    assert nbd_map(peer, "qemu:dirty-bitmap:since") == [(0, SIZE_BYTES, 0)]
    commands = ["write 1M 64k", "write -z 8M 1M", "discard 32M 64k"]
    run("qemu-io", "-f", "raw", "-d", "unmap", *[w for c in commands for w in ("-c", c)], peer.uri("disk"))
    dirty = [(offset, length) for offset, length, state in nbd_map(peer, "qemu:dirty-bitmap:since") if state]
    assert dirty == [(1 << 20, 64 << 10), (8 << 20, 1 << 20), (32 << 20, 64 << 10)]


def test_map_of_a_context_that_is_not_there(peer: Peer) -> None:
    run("nbdinfo", "--map=qemu:dirty-bitmap:other", peer.uri("disk"), status=1)
    run("nbdinfo", "--map=x-no:such", peer.uri("disk"), status=1)


def test_totals_of_a_terabyte_of_nothing() -> None:
    """More than 32 bits of lengths, in as many requests as it takes."""
    with pynbd_serve("driver=memory,size=1T") as peer:
        (total,) = json.loads(run("nbdinfo", "--json", "--map", "--totals", peer.uri()))
    assert (total["size"], total["type"]) == (1 << 40, 3)
