"""`pynbd` as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import peers

PYNBD = (sys.executable, "-m", "pynbd")


def pynbd(*arguments: str | Path, status: int = 0) -> str:
    """What the command prints; it must end with that status."""
    return peers.run(*PYNBD, *arguments, status=status)


def failure(*arguments: str | Path) -> str:
    """What the command says of a failure: one line on stderr without its own name, nothing else, and status 1."""
    done = subprocess.run(
        [*PYNBD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=peers.COMMAND_LIMIT_S,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    begin = f"pynbd {arguments[0]}: "
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith(begin), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix(begin).rstrip("\n")
