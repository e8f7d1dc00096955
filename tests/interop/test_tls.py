"""Real peers through TLS: their clients with our server. Each verifies us, and shows a certificate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.crypto import certificates
from tests.peers import Peer, pynbd_serve, require_nbdsh, require_tool, run

MIB = 1 << 20


@pytest.fixture
def peer(random_disk: Path, pki: Path) -> Iterator[Peer]:
    """A disk of 8 MiB for those who have a certificate."""
    tls = ["--tls-certificates", str(pki), "--tls-verify-peer"]
    with pynbd_serve("-v", "-f", "raw", "--discard", "unmap", *tls, random_disk, tcp=True) as peer:
        yield peer


def uri_of(peer: Peer, folder: Path, host: str = "localhost") -> str:
    return f"nbds://{host}:{peer.endpoint.port}/?tls-certificates={folder}"


def qemu_options(peer: Peer, folder: Path, host: str = "localhost") -> list[str]:
    disk = f"driver=nbd,host={host},port={peer.endpoint.port},tls-creds=tls0"
    return ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={folder}", "--image-opts", disk]


def test_nbdinfo(peer: Peer, pki: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    assert "with TLS, using structured packets" in run("nbdinfo", uri_of(peer, pki))
    peer.until_logged("uses export '' (structured, TLSv1.3, 'CN=alice')")


def test_nbdcopy_both_ways(peer: Peer, pki: Path, random_disk: Path, tmp_path: Path) -> None:
    require_tool("nbdcopy", package="libnbd-bin")
    copy = tmp_path / "copy"
    run("nbdcopy", uri_of(peer, pki), copy)
    assert copy.read_bytes() == random_disk.read_bytes()
    turned = copy.read_bytes()[::-1]
    copy.write_bytes(turned)
    run("nbdcopy", "--flush", copy, uri_of(peer, pki))
    assert random_disk.read_bytes() == turned


def test_nbdsh_with_many_requests_in_flight(peer: Peer, pki: Path, random_disk: Path) -> None:
    script = f"""
import nbd
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates({str(pki)!r})
h.connect_tcp("localhost", "{peer.endpoint.port}")
assert h.get_tls_negotiated()
expected = open({str(random_disk)!r}, "rb").read()
sizes = (1, 4096, 16384, 65536, 1000000)
reads = []
for number in range(100):
    size = sizes[number % len(sizes)]
    buffer = nbd.Buffer(size)
    reads.append((number * 5000, size, buffer, h.aio_pread(buffer, number * 5000)))
for offset, size, buffer, cookie in reads:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert buffer.to_bytearray() == expected[offset:offset + size], (offset, size)
h.pwrite(b"x" * 3000000, 7)
h.flush()
assert h.pread(3000000, 7) == b"x" * 3000000
h.shutdown()
"""
    run(*require_nbdsh(), "-c", script)


def test_qemu_io(peer: Peer, pki: Path, random_disk: Path) -> None:
    require_tool("qemu-io", package="qemu-utils")
    commands = ["write -P 7 1M 3M", "read -P 7 1M 3M", "write -z 2M 1M", "discard 5M 1M", "flush", "read -P 0 2M 1M"]
    said = run("qemu-io", *qemu_options(peer, pki), *(word for line in commands for word in ("-c", line)))
    assert said.count("read 3145728/3145728") == 1
    assert "failed" not in said
    assert random_disk.read_bytes()[MIB : 4 * MIB] == b"\7" * MIB + bytes(MIB) + b"\7" * MIB


def test_nbd_client(peer: Peer, pki: Path) -> None:
    """It lists, and goes as far as the kernel would take over."""
    require_tool("nbd-client")
    place = ["localhost", str(peer.endpoint.port)]
    files = [f"-{name}file={pki}/{file}.pem" for name, file in (("cacert", "ca-cert"), ("cert", "client-cert"))]
    files += [f"-keyfile={pki}/client-key.pem"]
    assert "Negotiation" in run("nbd-client", "-l", *place, *files)
    run("sh", "-c", f"nbd-client {' '.join(place)} /dev/null -L {' '.join(files)}; true")
    peer.until_logged("uses export '' (simple, TLSv1.2, 'CN=alice')")


def test_peers_refuse_another_hosts_certificate(pki: Path, random_disk: Path, tmp_path: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    require_tool("qemu-img", package="qemu-utils")
    authority = certificates.load_authority(pki)
    certificates.issue(authority, tmp_path, "server", "elsewhere", ["elsewhere.example"], 1)
    with pynbd_serve("-f", "raw", "--tls-certificates", tmp_path, random_disk, tcp=True) as peer:
        run("nbdinfo", uri_of(peer, pki), status=1)
        run("qemu-img", "info", *qemu_options(peer, pki), status=1)
        named = qemu_options(peer, pki)
        named[-1] += ",tls-hostname=elsewhere.example"
        run("qemu-img", "info", *named)


def test_who_has_no_certificate_stays_outside(peer: Peer, pki: Path, tmp_path: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    (tmp_path / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    run("nbdinfo", uri_of(peer, tmp_path), status=1)
    peer.until_logged("peer did not return a certificate")
    run("nbdinfo", uri_of(peer, pki / "stranger"), status=1)
    run("nbdinfo", peer.uri(), status=1)
    assert "uses export" not in peer.log()
