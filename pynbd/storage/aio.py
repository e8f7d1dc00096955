"""Flushes without a thread: Linux's asynchronous I/O (io_submit(2), `IOCB_CMD_FDSYNC`, Linux 4.18).

A thread that waits for `fdatasync` costs two wake-ups and a quarrel over the interpreter's lock, which is more than a
flush of a fast disk takes. Here the kernel's own worker waits, and tells the event loop through an eventfd.
"""

import asyncio
import ctypes
import errno
import os
import platform
import struct
from typing import Final, NamedTuple

from pynbd.storage import linux

MAX_EVENTS: Final = 8
"""Flushes of one file under way at a time: the block layer merges them, so that one or two are usual."""

IOCB_CMD_FDSYNC: Final = 3
IOCB_FLAG_RESFD: Final = 1

IOCB: Final = struct.Struct("=QIIHhIQQqQII")
"""struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved, flags, resfd."""

IO_EVENT: Final = struct.Struct("=QQqq")
"""struct io_event: data, obj, res, res2."""


class CallNumbers(NamedTuple):
    """The numbers of the system calls, which differ between architectures."""

    setup: int
    destroy: int
    getevents: int
    submit: int


CALL_NUMBERS: Final = {"x86_64": CallNumbers(206, 207, 208, 209), "aarch64": CallNumbers(0, 1, 4, 2)}

_calls = CALL_NUMBERS.get(platform.machine())


class FlushQueue:
    """Flushes of one open file, on one event loop.

    Args:
        fd: the open file; it stays its owner's.

    Raises:
        OSError: the kernel has no asynchronous I/O, or no more of it to give. Flush in a thread then.
    """

    def __init__(self, fd: int) -> None:
        if _calls is None:
            raise OSError(errno.ENOSYS, f"asynchronous I/O on {platform.machine()}")
        self._fd = fd
        self._calls = _calls
        self._context = ctypes.c_ulong(0)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        self._events = ctypes.create_string_buffer(IO_EVENT.size * MAX_EVENTS)
        linux.syscall(self._calls.setup, ctypes.c_uint(MAX_EVENTS), ctypes.byref(self._context))
        try:
            self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:
            linux.syscall(self._calls.destroy, self._context)
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._eventfd, self._reap)

    async def fdatasync(self) -> None:
        """As `os.fdatasync`.

        Raises:
            OSError: EAGAIN or EINVAL if it could not be begun (too many at a time, or the file system has none);
                everything else is the flush's own failure.
        """
        self._last = tag = self._last + 1
        block = ctypes.create_string_buffer(
            IOCB.pack(tag, 0, 0, IOCB_CMD_FDSYNC, 0, self._fd, 0, 0, 0, 0, IOCB_FLAG_RESFD, self._eventfd), IOCB.size
        )
        blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        self._waiting[tag] = done = self._loop.create_future()
        try:
            linux.syscall(self._calls.submit, self._context, ctypes.c_long(1), blocks)
        except OSError:
            del self._waiting[tag]
            raise
        await done

    def _reap(self) -> None:
        """Tell those whose flushes have ended."""
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return
        # The kernel's ring holds more than was asked for: what is left in it would not be told of again.
        while count := self._take_events():
            self._tell(count)

    def _take_events(self) -> int:
        at_once = ctypes.create_string_buffer(16)  # a struct timespec of no time
        return linux.syscall(
            self._calls.getevents, self._context, ctypes.c_long(0), ctypes.c_long(MAX_EVENTS), self._events, at_once
        )

    def _tell(self, count: int) -> None:
        for number in range(count):
            tag, _, result, _ = IO_EVENT.unpack_from(self._events, number * IO_EVENT.size)
            done = self._waiting.pop(tag)
            if done.cancelled():
                continue
            if result < 0:
                done.set_exception(OSError(-result, os.strerror(-result)))
            else:
                done.set_result(None)

    def close(self) -> None:
        """Give the kernel's part back. Nothing is under way."""
        assert not self._waiting, f"{len(self._waiting)} flushes are under way"
        self._loop.remove_reader(self._eventfd)
        os.close(self._eventfd)
        linux.syscall(self._calls.destroy, self._context)
