"""The server under test: `pynbd serve` as a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import contextlib
import copy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.attach.watching import announce, watcher
from tests.peers import free_port

ADDRESS = "127.0.0.1"
READY_TIMEOUT_S = 30
STOP_TIMEOUT_S = 30
RETRY_S = 0.02
LOG_SHOWN_CHARS = 12_000


class ServerError(Exception):
    """The server did not start, or did not end as it should; carries what it printed."""


class ServerUnderTest:
    """A running `pynbd serve` of one disk; a context manager.

    `disk` is served as the export `export_name`, unless the words behind the options say what is served; `options` are
    further options of `pynbd serve`. Leaving the context
    stops the server as a user would (SIGTERM) and raises `ServerError` when it does not end with status 0 then, unless
    another error is on its way.
    """

    def __init__(
        self,
        disk: Path,
        log_path: Path,
        export_name: str = "disk",
        options: Sequence[str] = ("--discard", "unmap"),
        words: Sequence[str] = (),
    ) -> None:
        self.disk = disk
        self.export_name = export_name
        self.port = free_port()
        self.options = tuple(options)
        self.words = tuple(words) or ("-x", export_name, str(disk))
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The export's NBD URI, for clients on this machine."""
        return f"nbd://{ADDRESS}:{self.port}/{self.export_name}"

    @property
    def pid(self) -> int:
        """The server's process id; for scenarios that stop or kill it."""
        return self._running().pid

    def command(self) -> list[str]:
        """The server's command line."""
        return [
            *(sys.executable, "-m", "pynbd", "serve", *self.options),
            *("-b", ADDRESS, "-p", str(self.port), *self.words),
        ]

    def other_export(self, name: str) -> ServerUnderTest:
        """The same running server, seen as that of another of its exports; not to be started or stopped."""
        other = copy.copy(self)
        other.export_name = name
        return other

    def start(self) -> None:
        """Start the server and return when it takes connections; after `stop` or `kill`, on the same port again."""
        announce(f"host$ pynbd {' '.join(self.command()[3:])}")
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server by SIGTERM; raise `ServerError` when it is not gone in time with status 0."""
        process = self._running()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerError(f"still there {STOP_TIMEOUT_S} s after SIGTERM\n{self.log()}") from None
        self._process = None
        if status != 0:
            raise ServerError(f"ended with status {status} after SIGTERM\n{self.log()}")

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would; does nothing when it does not run."""
        if self._process is not None:
            announce("host: the server is killed")
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        """Return the end of what the server printed."""
        return self._log_path.read_text(errors="replace")[-LOG_SHOWN_CHARS:]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._process is not None:
                self.stop()
        finally:
            self.kill()
            if watcher() is None:
                print(f"--- {' '.join(self.command())} ---\n{self.log()}")  # noqa: T201 - pytest shows it beside a failure

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError(f"the server does not run\n{self.log()}")
        return self._process

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((ADDRESS, self.port)):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(RETRY_S)
                raise ServerError(f"ended with status {status} before it took a connection\n{self.log()}")
            if time.monotonic() > deadline:
                raise ServerError(f"takes no connection after {READY_TIMEOUT_S} s\n{self.log()}")
