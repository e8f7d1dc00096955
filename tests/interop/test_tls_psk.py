"""Real peers through TLS with pre-shared keys, in both directions."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.cli.pynbd_command import failure, pynbd
from tests.peers import Peer, nbdkit, pynbd_serve, qemu_nbd, require_tool, run

pytestmark = pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_server_callback"),
    reason="this Python's ssl has no pre-shared keys (3.13 has)",
)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text("alice:00112233445566778899aabbccddeeff\nbob:ffeeddccbbaa99887766554433221100\n")
    (tmp_path / "wrong.psk").write_text("alice:ff112233445566778899aabbccddeeff\n")
    return path


def uri_of(peer: Peer, keys: Path, user: str = "alice") -> str:
    return f"nbds://{user}@localhost:{peer.endpoint.port}/?tls-psk-file={keys}"


def test_their_clients(keys: Path, random_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    require_tool("qemu-img", package="qemu-utils")
    objects = ["--object", "authz-list,id=authz0,rules.0.match=bob,rules.0.policy=deny,policy=allow"]
    with pynbd_serve("-v", "-f", "raw", "--tls-psk", keys, random_disk, tcp=True) as peer:
        assert run("nbdinfo", "--size", uri_of(peer, keys)) == f"{8 << 20}\n"
        peer.until_logged("uses export '' (structured, TLSv1.3, 'alice')")
        run("nbdinfo", uri_of(peer, keys.with_name("wrong.psk")), status=1)
        creds = f"tls-creds-psk,id=tls0,dir={keys.parent},username=bob,endpoint=client"
        disk = f"driver=nbd,host=localhost,port={peer.endpoint.port},tls-creds=tls0"
        assert "8 MiB" in run("qemu-img", "info", "--object", creds, "--image-opts", disk)
        run("nbdinfo", peer.uri(), status=1)
    with pynbd_serve("-f", "raw", *objects, "--tls-psk", keys, "--tls-authz", "authz0", random_disk, tcp=True) as peer:
        run("nbdinfo", "--size", uri_of(peer, keys))
        run("nbdinfo", "--size", uri_of(peer, keys, "bob"), status=1)
        peer.until_logged("refused: 'bob' is not authorized")


Start = Callable[[Path, Path], AbstractContextManager[Peer]]

SERVERS: dict[str, Start] = {
    "qemu-nbd": lambda disk, keys: qemu_nbd(
        disk,
        "--object",
        f"tls-creds-psk,id=tls0,endpoint=server,dir={keys.parent}",
        "--tls-creds",
        "tls0",
        tcp=True,
    ),
    "nbdkit": lambda disk, keys: nbdkit("file", disk, options=["--tls=require", f"--tls-psk={keys}"], tcp=True),
    "pynbd": lambda disk, keys: pynbd_serve("-f", "raw", "--tls-psk", keys, disk, tcp=True),
}


@pytest.mark.parametrize("kind", SERVERS)
def test_their_servers(kind: str, keys: Path, random_disk: Path, tmp_path: Path) -> None:
    with SERVERS[kind](random_disk, keys) as peer:
        assert "with TLS" in pynbd("info", uri_of(peer, keys))
        pynbd("copy", uri_of(peer, keys), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == random_disk.read_bytes()
        assert "the TLS handshake failed" in failure("info", uri_of(peer, keys.with_name("wrong.psk")))
        creds = f"tls-creds-psk,id=tls0,file={keys},username=bob"
        plain = f"nbd://localhost:{peer.endpoint.port}"
        assert "8M" in pynbd("list", "--object", creds, "--tls-creds", "tls0", plain)


def test_a_server_with_a_certificate_has_no_key(keys: Path, random_disk: Path, pki: Path) -> None:
    """It might be anybody's certificate."""
    options = ["--tls=require", f"--tls-certificates={pki}"]
    with nbdkit("file", random_disk, options=options, tcp=True) as peer:
        said = failure("info", uri_of(peer, keys))
        assert "not that it knows the key" in said or "the TLS handshake failed" in said
