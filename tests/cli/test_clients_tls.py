"""`pynbd info`, `list` and `copy` through TLS, with the servers of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import peers
from tests.cli.pynbd_command import failure, pynbd
from tests.storage.test_nbd_tls import SERVERS


@pytest.mark.parametrize("kind", SERVERS)
def test_info_and_list_and_copy(kind: str, random_disk: Path, pki: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with SERVERS[kind](random_disk, pki) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates={pki}"
        told = json.loads(pynbd("info", "--json", uri))
        assert told["TLS"] is True
        assert told["exports"][0]["uri"] == uri
        assert "with TLS, using" in pynbd("info", uri)
        assert pynbd("info", "--map", "--totals", uri).split() == ["8388608", "100.0%", "0", "data"]
        assert pynbd("list", uri).split()[:2] == ['""', "8M"]
        pynbd("copy", uri, copy)
        assert copy.read_bytes() == random_disk.read_bytes()
        copy.write_bytes(copy.read_bytes()[::-1])
        pynbd("copy", copy, uri)
    assert random_disk.read_bytes() == copy.read_bytes()


def test_an_object_instead_of_a_folder(random_disk: Path, pki: Path, tmp_path: Path) -> None:
    objects = ["--object", f"tls-creds-x509,id=tls0,dir={pki}"]
    with SERVERS["qemu-nbd"](random_disk, pki) as peer:
        uri = f"nbd://localhost:{peer.endpoint.port}"
        for verb in ("info", "list"):
            assert "8M" in pynbd(verb, *objects, "--tls-creds", "tls0", uri)
            said = failure(verb, *objects, "--tls-creds", "tls0", "--tls-hostname", "other.example", uri)
            assert "Hostname mismatch" in said
            assert "there is no tls-creds-x509 'tls1'" in failure(verb, *objects, "--tls-creds", "tls1", uri)
        place = f"driver=nbd,host=localhost,port={peer.endpoint.port},tls-creds=tls0"
        pynbd("copy", *objects, place, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == random_disk.read_bytes()


def test_a_server_without_tls(random_disk: Path, pki: Path) -> None:
    with peers.nbdkit("file", random_disk, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates={pki}"
        for verb in ("info", "list"):
            assert "the server does not begin TLS: " in failure(verb, uri)
