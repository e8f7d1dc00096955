"""Credentials: which files are read, what is said of those that are not as they should be, and reading them again."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects, checked, parse
from pynbd.crypto import certificates
from pynbd.crypto.tls_credentials import TlsCredsX509
from tests.crypto.tls_ends import credentials, secured


def test_as_qemu_writes_them(pki: Path) -> None:
    objects = Objects()
    made = objects.make(parse(f"tls-creds-x509,id=tls0,endpoint=server,dir={pki},verify-peer=off"))
    assert isinstance(made, TlsCredsX509)
    assert made.endpoint == "server"
    assert not made.wants_client_identity
    kind, options = checked(parse("tls-creds-x509,id=tls0"))
    assert kind is TlsCredsX509
    assert (options.endpoint, options.verify_peer) == ("client", True)  # type: ignore[attr-defined]  # of that kind


async def test_files_by_name(pki: Path) -> None:
    server = credentials(
        "server",
        ca_file=str(pki / "ca-cert.pem"),
        cert_file=str(pki / "server-cert.pem"),
        key_file=str(pki / "server-key.pem"),
    )
    client = credentials("client", pki / "stranger", verify_peer=False)
    with pytest.raises(OSError, match="not accepted"):
        async with secured(server, client):
            pass
    async with secured(server, credentials("client", pki)) as (end, _):
        assert end.identity == "CN=alice"


async def test_certificate_and_key_in_one_file(pki: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((pki / "server-key.pem").read_bytes() + (pki / "server-cert.pem").read_bytes())
    async with secured(
        credentials("server", cert_file=str(both), verify_peer=False), credentials("client", pki)
    ) as ends:
        assert ends[0].identity == ""
        assert ends[1].identity == "CN=localhost"


async def test_the_systems_authorities(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca-cert.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
    server = credentials("server", pki, verify_peer=False)
    async with secured(server, credentials("client")) as (_, client):
        assert client.identity == "CN=localhost"
    server = credentials("server", pki, ca_file="system")
    async with secured(server, credentials("client", pki)) as (end, _):
        assert end.identity == "CN=alice"
    with pytest.raises(OSError, match="unable to get local issuer"):
        async with secured(credentials("server", pki / "stranger", verify_peer=False), credentials("client")):
            pass


def encrypt_key(source: Path, target: Path, password: bytes) -> None:
    key = serialization.load_pem_private_key(source.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(password)
    target.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def test_an_encrypted_key(pki: Path, tmp_path: Path) -> None:
    encrypt_key(pki / "server-key.pem", tmp_path / "key.pem", b"letmein")
    options = f"tls-creds-x509,id=tls0,endpoint=server,dir={pki},key-file={tmp_path / 'key.pem'}"
    objects = Objects()
    objects.make(parse("secret,id=right,data=letmein"))
    objects.make(parse("secret,id=wrong,data=sesame"))
    objects.make(parse(f"{options},passwordid=right"))
    with pytest.raises(OptionError, match=r"key\.pem: .*not encrypted with that secret|bad decrypt"):
        objects.make(parse(f"{options},passwordid=wrong".replace("tls0", "tls1")))
    # Without one OpenSSL would ask on the terminal, and a service would hang.
    with pytest.raises(OptionError, match="the key is encrypted: give a passwordid"):
        objects.make(parse(options.replace("tls0", "tls2")))


@pytest.mark.parametrize(
    ("endpoint", "options", "says"),
    [
        ("server", {}, "a server needs a certificate: give dir, or cert-file and key-file"),
        ("server", {"dir": "missing"}, "server-cert.pem: No such file"),
        ("server", {"dir": "PKI", "key_file": "PKI/client-key.pem"}, "client-key.pem: key values mismatch"),
        ("server", {"dir": "PKI", "cert_file": "PKI/server-key.pem"}, "server-key.pem with"),
        ("server", {"dir": "PKI", "ca_file": "missing.pem"}, "missing.pem: No such file"),
        ("server", {"dir": "PKI", "ca_file": "PKI/ca-key.pem"}, "ca-key.pem: no certificate or crl found"),
        (
            "server",
            {"cert_file": "PKI/server-cert.pem", "key_file": "PKI/server-key.pem"},
            "whose clients are believed",
        ),
        ("client", {"key_file": "PKI/client-key.pem"}, "is the key of no certificate"),
        ("client", {"dir": "missing"}, "ca-cert.pem: No such file"),
    ],
)
def test_what_is_wrong(endpoint: str, options: dict[str, Any], says: str, pki: Path) -> None:
    options = {key: value.replace("PKI", str(pki)) for key, value in options.items()}
    with pytest.raises((OptionError, OSError), match=r"tls-creds-x509 'tls0': ") as caught:
        credentials(endpoint, options.pop("dir", ""), **options)
    assert says in str(caught.value)


def revocation_list(pki: Path, revoked: Path) -> bytes:
    authority = certificates.load_authority(pki)
    certificate = x509.load_pem_x509_certificate(revoked.read_bytes())
    start = certificate.not_valid_before_utc
    entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(start).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    builder = builder.last_update(start).next_update(certificate.not_valid_after_utc).add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def test_a_revoked_certificate(pki: Path, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(pki, folder)
    (folder / "ca-crl.pem").write_bytes(revocation_list(pki, pki / "bob" / "client-cert.pem"))
    server = credentials("server", folder)
    async with secured(server, credentials("client", pki)) as (end, _):
        assert end.identity == "CN=alice"
    with pytest.raises(OSError, match="certificate revoked"):
        async with secured(server, credentials("client", pki / "bob")):
            pass


async def test_reload(pki: Path, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(pki, folder)
    server = credentials("server", folder, verify_peer=False)
    client = credentials("client", pki)
    (folder / "server-cert.pem").write_text("nonsense")
    with pytest.raises(OptionError, match=r"server-cert\.pem"):
        server.reload()
    async with secured(server, client):
        pass  # what was read before is in use
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(pki / "stranger" / name, folder / name)
    server.reload()
    with pytest.raises(OSError, match="unable to get local issuer"):
        async with secured(server, client):
            pass


async def test_any_name_will_do_where_none_is_known(pki: Path) -> None:
    """A Unix socket has no host name: who is believed may be any host."""
    async with secured(credentials("server", pki), credentials("client", pki), hostname=None) as (_, client):
        assert client.identity == "CN=localhost"
    with pytest.raises(OSError, match="Hostname mismatch"):
        async with secured(credentials("server", pki), credentials("client", pki), hostname="other.example"):
            pass
    async with secured(credentials("server", pki), credentials("client", pki), hostname="127.0.0.1"):
        pass


def test_no_old_versions_and_no_resumption(pki: Path) -> None:
    context = credentials("server", pki)._context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.num_tickets == 0
    assert context.options & ssl.OP_NO_RENEGOTIATION
