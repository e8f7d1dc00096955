"""Making files, and changing their length, with space reserved or not. These functions wait: call them in threads."""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence

from pynbd.block.alignment import BOUNCE_BYTES, pieces
from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.permissions import Permission
from pynbd.storage import linux, opening, transfers
from pynbd.storage.locks import FileLocks

ZEROES = memoryview(bytes(BOUNCE_BYTES))

EXTENT_SIZE_HINT_BYTES = 1 << 20
"""The hint of new files of which nobody says another one; QEMU's."""

NEW_FILE_MODE = 0o644
"""As QEMU's: the owner writes, all read; the umask takes away what it likes."""


def resize(
    fd: int, before: int, size: int, preallocation: Preallocation, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Change the length of a regular file.

    Args:
        fd: the file.
        before: its length, in bytes.
        size: the new length.
        preallocation: what is done with space that is added.
        is_stopped: whether to end early, asked now and then.

    Raises:
        OSError: ENOTSUP, that preallocation is not for files, or not for a shorter one; ECANCELED, it was to end early;
            or what the file system said.
            The file has its old length then.
    """
    if preallocation is Preallocation.METADATA or (preallocation is not Preallocation.OFF and size < before):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        if preallocation is Preallocation.FALLOC and size > before:
            linux.fallocate(fd, 0, before, size - before)
        elif preallocation is Preallocation.FULL and size > before:
            _fill(fd, before, size, is_stopped)
        else:
            os.ftruncate(fd, size)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            if os.fstat(fd).st_size > before:
                os.ftruncate(fd, before)
        raise


def _fill(fd: int, start: int, end: int, is_stopped: Callable[[], bool]) -> None:
    """Write zeroes, a piece at a time, and see that they are on the disk: the space is really there then."""
    # Another description of the same file, without O_DIRECT: its end may lie anywhere.
    plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for offset, length in pieces(start, end - start, BOUNCE_BYTES, BOUNCE_BYTES):
            if is_stopped():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            transfers.write_at(plain, ZEROES[:length], offset)
        os.fsync(plain)
    finally:
        os.close(plain)


def create(
    filename: str,
    size: int,
    preallocation: Preallocation,
    locking: str,
    *,
    no_cow: bool = False,
    extent_size_hint: int | None = None,
) -> Sequence[str]:
    """Make a file, or empty the one that is there, and give it a length.

    Args:
        filename: its name.
        size: its length in bytes.
        preallocation: what is done with the space.
        locking: as the option of `file`: a file that somebody else uses is left alone.
        no_cow: whether it is to be written in place, where the file system copies on write else.
        extent_size_hint: in which pieces it gets its space, in bytes; 0 for no hint, None for what is usual.

    Returns:
        what was asked for and could not be had. Of `no_cow` nothing is said: it means something on btrfs alone.

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
            target = os.path.realpath(filename)
            if target != filename and not os.path.lexists(target):  # a symbolic link that leads to no file yet
                return create(target, size, preallocation, locking, no_cow=no_cow, extent_size_hint=extent_size_hint)
            opening.check_kind(filename, os.stat(filename).st_mode, device=False)  # noqa: PTH116  # keeps the name
            fd, new = os.open(filename, flags), False
    except (OSError, ValueError) as problem:
        raise opening.explained(filename, problem, verb="create") from problem
    try:
        if locking != "off":
            # As strict as whoever writes it right after: what is refused then must not be empty already.
            held = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
            FileLocks(fd, filename, required=locking == "on").prepare(held, Permission.CONSISTENT_READ)
        try:
            os.ftruncate(fd, 0)
            said = _set_attributes(fd, no_cow=no_cow, extent_size_hint=extent_size_hint)
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
    return said


def _set_attributes(fd: int, *, no_cow: bool, extent_size_hint: int | None) -> Sequence[str]:
    """What a file must be told as long as it is empty; gives what it would not take."""
    if no_cow:
        with contextlib.suppress(OSError):
            linux.set_no_copy_on_write(fd)
    size = EXTENT_SIZE_HINT_BYTES if extent_size_hint is None else extent_size_hint
    try:
        if size:
            linux.set_extent_size_hint(fd, size)
    except OSError as problem:
        if extent_size_hint is not None:
            return (f"the extent size hint of {size} bytes could not be set: {problem.strerror}",)
    return ()


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
