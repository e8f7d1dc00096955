"""`pynbd serve` under somebody's care: what a service manager is told, SIGHUP, and whose end is its own."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import SYSTEM_PATH, Daemon, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd", "serve")
PATIENCE_S = 60.0
WATCHDOG_USEC = 100_000
SILENCE_S = 1.0
"""Twenty times what a loop that turns takes to say so."""

STANDS_STILL = """
from pathlib import Path
from pynbd import Driver

class Still(Driver):
    size = 512
    async def read(self, offset, into):
        Path("gate").read_bytes()  # as no driver should: the event loop stands still meanwhile
        into[:] = bytes(len(into))
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory whose name is short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        monkeypatch.chdir(folder)
        path = Path(folder)
        (path / "disk.raw").write_bytes(bytes(1 << 20))
        yield path


class Manager:
    """The end of a service manager."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + name[1:] if name.startswith("@") else name)
        self.sock.settimeout(PATIENCE_S)

    def told(self) -> list[str]:
        """The lines of the next message."""
        return self.sock.recv(65536).decode().split("\n")

    def until(self, line: str) -> list[str]:
        """The lines of the next message that has this one."""
        while line not in (lines := self.told()):
            pass
        return lines


@pytest.fixture
def manager(place: Path) -> Iterator[Manager]:
    """One at a path."""
    made = Manager(f"{place}/notify.sock")
    with made.sock:
        yield made


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`pynbd serve ARGUMENTS` on the socket nbd.sock; killed on leaving if it still runs."""
    with subprocess.Popen(
        [*PYNBD, "-k", "nbd.sock", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": SYSTEM_PATH, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def stopped(process: subprocess.Popen[str]) -> str:
    """What it said, after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    return said


# --- the service manager --------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told_how_it_goes(place: Path, abstract: bool) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    manager = Manager(f"@pynbd-test-{os.getpid()}" if abstract else f"{place}/notify.sock")
    with manager.sock, started("-f", "raw", "a=disk.raw", NOTIFY_SOCKET=manager.name) as process:
        assert manager.told() == ["READY=1", "STATUS=exports: 1, clients: 0, served so far: 0"]
        assert run("nbdinfo", "--size", f"nbd+unix:///a?socket={place}/nbd.sock") == f"{1 << 20}\n"
        assert manager.until("STATUS=exports: 1, clients: 0, served so far: 1")
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        process.send_signal(signal.SIGHUP)
        reloading, when = manager.told()
        assert reloading == "RELOADING=1"
        assert (
            before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        )
        assert "READY=1" in manager.told()
        assert stopped(process) == ""
        assert manager.told() == ["STOPPING=1", "STATUS=flushing and closing the disks"]


def test_what_went_wrong_is_told(manager: Manager) -> None:
    with started("missing.raw", NOTIFY_SOCKET=manager.name) as process:
        assert manager.told() == ["STATUS=Could not open 'missing.raw': No such file or directory", "ERRNO=2"]
        assert process.wait(PATIENCE_S) == 1


def test_who_serves_in_the_background_is_told(place: Path, manager: Manager) -> None:
    with started("--fork", "--pid-file", "pid", "disk.raw", NOTIFY_SOCKET=manager.name) as process:
        lines = manager.until("READY=1")
        server = Daemon(int(lines[1].removeprefix("MAINPID=")))
        assert process.wait(PATIENCE_S) == 0
        assert (place / "pid").read_text() == f"{server.pid}\n"
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE_S)


def test_those_whom_it_starts_are_not_told_of_the_manager(place: Path, manager: Manager) -> None:
    with started(
        "--run", "env > command.env", "disk.raw", NOTIFY_SOCKET=manager.name, WATCHDOG_USEC="5000000"
    ) as process:
        assert process.wait(PATIENCE_S) == 0
    environment = (place / "command.env").read_text()
    assert "uri=nbd" in environment
    assert "NOTIFY_SOCKET" not in environment
    assert "WATCHDOG" not in environment


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "NOTIFY_SOCKET",
            "relative",
            "NOTIFY_SOCKET: 'relative' is neither an absolute path nor @ and an abstract name",
        ),
        ("NOTIFY_SOCKET", "/nowhere/at/all", "NOTIFY_SOCKET: /nowhere/at/all: No such file or directory"),
        ("WATCHDOG_USEC", "soon", "WATCHDOG_USEC: 'soon' is no number"),
    ],
)
def test_a_manager_that_can_not_be(place: Path, variable: str, value: str, said: str) -> None:
    with started("disk.raw", **{variable: value}) as process:
        assert process.communicate(timeout=PATIENCE_S)[1] == f"pynbd serve: {said}\n"
        assert process.returncode == 1


# --- the watchdog ---------------------------------------------------------------------------------------------


def test_a_loop_that_stands_still_is_not_reported_as_alive(place: Path, manager: Manager) -> None:
    (place / "still.py").write_text(STANDS_STILL)
    os.mkfifo(place / "gate")
    require_tool("qemu-io", package="qemu-utils")
    with started("./still.py", NOTIFY_SOCKET=manager.name, WATCHDOG_USEC=str(WATCHDOG_USEC)) as process:
        manager.until("READY=1")
        for _ in range(3):
            manager.until("WATCHDOG=1")
        reader = ["qemu-io", "-f", "raw", "-r", "-c", "read 0 512", "nbd+unix://?socket=nbd.sock"]
        with subprocess.Popen(reader, stdout=subprocess.PIPE, text=True) as client:
            # It is opened for writing as soon as somebody reads: then the loop stands.
            with (place / "gate").open("wb"):
                while select.select([manager.sock], [], [], 0)[0]:
                    manager.told()
                assert select.select([manager.sock], [], [], SILENCE_S)[0] == []
            manager.until("WATCHDOG=1")
            assert client.wait(PATIENCE_S) == 0
        assert stopped(process) == ""


def test_a_watchdog_of_somebody_else_is_left_alone(manager: Manager) -> None:
    with started("disk.raw", NOTIFY_SOCKET=manager.name, WATCHDOG_USEC=str(WATCHDOG_USEC), WATCHDOG_PID="1") as process:
        manager.until("READY=1")
        stopped(process)
        assert manager.told()[0] == "STOPPING=1"


# --- SIGHUP, and parents --------------------------------------------------------------------------------------


def test_it_ends_with_its_terminal(place: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PYNBD, "-k", "nbd.sock", "disk.raw"])
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        seen = b""
        while b"Stop with Ctrl-C.\r\n" not in seen:
            seen += screen.read(4096)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not (place / "nbd.sock").exists()


def test_it_ends_with_its_parent(place: Path, manager: Manager) -> None:
    words = [*PYNBD, "-k", "nbd.sock", "--exit-with-parent", "--pid-file", "pid", "disk.raw"]
    starter = f"import subprocess, sys; subprocess.Popen({words!r}); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "NOTIFY_SOCKET": manager.name},
    ) as parent:
        manager.until("READY=1")
        server = Daemon(int((place / "pid").read_text()))
        parent.kill()
    manager.until("STOPPING=1")
    server.wait(PATIENCE_S)
    assert sorted(path.name for path in place.iterdir()) == ["disk.raw", "notify.sock"]


def test_in_the_background_there_is_no_parent(place: Path) -> None:
    with started("--fork", "--exit-with-parent", "disk.raw") as process:
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr is not None
        assert "--fork and --exit-with-parent don't go together" in process.stderr.read()
