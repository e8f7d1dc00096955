"""`pynbd serve` as a command: where it listens, how it starts, for whom it stays, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.contents import sha256
from tests.peers import Daemon, Endpoint, free_port, pynbd_serve, qemu_nbd, require_nbdsh, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd", "serve")
PATIENCE_S = 30.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name is short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`pynbd serve ARGUMENTS` with its output at hand; killed on leaving if it still runs."""
    words = [*PYNBD, *map(str, arguments)]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        try:
            yield p
        finally:
            if p.poll() is None:
                p.kill()


def wait_for(endpoint: Endpoint) -> None:
    """Wait until a server accepts."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            endpoint.connect().close()
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline, f"nobody listens at {endpoint}"
            os.sched_yield()
        else:
            return


def refusal(*arguments: str | Path, status: int = 1) -> str:
    """What `pynbd serve` says on its standard error when it can't begin."""
    done = subprocess.run(
        [*PYNBD, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == status, done
    return done.stderr


# Where it listens -------------------------------------------------------------------------------------------


def test_unix_tcp_and_ipv6_at_once(random_disk: Path, place: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    port = free_port()
    where: list[str | Path] = [
        "-k",
        place / "a.sock",
        "-k",
        place / "b.sock",
        "-b",
        "127.0.0.1",
        "-b",
        "::1",
        "-p",
        str(port),
    ]
    with started("-f", "raw", *where, random_disk) as server:
        places = [
            Endpoint(place / "a.sock"),
            Endpoint(place / "b.sock"),
            Endpoint(port=port),
            Endpoint(host="::1", port=port),
        ]
        for endpoint in places:
            wait_for(endpoint)
            assert int(run("nbdinfo", "--size", endpoint.uri())) == 8 << 20
        server.send_signal(signal.SIGTERM)
        said, complaints = server.communicate(timeout=PATIENCE_S)
        assert (server.returncode, complaints) == (0, "")
    for endpoint in places:
        assert endpoint.uri() in said.replace("%2F", "/")
    assert list(place.iterdir()) == []


def test_any_free_port_is_printed(random_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with started("-f", "raw", "-p", "0", random_disk) as server:
        assert server.stdout is not None
        uri = next(line.strip() for line in server.stdout if line.strip().startswith("nbd://"))
        assert int(run("nbdinfo", "--size", uri)) == 8 << 20
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0


def test_the_lines_to_paste_work(random_disk: Path) -> None:
    """What it prints for qemu-img can be run as it is."""
    require_tool("qemu-img", package="qemu-utils")
    with started("-f", "raw", "-p", "0", "-x", "it's a name", random_disk) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.split()[:1] == ["qemu-img"])
        assert "file format: raw" in run("sh", "-c", line.split(maxsplit=1)[1])
        server.send_signal(signal.SIGTERM)


def test_a_dead_servers_socket_is_replaced(random_disk: Path, place: Path) -> None:
    path = place / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with started("-f", "raw", "-k", path, random_disk) as server:
        wait_for(Endpoint(path))
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    assert not path.exists()


def test_a_live_servers_socket_is_left_alone(random_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with pynbd_serve("-f", "raw", "-r", random_disk) as peer:
        assert peer.endpoint.socket_path is not None
        said = refusal("-f", "raw", "-r", "-k", peer.endpoint.socket_path, random_disk)
        assert str(peer.endpoint.socket_path) in said
        assert len(said.splitlines()) == 1
        run("nbdinfo", peer.uri())
    said = refusal("-f", "raw", "-r", "-k", random_disk, random_disk)
    assert "no socket" in said
    assert random_disk.stat().st_size == 8 << 20


def test_a_port_in_use_is_told_in_one_line(random_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "-r", random_disk, tcp=True) as peer:
        said = refusal("-f", "raw", "-r", "-p", str(peer.endpoint.port), random_disk)
    assert f"127.0.0.1:{peer.endpoint.port}" in said
    assert len(said.splitlines()) == 1


# How it starts ----------------------------------------------------------------------------------------------


def test_fork_and_pid_file(random_disk: Path, place: Path) -> None:
    """When the command returns clients can connect; the pid file names who serves, and goes with it."""
    require_tool("nbdinfo", package="libnbd-bin")
    path, pid_file = place / "nbd.sock", place / "pid"
    # The daemon must not hold our pipes: reading them to their end would wait for it.
    assert run(*PYNBD, "--fork", "--pid-file", pid_file, "-f", "raw", "-k", path, random_disk) == ""
    daemon = Daemon(int(pid_file.read_text()))
    try:
        assert int(run("nbdinfo", "--size", Endpoint(path).uri())) == 8 << 20
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(PATIENCE_S)
    assert list(place.iterdir()) == []


def test_fork_that_fails_says_so(tmp_path: Path, place: Path) -> None:
    said = refusal("--fork", "--pid-file", place / "pid", "-f", "raw", "-k", place / "nbd.sock", tmp_path / "no such")
    assert "no such" in said
    assert list(place.iterdir()) == []


def test_run_gives_the_uri_and_the_status(random_disk: Path) -> None:
    """It serves as long as the command runs, and ends with its status."""
    require_tool("nbdinfo", package="libnbd-bin")
    assert run(*PYNBD, "-f", "raw", "--run", 'nbdinfo --size "$uri"', random_disk).strip() == str(8 << 20)
    run(*PYNBD, "-f", "raw", "--run", "exit 7", random_disk, status=7)
    assert run(*PYNBD, "-f", "raw", "-x", "ä b", "--run", 'nbdinfo --size "$uri"', random_disk).strip() == str(8 << 20)


def test_run_ends_with_the_server(random_disk: Path, place: Path) -> None:
    """SIGTERM to the server ends the command, too."""
    path = place / "nbd.sock"
    with started("-f", "raw", "-k", path, "--run", "exec sleep 1000", random_disk) as server:
        wait_for(Endpoint(path))
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) in (0, 128 + signal.SIGTERM)


def test_what_can_not_be_served_is_told_in_one_line(tmp_path: Path) -> None:
    mistakes: list[tuple[list[str | Path], str]] = [
        ([tmp_path / "missing.raw"], "missing.raw"),
        (["-f", "nonsense", tmp_path], "nonsense"),
        (["driver=memory,size=1M,sice=2"], "sice"),
        (["driver=memory,size=many"], "many"),
        ([tmp_path / "a", tmp_path / "b"], "NAME="),
        ([], "nothing to serve"),
        (["-p", "70000", "driver=memory,size=1M"], "70000"),
        (["driver=null", "--filter", "nonsense"], "nonsense"),
    ]
    for arguments, words in mistakes:
        said = refusal(*arguments)
        assert words in said
        assert len(said.splitlines()) == 1, said
        assert said.startswith("pynbd serve: ")


# For whom it stays ------------------------------------------------------------------------------------------


def test_exit_last(random_disk: Path, place: Path) -> None:
    """It ends with the last client, not with the first that leaves."""
    require_tool("nbdinfo", package="libnbd-bin")
    path = place / "nbd.sock"
    with started("-f", "raw", "--exit-last", "-k", path, random_disk) as server:
        wait_for(Endpoint(path))
        uri = Endpoint(path).uri()
        inner = f"nbdinfo --size '{uri}' && nbdinfo --size '{uri}'"
        meanwhile = f'import subprocess; subprocess.run("{inner}", shell=True, check=True)'
        hold = f'h.connect_uri("{uri}"); {meanwhile}; h.shutdown()'
        run(*require_nbdsh(), "-c", hold)
        assert server.wait(PATIENCE_S) == 0


def test_no_more_clients_than_allowed(random_disk: Path) -> None:
    """With `-e 2` a third client waits until one of the two has gone, and is served then."""
    require_tool("nbdinfo", package="libnbd-bin")
    with pynbd_serve("-f", "raw", "-e", "2", random_disk) as peer:
        with contextlib.ExitStack() as stay:
            holders = []
            for _ in range(2):
                holder = stay.enter_context(peer.endpoint.connect())
                assert holder.recv(8) == b"NBDMAGIC"
                holders.append(holder)
            third = stay.enter_context(peer.endpoint.connect())
            third.setblocking(False)
            with pytest.raises(BlockingIOError):
                third.recv(8)
            holders[0].close()
            third.settimeout(PATIENCE_S)
            assert third.recv(8) == b"NBDMAGIC"
            # The other one still sits there: it was not its time limit that made room.
            assert "no export was chosen" not in peer.log()
        run("nbdinfo", peer.uri())


# What it serves ---------------------------------------------------------------------------------------------


def test_several_exports(random_disk: Path, sparse_disk: Path) -> None:
    """Each under its name, and no default among them."""
    require_tool("nbdinfo", package="libnbd-bin")
    with pynbd_serve(f"a={random_disk}", f"b={sparse_disk}", "c=driver=memory,size=1G") as peer:
        assert int(run("nbdinfo", "--size", peer.uri("a"))) == 8 << 20
        assert int(run("nbdinfo", "--size", peer.uri("b"))) == 64 << 20
        assert int(run("nbdinfo", "--size", peer.uri("c"))) == 1 << 30
        run("nbdinfo", "--size", peer.uri(""), status=1)


def test_exports_of_a_file(random_disk: Path, tmp_path: Path) -> None:
    """Whole stacks from TOML, each as it is described there."""
    require_tool("nbdinfo", package="libnbd-bin")
    config = tmp_path / "pynbd.toml"
    config.write_text(
        f"""
        [[node]]
        node-name = "disk"
        driver = "raw"
        read-only = true
        file = {{ driver = "file", filename = "{random_disk}", read-only = true }}

        [export.plain]
        disk = "disk"
        description = "as it is"

        [export.part]
        disk = {{ driver = "raw", offset = 4096, size = 1048576, read-only = true, file = "disk" }}
        read-only = true
        """
    )
    run(*PYNBD, "--config", config, "--check-config")
    with pynbd_serve("--config", config) as peer:
        told = json.loads(run("nbdinfo", "--json", "--list", peer.uri("")))["exports"]
        found = {export["export-name"]: (export["export-size"], export["is_read_only"]) for export in told}
        assert found == {"plain": (8 << 20, True), "part": (1 << 20, True)}
        run("sh", "-c", 'nbdcopy "$0" - | cmp - "$1"', peer.uri("plain"), random_disk)
        part = 'tail -c +4097 "$1" | head -c 1048576 > "$2"; nbdcopy "$0" - | cmp - "$2"'
        run("sh", "-c", part, peer.uri("part"), random_disk, tmp_path / "part.raw")


def test_an_offset_into_the_disk(random_disk: Path) -> None:
    require_tool("nbdcopy", package="libnbd-bin")
    with pynbd_serve("-f", "raw", "-o", "1048576", random_disk) as peer:
        run("sh", "-c", 'tail -c +1048577 "$1" > "$1.part"; nbdcopy "$0" - | cmp - "$1.part"', peer.uri(), random_disk)


def test_read_only_leaves_the_file_alone(random_disk: Path) -> None:
    require_tool("qemu-io", package="qemu-utils")
    before = sha256(random_disk), random_disk.stat().st_mtime_ns
    random_disk.chmod(0o400)
    with pynbd_serve("-f", "raw", "-r", random_disk) as peer:
        run("qemu-io", "-f", "raw", "-c", "write 0 64k", peer.uri(), status=1)
        run("qemu-io", "-f", "raw", "-r", "-c", "read 0 64k", peer.uri())
    assert (sha256(random_disk), random_disk.stat().st_mtime_ns) == before


def test_snapshot_keeps_the_file_and_the_writes_apart(random_disk: Path) -> None:
    """`-s`: clients see what they wrote as long as it runs; the file has seen nothing."""
    require_tool("qemu-io", package="qemu-utils")
    before = sha256(random_disk), random_disk.stat().st_mtime_ns
    with pynbd_serve("-f", "raw", "-s", random_disk) as peer:
        commands = ["write -P 1 0 64k", "write -P 2 1000003 7", "write -z 4M 1M", "discard 6M 64k", "flush"]
        run("qemu-io", "-f", "raw", "-d", "unmap", *[w for c in commands for w in ("-c", c)], peer.uri())
        commands = ["read -P 1 0 64k", "read -P 2 1000003 7", "read -P 0 4M 1M"]
        run("qemu-io", "-f", "raw", *[w for c in commands for w in ("-c", c)], peer.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", peer.uri(), random_disk, status=1)
    assert (sha256(random_disk), random_disk.stat().st_mtime_ns) == before


def test_a_guessed_format_is_guarded(tmp_path: Path) -> None:
    """A disk that was only guessed to be raw does not become another format by what a client writes to it."""
    require_tool("qemu-io", package="qemu-utils")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    qcow2 = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M")
    header = tmp_path / "header"
    header.write_bytes(qcow2.read_bytes()[:512])
    with pynbd_serve(disk) as peer:
        peer.until_logged("-f raw")
        said = run("qemu-io", "-f", "raw", "-c", f"write -s {header} 0 512", peer.uri(), status=1)
        assert "failed" in said
        run("qemu-io", "-f", "raw", "-c", "write -P 5 0 512", "-c", "read -P 5 0 512", peer.uri())
    with pynbd_serve("-f", "raw", disk) as peer:
        run("qemu-io", "-f", "raw", "-c", f"write -s {header} 0 512", peer.uri())
    assert disk.read_bytes()[:512] == header.read_bytes()


# Who else has the file --------------------------------------------------------------------------------------


def test_a_running_qemu_refuses_and_is_refused(random_disk: Path) -> None:
    """Locks that QEMU understands, in both directions; readers get along."""
    require_tool("qemu-io", package="qemu-utils")
    with qemu_nbd(random_disk):
        said = refusal("-f", "raw", "-p", "0", random_disk)
        assert str(random_disk) in said
        assert "lock" in said.lower()
        assert len(said.splitlines()) == 1
    with pynbd_serve("-f", "raw", random_disk) as peer:
        run("qemu-io", "-f", "raw", "-c", "read 0 512", random_disk, status=1)
        run("qemu-nbd", "-f", "raw", "-t", "-k", f"{peer.endpoint.socket_path}.other", random_disk, status=1)
        run("qemu-io", "-f", "raw", "-r", "-U", "-c", "read 0 512", random_disk)
    with pynbd_serve("-f", "raw", "-r", random_disk) as peer:
        run("qemu-io", "-f", "raw", "-r", "-c", "read 0 512", random_disk)
        run("qemu-io", "-f", "raw", "-c", "write 0 512", random_disk, status=1)
    run("qemu-io", "-f", "raw", "-c", "write 0 512", random_disk)


def test_two_of_ours_on_one_file(random_disk: Path) -> None:
    with pynbd_serve("-f", "raw", random_disk):
        assert str(random_disk) in refusal("-f", "raw", "-p", "0", random_disk)
        assert str(random_disk) in refusal("-f", "raw", "-r", "-p", "0", random_disk)
        with pynbd_serve(f"driver=raw,file.driver=file,file.filename={random_disk},file.locking=off", "-r") as peer:
            run("nbdinfo", peer.uri())
    with pynbd_serve("-f", "raw", "-r", random_disk), pynbd_serve("-f", "raw", "-r", random_disk) as second:
        run("nbdinfo", second.uri())
