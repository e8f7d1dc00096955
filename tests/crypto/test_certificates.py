"""Certificates that are made: OpenSSL and GnuTLS agree with them, and nothing is overwritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError, OptionError
from pynbd.crypto import certificates
from tests.peers import require_tool, run


def test_openssl_verifies_them(pki: Path) -> None:
    openssl = require_tool("openssl")
    for purpose, name in (("sslserver", "server-cert.pem"), ("sslclient", "client-cert.pem")):
        authority = ["-x509_strict", "-CAfile", str(pki / "ca-cert.pem")]
        run(openssl, "verify", *authority, "-purpose", purpose, pki / name)
        run(openssl, "verify", *authority, pki / "stranger" / name, status=2)
    run(openssl, "verify", "-CAfile", pki / "ca-cert.pem", "-purpose", "sslclient", pki / "server-cert.pem", status=2)
    run(openssl, "verify", "-CAfile", pki / "ca-cert.pem", "-verify_ip", "127.0.0.1", pki / "server-cert.pem")


def test_keys_are_for_their_owner(pki: Path) -> None:
    assert {path.name: path.stat().st_mode & 0o777 for path in pki.glob("*-key.pem")} == {
        "ca-key.pem": 0o600,
        "client-key.pem": 0o600,
        "server-key.pem": 0o600,
    }


def test_the_authority_is_loaded_again(pki: Path, tmp_path: Path) -> None:
    certificates.issue(certificates.load_authority(pki), tmp_path, "client", "carol", [], 10000)
    assert (tmp_path / "ca-cert.pem").read_bytes() == (pki / "ca-cert.pem").read_bytes()
    assert not (tmp_path / "ca-key.pem").exists()
    # Good no longer than its authority, or it would be of no use then.
    ends = [
        run(require_tool("openssl"), "x509", "-noout", "-enddate", "-in", folder / name)
        for folder, name in ((pki, "ca-cert.pem"), (tmp_path, "client-cert.pem"))
    ]
    assert ends[0] == ends[1]


def test_what_is_there_stays(pki: Path) -> None:
    before = {path: path.read_bytes() for path in pki.iterdir() if path.is_file()}
    authority = certificates.load_authority(pki)
    with pytest.raises(FileExistsError, match=r"server-key\.pem: File exists"):
        certificates.issue(authority, pki, "server", "x", ["x"], 1)
    with pytest.raises(FileExistsError, match=r"ca-key\.pem: File exists"):
        certificates.make_authority(pki, "x", 1)
    with pytest.raises(BlockError, match="this is the certificate of another authority"):
        certificates.issue(authority, pki / "stranger", "client", "x", [], 1)
    assert before == {path: path.read_bytes() for path in pki.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "hosts", "days", "says"),
    [
        ("", [], 1, "a common name has 1 to 64 letters"),
        ("x" * 65, [], 1, "a common name has 1 to 64 letters"),
        ("x", ["a..b"], 1, "'a..b' is no host name and no address"),
        ("x", [], 0, "0 days: a certificate is good for 1 to 36500"),
    ],
)
def test_out_of_bounds(name: str, hosts: list[str], days: int, says: str, pki: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=says):
        certificates.issue(certificates.load_authority(pki), tmp_path, "server", name, hosts, days)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("ca-cert.pem", "nonsense", "ca-cert.pem: this is no certificate"),
        ("ca-key.pem", "nonsense", "ca-key.pem: this is no private key without a password"),
        ("ca-key.pem", None, "ca-key.pem: No such file"),
        ("ca-key.pem", "client-key.pem", "ca-key.pem: this is not the key of"),
    ],
)
def test_what_is_no_authority(name: str, content: str | None, says: str, pki: Path, tmp_path: Path) -> None:
    for file in ("ca-cert.pem", "ca-key.pem"):
        (tmp_path / file).write_bytes((pki / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((pki / content).read_bytes() if content != "nonsense" else b"nonsense")
    with pytest.raises((OptionError, OSError), match=says):
        certificates.load_authority(tmp_path)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.x509", None)
    with pytest.raises(OptionError, match=r"pip install 'pynbd\[crypto\]'"):
        certificates.check_library()
