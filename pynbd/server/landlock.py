"""Landlock: the kernel refuses this process what it was not granted, from now on and for good.

A ruleset says which kinds of access are refused unless a rule grants them: below a folder, to a file, at a TCP port.
What is open already stays open. It holds for the calling thread and those that it starts afterwards, so that all others
have to have ended. Source: landlock(7), Documentation/userspace-api/landlock.rst of the kernel.
"""

import ctypes
import enum
import errno
import os
import stat
import struct
from pathlib import Path
from time import monotonic, sleep
from typing import Final

import msgspec

from pynbd.block.errors import BlockError
from pynbd.storage import linux

SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_ADD_RULE: Final = 445
SYS_LANDLOCK_RESTRICT_SELF: Final = 446
"""The numbers of the system calls, which are the same on every architecture (Linux 5.13)."""

LANDLOCK_CREATE_RULESET_VERSION: Final = 1
LANDLOCK_RULE_PATH_BENEATH: Final = 1

RULESET_ATTR: Final = struct.Struct("=QQQ")
"""struct landlock_ruleset_attr: handled_access_fs, handled_access_net (version 4), scoped (version 6)."""

PATH_BENEATH_ATTR: Final = struct.Struct("=Qi")
"""struct landlock_path_beneath_attr: allowed_access, parent_fd; it is packed."""

THREAD_END_S: Final = 1.0
"""How long threads that have been ended may take until the kernel has forgotten them."""

KERNEL_THREADS: Final = "iou-"
"""How the names of io_uring's workers begin, which do nothing but what is submitted, with the submitter's rights."""

THREADS: Final = Path("/proc/self/task")


class FsAccess(enum.IntFlag):
    """LANDLOCK_ACCESS_FS_…: what may be done with files."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


class NetAccess(enum.IntFlag):
    """LANDLOCK_ACCESS_NET_…: what may be done with TCP."""

    BIND_TCP = 1 << 0
    CONNECT_TCP = 1 << 1


class Scope(enum.IntFlag):
    """LANDLOCK_SCOPE_…: who outside may be reached."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


OF_A_FILE: Final = FsAccess.EXECUTE | FsAccess.WRITE_FILE | FsAccess.READ_FILE | FsAccess.TRUNCATE | FsAccess.IOCTL_DEV
"""What a rule about something that is no folder can grant."""

READ: Final = FsAccess.READ_FILE | FsAccess.READ_DIR
WRITE: Final = (
    READ
    | FsAccess.WRITE_FILE
    | FsAccess.TRUNCATE
    | FsAccess.IOCTL_DEV
    | FsAccess.MAKE_REG
    | FsAccess.MAKE_DIR
    | FsAccess.REMOVE_FILE
    | FsAccess.REMOVE_DIR
    | FsAccess.REFER
)
"""What reading and writing below a folder take."""


class Grants(msgspec.Struct, frozen=True):
    """What stays possible.

    Args:
        files: kinds of access by path; a path that is not there is passed over.
        connect: whether TCP connections can be made to others.
    """

    files: dict[Path, FsAccess]
    connect: bool


def version() -> int:
    """The version of the kernel's Landlock, 0 if it has none or it is off."""
    try:
        return linux.syscall(
            SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_CREATE_RULESET_VERSION)
        )
    except OSError as problem:
        if problem.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def handled(abi: int) -> tuple[FsAccess, NetAccess, Scope]:
    """What a version of Landlock can refuse."""
    files = FsAccess(0x1FFF)
    for since, access in ((2, FsAccess.REFER), (3, FsAccess.TRUNCATE), (5, FsAccess.IOCTL_DEV)):
        files |= access if abi >= since else FsAccess(0)
    net = NetAccess.BIND_TCP | NetAccess.CONNECT_TCP if abi >= 4 else NetAccess(0)
    return files, net, Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL if abi >= 6 else Scope(0)


def restrict(grants: Grants) -> int:
    """Refuse this process everything but what is granted. There is no way back.

    Returns:
        The version of Landlock, which says what it could refuse.

    Raises:
        BlockError: the kernel has no Landlock, or there are threads that it would not hold for.
        OSError: a rule can't be made; nothing has changed then.
    """
    abi = version()
    if not abi:
        raise BlockError("this kernel has no Landlock, or it is off (Linux 5.13, lsm=landlock)")
    if others := other_threads():
        raise BlockError(f"there are threads that can't be confined: {', '.join(sorted(others))}")
    files, net, scope = handled(abi)
    if grants.connect:
        # Whoever may connect to servers may do so where they have abstract names, too.
        net, scope = net & ~NetAccess.CONNECT_TCP, scope & ~Scope.ABSTRACT_UNIX_SOCKET
    ruleset = _create(files, net, scope, abi)
    try:
        for path, access in grants.files.items():
            _add(ruleset, path, access & files)
        linux.no_new_privileges()
        linux.syscall(SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return abi


def other_threads() -> list[str]:
    """The names of threads that stay. One that was joined may be seen a moment longer."""
    ends = monotonic() + THREAD_END_S
    while others := [
        name for thread in THREADS.iterdir() if (name := _thread_name(thread)) and thread.name != str(os.getpid())
    ]:
        if monotonic() > ends:
            break
        sleep(0.005)
    return others


def _thread_name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:
        return ""  # it has ended meanwhile


def _create(files: FsAccess, net: NetAccess, scope: Scope, abi: int) -> int:
    # An older kernel refuses a longer structure only if it says something there.
    size = RULESET_ATTR.size if abi >= 6 else 16 if abi >= 4 else 8
    described = RULESET_ATTR.pack(files, net, scope)[:size]
    return linux.syscall(SYS_LANDLOCK_CREATE_RULESET, described, ctypes.c_size_t(size), ctypes.c_uint32(0))


def _add(ruleset: int, path: Path, access: FsAccess) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # then there is nothing to be granted
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= OF_A_FILE
        rule = PATH_BENEATH_ATTR.pack(access, place)
        linux.syscall(
            SYS_LANDLOCK_ADD_RULE,
            ctypes.c_int(ruleset),
            ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH),
            rule,
            ctypes.c_uint32(0),
        )
    except OSError as problem:
        raise OSError(problem.errno, f"Landlock: no rule can be made for {path}: {problem.strerror}") from problem
    finally:
        os.close(place)
