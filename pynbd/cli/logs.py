"""Where a server's log goes, and what its lines look like: for people, for programs, for the journal."""

import argparse
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import msgspec

from pynbd.server import events

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
"""What --log-level takes; -v and -vv are two of them."""

OURS = ("pynbd", "nbd_protocol")

JOURNAL_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Priorities of syslog, by the least level that has them; less than all of these is 7. See sd-daemon(3)."""

LOG_FILE_MODE = 0o640

BEGIN = "pynbd serve: "


def timestamp(created: float) -> str:
    """A time as in RFC 3339, in UTC, to the millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(created % 1 * 1000):03d}Z"


class TextLines(logging.Formatter):
    """Lines for people. In a file each has its time and level, on a terminal the name of the command."""

    def __init__(self, *, dated: bool) -> None:
        super().__init__()
        self._dated = dated

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # a method of logging's
        if self._dated:
            return f"{timestamp(record.created)} {record.levelname.lower()}: {record.message}"
        return f"{BEGIN}{record.message}"


class JsonLines(logging.Formatter):
    """An object on each line, with the same keys in the same order; those of what the line is about come last."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", events.OTHER),
            "message": record.getMessage(),
            "logger": record.name,
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = value if isinstance(value, int | float | bool) else str(value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        # What comes from clients and file names need not be UTF-8.
        return msgspec.json.encode(_speakable(line)).decode()


def _speakable(line: dict[str, str]) -> dict[str, str]:
    return {
        name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for name, value in line.items()
    }


class JournalLines(logging.Formatter):
    """Another one's lines, each with its priority before it, as the journal takes them from a service."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for least, number in JOURNAL_PRIORITIES if record.levelno >= least), 7)
        return "\n".join(f"<{priority}>{line}" for line in self._lines.format(record).splitlines())


def goes_to_journal(stream: TextIO, told: str) -> bool:
    """Whether what is written to a stream is read by the journal.

    Args:
        stream: the standard error.
        told: `JOURNAL_STREAM`, the device and inode of what the service manager has connected to the journal.
    """
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


class LogFile(logging.StreamHandler[TextIO]):
    """A file that lines are appended to, and that is opened anew when somebody has put it aside.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, name: str) -> None:
        self._path = Path(name).absolute()
        super().__init__(self._open())

    def _open(self) -> TextIO:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, LOG_FILE_MODE)
        return open(descriptor, "w", encoding="utf-8", errors="backslashreplace")  # noqa: PTH123  # it stays open

    def reopen(self) -> None:
        """Go on in the file that has the name now; one is made, if there is none.

        Raises:
            OSError: it can't be opened; the old one stays in use.
        """
        old = self.setStream(self._open())
        if old is not None:
            old.close()

    def close(self) -> None:
        """As the base class, and the file."""
        super().close()
        self.stream.close()


def begin_logging(arguments: argparse.Namespace, at_end: contextlib.ExitStack) -> LogFile | None:
    """Log as the arguments say, until the end.

    Returns:
        The log file, if there is one.

    Raises:
        OSError: it can't be opened.
    """
    handler: logging.StreamHandler[TextIO] = logging.StreamHandler(sys.stderr)
    file = None
    if arguments.log_file:
        handler = file = LogFile(arguments.log_file)
        at_end.callback(file.close)
    lines: logging.Formatter = JsonLines() if arguments.log_format == "json" else TextLines(dated=file is not None)
    journal = os.environ.pop("JOURNAL_STREAM", "")
    if file is None and sys.stderr is not None and goes_to_journal(sys.stderr, journal):
        lines = JournalLines(lines)
    handler.setFormatter(lines)
    logging.basicConfig(handlers=[handler])
    level = LEVELS[arguments.log_level] if arguments.log_level else chosen_by(arguments.verbose)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    return file


def chosen_by(verbose: int) -> int:
    """The level that so many -v stand for."""
    return (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
