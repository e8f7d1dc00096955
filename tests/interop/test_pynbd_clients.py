"""`pynbd info`, `pynbd list` and `pynbd copy` beside libnbd's tools: of every server they must tell and do the same."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.contents import sha256, write_random
from tests.peers import Peer, nbd_server, nbdkit, pynbd_serve, qemu_nbd, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd")

Server = Callable[[Path], contextlib.AbstractContextManager[Peer]]

SERVERS: dict[str, Server] = {
    "pynbd": lambda disk: pynbd_serve("-f", "raw", "-A", "-B", "b", "-D", "what it is", "-x", "a disk", disk),
    "pynbd-read-only": lambda disk: pynbd_serve("-f", "raw", "-r", disk, tcp=True),
    "qemu-nbd": lambda disk: qemu_nbd(disk, "-x", "ä/b", "-D", "its text", "-A"),
    "nbdkit": lambda disk: nbdkit("file", disk),
    "nbdkit-simple": lambda disk: nbdkit("file", disk, options=["--no-sr", "-r"]),
    "nbd-server": lambda disk: nbd_server({"one": disk, "two": disk}, "flush = true", "readonly = true", tcp=True),
}

EXPORT_NAMES = {"pynbd": "a disk", "qemu-nbd": "ä/b"}

OURS_ALONE = {"can_block_status_payload", "uri", "description", "content", "export-size-str"}
"""What only one of the two tells, or each in its own way."""

NO_BLOCK_STATUS = {"nbdkit-simple", "nbd-server"}


@pytest.fixture(params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    require_tool("nbdinfo", package="libnbd-bin")
    return str(request.param)


def told_by(tool: tuple[str, ...], *arguments: str) -> Any:
    """What a tool prints as JSON."""
    return json.loads(run(*tool, *arguments))


def facts(export: dict[str, Any]) -> dict[str, Any]:
    """What both tools tell of an export, without what there is not."""
    return {key: value for key, value in export.items() if key not in OURS_ALONE and value is not None}


def test_info_tells_what_nbdinfo_tells(name: str, sparse_disk: Path) -> None:
    with SERVERS[name](sparse_disk) as peer:
        uri = peer.uri(EXPORT_NAMES.get(name))
        (theirs,) = told_by(("nbdinfo", "--json"), uri)["exports"]
        (ours,) = told_by((*PYNBD, "info", "--json"), uri)["exports"]
        if name == "nbd-server":
            # It says 0 to a GO that comes after an INFO of the same export, as nbdinfo's does.
            assert theirs.pop("export-size") == 0
        # What a server does not say of its block sizes, ours gives by the specification's defaults.
        assert facts(ours) == facts(ours) | facts(theirs)
        assert int(run(*PYNBD, "info", "--size", uri)) == sparse_disk.stat().st_size


def test_list_tells_what_nbdinfo_lists(name: str, sparse_disk: Path) -> None:
    with SERVERS[name](sparse_disk) as peer:
        theirs = told_by(("nbdinfo", "--json", "--list"), peer.uri(""))["exports"]
        ours = told_by((*PYNBD, "list", "--json"), peer.uri(""))["exports"]
    assert [export["export-name"] for export in ours] == [export["export-name"] for export in theirs]


def test_the_map_is_nbdinfos_map(name: str, sparse_disk: Path) -> None:
    with SERVERS[name](sparse_disk) as peer:
        uri = peer.uri(EXPORT_NAMES.get(name))
        if name in NO_BLOCK_STATUS:
            run(*PYNBD, "info", "--map", uri, status=1)
            return
        theirs = told_by(("nbdinfo", "--json", "--map"), uri)
        ours = told_by((*PYNBD, "info", "--json", "--map"), uri)
    wanted = ("offset", "length", "type")
    assert [[extent[key] for key in wanted] for extent in ours] == [
        [extent[key] for key in wanted] for extent in theirs
    ]


def test_copy_out_of_every_server(name: str, sparse_disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    with SERVERS[name](sparse_disk) as peer:
        run(*PYNBD, "copy", peer.uri(EXPORT_NAMES.get(name)), copy)
    assert sha256(copy) == sha256(sparse_disk)
    assert copy.stat().st_blocks <= sparse_disk.stat().st_blocks


@pytest.mark.parametrize(
    "server", [lambda disk: qemu_nbd(disk), lambda disk: nbdkit("file", disk)], ids=["qemu-nbd", "nbdkit"]
)
def test_copy_into_another_server(server: Server, sparse_disk: Path, tmp_path: Path) -> None:
    """Over what was there before: what is a hole in the source is zeroes in the target."""
    target = write_random(tmp_path / "target.raw", sparse_disk.stat().st_size)
    with server(target) as peer:
        run(*PYNBD, "copy", "--flush", sparse_disk, peer.uri())
    assert sha256(target) == sha256(sparse_disk)


def test_copy_from_server_to_server(random_disk: Path, tmp_path: Path) -> None:
    """nbdcopy into theirs and `pynbd copy` into ours come to the same."""
    with pynbd_serve("driver=memory,size=8M") as ours, nbdkit("memory", "8M") as theirs:
        run("nbdcopy", random_disk, theirs.uri())
        run(*PYNBD, "copy", theirs.uri(), ours.uri())
        run("nbdcopy", ours.uri(), tmp_path / "copy.raw")
    assert sha256(tmp_path / "copy.raw") == sha256(random_disk)
