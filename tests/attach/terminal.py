"""A person's terminal, joined to a shell in the guest."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator

LEAVE = b"\x1d"
"""Ctrl-]: leave the guest whatever it does."""

END_OF_INPUT = b"\x04"
END_OF_SHELL = "<end of the interactive shell>"

SHELL = f"stty echo onlcr; PS1='guest# ' sh -i </dev/ttyS0 >/dev/ttyS0 2>&1; stty -echo -onlcr; echo '{END_OF_SHELL}'\n"
"""The guest's one shell reads its port as a script; this one is for people, on the same port."""

CHUNK_BYTES = 4096


def interact(console: socket.socket) -> None:
    """Start a shell for a person on the guest's `console`, and return when it has ended or Ctrl-] was pressed."""
    console.sendall(SHELL.encode())
    stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
    sources = [stdin, console.fileno()]
    seen = b""
    with _raw(stdin):
        while True:
            readable, _, _ = select.select(sources, [], [])
            if stdin in readable:
                typed = os.read(stdin, CHUNK_BYTES)
                if LEAVE in typed:
                    return
                if not typed:
                    sources.remove(stdin)
                console.sendall(typed or END_OF_INPUT)
            if console.fileno() in readable:
                said = console.recv(CHUNK_BYTES)
                seen = (seen + said)[-CHUNK_BYTES:]
                if not said or END_OF_SHELL.encode() in seen:
                    return
                os.write(stdout, said)


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Every key goes to the guest as it is pressed; not where the input is no terminal."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
