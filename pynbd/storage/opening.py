"""Opening files of the host, and saying in a sentence why one can't be."""

import errno
import os
import stat
from typing import NamedTuple

from pynbd.block.errors import BlockError, OptionError
from pynbd.storage import linux

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISREG, "a regular file"),
)

WRITING_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Opened(NamedTuple):
    """A file that is open.

    Args:
        fd: of the caller, who closes it.
        read_only: whether it was opened for reading only.
    """

    fd: int
    read_only: bool


def kind_of(mode: int) -> str:
    """What a file is, for messages."""
    return next((kind for test, kind in KINDS if test(mode)), "no file")


def check_kind(filename: str, mode: int, *, device: bool) -> None:
    """Check that a file is of the kind that a driver takes.

    Raises:
        BlockError: it is something else; the text says which driver would do, if one would.
    """
    driver = "host_device" if device else "file"
    if stat.S_ISBLK(mode) if device else stat.S_ISREG(mode):
        return
    needs = "a block device" if device else "a regular file"
    hint = ""
    if stat.S_ISBLK(mode):
        hint = "; use the driver host_device"
    elif stat.S_ISREG(mode):
        hint = "; use the driver file"
    raise BlockError(f"Could not open '{filename}': it is {kind_of(mode)}, and the driver {driver} needs {needs}{hint}")


def open_existing(filename: str, *, device: bool, read_only: bool, auto_read_only: bool, direct: bool) -> Opened:
    """Open a file or a device for a node. Waits for the file system: call it in a thread.

    Args:
        filename: its name.
        device: whether a block device is wanted; otherwise a regular file.
        read_only: open it for reading only.
        auto_read_only: do so if it can't be opened for writing.
        direct: with O_DIRECT.

    Raises:
        BlockError: it can't be opened, in a sentence; nothing stays open.
    """
    try:
        # Looked at before it is opened: opening a named pipe waits, and opening some devices does something.
        check_kind(filename, os.stat(filename).st_mode, device=device)  # noqa: PTH116  # a Path would change the name
        if read_only:
            return Opened(_open(filename, os.O_RDONLY, device=device, direct=direct), read_only=True)
        try:
            return Opened(_open(filename, os.O_RDWR, device=device, direct=direct), read_only=False)
        except OSError as problem:
            if not auto_read_only or problem.errno not in WRITING_REFUSED:
                raise
        return Opened(_open(filename, os.O_RDONLY, device=device, direct=direct), read_only=True)
    except (OSError, ValueError) as problem:
        raise explained(filename, problem, direct=direct) from problem


def _open(filename: str, flags: int, *, device: bool, direct: bool) -> int:
    fd = os.open(filename, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        check_kind(filename, os.fstat(fd).st_mode, device=device)
        if device and flags & os.O_RDWR and linux.device_is_read_only(fd):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except BaseException:
        os.close(fd)
        raise
    return fd


def explained(filename: str, problem: OSError | ValueError, *, direct: bool = False, verb: str = "open") -> BlockError:
    """What to tell the person who named a file that can't be opened (or made)."""
    if not isinstance(problem, OSError):
        return OptionError(f"Could not {verb} {filename!r}: {problem}")  # a NUL in the name
    why = problem.strerror or str(problem)
    if direct and problem.errno == errno.EINVAL:
        why = "the file system does not support O_DIRECT (cache.direct=on)"
    return BlockError(f"Could not {verb} '{filename}': {why}")
