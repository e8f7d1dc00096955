"""`pynbd info` says of real servers what nbdinfo says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pynbd.cli.export_description import human_size
from pynbd.cli.info import state_name
from tests import peers
from tests.cli.pynbd_command import failure, pynbd
from tests.conftest import DiskMaker

Start = Callable[[Path], AbstractContextManager[peers.Peer]]

SERVERS: dict[str, Start] = {
    "qemu-nbd": lambda disk: peers.qemu_nbd(disk, "-D", "a disk"),
    "qemu-nbd, read-only": lambda disk: peers.qemu_nbd(disk, "-r", "-x", "näme/with spaces"),
    "nbdkit": lambda disk: peers.nbdkit("file", disk, tcp=True),
    "nbdkit with block sizes": lambda disk: peers.nbdkit(
        "file", disk, "blocksize-minimum=512", "blocksize-preferred=65536", options=["--filter=blocksize-policy"]
    ),
    "nbdkit with simple replies": lambda disk: peers.nbdkit("file", disk, options=["--no-sr"]),
    "nbdkit newstyle": lambda disk: peers.nbdkit("file", disk, options=["--mask-handshake=0"]),
    "nbdkit oldstyle": lambda disk: peers.nbdkit("file", disk, options=["--oldstyle"]),
    "pynbd": lambda disk: peers.pynbd_serve("-f", "raw", disk),
}


def nbdinfo(*arguments: str) -> str:
    return peers.run(peers.require_tool("nbdinfo", package="libnbd-bin"), *arguments)


@pytest.mark.parametrize("kind", SERVERS)
def test_the_same_as_nbdinfo(kind: str, sparse_disk: Path) -> None:
    with SERVERS[kind](sparse_disk) as peer:
        uri = peer.uri("näme/with spaces" if "read-only" in kind else None)
        ours, theirs = json.loads(pynbd("info", "--json", uri)), json.loads(nbdinfo("--json", uri))
        (ours_export,), (theirs_export,) = ours.pop("exports"), theirs.pop("exports")
        replies = ours.pop("replies")
        # That nbdinfo knows no extended headers, and looks into the disk.
        assert theirs.pop("structured") == (ours.pop("structured") and replies != "simple")
        assert ours == theirs
        assert theirs_export.pop("content")
        assert peers.run("nbdinfo", "--size", ours_export.pop("uri")) == nbdinfo("--size", theirs_export.pop("uri"))
        assert {name: ours_export[name] for name in theirs_export} == theirs_export
        assert pynbd("info", "--size", uri) == nbdinfo("--size", uri)
        human = pynbd("info", uri)
        assert f'export="{ours_export["export-name"]}":\n\texport-size: 67108864 (64M)\n' in human
        assert f"\tis_read_only: {str(ours_export['is_read_only']).lower()}\n" in human


def test_the_size_of_an_export_of_nbd_server(sparse_disk: Path) -> None:
    """Asked by INFO it says 0, which nbdinfo believes; a client that connects gets to know better."""
    with peers.nbd_server({"disk": sparse_disk}) as peer:
        assert pynbd("info", "--size", peer.uri()) == f"{64 << 20}\n"


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "pynbd"])
def test_the_same_map_as_nbdinfo(kind: str, sparse_disk: Path) -> None:
    with SERVERS[kind](sparse_disk) as peer:
        uri = peer.uri()
        assert json.loads(pynbd("info", "--map", "--json", uri)) == json.loads(nbdinfo("--map", "--json", uri))
        assert pynbd("info", "--map", uri).split() == nbdinfo("--map", uri).split()
        assert pynbd("info", uri, "--map", "--totals").split() == nbdinfo("--map", "--totals", uri).split()


def test_the_map_of_a_dirty_bitmap(tmp_path: Path) -> None:
    """And of any other context, if it is named."""
    image = tmp_path / "disk.qcow2"
    qemu_img = peers.require_tool("qemu-img", package="qemu-utils")
    peers.run(qemu_img, "create", "-q", "-f", "qcow2", image, "1M")
    peers.run(qemu_img, "bitmap", "--add", "-g", "64k", image, "b0")
    peers.run(peers.require_tool("qemu-io", package="qemu-utils"), "-c", "write 128k 1k", image)
    with peers.qemu_nbd(image, "-f", "qcow2", "-B", "b0", "-A") as peer:
        uri = peer.uri()
        contexts = json.loads(pynbd("info", "--json", uri))["exports"][0]["contexts"]
        assert sorted(contexts) == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
        assert pynbd("info", "--map=qemu:dirty-bitmap:b0", uri).split("\n") == [
            "         0      131072    0  clean",
            "    131072       65536    1  dirty",
            "    196608      851968    0  clean",
            "",
        ]
        depths = json.loads(pynbd("info", "--json", "--map=qemu:allocation-depth", uri))
        assert [extent["description"] for extent in depths] == ["unallocated", "local", "unallocated"]
        assert "has no metadata context 'qemu:dirty-bitmap:b1'" in failure("info", "--map=qemu:dirty-bitmap:b1", uri)


def test_a_map_of_many_requests() -> None:
    """A disk larger than one request can say, and the map of nothing."""
    with peers.nbdkit("memory", "9T") as peer:
        assert pynbd("info", "--map", peer.uri()).split() == ["0", str(9 << 40), "3", "hole,zero"]
    with peers.nbdkit("null", "0") as peer:
        assert pynbd("info", "--map", peer.uri()) == ""
        assert json.loads(pynbd("info", "--map", "--json", peer.uri())) == []
        assert pynbd("info", "--map", "--totals", peer.uri()) == ""


def test_extended_headers(random_disk: Path) -> None:
    with peers.qemu_nbd(random_disk, qemu10=True) as peer:
        told: dict[str, Any] = json.loads(pynbd("info", "--json", peer.uri()))
        assert told["replies"] == "extended"
        assert told["structured"] is True
        assert pynbd("info", peer.uri()).startswith("protocol: newstyle-fixed without TLS, using extended packets\n")
        assert pynbd("info", "--map", peer.uri()).split() == ["0", str(8 << 20), "0", "data"]


def test_legacy_names(random_disk: Path) -> None:
    with peers.qemu_nbd(random_disk, "-x", "disk") as peer:
        assert pynbd("info", "--size", f"nbd:unix:{peer.endpoint.socket_path}:exportname=disk") == f"{8 << 20}\n"


def test_failures(make_disk: DiskMaker, tmp_path: Path) -> None:
    """One line that says what and where."""
    assert failure("info", "nbd://127.0.0.1:1") == "Failed to connect to '127.0.0.1:1': Connection refused"
    assert failure("info", "nbds://127.0.0.1:1") == "Failed to connect to '127.0.0.1:1': Connection refused"
    assert failure("info", "disk.raw").startswith("disk.raw: ")
    assert failure("info") == "the URI of an export is missing"
    with peers.qemu_nbd(make_disk(512), "-x", "there") as peer:
        said = failure("info", peer.uri("elsewhere"))
        assert said.startswith(
            f"Failed to connect to '{peer.endpoint.socket_path}': the server refuses export 'elsewhere'"
        )
    psk = tmp_path / "psk"
    psk.write_text("user:00112233445566778899aabbccddeeff\n")
    with peers.nbdkit("null", "1M", options=["--tls=require", f"--tls-psk={psk}"]) as peer:
        assert "the server demands TLS" in failure("info", peer.uri())


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0"),
        (1000, "1000"),
        (1024, "1K"),
        (1536, "1.5K"),
        (1 << 30, "1G"),
        ((1 << 30) + 512, "1073742336"),
        ((1 << 30) + (1 << 20), "1025M"),
        (3 << 39, "1.5T"),
        (10_000_000, "10000000"),
        ((1 << 63) - 1, "9223372036854775807"),
        (1 << 62, "4E"),
    ],
)
def test_human_sizes(size: int, said: str) -> None:
    assert human_size(size) == said


@pytest.mark.parametrize(
    ("context", "state", "said"),
    [
        ("base:allocation", 0, "data"),
        ("base:allocation", 3, "hole,zero"),
        ("base:allocation", 4, ""),
        ("qemu:dirty-bitmap:x", 1, "dirty"),
        ("qemu:allocation-depth", 3, "backing depth 3"),
        ("other:context", 1, ""),
    ],
)
def test_names_of_states(context: str, state: int, said: str) -> None:
    assert state_name(context, state) == said
