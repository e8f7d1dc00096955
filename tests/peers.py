"""Real NBD servers and clients, started and ended for a test: qemu-nbd, nbdkit, nbd-server and pynbd itself.

Every server is a context manager that yields a running `Peer`: started on a Unix socket of its own or on a free port of
127.0.0.1, ready when it has greeted a connection, and ended by its process id when the block is left, at the latest
when the interpreter ends. Nothing here leaves the machine.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import pytest

ROOT = Path(__file__).resolve().parent.parent
"""The top folder of the tree."""

QEMU10 = ROOT / ".cache" / "qemu10"
"""Where tests/setup/fetch_qemu10 puts a QEMU that negotiates extended headers."""

TOOL_MISSING = "tool missing: "
"""How the reason of a skip begins when an installable program is not there; under CI such a skip is a failure."""

READY_LIMIT_S = 30.0
"""How long a server may take until it greets; none takes a second on an idle machine."""

END_LIMIT_S = 20.0
"""How long a server may take to end after SIGTERM before it is killed."""

LOG_LIMIT_S = 30.0
"""How long what a server is to say may take."""

LOG_INTERVAL_S = 0.02
"""How long to wait before its log is read again."""

MEASURING_ATTEMPTS = 20
"""How often QEMU may fail to measure how fast the processor is."""

COMMAND_LIMIT_S = 100.0
"""How long a client may run unless the caller says otherwise; below pytest's own limit, so that its output is seen."""

SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
"""PATH with the folders of system programs (nbd-client, mkfs), which an ordinary user's PATH may lack."""

_running: dict[int, Process] = {}


class CommandError(AssertionError):
    """A program ended otherwise than expected; the text has its command line, status, output and errors."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens: a Unix socket, or a port of a host."""

    socket_path: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0

    def uri(self, export: str = "") -> str:
        """The NBD URI of `export` here."""
        if self.socket_path is not None:
            return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self.socket_path))}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{quote(export, safe='')}"

    def connect(self, timeout_s: float = READY_LIMIT_S) -> socket.socket:
        """A blocking socket connected to here; the caller closes it. Raises OSError."""
        if self.socket_path is None:
            return socket.create_connection((self.host, self.port), timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(self.socket_path))
        except OSError:
            connection.close()
            raise
        return connection


class Process(Protocol):
    """What is needed of a process: subprocess.Popen has it, and so has a daemon that is nobody's child."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Daemon:
    """A process that left its parent, known by its pid file; its exit status can't be had and counts as 0."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._handle)

    def poll(self) -> int | None:
        """0 when it has ended, None before."""
        return 0 if select.select([self._handle], [], [], 0)[0] else None

    def send_signal(self, sig: int, /) -> None:
        """Signal this process, never another that has got its number."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, sig)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended. Raises subprocess.TimeoutExpired, as Popen does."""
        if not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return 0


@dataclass
class Peer:
    """A server that runs: its process, where it listens, and what it has said so far."""

    name: str
    process: Process
    endpoint: Endpoint
    log_path: Path
    command: tuple[str, ...]
    default_export: str = ""
    stopped: bool = False

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def uri(self, export: str | None = None) -> str:
        """The NBD URI of one of its exports; of its default export, if it isn't named."""
        return self.endpoint.uri(self.default_export if export is None else export)

    def log(self) -> str:
        """Everything it has written to its standard output and error."""
        return self.log_path.read_text(errors="replace")

    def until_logged(self, text: str) -> None:
        """Wait until it has said this: a client can be gone before the server tells of it. Fails after LOG_LIMIT_S."""
        self.until(lambda: text in self.log(), f"{text!r}")

    def until(self, said: Callable[[], bool], what: str) -> None:
        """Wait until it has said something. Fails after LOG_LIMIT_S."""
        deadline = time.monotonic() + LOG_LIMIT_S
        while not said():
            assert self.process.poll() is None, f"{self.name} ended before it said {what}:\n{self.log()}"
            assert time.monotonic() < deadline, f"{self.name} never said {what}:\n{self.log()}"
            time.sleep(LOG_INTERVAL_S)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it with a signal and return its exit status; if it ignores that for END_LIMIT_S, kill it and raise."""
        self.stopped = True
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            raise CommandError(
                f"{self.name} went on for {END_LIMIT_S} s after signal {signal_number}:\n{self.log()}"
            ) from None
        finally:
            _running.pop(self.pid, None)


def require_tool(name: str, *, package: str = "") -> str:
    """The path of a program, or a skip that says which one is missing (and, if given, the package that has it)."""
    path = shutil.which(name, path=SYSTEM_PATH)
    if path is None:
        pytest.skip(TOOL_MISSING + name + (f" (Debian package {package})" if package else ""))
    return path


def require_nbdsh() -> list[str]:
    """How to start nbdsh, by the Python that libnbd's bindings were built for, or a skip."""
    command = ["/usr/bin/python3", "-I", "-m", "nbd"]
    if (
        not Path(command[0]).exists()
        or subprocess.run([*command, "--version"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"{TOOL_MISSING}nbdsh (Debian package python3-libnbd)")
    return command


def require_qemu10(name: str) -> str:
    """The path of qemu-img, qemu-nbd or qemu-io of a QEMU with extended headers, or a skip with the reason."""
    path = QEMU10 / "bin" / name
    if not path.exists():
        reason = QEMU10 / "unavailable"
        why = reason.read_text().strip() if reason.exists() else "`make packages` has not been run"
        pytest.skip(f"no QEMU with extended headers: {why}")
    return str(path)


def run(
    *command: str | Path,
    timeout_s: float = COMMAND_LIMIT_S,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    status: int = 0,
) -> str:
    """Run a program to its end and return what it printed.

    Not for a server inside the test's own event loop, which would stand still meanwhile: see `run_beside_loop`.

    Args:
        command: the program and its arguments.
        timeout_s: seconds until it is killed and CommandError is raised.
        stdin: bytes for its standard input; None is an empty one.
        env: variables added to the environment.
        status: the exit status that is expected. Any other raises CommandError with the program's errors.
    """
    words = [str(word) for word in command]
    done = ending_of(words, timeout_s=timeout_s, stdin=stdin, env=env)
    return _judged(words, done.returncode, status, done.stdout, done.stderr)


def ending_of(
    words: list[str],
    *,
    timeout_s: float = COMMAND_LIMIT_S,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """`run`, for who judges the ending himself.

    QEMU's tools measure PBKDF2 before they make a key, and fail when the processor's clock stood still meanwhile, as it
    does at times on virtual machines: then they are run again.
    """
    for _ in range(MEASURING_ATTEMPTS):
        try:
            done = subprocess.run(
                words, input=stdin or b"", capture_output=True, timeout=timeout_s, env=_environment(env), check=False
            )
        except subprocess.TimeoutExpired as late:
            raise CommandError(_story(words, f"killed after {timeout_s} s", late.stdout, late.stderr)) from None
        if b"Unable to get accurate CPU usage" not in done.stderr:
            break
    return done


async def run_beside_loop(
    *command: str | Path,
    timeout_s: float = COMMAND_LIMIT_S,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    status: int = 0,
) -> str:
    """`run`, while the event loop goes on: for clients of a server that lives in the test itself."""
    words = [str(word) for word in command]
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(env),
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin or b"")
    except TimeoutError:
        raise CommandError(_story(words, f"killed after {timeout_s} s", None, None)) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return _judged(words, process.returncode, status, out, err)


@contextlib.contextmanager
def pynbd_serve(
    *arguments: str | Path, tcp: bool = False, python: str = sys.executable, env: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    """`pynbd serve ARGUMENTS`, listening where this says; on leaving it must end by SIGTERM with status 0."""
    with _place(tcp) as (endpoint, folder):
        command = [python, "-m", "pynbd", "serve", *_listen_options(endpoint, bind="-b"), *arguments]
        with _started("pynbd", command, endpoint, folder, env=env) as peer:
            yield peer
            if not peer.stopped:
                status = peer.stop()
                if status != 0:
                    raise CommandError(f"pynbd serve ended with status {status} on SIGTERM:\n{peer.log()}")


@contextlib.contextmanager
def qemu_nbd(
    disk: str | Path, *options: str, tcp: bool = False, qemu10: bool = False, clients: int = 64
) -> Iterator[Peer]:
    """`qemu-nbd -t -e CLIENTS OPTIONS DISK`, persistent; `-f raw` when no option says the format."""
    program = require_qemu10("qemu-nbd") if qemu10 else require_tool("qemu-nbd", package="qemu-utils")
    if not {"-f", "--image-opts"} & set(options) and not any(word.startswith("--format") for word in options):
        options = ("-f", "raw", *options)
    with _place(tcp) as (endpoint, folder):
        command: list[str | Path] = [
            program,
            "-t",
            "-e",
            str(clients),
            *_listen_options(endpoint, bind="-b"),
            *options,
            disk,
        ]
        with _started("qemu-nbd", command, endpoint, folder) as peer:
            yield peer


@contextlib.contextmanager
def nbdkit(
    plugin: str | Path, *arguments: str | Path, options: Sequence[str] = (), tcp: bool = False
) -> Iterator[Peer]:
    """`nbdkit -f OPTIONS PLUGIN ARGUMENTS`: `nbdkit("memory", "1G", options=["--filter=nofilter"])`."""
    program = require_tool("nbdkit")
    with _place(tcp) as (endpoint, folder):
        listen = _listen_options(endpoint, bind="-i", unix="-U")
        command = [program, "-f", "--exit-with-parent", *listen, *options, plugin, *arguments]
        with _started("nbdkit", command, endpoint, folder) as peer:
            yield peer


@contextlib.contextmanager
def nbd_server(exports: Mapping[str, Path], *settings: str, tcp: bool = False) -> Iterator[Peer]:
    """nbd-server with one section for each export, each with `settings` (lines like "readonly = true")."""
    program = require_tool("nbd-server", package="nbd-server")
    with _place(tcp) as (endpoint, folder):
        lines = ["[generic]", "allowlist = true", f"port = {endpoint.port or free_port()}"]
        lines += [f"unixsock = {endpoint.socket_path}"] if endpoint.socket_path else []
        lines += ["listenaddr = 127.0.0.1"]
        for name, path in exports.items():
            lines += [f"[{name}]", f"exportname = {path}", *settings]
        config = folder / "nbd-server.conf"
        config.write_text("\n".join(lines) + "\n")
        pid_file = folder / "nbd-server.pid"
        # It always leaves for the background: the process that was started ends, another one serves.
        command = (program, "-C", str(config), "-p", str(pid_file))
        run(*command)
        peer = Peer(
            "nbd-server", Daemon(_read_pid(pid_file)), endpoint, folder / "nbd-server.log", command, next(iter(exports))
        )
        peer.log_path.touch()
        with _running_until_left(peer):
            yield peer


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _place(tcp: bool) -> Iterator[tuple[Endpoint, Path]]:
    # The path of a Unix socket has at most 107 bytes: pytest's own folders are too deep for it.
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        endpoint = Endpoint(port=free_port()) if tcp else Endpoint(socket_path=Path(folder) / "nbd.sock")
        yield endpoint, Path(folder)


def _listen_options(endpoint: Endpoint, *, bind: str, unix: str = "-k") -> list[str]:
    if endpoint.socket_path is not None:
        return [unix, str(endpoint.socket_path)]
    return [bind, endpoint.host, "-p", str(endpoint.port)]


@contextlib.contextmanager
def _started(
    name: str, command: Sequence[str | Path], endpoint: Endpoint, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    log_path = folder / f"{name}.log"
    words = [str(word) for word in command]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(env),
        )
    with _running_until_left(Peer(name, process, endpoint, log_path, tuple(words))) as peer:
        yield peer


@contextlib.contextmanager
def _running_until_left(peer: Peer) -> Iterator[Peer]:
    _running[peer.pid] = peer.process
    try:
        _wait_until_it_greets(peer)
        yield peer
    finally:
        if not peer.stopped:
            peer.stop()


def _read_pid(pid_file: Path) -> int:
    deadline = time.monotonic() + READY_LIMIT_S
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        if time.monotonic() > deadline:
            raise CommandError(f"no process id in {pid_file} after {READY_LIMIT_S} s")
        os.sched_yield()
    return int(pid_file.read_text())


def _greets(endpoint: Endpoint) -> bool:
    # A connection alone says nothing: qemu-nbd listens first, and only then finds that it can't open its disk.
    try:
        with endpoint.connect() as connection:
            return connection.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
    except (FileNotFoundError, ConnectionError):
        return False


def _wait_until_it_greets(peer: Peer) -> None:
    deadline = time.monotonic() + READY_LIMIT_S
    while True:
        if _greets(peer.endpoint):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            # The pause between two attempts ends at once if the server does.
            status = peer.process.wait(0.01)
            raise CommandError(f"{peer.name} ended with status {status} instead of listening:\n{peer.log()}")
        if time.monotonic() > deadline:
            raise CommandError(f"{peer.name} does not greet after {READY_LIMIT_S} s:\n{peer.log()}")


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **(added or {})}


def _judged(words: list[str], status: int, expected: int, out: bytes, err: bytes) -> str:
    if status != expected:
        raise CommandError(_story(words, f"status {status}, expected {expected}", out, err))
    return out.decode(errors="replace")


def _story(words: list[str], what: str, out: bytes | None, err: bytes | None) -> str:
    said = "".join(
        f"\n{name}: {text.decode(errors='replace').rstrip()}" for name, text in (("out", out), ("err", err)) if text
    )
    return f"{' '.join(words)}: {what}{said}"


def _end_all() -> None:
    for process in list(_running.values()):
        process.send_signal(signal.SIGKILL)
        process.wait()


atexit.register(_end_all)
