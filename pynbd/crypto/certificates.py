"""Certificates for tests and for a handful of machines: an authority, and what it signs for servers and clients.

Files have the names that QEMU, nbdkit and libnbd look for in a folder. Keys are on the curve P-256: all peers know it,
and a handshake costs little. The package `cryptography` is imported when the first one is made.
"""

import datetime
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pynbd.block.errors import BlockError, OptionError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

NEEDED = "making certificates needs the Python package cryptography, version 43 or later: pip install 'pynbd[crypto]'"

CLOCKS_DIFFER = datetime.timedelta(hours=1)
"""Certificates are good from so long ago, for machines whose clocks are slow."""

MAX_DAYS = 36500
MAX_NAME_LETTERS = 64
"""The longest common name that X.509 allows."""

MAX_PEM_BYTES = 1 << 20
"""A file larger than this is no certificate."""

End = Literal["server", "client"]


class Authority(msgspec.Struct, frozen=True):
    """Who signs certificates.

    Args:
        certificate: its own.
        key: what it signs with.
    """

    certificate: "x509.Certificate"
    key: "EllipticCurvePrivateKey"


def check_library() -> None:
    """See whether certificates can be made at all.

    Raises:
        OptionError: the package that makes them is missing.
    """
    try:
        import cryptography.x509  # noqa: F401  # only to see whether it can be
    except ImportError as problem:
        raise OptionError(f"{NEEDED} ({problem})") from problem


def make_authority(folder: Path, name: str, days: int) -> Authority:
    """A new authority, in ca-cert.pem and ca-key.pem.

    Args:
        folder: there already.
        name: what people call it.
        days: how long it is good.

    Raises:
        OptionError: the name or the time is out of bounds.
        OSError: a file can't be written, or is there already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(name)
    builder = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    certificate = _signed(builder, key)
    _write_pair(folder, "ca", certificate, key)
    return Authority(certificate, key)


def load_authority(folder: Path) -> Authority:
    """The authority whose ca-cert.pem and ca-key.pem are in a folder.

    Raises:
        OptionError: they are no certificate and its key, or the key is of another kind than we make.
        OSError: one can't be read.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    certificate_path, key_path = folder / "ca-cert.pem", folder / "ca-key.pem"
    try:
        certificate = x509.load_pem_x509_certificate(_read(certificate_path))
    except ValueError as problem:
        raise OptionError(f"{certificate_path}: this is no certificate: {problem}") from problem
    try:
        key = serialization.load_pem_private_key(_read(key_path), None)
    except (ValueError, TypeError) as problem:
        raise OptionError(f"{key_path}: this is no private key without a password: {problem}") from problem
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise OptionError(f"{key_path}: this is not the key of {certificate_path} on an elliptic curve")
    return Authority(certificate, key)


def issue(authority: Authority, folder: Path, end: End, name: str, hosts: Sequence[str], days: int) -> None:
    """A certificate with its key for one end, in END-cert.pem and END-key.pem, and the authority's in ca-cert.pem.

    Args:
        authority: signs it.
        folder: there already.
        end: what it may be used for.
        name: its common name.
        hosts: names and addresses that a server is reached by.
        days: how long it is good, but not longer than the authority.

    Raises:
        OptionError: a name or the time is out of bounds.
        BlockError: the folder has the certificate of another authority.
        OSError: a file can't be written, or is there already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if end == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    signer = authority.certificate
    builder = (
        _builder(_common_name(name), signer.subject, key, days, signer.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(_host_names(hosts)), critical=False)
    _put_authority(folder, signer)
    _write_pair(folder, end, _signed(builder, authority.key), key)


def _builder(
    subject: "x509.Name",
    issuer: "x509.Name",
    key: "EllipticCurvePrivateKey",
    days: int,
    latest: datetime.datetime | None = None,
) -> "x509.CertificateBuilder":
    from cryptography import x509

    if not 1 <= days <= MAX_DAYS:
        raise OptionError(f"{days} days: a certificate is good for 1 to {MAX_DAYS}")
    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(ends if latest is None else min(ends, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _signed(builder: "x509.CertificateBuilder", key: "EllipticCurvePrivateKey") -> "x509.Certificate":
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA256())


def _common_name(name: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    if not 1 <= len(name) <= MAX_NAME_LETTERS or "\0" in name:
        raise OptionError(f"{name!r}: a common name has 1 to {MAX_NAME_LETTERS} letters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host_names(hosts: Iterable[str]) -> "list[x509.GeneralName]":
    from cryptography import x509

    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            try:
                names.append(x509.DNSName(host.encode("idna").decode()))
            except (UnicodeError, ValueError):
                raise OptionError(f"{host!r} is no host name and no address") from None
    return names


# --- files ----------------------------------------------------------------------------------------------------


def _write_pair(folder: Path, name: str, certificate: "x509.Certificate", key: "EllipticCurvePrivateKey") -> None:
    from cryptography.hazmat.primitives import serialization

    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_new(folder / f"{name}-key.pem", secret, 0o600)
    write_new(folder / f"{name}-cert.pem", certificate.public_bytes(pem), 0o644)


def _put_authority(folder: Path, certificate: "x509.Certificate") -> None:
    """The authority's certificate beside what it has signed; its key stays where it is."""
    from cryptography.hazmat.primitives import serialization

    path = folder / "ca-cert.pem"
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    if not path.exists():
        write_new(path, pem, 0o644)
    elif _read(path) != pem:
        raise BlockError(f"{path}: this is the certificate of another authority")


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Make a file that nobody has seen with other permissions, even for a moment.

    Raises:
        OSError: it is there already, or can't be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError as problem:
        raise OSError(problem.errno, f"{path}: {problem.strerror}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PEM_BYTES + 1)
    except OSError as problem:
        raise OSError(problem.errno, f"{path}: {problem.strerror}") from None
    if len(content) > MAX_PEM_BYTES:
        raise OptionError(f"{path}: longer than {MAX_PEM_BYTES} bytes")
    return content
