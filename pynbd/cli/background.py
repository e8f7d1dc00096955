"""Going to the background, and the pid file."""

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterator

from pynbd.block.errors import BlockError

PARENT_FAILED = 1


def daemonize() -> int:
    """Fork: the child goes on, the parent waits until it says that clients can connect, and exits.

    The child keeps its working directory, because relative names must stay good (a driver may open files at any
    time); start it in / where that must not keep a file system busy.

    Returns:
        in the child, where to say it (for `report_ready`). If nobody waits any more, that fails with EPIPE.

    Raises:
        SystemExit: in the parent, with 0, or with 1 if the child ended before it was ready.
    """
    ready, announce = os.pipe()
    if os.fork():
        os.close(announce)
        with os.fdopen(ready, "rb") as pipe:
            sys.exit(0 if pipe.read(1) else PARENT_FAILED)
    os.close(ready)
    os.setsid()
    return announce


def report_ready(announce: int) -> None:
    """Leave the terminal and the pipes of who started us, and tell the parent that clients can connect."""
    leave_streams()
    os.write(announce, b"1")
    os.close(announce)


def leave_streams() -> None:
    """Leave the terminal and the pipes of who started us.

    Where the standard error is a file it stays: there is a log.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if stream < 2 or not stat.S_ISREG(os.fstat(stream).st_mode):
            os.dup2(null, stream)
    os.close(null)


@contextlib.contextmanager
def pid_file(name: str | None) -> Iterator[None]:
    """The process id in a file, as long as it serves. The file is locked: one that a dead server left is taken over.

    Raises:
        OSError: it can't be written.
        BlockError: a server that runs has it.
    """
    if name is None:
        yield
        return
    name = os.path.abspath(name)  # noqa: PTH100  # resolve() would follow links
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockError(f"{name}: a server that runs has this pid file") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(name), os.fstat(descriptor)):  # noqa: PTH116  # beside fstat
                    _remove(name, descriptor)
    finally:
        os.close(descriptor)


def _remove(name: str, descriptor: int) -> None:
    """Remove a pid file, or empty it where its folder is that of the user whom we were when we made it."""
    try:
        os.unlink(name)  # noqa: PTH108  # a name, as it was given
    except PermissionError:
        os.ftruncate(descriptor, 0)
