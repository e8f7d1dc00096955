"""`pynbd list` finds what real servers have."""

from __future__ import annotations

import json
from pathlib import Path

from tests import peers
from tests.cli.pynbd_command import failure, pynbd
from tests.conftest import DiskMaker


def test_exports_with_sizes_and_descriptions(make_disk: DiskMaker) -> None:
    with peers.qemu_nbd(make_disk(1 << 20), "-x", "disk", "-D", "the only one") as peer:
        assert pynbd("list", peer.uri("")) == '"disk"        1M  the only one\n'
        assert pynbd("list", "--full", peer.uri("")) == pynbd("info", "--list", peer.uri(""))
        told = json.loads(pynbd("list", "--json", peer.uri("")))
        assert told["protocol"] == "newstyle-fixed"
        (export,) = told["exports"]
        assert (export["export-name"], export["description"], export["export-size"]) == (
            "disk",
            "the only one",
            1 << 20,
        )
        assert export["contexts"] == ["base:allocation"]
        assert export["uri"] == peer.uri("disk")


def test_the_same_as_nbdinfo(tmp_path: Path) -> None:
    """More exports than a server answers options on one connection."""
    folder = tmp_path / "disks"
    folder.mkdir()
    for number in range(40):
        (folder / f"disk {number:02}").write_bytes(bytes(512 * number))
    with peers.nbdkit("file", f"dir={folder}") as peer:
        ours = json.loads(pynbd("list", "--json", peer.uri("")))["exports"]
        assert sorted(export["export-name"] for export in ours) == [f"disk {number:02}" for number in range(40)]
        assert {export["export-name"]: export["export-size"] for export in ours} == {
            f"disk {number:02}": 512 * number for number in range(40)
        }
        lines = pynbd("list", peer.uri("")).splitlines()
        assert '"disk 04"        2K' in lines


def test_a_server_without_infos(make_disk: DiskMaker) -> None:
    """nbd-server lists; what it does not tell otherwise is found by connecting."""
    disks = {"one": make_disk(1 << 20, name="1"), "two": make_disk(2 << 20, name="2")}
    with peers.nbd_server(disks) as peer:
        told = json.loads(pynbd("list", "--json", peer.uri("")))["exports"]
        assert {export["export-name"]: export["export-size"] for export in told} == {"one": 1 << 20, "two": 2 << 20}


def test_one_bad_export_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    (folder / "good").write_bytes(bytes(512))
    exports = [f"exportname={name}" for name in ("good", "gone")]
    options = ["--filter=exportname"]
    with peers.nbdkit("file", f"dir={folder}", "exportname-list=explicit", *exports, options=options) as peer:
        listed = json.loads(pynbd("list", "--json", peer.uri("")))["exports"]
        told = {export["export-name"]: export for export in listed}
        assert told["good"]["export-size"] == 512
        assert "the server refuses export 'gone'" in told["gone"]["error"]
        assert "?  (Failed to connect" in pynbd("list", peer.uri(""))
        assert "\terror: Failed to connect" in pynbd("list", "--full", peer.uri(""))


def test_failures(make_disk: DiskMaker) -> None:
    assert failure("list", "nbd://127.0.0.1:1") == "Failed to connect to '127.0.0.1:1': Connection refused"
    with peers.nbdkit("null", "1M", options=["--oldstyle"]) as peer:
        assert "does not list its exports: ERR_UNSUP" in failure("list", peer.uri(""))
