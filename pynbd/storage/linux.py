"""Linux system calls that `os` lacks: fallocate modes, block device ioctls, OFD locks, statfs, statx, cachestat.

Everything here is a thin typed wrapper: it raises `OSError` with the errno and does not retry, except after EINTR.
Names of numbers are the kernel's, so that they can be searched for.
"""

import errno
import fcntl
import os
import struct
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import ctypes

assert sys.platform == "linux", "pynbd's storage needs Linux"

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

BLKROGET: Final = 0x125E
BLKSSZGET: Final = 0x1268
BLKDISCARD: Final = 0x1277
BLKZEROOUT: Final = 0x127F
BLKGETSIZE64: Final = 0x80081272

SIOCOUTQ: Final = 0x5411

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_NOCOW_FL: Final = 0x00800000
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820
FS_XFLAG_EXTSIZE: Final = 0x00000800

TMPFS_MAGIC: Final = 0x01021994
RAMFS_MAGIC: Final = 0x858458F6
HUGETLBFS_MAGIC: Final = 0x958458F6
MEMORY_FILE_SYSTEMS: Final = frozenset({TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC})

AT_EMPTY_PATH: Final = 0x1000
STATX_DIOALIGN: Final = 0x2000

PR_SET_NO_NEW_PRIVS: Final = 38

SYS_CACHESTAT: Final = 451
"""The number of cachestat(2), which is the same on every architecture (Linux 6.5)."""


class _Libc:
    """The functions of the C library, or None for those that it lacks."""

    def __init__(self) -> None:
        # Imported here, and not at all where none of this is needed: a small command is done in little more time.
        import ctypes

        self._ctypes = ctypes
        self._library = ctypes.CDLL(None, use_errno=True)
        number, off = ctypes.c_int, ctypes.c_int64
        # On 64-bit systems off_t has 64 bits anyway; on others the plain name takes 32.
        self.fallocate = self._function("fallocate64", number, number, off, off) or self._function(
            "fallocate", number, number, off, off
        )
        self.fstatfs = self._function("fstatfs", number, ctypes.c_void_p)
        self.statx = self._function("statx", number, ctypes.c_char_p, number, ctypes.c_uint, ctypes.c_void_p)
        self.prctl = self._library.prctl
        self.prctl.restype = ctypes.c_int
        self.syscall = self._library.syscall
        self.syscall.restype = ctypes.c_long

    def _function(self, name: str, *arguments: type) -> "ctypes._FuncPointer | None":
        function = getattr(self._library, name, None)
        if function is not None:
            function.argtypes = arguments
            function.restype = self._ctypes.c_int
        return function

    def buffer(self, length: int) -> "ctypes.Array[ctypes.c_char]":
        """Memory that the kernel fills."""
        return self._ctypes.create_string_buffer(length)

    def words(self, count: int) -> "ctypes.Array[ctypes.c_uint64]":
        """Memory of so many words of 64 bits."""
        return (self._ctypes.c_uint64 * count)()

    def integers(self, *values: int) -> "tuple[ctypes.c_long, ...]":
        """Arguments of a system call."""
        return tuple(map(self._ctypes.c_long, values))

    def errno(self) -> int:
        """Why the last call has failed."""
        return self._ctypes.get_errno()

    def failed(self) -> OSError:
        """The same as an error to raise."""
        code = self.errno()
        return OSError(code, os.strerror(code))


@cache
def _libc() -> _Libc:
    return _Libc()


def syscall(number: int, *arguments: object) -> int:
    """A system call that has no function in the C library, by its number; the arguments are ctypes'.

    Raises:
        OSError: it failed.
    """
    libc = _libc()
    result = int(libc.syscall(*libc.integers(number), *arguments))
    if result < 0:
        raise libc.failed()
    return result


def no_new_privileges() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS): no program that this thread or its children start has more rights than it.

    Raises:
        OSError: the kernel does not know that (Linux 3.5).
    """
    libc = _libc()
    if libc.prctl(*libc.integers(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) != 0:
        raise libc.failed()


def unfetched_bytes(fd: int) -> int:
    """What has been sent through a Unix socket, and not been received by its peer, in bytes of kernel memory (unix(7)).

    Raises:
        OSError: it is no socket.
    """
    return int.from_bytes(fcntl.ioctl(fd, SIOCOUTQ, bytes(4)), sys.byteorder)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): reserve, zero or punch out `length` bytes (over 0) at `offset`.

    Raises:
        OSError: EOPNOTSUPP or ENOSYS where the file system lacks the mode; nothing was changed then.
    """
    libc = _libc()
    if libc.fallocate is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while libc.fallocate(fd, mode, offset, length) != 0:
        problem = libc.failed()
        if problem.errno != errno.EINTR:
            raise problem


def file_system_magic(fd: int) -> int:
    """The `f_type` of the file system that an open file lies on, as in <linux/magic.h>."""
    libc = _libc()
    buffer = libc.buffer(256)
    if libc.fstatfs is None or libc.fstatfs(fd, buffer) != 0:
        raise libc.failed()
    return int(struct.unpack_from("l", buffer.raw)[0]) & 0xFFFFFFFF


def nowait_flags(fd: int) -> int | None:
    """The flags with which `preadv` of a file never waits for a disk.

    Returns:
        0 on file systems that live in memory, `RWF_NOWAIT` where the file takes it, None if there are none.
    """
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return os.RWF_NOWAIT  # it is understood: this byte is not in the page cache
    except OSError as problem:
        if problem.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return 0 if file_system_magic(fd) in MEMORY_FILE_SYSTEMS else None
        return os.RWF_NOWAIT  # a bad sector, for example: whoever reads it will be told
    return os.RWF_NOWAIT


# --- attributes of files ---------------------------------------------------------------------------------------

_FSXATTR = "5I8x"
"""struct fsxattr: flags, extent size hint, number of extents, project, hint for copies on write."""


def set_no_copy_on_write(fd: int) -> None:
    """FS_NOCOW_FL: an empty file is written in place from now on (btrfs).

    Raises:
        OSError: the file system does not know that.
    """
    # The kernel reads and writes an int here, whatever the numbers say.
    flags = int(struct.unpack("i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4)))[0])
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("i", flags | FS_NOCOW_FL))


def set_extent_size_hint(fd: int, size_bytes: int) -> None:
    """FS_XFLAG_EXTSIZE: an empty file gets its space in pieces of that many bytes (XFS).

    Raises:
        OSError: the file system does not know that, or not of this size.
    """
    attributes = bytearray(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(struct.calcsize(_FSXATTR))))
    flags = struct.unpack_from("I", attributes)[0]
    struct.pack_into("2I", attributes, 0, flags | FS_XFLAG_EXTSIZE, size_bytes)
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, bytes(attributes))


# --- block devices -----------------------------------------------------------------------------------------


def _ioctl_number(fd: int, request: int, form: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(form)))
    return int(struct.unpack(form, answer)[0])


def device_size(fd: int) -> int:
    """The length of a block device in bytes."""
    return _ioctl_number(fd, BLKGETSIZE64, "Q")


def logical_block_size(fd: int) -> int:
    """The bytes of the smallest unit that a block device can address."""
    return _ioctl_number(fd, BLKSSZGET, "i")


def device_is_read_only(fd: int) -> bool:
    """Whether a block device refuses writes."""
    return bool(_ioctl_number(fd, BLKROGET, "i"))


def discard_granularity(fd: int) -> int:
    """The unit in which a block device gives space back, in bytes; 0 if it does not say or can't."""
    number = os.fstat(fd).st_rdev
    from pathlib import Path

    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for folder in (device, device.parent):  # a partition has no queue of its own
        try:
            return int((folder / "queue" / "discard_granularity").read_text())
        except (OSError, ValueError):
            continue
    return 0


def device_discard(fd: int, offset: int, length: int) -> None:
    """BLKDISCARD: the range is no longer needed; multiples of the logical block size."""
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", offset, length))


def device_zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT: make the range read as zeroes, by writing them if need be; multiples of the logical block size."""
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", offset, length))


# --- locks of an open file description ---------------------------------------------------------------------

_FLOCK = "hhqqi0q"
"""struct flock with a 64-bit off_t: type, whence, start, length, pid."""


def _ofd(fd: int, command: int, kind: int, offset: int, length: int) -> int:
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, os.SEEK_SET, offset, length, 0))
    return int(struct.unpack(_FLOCK, answer)[0])


def lock_shared(fd: int, offset: int, length: int = 1) -> None:
    """Take a shared OFD lock without waiting.

    Raises:
        OSError: EAGAIN or EACCES, somebody has an exclusive lock; others where the file system has no locks.
    """
    _ofd(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, offset, length)


def unlock(fd: int, offset: int, length: int = 1) -> None:
    """Give an OFD lock back."""
    _ofd(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, offset, length)


def locked_by_others(fd: int, offset: int, length: int = 1) -> bool:
    """Whether another open file description holds any lock on these bytes."""
    return _ofd(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, offset, length) != fcntl.F_UNLCK


# --- direct I/O, page cache --------------------------------------------------------------------------------


class DirectAlignment(NamedTuple):
    """What direct I/O on a file asks for, in bytes."""

    memory: int
    offset: int


def direct_alignment(fd: int) -> DirectAlignment | None:
    """What the kernel says of direct I/O on a file (statx, Linux 6.1); None if it does not say."""
    libc = _libc()
    buffer = libc.buffer(256)
    if libc.statx is None or libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, buffer) != 0:
        return None
    mask = struct.unpack_from("I", buffer.raw, 0)[0]
    memory, offset = struct.unpack_from("II", buffer.raw, 0x98)
    if not mask & STATX_DIOALIGN or not memory or not offset:
        return None
    return DirectAlignment(memory, offset)


CACHESTAT_WORDS = 5
"""struct cachestat: pages that are cached, dirty, being written, evicted, and evicted lately."""

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
PROBE_BYTES = 128 << 10
"""How much the kernel reads ahead at a time, unless the device says otherwise."""


class _Cachestat(threading.local):
    """cachestat(2), with memory for its arguments that each thread uses again and again."""

    def __init__(self) -> None:
        libc = _libc()
        self._wanted, self._found = libc.words(2), libc.words(CACHESTAT_WORDS)
        self._number, self._none = libc.integers(SYS_CACHESTAT, 0)
        self._syscall = libc.syscall

    def pages(self, fd: int, offset: int, length: int) -> int | None:
        """How many pages of a range are in the page cache; None where the kernel (or the file) can't tell."""
        wanted = self._wanted
        wanted[0], wanted[1] = offset, length
        if self._syscall(self._number, fd, wanted, self._found, self._none) != 0:
            return None
        return int(self._found[0])


@cache
def _cachestat() -> _Cachestat | None:
    """None where there is no such call."""
    if _libc().syscall(*_libc().integers(SYS_CACHESTAT, -1, 0, 0, 0)) and _libc().errno() in (
        errno.ENOSYS,
        errno.EPERM,
    ):
        return None
    return _Cachestat()


def resident_bytes(fd: int, offset: int, length: int) -> int | None:
    """How much of a range is in the page cache.

    Returns:
        `length` if every page that the range touches is there, and less otherwise: what is surely there. None where
        the kernel (or the file) can't tell.
    """
    call = _cachestat()
    cached = call.pages(fd, offset, length) if call is not None else None
    if cached is None:
        return None
    touched = (offset + length - 1) // PAGE_BYTES - offset // PAGE_BYTES + 1
    return max(length - (touched - cached) * PAGE_BYTES, 0)


def readable_at_once(fd: int, offset: int, length: int) -> bool:
    """Whether a range is in the page cache, so that to read it does not wait for the disk.

    Pages that are on their way from the disk count as there; whether they have come, only a read tells that may not
    wait. The kernel fetches them in steps of about `PROBE_BYTES`, so a byte of each step is read. False where the
    kernel (or the file) can't tell.

    Raises:
        OSError: the file can't be read there.
    """
    if resident_bytes(fd, offset, length) != length:
        return False
    byte = (bytearray(1),)
    try:
        for position in (*range(offset, offset + length, PROBE_BYTES), offset + length - 1):
            if not os.preadv(fd, byte, position, os.RWF_NOWAIT):
                return False
    except BlockingIOError:
        return False
    return True
