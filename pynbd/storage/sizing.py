"""Making files, and changing their length, with space reserved or not. These functions wait: call them in threads."""

import contextlib
import errno
import os

from pynbd.block.alignment import BOUNCE_BYTES, pieces
from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.permissions import Permission
from pynbd.storage import linux, opening, transfers
from pynbd.storage.locks import FileLocks

ZEROES = memoryview(bytes(BOUNCE_BYTES))

NEW_FILE_MODE = 0o644
"""As QEMU's: the owner writes, all read; the umask takes away what it likes."""


def resize(fd: int, before: int, size: int, preallocation: Preallocation) -> None:
    """Change the length of a regular file.

    Args:
        fd: the file.
        before: its length, in bytes.
        size: the new length.
        preallocation: what is done with space that is added.

    Raises:
        OSError: ENOTSUP, that preallocation is not for files, or not for a shorter one; or what the file system said.
            The file has its old length then.
    """
    if preallocation is Preallocation.METADATA or (preallocation is not Preallocation.OFF and size < before):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        if preallocation is Preallocation.FALLOC and size > before:
            linux.fallocate(fd, 0, before, size - before)
        elif preallocation is Preallocation.FULL and size > before:
            _fill(fd, before, size)
        else:
            os.ftruncate(fd, size)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            if os.fstat(fd).st_size > before:
                os.ftruncate(fd, before)
        raise


def _fill(fd: int, start: int, end: int) -> None:
    """Write zeroes, a piece at a time, and see that they are on the disk: the space is really there then."""
    # Another description of the same file, without O_DIRECT: its end may lie anywhere.
    plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for offset, length in pieces(start, end - start, BOUNCE_BYTES, BOUNCE_BYTES):
            transfers.write_at(plain, ZEROES[:length], offset)
        os.fsync(plain)
    finally:
        os.close(plain)


def create(filename: str, size: int, preallocation: Preallocation, locking: str) -> None:
    """Make a file, or empty the one that is there, and give it a length.

    Args:
        filename: its name.
        size: its length in bytes.
        preallocation: what is done with the space.
        locking: as the option of `file`: a file that somebody else uses is left alone.

    Raises:
        BlockError: it can't be made, in a sentence. A new file is removed again; one that was there is left empty at
            worst, and untouched if somebody else uses it.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            fd = os.open(filename, flags | os.O_CREAT | os.O_EXCL, NEW_FILE_MODE)
            new = True
        except FileExistsError:
            opening.check_kind(filename, os.stat(filename).st_mode, device=False)  # noqa: PTH116  # keeps the name
            fd, new = os.open(filename, flags), False
    except (OSError, ValueError) as problem:
        raise opening.explained(filename, problem, verb="create") from problem
    try:
        if locking != "off":
            changing = Permission.WRITE | Permission.RESIZE
            FileLocks(fd, filename, required=locking == "on").prepare(changing, Permission.ALL & ~Permission.RESIZE)
        try:
            os.ftruncate(fd, 0)
            resize(fd, 0, size, preallocation)
            os.fsync(fd)
            if new:
                _sync_folder(filename)
        except OSError as problem:
            raise opening.explained(filename, problem, verb="create") from problem
    except BaseException:
        if new:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(filename)  # noqa: PTH108  # see _sync_folder
        raise
    finally:
        os.close(fd)


def _sync_folder(filename: str) -> None:
    """See that a new file's name outlives a power failure, too."""
    # Without pathlib, whose import takes longer than all this.
    parent = os.path.dirname(filename) or os.curdir  # noqa: PTH120  # as said
    folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_device(filename: str, size: int, preallocation: Preallocation) -> None:
    """ "Making" an image on a block device: see that it is there, and large enough.

    Raises:
        BlockError: it is not.
    """
    if preallocation not in (Preallocation.OFF, Preallocation.FULL, Preallocation.FALLOC):
        raise OptionError(f"{filename}: preallocation {preallocation.value!r} means nothing on a device")
    opened = opening.open_existing(filename, device=True, read_only=False, auto_read_only=False, direct=False)
    try:
        found = linux.device_size(opened.fd)
    finally:
        os.close(opened.fd)
    if found < size:
        raise BlockError(f"Could not create '{filename}': the device has {found} bytes, and {size} are needed")
