"""A place of their own for the containers of the tests: network, mounts and processes that are gone when it is left."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.peers import require_tool

# The first process of the namespaces. Children that others leave to it are reaped by the kernel. It ends with its
# standard input, and with it all processes there, however the tests end.
KEEPER = """
import fcntl, signal, socket, struct, subprocess, sys
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for folder in ("/run", "/var/lib/containers", "/var/lib/cni"):
    subprocess.run(["mkdir", "-p", folder], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
with socket.socket() as any_socket:
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def own_namespaces() -> Iterator[list[str]]:
    """What to put before a command to run it there. Skips, with the reason, where the system does not allow it."""
    enter = [require_tool("nsenter", package="util-linux"), "--mount", "--net", "--pid", "--target"]
    unshare = [require_tool("unshare", package="util-linux")]
    unshare += ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    with subprocess.Popen(
        [*unshare, sys.executable, "-I", "-c", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        try:
            if keeper.stdout.readline() != "ready\n":
                keeper.stdin.close()
                why = " ".join(keeper.stderr.read().split())
                pytest.skip(f"this system allows no containers: {why}")
            (child,) = _children_of(keeper.pid)
            yield [*enter, str(child)]
        finally:
            keeper.stdin.close()
            keeper.wait()


def _children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:  # noqa: PTH123  # a file of the kernel's
        return [int(word) for word in file.read().split()]
