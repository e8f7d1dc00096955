"""`pynbd certs`: folders that the server and its clients take as they are, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.pynbd_command import failure, pynbd
from tests.peers import pynbd_serve, require_tool, run

ALL = ["ca-cert.pem", "ca-key.pem", "client-cert.pem", "client-key.pem", "server-cert.pem", "server-key.pem"]


def test_a_folder_for_both_ends(tmp_path: Path, sparse_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    folder = tmp_path / "deep" / "pki"
    assert pynbd("certs", folder).splitlines() == [str(folder / name) for name in ALL]
    assert folder.stat().st_mode & 0o077 == 0
    tls = ["--tls-certificates", str(folder), "--tls-verify-peer"]
    with pynbd_serve("-f", "raw", *tls, sparse_disk, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates={folder}"
        assert run("nbdinfo", "--size", uri) == f"{sparse_disk.stat().st_size}\n"


def test_one_more_client(tmp_path: Path) -> None:
    pynbd("certs", tmp_path / "pki", "--for", "server", "--host", "192.0.2.7", "--host", "disks.example.com")
    made = pynbd("certs", tmp_path / "bob", "--ca", tmp_path / "pki", "--for", "client", "--name", "bob")
    assert made.splitlines() == [
        str(tmp_path / "bob" / name) for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    ]
    openssl = require_tool("openssl")
    shown = run(
        openssl, "x509", "-noout", "-subject", "-ext", "extendedKeyUsage", "-in", tmp_path / "bob/client-cert.pem"
    )
    assert "CN = bob" in shown
    assert "TLS Web Client Authentication" in shown
    shown = run(openssl, "x509", "-noout", "-ext", "subjectAltName", "-in", tmp_path / "pki/server-cert.pem")
    assert "IP Address:192.0.2.7, DNS:disks.example.com" in shown
    # The authority that is there signs, also when nobody says so.
    pynbd("certs", tmp_path / "pki", "--for", "client")
    run(openssl, "verify", "-CAfile", tmp_path / "bob/ca-cert.pem", tmp_path / "pki/client-cert.pem")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--for", "server"], "server-key.pem: File exists"),
        (["--for", "client", "--name", ""], "'': a common name has 1 to 64 letters"),
        (["--days", "0"], "0 days: a certificate is good for 1 to 36500"),
        (["--ca", "/nonexistent"], "/nonexistent/ca-cert.pem: No such file or directory"),
    ],
)
def test_what_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    pynbd("certs", tmp_path / "pki", "--for", "server")
    assert says in failure("certs", tmp_path / "pki", *words)
