"""`pynbd serve` as a process: what it prints, the background, commands, signals, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.cli import background
from tests.benchmarks.servers import UNDER_UVLOOP
from tests.peers import SYSTEM_PATH, Daemon, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd", "serve")
PATIENCE_S = 60.0

SLOW_TO_OPEN = """
import asyncio
import sys
from pynbd import Driver

class Slow(Driver):
    size = 512
    async def open(self):
        print("opening", file=sys.stderr, flush=True)
        await asyncio.sleep(1000)
    async def read(self, offset, into): ...
"""

LOSES_WRITES = """
from pynbd import Driver

class Lost(Driver):
    size = 512
    async def read(self, offset, into): ...
    async def write(self, offset, data): ...
    async def flush_to_disk(self): raise OSError(5, "the disk is gone")
"""

BROKEN = """
from pynbd import Driver

class Broken(Driver):
    size = 512
    def open(self):
        raise ArithmeticError("the author's mistake")
    def read(self, offset, into): ...
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a short name; temporary files of those that are started go there, too."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert sorted(path.name for path in Path(folder).iterdir() if path.suffix not in KEPT) == []


KEPT = (".raw", ".py", ".toml", ".log")
"""What tests put there; anything else was left behind."""


@pytest.fixture
def disk(place: Path) -> Path:
    """A small disk there."""
    path = place / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def environment() -> dict[str, str]:
    """The environment of the processes."""
    return {**os.environ, "LC_ALL": "C.UTF-8", "PATH": SYSTEM_PATH, "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`pynbd serve ARGUMENTS`; killed on leaving if it still runs."""
    with subprocess.Popen(
        [*PYNBD, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(*arguments: str | Path) -> tuple[int, str, str]:
    """Status, output and errors of a `pynbd serve` that ends by itself."""
    with started(*arguments) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def refusal(*arguments: str | Path) -> str:
    """The one line that is said by one that can't begin."""
    status, out, err = ended(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("pynbd serve: ")
    return err.removeprefix("pynbd serve: ").rstrip("\n")


def greeting(process: subprocess.Popen[str]) -> list[str]:
    """The lines that it prints when clients can connect."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("Stop with"):
            return lines
    pytest.fail(f"no greeting: {process.communicate()[1]}")


def stopped(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Status and errors, after a signal."""
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, err


# --- the lines to paste ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "0"],
        ["-p", "0", "-r", "-x", "disk0"],
        ["-p", "0", "-b", "::1", "-x", "it's a, name"],
        ["-p", "0", "-b", "0.0.0.0"],
        ["-k", "a sock,et", "-x", "ä&b=c"],
    ],
)
def test_every_line_can_be_pasted(words: list[str], disk: Path) -> None:
    require_tool("qemu-img", package="qemu-utils")
    with started("-f", "raw", *words, disk) as server:
        lines = greeting(server)
        pasted = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("    ")}
        assert "virtual size: 1 MiB" in run("sh", "-c", pasted["qemu-img"])
        if words[-1] != "ä&b=c":  # which this program sends in its own way
            paste_into_nbd_client(pasted["Linux"])
        paste_into_qemu(pasted["QEMU"])
        assert stopped(server) == (0, "")
    assert ("-R" in pasted["Linux"].split()) == pasted["QEMU"].endswith("readonly=on") == ("-r" in words)
    assert f"default export: {disk}, 1048576 bytes, writable" in lines or "-x" in words
    assert any("every address" in line for line in lines) == ("0.0.0.0" in words)


def paste_into_nbd_client(line: str) -> None:
    """It negotiates; that this is no such device is found after that."""
    require_tool("nbd-client")
    assert " /dev/nbd0" in line
    done = subprocess.run(
        line.replace(" /dev/nbd0", " /dev/null") + " -L",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert "size = 1MB" in done.stdout, (line, done.stdout, done.stderr)


def paste_into_qemu(line: str) -> None:
    """It starts with that disk; its processor does not run."""
    require_tool("qemu-system-x86_64", package="qemu-system-x86")
    options = " -S -nodefaults -display none -monitor stdio"
    said = run("sh", "-c", line + options, stdin=b"info block\nquit\n")
    assert "virtio0" in said
    assert "nbd" in said


def test_what_is_served_is_said(place: Path, disk: Path) -> None:
    other = place / "other.raw"
    other.write_bytes(bytes(512))
    words = ["-k", "s", "-s", "--filter", "nofilter", f"a={disk}", f"b={other}", "c=driver=memory,size=1k"]
    with started(*words) as server:
        lines = greeting(server)
        assert stopped(server, signal.SIGINT) == (0, "")
    titles = [line for line in lines if line.startswith("export")]
    assert titles == [
        f"export 'a': {disk}, 1048576 bytes, writable, writes are lost at the end",
        f"export 'b': {other}, 512 bytes, writable, writes are lost at the end",
        "export 'c': driver=memory,size=1k, 1024 bytes, writable, writes are lost at the end",
    ]


def test_a_guessed_format_is_said_also_below_a_filter(disk: Path) -> None:
    with started("-k", "s", "--filter", "nofilter", disk) as server:
        assert any("say -f raw" in line for line in greeting(server))
        assert stopped(server) == (0, "")


# --- what can't be served -------------------------------------------------------------------------------------


def test_places_where_nothing_can_be_made(place: Path, disk: Path) -> None:
    assert "no/s: No such file or directory" in refusal("-k", "no/s", disk)
    assert "/sys/s: " in refusal("-k", "/sys/s", disk)
    assert "exists, and is no socket" in refusal("-k", disk, disk)
    assert "exists, and is no socket" in refusal("-k", ".", disk)
    assert refusal("-k", "s", "--pid-file", "no/pid", disk) == f"{place}/no/pid: No such file or directory"
    assert refusal("-k", "s", "--pid-file", ".", disk) == f"{place}: Is a directory"
    assert "no/pid" in refusal("--fork", "-k", "s", "--pid-file", "no/pid", disk)
    assert "it is a directory" in refusal("-k", "s", place)


def test_a_mistake_in_a_driver_is_one_line_too(place: Path) -> None:
    (place / "broken.py").write_text(BROKEN)
    assert refusal("-k", "s", "./broken.py") == f"ArithmeticError: the author's mistake ({place}/broken.py:7)"
    status, _, err = ended("-vv", "-k", "s", "./broken.py")
    assert status == 1
    assert "Traceback" in err


def test_what_is_lost_at_the_end_is_told(place: Path) -> None:
    require_tool("qemu-io", package="qemu-utils")
    (place / "lost.py").write_text(LOSES_WRITES)
    status, _, err = ended("-q", "--run", 'qemu-io -f raw -t none -c "write 0 512" "$uri" || true', "./lost.py")
    assert status == 1
    last = err.splitlines()[-1]
    assert last == ("pynbd serve: not everything could be flushed, what was written last may be lost: the disk is gone")


def test_a_configuration_is_only_checked(place: Path) -> None:
    (place / "c.toml").write_text('[export.a]\ndisk = "missing"\n[export.""]\ndisk = "missing"\n')
    assert ended("--config", "c.toml", "--check-config") == (0, "c.toml is good; exports: 'a', ''\n", "")
    assert ended("--config", "c.toml", "--check-config", "-q") == (0, "", "")
    assert ended("--check-config", "missing") == (0, "the command line is good; exports: ''\n", "")
    (place / "c.toml").write_text('[export.a]\ndisk = "missing"\nfilters = ["dealy"]\n')
    said = refusal("--config", "c.toml", "--check-config")
    assert said.startswith("c.toml: export.a.filters.0: driver 'dealy' is unknown (did you mean 'delay'?)")


# --- the background -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def daemon(*arguments: str | Path) -> Iterator[tuple[Daemon, str]]:
    """`pynbd serve --fork ARGUMENTS`, with what it printed; ended on leaving."""
    out = run(*PYNBD, "--fork", "--pid-file", "pid", *arguments, env={"PYTHONDONTWRITEBYTECODE": "1"})
    process = Daemon(int(Path("pid").read_text()))
    try:
        yield process, out
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def test_the_background_holds_nothing_of_who_started_it(place: Path, disk: Path) -> None:
    """Neither its terminal nor its pipes; relative names stay good."""
    require_tool("qemu-img", package="qemu-utils")
    with daemon("-f", "raw", "-k", "s", disk.name) as (process, out):
        assert out == ""
        assert [str(Path(f"/proc/{process.pid}/fd/{stream}").readlink()) for stream in (0, 1, 2)] == ["/dev/null"] * 3
        assert os.getsid(process.pid) == process.pid
        assert "1 MiB" in run("qemu-img", "info", f"nbd+unix:///?socket={place}/s")


def test_a_log_file_stays(place: Path, disk: Path) -> None:
    with (place / "errors.log").open("w") as log:
        words = [*PYNBD, "--fork", "--pid-file", "pid", "-v", "-f", "raw", "-k", "s", str(disk)]
        subprocess.run(words, stderr=log, check=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_S)
    process = Daemon(int(Path("pid").read_text()))
    require_tool("qemu-img", package="qemu-utils")
    run("qemu-img", "info", f"nbd+unix:///?socket={place}/s")
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)
    assert "uses export ''" in (place / "errors.log").read_text()


def test_a_port_that_nobody_could_know_is_printed(disk: Path) -> None:
    with daemon("-p", "0", "-x", "a", disk) as (_, out):
        assert out.startswith("nbd://127.0.0.1:")
        assert out.endswith("/a\n")
        assert out.count("\n") == 1


def test_a_background_that_nobody_waits_for_ends(place: Path) -> None:
    (place / "slow.py").write_text(SLOW_TO_OPEN)
    with started("--fork", "-k", "s", "--pid-file", "pid", "./slow.py") as parent:
        assert parent.stderr is not None
        assert parent.stderr.readline() == "opening\n"
        parent.kill()
        # The pipe ends when the child, which holds it too, has ended.
        assert parent.stderr.read() == "pynbd serve: stopped before clients could connect\n"


# --- pid files ------------------------------------------------------------------------------------------------


def test_a_pid_file_is_that_of_one_server(place: Path, disk: Path) -> None:
    with started("-k", "s", "--pid-file", "pid", disk) as server:
        greeting(server)
        assert (place / "pid").read_text() == f"{server.pid}\n"
        said = refusal("-k", "t", "--pid-file", "pid", "driver=null")
        assert said == f"{place}/pid: a server that runs has this pid file"
        assert (place / "pid").read_text() == f"{server.pid}\n"
        assert stopped(server) == (0, "")


def test_a_pid_file_that_a_dead_server_left_is_taken_over(place: Path, disk: Path) -> None:
    (place / "pid").write_text("123456789012345\n")
    with started("-k", "s", "--pid-file", "pid", disk) as server:
        greeting(server)
        assert (place / "pid").read_text() == f"{server.pid}\n"
        assert stopped(server) == (0, "")


def test_a_pid_file_of_somebody_else_is_left_alone(place: Path) -> None:
    path = place / "pid"
    with background.pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        path.unlink()
        path.write_text("another's\n")
    assert path.read_text() == "another's\n"
    path.unlink()
    with background.pid_file(str(path)):
        path.unlink()


# --- commands -------------------------------------------------------------------------------------------------


def test_the_status_of_a_command_is_that_of_the_server(disk: Path) -> None:
    status, out, err = ended("--run", "no-such-command", disk)
    assert (status, out) == (127, "")
    assert "not found" in err
    assert ended("--run", "kill -9 $$", disk) == (128 + 9, "", "")
    assert ended("--run", "exit 3", disk) == (3, "", "")


def test_a_command_knows_where_to_find_the_disk(place: Path, disk: Path) -> None:
    said = 'printf "%s\\n" "$uri" "$nbd" "$unixsocket"'
    uri = f"nbd+unix:///a%20b?socket={place}/s"
    assert ended("-x", "a b", "-k", "s", "--run", said, disk) == (0, f"{uri}\n{uri}\n{place}/s\n", "")


def ends_with_all_that_it_started(disk: Path) -> None:
    """What a command does when the server is told to end: our output ends only when nobody is left who holds it."""
    with started("--run", "sleep 1000 & echo begun; sleep 1000; echo went on", disk) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "begun\n"
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=PATIENCE_S) == ("", "")
    assert server.returncode == 128 + signal.SIGTERM


def test_a_command_ends_with_all_that_it_started(disk: Path) -> None:
    ends_with_all_that_it_started(disk)


def test_a_command_under_uvloop(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvloop")
    monkeypatch.setenv("PYTHONPATH", str(UNDER_UVLOOP), prepend=os.pathsep)
    assert ended("--run", "exit 3", disk) == (3, "", "")
    ends_with_all_that_it_started(disk)


# --- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_leaves_nothing(disk: Path, second: signal.Signals) -> None:
    """Also what it runs, however stubborn. `place` sees that socket, pid file and temporary folder are gone."""
    stubborn = 'trap "echo heard" TERM; echo begun; while :; do sleep 1000 & wait; done'
    with started("--pid-file", "pid", "--run", stubborn, disk) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "begun\n"
        server.send_signal(signal.SIGTERM)
        assert server.stdout.readline() == "heard\n"
        server.send_signal(second)
        out, err = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, err) == (128 + second, "")
    assert "heard" not in out


def test_a_signal_breaks_off_an_opening(place: Path) -> None:
    (place / "slow.py").write_text(SLOW_TO_OPEN)
    with started("-k", "s", "--pid-file", "pid", "a=driver=null", "b=./slow.py") as server:
        assert server.stderr is not None
        assert server.stderr.readline() == "opening\n"
        assert stopped(server) == (1, "pynbd serve: stopped before clients could connect\n")
