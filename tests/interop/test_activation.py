"""`pynbd serve` started by others with sockets that are open already: libnbd's tools, systemd's, inetd's way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.peers import SYSTEM_PATH, free_port, require_nbdsh, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd", "serve")
PATIENCE_S = 30.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name is short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        yield Path(folder)


def bracketed(*arguments: str | Path) -> list[str]:
    """`[ pynbd serve ARGUMENTS ]`, as libnbd's tools start a server."""
    return ["[", *PYNBD, *map(str, arguments), "]"]


def nbdsh(*lines: str) -> str:
    """What lines of nbdsh print."""
    return run(*require_nbdsh(), "-c", "\n".join(lines))


# --- libnbd ---------------------------------------------------------------------------------------------------


def test_nbdinfo_starts_it(random_disk: Path) -> None:
    size = random_disk.stat().st_size
    require_tool("nbdinfo", package="libnbd-bin")
    assert run("nbdinfo", "--size", "--", *bracketed("-f", "raw", random_disk)) == f"{size}\n"
    assert '"export-name": "b"' in run(
        "nbdinfo", "--list", "--json", "--", *bracketed("-r", f"a={random_disk}", f"b={random_disk}")
    )


def test_nbdcopy_starts_one_for_each_end(random_disk: Path, tmp_path: Path) -> None:
    require_tool("nbdcopy", package="libnbd-bin")
    copy, back = tmp_path / "copy.raw", tmp_path / "back.raw"
    copy.touch()
    os.truncate(copy, random_disk.stat().st_size)
    run("nbdcopy", "--", *bracketed("-f", "raw", "-r", random_disk), *bracketed("-f", "raw", copy))
    assert copy.read_bytes() == random_disk.read_bytes()
    run("nbdcopy", "--", *bracketed("-f", "raw", copy), back)
    assert back.read_bytes() == random_disk.read_bytes()


def test_a_socket_with_a_name_and_tls(random_disk: Path, pki: Path) -> None:
    command = [*PYNBD, "-f", "raw", "--tls-certificates", str(pki), "--tls-verify-peer", str(random_disk)]
    nbdsh(
        "h.set_tls(nbd.TLS_REQUIRE)",
        f"h.set_tls_certificates({str(pki)!r})",
        "h.set_tls_verify_peer(False)",
        "hasattr(h, 'set_socket_activation_name') and h.set_socket_activation_name('disk')",
        f"h.connect_systemd_socket_activation({command!r})",
        "assert h.get_tls_negotiated()",
        f"data = open({str(random_disk)!r}, 'rb').read(65536)",
        "assert h.pread(65536, 0) == data",
        "h.shutdown()",
    )


# --- one client at the standard streams -------------------------------------------------------------------------


def test_libnbd_starts_it_at_the_standard_streams(random_disk: Path) -> None:
    command = [*PYNBD, "--single", "-f", "raw", str(random_disk)]
    nbdsh(
        f"h.connect_command({command!r})",
        f"data = open({str(random_disk)!r}, 'rb').read()",
        "assert h.pread(4096, 8192) == data[8192:12288]",
        "h.pwrite(bytes(4096), 0)",
        "h.flush()",
        "h.shutdown()",
    )
    assert random_disk.read_bytes()[:4096] == bytes(4096)


@contextlib.contextmanager
def with_a_client(
    *arguments: str | Path, errors: int = subprocess.PIPE
) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A server whose standard streams are a socket, and the other end of that."""
    ours, its = socket.socketpair()
    with (
        ours,
        its,
        subprocess.Popen(
            [*PYNBD, *map(str, arguments)],
            stdin=its.fileno(),
            stdout=its.fileno(),
            stderr=errors,
            text=True,
        ) as process,
    ):
        its.close()
        try:
            yield process, ours
        finally:
            process.kill()


def test_it_ends_with_its_client(random_disk: Path) -> None:
    with with_a_client("--inetd", "-f", "raw", random_disk) as (process, client):
        assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        client.close()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")


def test_inetd_gives_the_client_as_the_standard_error_too(random_disk: Path) -> None:
    with with_a_client("--inetd", "-v", "-f", "raw", random_disk, errors=subprocess.STDOUT) as (process, client):
        greeting = client.recv(18, socket.MSG_WAITALL)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT"
        client.sendall((0x80000000).to_bytes(4))  # a flag that nobody knows: it is logged, and that is the end
        assert client.recv(100) == b""
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("flags", [["-p", "1"], ["-p", "0"], ["-b", "::1"], ["-k", "x"], ["--run", "true"], ["--fork"]])
def test_nobody_else_can_come(flags: list[str], random_disk: Path) -> None:
    with with_a_client("--single", *flags, random_disk) as (process, client):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert errors.startswith(f"pynbd serve: {flags[0]}: ")
        assert client.recv(10) == b""


def test_the_standard_input_must_be_a_client(random_disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for stream, said in ((subprocess.DEVNULL, "is no socket"), (listener.fileno(), "a socket that listens")):
            done = subprocess.run(
                [*PYNBD, "--single", str(random_disk)], stdin=stream, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert said in done.stderr


# --- systemd's own tool ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def activated(listen: Sequence[str], *arguments: str, options: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """`systemd-socket-activate`, which becomes the server when the first client comes."""
    tool = require_tool("systemd-socket-activate", package="systemd")
    words = [tool, *(f"--listen={place}" for place in listen), *options]
    words += [f"--setenv={name}" for name in ("PYTHONPATH", "PATH") if name in os.environ]
    with subprocess.Popen(
        [*words, *PYNBD, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": SYSTEM_PATH},
    ) as process:
        try:
            assert process.stderr is not None
            for _ in listen:
                assert "Listening on" in process.stderr.readline()
            yield process
        finally:
            process.kill()


def rest_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it prints and says until it ends, beside the lines that were read already; that is little."""
    assert process.stdout is not None
    assert process.stderr is not None
    process.wait(PATIENCE_S)
    return process.stdout.read(), process.stderr.read()


def test_systemd_gives_several_sockets(random_disk: Path, place: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    path, port = place / "nbd.sock", free_port()
    options = ["--fdname=local:tcp"]
    with activated([str(path), f"127.0.0.1:{port}"], "-v", "-f", "raw", str(random_disk), options=options) as process:
        size = f"{random_disk.stat().st_size}\n"
        for uri in (f"nbd+unix://?socket={path}", f"nbd://127.0.0.1:{port}", f"nbd+unix://?socket={path}"):
            assert run("nbdinfo", "--size", uri) == size
        process.send_signal(signal.SIGTERM)
        printed, logged = rest_of(process)
        assert path.exists(), "it is the socket of who made it"
    assert (process.returncode, printed) == (0, "")
    assert f"listens at nbd+unix:///?socket={path} (local)" in logged
    assert f"listens at nbd://127.0.0.1:{port}/ (tcp)" in logged


def test_systemd_starts_one_for_each_client(random_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    port = free_port()
    arguments = ("-r", "-f", "raw", str(random_disk))
    with activated([f"127.0.0.1:{port}"], *arguments, options=["--accept"]) as process:
        for _ in range(2):
            assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}") == f"{random_disk.stat().st_size}\n"
        process.send_signal(signal.SIGINT)
        rest_of(process)


def test_addresses_of_our_own_contradict_sockets_that_are_given(random_disk: Path, place: Path) -> None:
    path = place / "nbd.sock"
    with activated([str(path)], "-p", "0", str(random_disk)) as process, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        _, said = rest_of(process)
    assert process.returncode == 1
    assert said.endswith("pynbd serve: -p: the sockets are given by who has started us (LISTEN_FDS)\n")
