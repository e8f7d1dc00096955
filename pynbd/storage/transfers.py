"""Reading and writing open files to the end, whatever the kernel cuts short.

These functions wait for disks: call them in threads.
"""

import errno
import mmap
import os
import threading

from pynbd.block.alignment import BOUNCE_BYTES, pieces

_thread = threading.local()


def read_at(fd: int, into: memoryview, offset: int) -> None:
    """Fill `into` with the bytes of a file at `offset`; zeroes, where the file has ended."""
    done, length = 0, len(into)
    while done < length:
        got = os.preadv(fd, (into[done:],), offset + done)
        if not got:
            into[done:] = bytes(length - done)
            return
        done += got


def write_at(fd: int, data: memoryview, offset: int, flags: int = 0) -> None:
    """Put all of `data` into a file at `offset`.

    Args:
        fd: the file.
        data: the bytes.
        offset: where, in bytes.
        flags: of pwritev2: `RWF_DSYNC`.
    """
    done, length = 0, len(data)
    while done < length:
        done += os.pwritev(fd, (data[done:],), offset + done, flags)


def read_direct(fd: int, into: memoryview, offset: int, alignment: int) -> None:
    """`read_at` of a file that was opened with O_DIRECT.

    The memory is tried as it is first: how far it must be aligned, only the device below knows.

    Args:
        fd: the file.
        into: any memory; its length is a multiple of `alignment`.
        offset: where, in bytes: a multiple of `alignment`.
        alignment: what O_DIRECT asks of lengths and offsets, in bytes.
    """
    for start, size in pieces(offset, len(into), BOUNCE_BYTES):
        part = into[start - offset : start - offset + size]
        try:
            got = os.preadv(fd, (part,), start)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            got = _read_bounced(fd, part, start)
        while got < size:
            if not got or got % alignment:
                part[got:] = bytes(size - got)  # the file has ended inside a block
                break
            more = _read_bounced(fd, part[got:], start + got)
            if not more:
                part[got:] = bytes(size - got)
                break
            got += more


def write_direct(fd: int, data: memoryview, offset: int, flags: int = 0) -> None:
    """`write_at` of a file that was opened with O_DIRECT; lengths and offsets are aligned, memory need not be."""
    for start, size in pieces(offset, len(data), BOUNCE_BYTES):
        part = data[start - offset : start - offset + size]
        try:
            done = os.pwritev(fd, (part,), start, flags)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            done = 0
        if done < size:
            bounce = _bounce(size - done)
            bounce[:] = part[done:]
            write_at(fd, bounce, start + done, flags)


def _read_bounced(fd: int, into: memoryview, offset: int) -> int:
    bounce = _bounce(len(into))
    got = os.preadv(fd, (bounce,), offset)
    into[:got] = bounce[:got]
    return got


def _bounce(length: int) -> memoryview:
    """Memory that begins on a page: at most `BOUNCE_BYTES`, this thread's own until it asks again."""
    whole: memoryview | None = getattr(_thread, "bounce", None)
    if whole is None:
        whole = _thread.bounce = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
    return whole[:length]
