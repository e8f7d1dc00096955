"""The log of `pynbd serve`: its levels, its lines for people, programs and the journal, and its file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pynbd.cli.logs import JournalLines, JsonLines, TextLines, timestamp
from pynbd.server.events import about
from tests.cli.pynbd_command import failure
from tests.peers import Peer, pynbd_serve, require_tool, run

PATIENCE_S = 60.0
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

FAILS = """
from pynbd import Driver

class Fails(Driver):
    size = 1 << 20
    async def read(self, offset, into):
        raise OSError(5, "the needle is bent") if offset else ArithmeticError("a mistake")
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a disk."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        monkeypatch.chdir(folder)
        (Path(folder) / "disk.raw").write_bytes(bytes(1 << 20))
        yield Path(folder)


def objects(text: str) -> list[dict[str, Any]]:
    """The lines of a log for programs; every one must be an object that begins alike."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for line in found:
        assert list(line)[:5] == ["time", "level", "event", "message", "logger"]
        assert TIME.fullmatch(line["time"])
    return found


def record(message: str, *, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    """A line of the log before it has a form."""
    made = logging.LogRecord("pynbd.x", level, "x.py", 1, "%s", (message,), None)
    made.created = 0.0
    if fields:
        vars(made).update(about("client-come", **fields))
    return made


# --- forms ----------------------------------------------------------------------------------------------------


def test_times_are_utc_to_the_millisecond() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1_700_000_000.25) == "2023-11-14T22:13:20.250Z"


def test_lines_for_people() -> None:
    assert TextLines(dated=False).format(record("hello")) == "pynbd serve: hello"
    assert TextLines(dated=True).format(record("hello")) == "1970-01-01T00:00:00.000Z info: hello"


def test_lines_for_programs() -> None:
    line = JsonLines().format(
        record("a\nb", client="unix#7", read_only=True, requests=3, error=OSError("gone"), export="")
    )
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "info",
        "event": "client-come",
        "message": "a\nb",
        "logger": "pynbd.x",
        "client": "unix#7",
        "read_only": True,
        "requests": 3,
        "error": "gone",
        "export": "",
    }
    assert "\n" not in line
    assert json.loads(JsonLines().format(record("no UTF-8: \udcff")))["message"] == "no UTF-8: \\udcff"
    assert json.loads(JsonLines().format(record("plain")))["event"] == "other"


def test_lines_for_the_journal_have_their_priority() -> None:
    lines = JournalLines(TextLines(dated=False))
    for level, priority in ((logging.CRITICAL, 3), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        assert lines.format(record("a\nb", level=level)) == f"<{priority}>pynbd serve: a\n<{priority}>b"
    assert lines.format(record("a", level=logging.DEBUG)) == "<7>pynbd serve: a"


# --- the server -----------------------------------------------------------------------------------------------


def use(peer: Peer, *commands: str, status: int = 0) -> None:
    """Use the default export."""
    require_tool("qemu-io", package="qemu-utils")
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-r", "-f", "raw", *words, peer.uri(), status=status)


def test_what_happens_is_told_to_programs(place: Path) -> None:
    (place / "fails.py").write_text(FAILS)
    with pynbd_serve("--log-format", "json", "--log-level", "info", "-q", "./fails.py", "-r") as peer:
        use(peer, "read 4k 4k", "read 0 4k", status=1)
        run("nbdinfo", "--size", f"nbd+unix:///secret?socket={peer.endpoint.socket_path}", status=1)
        peer.until_logged('"client-refused"')
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged('"reloaded"')
        peer.stop()
        lines = objects(peer.log())
    # Clients that come and go to see whether it runs are among them, and when each is told is its own matter.
    assert lines[0]["event"] == "ready"
    assert (lines[0]["exports"], lines[0]["pid"]) == (1, peer.pid)
    assert lines[-1]["event"] != "ready"
    by_event = {line["event"]: line for line in reversed(lines)}
    come = by_event["client-come"]
    assert come["client"].startswith("unix#")
    assert (come["export"], come["framing"], come["read_only"], come["level"]) == ("", "structured", True, "info")
    assert {line["client"] for line in lines if line["event"] == "client-gone"} == {come["client"]}
    failed = [line for line in lines if line["event"] == "request-failed"]
    assert [(line["client"], line["export"]) for line in failed] == [(come["client"], "")] * 2
    assert "the needle is bent" in failed[0]["reason"]
    assert failed[0]["level"] == "warning"
    assert failed[1]["error"] == "ArithmeticError('a mistake')"
    assert "fails.py" in failed[1]["traceback"]
    assert "'secret'" in by_event["client-refused"]["reason"]
    assert "stopping" in by_event


def test_levels(place: Path) -> None:
    for flags, told in (
        (["-v"], True),
        (["--log-level", "info"], True),
        ([], False),
        (["-v", "--log-level", "warning"], False),
    ):
        with pynbd_serve(*flags, "-f", "raw", "disk.raw") as peer:
            use(peer, "read 0 4k")
            peer.stop()
            assert ("uses export" in peer.log()) is told


def test_why_it_can_not_begin_is_told_in_the_same_form(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pynbd", "serve", "--log-format", "json", "missing.raw"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    (line,) = objects(done.stderr)
    assert (line["event"], line["level"]) == ("failed", "error")
    assert line["message"] == line["error"] == "Could not open 'missing.raw': No such file or directory"


def test_a_log_file_that_was_put_aside_is_made_anew(place: Path) -> None:
    with pynbd_serve("-v", "--log-file", "server.log", "-f", "raw", "disk.raw") as peer:
        use(peer, "read 0 4k")
        Path("server.log").rename("server.log.1")
        use(peer, "read 0 4k")
        peer.process.send_signal(signal.SIGHUP)
        use(peer, "read 0 4k")
        peer.stop()
        assert "uses export" not in peer.log()
    old, new = Path("server.log.1").read_text(), Path("server.log").read_text()
    for line in (*old.splitlines(), *new.splitlines()):
        assert TIME.match(line)
    assert old.count("uses export") == 2
    assert new.count("uses export") == 1
    assert " info: stops\n" in new


def test_a_log_file_that_can_not_be_made_is_told(place: Path) -> None:
    assert (
        failure("serve", "--log-file", "no/where.log", "disk.raw") == f"{place}/no/where.log: No such file or directory"
    )


def test_who_waits_for_it_to_begin_is_told_beside_the_log_file(place: Path) -> None:
    why = "Could not open 'missing.raw': No such file or directory"
    assert failure("serve", "--log-file", "server.log", "missing.raw") == why
    assert Path("server.log").read_text().endswith(f" error: {why}\n")


@pytest.mark.parametrize("ours", [True, False])
def test_the_journal_is_known_by_its_stream(place: Path, ours: bool) -> None:
    reading, writing = os.pipe()
    status = os.fstat(writing if ours else 0)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, reading)
        process = subprocess.Popen(
            [sys.executable, "-m", "pynbd", "serve", "missing.raw"],
            stdin=subprocess.DEVNULL,
            stderr=writing,
            env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )
        os.close(writing)
        assert process.wait(PATIENCE_S) == 1
        said = os.read(reading, 65536).decode()
    assert said == ("<3>" if ours else "") + "pynbd serve: Could not open 'missing.raw': No such file or directory\n"
