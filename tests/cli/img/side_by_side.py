"""`pynbd img` and qemu-img with the same words: what they print, and how they end."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from pynbd.cli.img import main
from tests import peers


class Ending(NamedTuple):
    """How a command ended: its exit status, and what it printed."""

    status: int
    out: str
    err: str


def img(*arguments: str | Path) -> Ending:
    """`pynbd img ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return Ending(status, out.getvalue(), err.getvalue())


def qemu_img(*arguments: str | Path) -> Ending:
    """`qemu-img ARGUMENTS`."""
    program = peers.require_tool("qemu-img", package="qemu-utils")
    done = peers.ending_of([program, *map(str, arguments)])
    return Ending(done.returncode, done.stdout.decode(), done.stderr.decode())


def ok(*arguments: str | Path) -> str:
    """What `pynbd img ARGUMENTS` prints; it must end well, and say nothing on stderr."""
    ending = img(*arguments)
    assert (ending.status, ending.err) == (0, ""), ending
    return ending.out


def failure(*arguments: str | Path, status: int = 1) -> str:
    """What `pynbd img ARGUMENTS` says of a failure: one line on stderr that begins with its name."""
    ending = img(*arguments)
    assert ending.status == status, ending
    begin = f"pynbd img {arguments[0]}: "
    assert ending.err.startswith(begin), ending.err
    assert ending.err.count("\n") == 1, ending.err
    return ending.err.removeprefix(begin).rstrip("\n")


def same(*arguments: str | Path) -> str:
    """What both print, which must be the same, as must be their exit status; a failure must be told on stderr."""
    theirs = qemu_img(*arguments)
    ours = img(*arguments)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    assert bool(ours.err) == bool(theirs.err), (ours, theirs)
    return ours.out
