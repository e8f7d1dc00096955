"""Who may use what, and how much of it, as real clients meet it: nbdinfo, qemu-img, qemu-io and nbdsh."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.interop.contents import sha256
from tests.peers import CommandError, Peer, pynbd_serve, require_nbdsh, require_tool, run

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    require_tool("qemu-io", package="qemu-utils")


def exports_of(uri: str) -> dict[str, bool]:
    """Whether each export that a client is shown is read-only."""
    told = json.loads(run("nbdinfo", "--json", "--list", uri))["exports"]
    return {export["export-name"]: export["is_read_only"] for export in told}


def refusal_of(*command: str | Path) -> str:
    """What a client says of being refused."""
    with pytest.raises(CommandError) as refused:
        run(*command)
    return str(refused.value)


def config_of(folder: Path, disk: Path, *, more: str = "") -> Path:
    """Three exports: for all, for this user and nobody else, and for nobody here."""
    file = folder / "access.toml"
    file.write_text(f"""
[export.open]
disk = {{ driver = "memory", size = "1M" }}

[export.mine]
disk = "{disk}"
format = "raw"
[[export.mine.access]]
policy = "read-only"
uid = {os.getuid()}
[[export.mine.access]]
policy = "allow"
address = "127.0.0.0/8"

[export.secret]
disk = {{ driver = "memory", size = "1M" }}
access = [{{ policy = "allow", address = "192.0.2.0/24" }}]
{more}""")
    return file


def test_a_user_of_this_machine_and_an_address(random_disk: Path, tmp_path: Path) -> None:
    """The same export can be read by one, and be written to by the other; a third export is hidden from both."""
    config = config_of(tmp_path, random_disk)
    with pynbd_serve("--config", config) as peer:
        assert exports_of(peer.endpoint.uri()) == {"open": False, "mine": True}
        said = refusal_of("qemu-io", "-f", "raw", "-c", "write 0 4k", peer.uri("mine"))
        assert "read-only" in said or "Permission denied" in said
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", peer.uri("mine"))
        run("qemu-io", "-f", "raw", "-c", "write 0 4k", peer.uri("open"))
    with pynbd_serve("--config", config, tcp=True) as peer:
        assert exports_of(peer.endpoint.uri()) == {"open": False, "mine": False}
        run("qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", "-c", "read -P 5 0 4k", peer.uri("mine"))


def without(peer: Peer, said: str, name: str) -> str:
    """What a client said of an export, without the name and the command line."""
    return (
        said.replace(peer.uri(name), "URI")
        .replace(f"'{name}'", "NAME")
        .replace(f"/{name}", "/NAME")
        .replace(name, "NAME")
    )


@pytest.mark.parametrize("program", ["nbdinfo", "qemu-img"])
def test_a_hidden_export_looks_as_a_missing_one(program: str, random_disk: Path, tmp_path: Path) -> None:
    command = [program] if program == "nbdinfo" else [program, "info", "-f", "raw"]
    with pynbd_serve("--config", config_of(tmp_path, random_disk)) as peer:
        hidden, missing = (refusal_of(*command, peer.uri(name)) for name in ("secret", "absent"))
        assert without(peer, hidden, "secret") == without(peer, missing, "absent")
        peer.until_logged("export 'secret': hidden from it by no rule fits")
        peer.until_logged("export 'absent': there is no such export")


def test_flags_of_the_command_line(random_disk: Path) -> None:
    disk = ("-f", "raw", random_disk)
    with pynbd_serve("--deny", "127.0.0.1", *disk, tcp=True) as peer:
        assert "No such file or directory" in refusal_of("nbdinfo", peer.uri())
        peer.until_logged("hidden from it by rule 0, deny address=127.0.0.1")
    with pynbd_serve("--deny", "10.0.0.0/8", *disk, tcp=True) as peer:
        assert exports_of(peer.uri()) == {"": False}
    with pynbd_serve("--deny", "10.0.0.0/8", "--allow-read-only", "127.0.0.0/8", *disk, tcp=True) as peer:
        assert exports_of(peer.uri()) == {"": True}
    with pynbd_serve("--allow", f"unix,uid={os.getuid()}", *disk) as peer:
        assert exports_of(peer.uri()) == {"": False}
    with pynbd_serve("--allow", f"uid={os.getuid() + 1}", *disk) as peer:
        assert exports_of(peer.uri()) == {}


def test_names_of_certificates(pki: Path, random_disk: Path, tmp_path: Path) -> None:
    """Alice may write, bob may read what others see, and who has no name sees nothing."""
    rules = ["--object", "authz-simple,id=admins,identity=CN=alice", "--allow", "authz=admins"]
    tls = ["--tls-certificates", str(pki), "--tls-verify-peer"]
    disk = ("-f", "raw", random_disk)
    with pynbd_serve(*tls, *rules, "--allow-read-only", "name=CN=b*", *disk, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates="
        assert exports_of(f"{uri}{pki}") == {"": False}
        assert exports_of(f"{uri}{pki / 'bob'}") == {"": True}
    with pynbd_serve(*tls, *rules, *disk, tcp=True) as peer:
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates="
        assert exports_of(f"{uri}{pki / 'bob'}") == {}
        assert "No such file or directory" in refusal_of("nbdinfo", f"{uri}{pki / 'bob'}")
        peer.until_logged("('CN=bob'): refused: export '': hidden from it by no rule fits")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--allow", "10.0.0.1/8"], "--allow 10.0.0.1/8: address: '10.0.0.1/8' has bits beyond its prefix"),
        (["--deny", "name=CN=x"], "--deny name=CN=x: nobody can be told by name"),
        (["--allow-read-only", "colour=red"], "--allow-read-only colour=red: colour:"),
        (["--client-limits", "conections=1"], "--client-limits: conections:"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_opened(flags: list[str], said: str) -> None:
    refused = refusal_of(sys.executable, "-m", "pynbd", "serve", "--check-config", *flags, "driver=null,size=1M")
    assert said in refused


def test_no_more_connections_than_a_client_may_have(random_disk: Path) -> None:
    with pynbd_serve("--client-limits", "connections=2", "-f", "raw", random_disk) as peer:
        script = f"""
import nbd
uri = {peer.uri()!r}
first, second = nbd.NBD(), nbd.NBD()
first.connect_uri(uri)
second.connect_uri(uri)
try:
    nbd.NBD().connect_uri(uri)
except nbd.Error as problem:
    print("refused")
assert first.pread(512, 0) == second.pread(512, 0)
second.shutdown()
"""
        assert "refused" in run(*require_nbdsh(), "-c", script)
        peer.until_logged(f"refused: uid {os.getuid()} has 2 connections already, the most it may have")
        run("nbdinfo", peer.uri())


def test_no_more_in_a_second_than_a_client_may_have(random_disk: Path) -> None:
    """4 MiB at 2 MiB a second, a half of that at once, by two connections: a second and a half at least."""
    require_nbdsh()
    limits = "bytes-per-second=2M,bytes-burst=1M"
    with pynbd_serve("--client-limits", limits, "-f", "raw", random_disk) as peer:
        script = f"""
import nbd, time
handles = [nbd.NBD(), nbd.NBD()]
for handle in handles:
    handle.connect_uri({peer.uri()!r})
began = time.monotonic()
pieces = [(handle, handle.aio_pread(nbd.Buffer(131072), 0)) for _ in range(16) for handle in handles]
for handle, cookie in pieces:
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
assert time.monotonic() - began > 1.4
"""
        run(*require_nbdsh(), "-c", script)


def test_sixteen_connections_have_no_more_in_flight_than_one(random_disk: Path, tmp_path: Path) -> None:
    """Reads that take a while: nbdcopy asks for 256 at a time, two are let in, and all come to their end."""
    copy = tmp_path / "copy"
    limits = "requests=2,bytes-in-flight=300k"
    filters = ("--filter", "delay,read=2ms")
    with pynbd_serve("--client-limits", limits, *filters, "-f", "raw", random_disk) as peer:
        run(
            require_tool("nbdcopy", package="libnbd-bin"),
            *("--connections=16", "--requests=16", "--request-size=131072", peer.uri(), copy),
        )
    assert sha256(copy) == sha256(random_disk)
