"""`pynbd serve` with TLS: the lines that it prints, the address of --run, reading certificates again, and mistakes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.cli.pynbd_command import failure, pynbd
from tests.peers import Peer, pynbd_serve, require_tool, run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def pasted_lines(peer: Peer, pki: Path) -> dict[str, str]:
    lines = [line.split(maxsplit=1) for line in peer.log().splitlines() if line.startswith("    ")]
    return {name: line.replace("DIR", str(pki)).replace("NAME", "localhost") for name, line in lines}


@pytest.mark.parametrize("tcp", [True, False])
def test_every_line_can_be_pasted(tcp: bool, disk: Path, pki: Path) -> None:
    """With the name of the folder for DIR; each client shows a certificate, and verifies the server's."""
    require_tool("qemu-system-x86_64", package="qemu-system-x86")
    with pynbd_serve(
        "-f", "raw", "-x", "a, b", "-r", "--tls-certificates", pki, "--tls-verify-peer", disk, tcp=tcp
    ) as peer:
        pasted = pasted_lines(peer, pki)
        assert "virtual size: 1 MiB" in run("sh", "-c", pasted["qemu-img"])
        machine = " -S -nodefaults -display none -monitor stdio"
        said = run("sh", "-c", pasted["QEMU"] + machine, stdin=b"info block\nquit\n")
        assert "virtio0" in said
        assert "read-only" in said
        if tcp:  # it has no TLS over Unix sockets
            said = run("sh", "-c", pasted["Linux"].replace("/dev/nbd0", "/dev/null") + " -L; true")
            assert "size = 1MB" in said
        for line in pasted.values():
            assert str(pki) in line


def test_the_address_of_a_command(disk: Path, pki: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    said = pynbd("serve", "-f", "raw", "--tls-certificates", pki, "--run", 'echo "$uri"; nbdinfo --size "$uri"', disk)
    uri, size = said.split()
    assert uri.startswith("nbds+unix:///?socket=")
    assert uri.endswith(f"&tls-certificates={pki}")
    assert size == str(1 << 20)


def test_credentials_as_qemu_has_them(disk: Path, pki: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    objects = ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={pki}"]
    objects += ["--object", "authz-simple,id=authz0,identity=CN=alice"]
    tls = ["--tls-creds", "tls0", "--tls-authz", "authz0"]
    with pynbd_serve("-f", "raw", *objects, *tls, disk) as peer:
        place = f"nbds+unix:///?socket={peer.endpoint.socket_path}&tls-certificates="
        assert run("nbdinfo", "--size", f"{place}{pki}") == f"{1 << 20}\n"
        run("nbdinfo", "--size", f"{place}{pki / 'bob'}", status=1)
        peer.until_logged("refused: 'CN=bob' is not authorized")


def test_a_configuration_file(disk: Path, pki: Path, tmp_path: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    file = tmp_path / "c.toml"
    file.write_text(
        f'[server]\ntls-certificates = "{pki}"\ntls-verify-peer = true\n[export.""]\ndisk = "{disk}"\nformat = "raw"\n'
    )
    with pynbd_serve("--config", file) as peer:
        place = f"nbds+unix:///?socket={peer.endpoint.socket_path}"
        assert run("nbdinfo", "--size", f"{place}&tls-certificates={pki}") == f"{1 << 20}\n"
        run("nbdinfo", "--size", f"nbd+unix:///?socket={peer.endpoint.socket_path}", status=1)
    # The command line goes before the file.
    with pynbd_serve("--config", file, "--tls", "off") as peer:
        run("nbdinfo", "--size", f"nbd+unix:///?socket={peer.endpoint.socket_path}")


def test_certificates_are_read_again_on_sighup(disk: Path, pki: Path, tmp_path: Path) -> None:
    """A connection that is there stays; new ones see the new certificate."""
    require_tool("nbdinfo", package="libnbd-bin")
    folder = tmp_path / "server"
    shutil.copytree(pki, folder)
    with pynbd_serve("-v", "-f", "raw", "--tls-certificates", folder, disk, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates="
        run("nbdinfo", "--size", f"{uri}{pki}")
        (folder / "server-cert.pem").write_text("nonsense")
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged("the old certificates and keys stay in use: tls-creds-x509 'tls-certificates': ")
        run("nbdinfo", "--size", f"{uri}{pki}")
        for name in ("server-cert.pem", "server-key.pem"):
            shutil.copy(pki / "stranger" / name, folder / name)
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged("certificates and keys were read again")
        run("nbdinfo", "--size", f"{uri}{pki}", status=1)
        run("nbdinfo", "--size", f"{uri}{pki / 'stranger'}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tls", "required"], "--tls: 'required' needs tls-creds, tls-certificates or tls-psk"),
        (["--tls-creds", "x"], "--tls-creds: there is no object 'x' of a kind tls-creds-…"),
        (["--tls-verify-peer"], "--tls-verify-peer: it goes with tls-certificates"),
        (["--tls-certificates", "/nonexistent"], "/nonexistent/server-cert.pem: No such file or directory"),
        (["--tls-certificates", "a", "--tls-creds", "b"], "not allowed with argument"),
        (["--tls-hostname", "x"], "--tls-hostname is no option here: it is for clients"),
    ],
)
def test_mistakes(words: list[str], says: str, disk: Path, tmp_path: Path) -> None:
    assert says in failure("serve", "-k", tmp_path / "s", *words, disk)
