"""Small reads without a thread: Linux's io_uring (io_uring_setup(2), Linux 5.6).

What is not in the page cache has to come from the disk. A thread that waits for it costs two wake-ups and a quarrel
over the interpreter's lock, for every few requests. Here the reads of one turn of the event loop are handed to the
kernel by one call, and what has arrived is collected by none: both sides look at a ring in shared memory. The bytes are
copied into their buffer by this thread all the same, so that large reads are better made by others.

`ReadRing` is the `ReadQueue` of drivers for files.
"""

import asyncio
import ctypes
import errno
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from pynbd.storage import linux

ENTRIES: Final = 64
"""Reads of one file that the kernel has at a time; more wait for their turn."""

SYS_SETUP: Final = 425
SYS_ENTER: Final = 426
"""The same on all architectures, as all calls since Linux 5.1."""

SETUP_COOP_TASKRUN: Final = 1 << 8
"""Linux 5.19: what has arrived is copied when this thread calls the kernel anyway, instead of by interrupting it."""

FEATURE_SINGLE_MMAP: Final = 1
OFFSET_SQES: Final = 0x10000000

WORD: Final = 0xFFFFFFFF
"""Positions in the rings are counted on and on, in 32 bits."""

OPCODE_READ: Final = 22
PARAMS: Final = struct.Struct("=7I12x8IQ8IQ")
"""struct io_uring_params: entries of both rings, flags, processor, idle, features, fd; then where what lies in each."""

SQE: Final = struct.Struct("=BBHiQQIIQ24x")
"""struct io_uring_sqe: opcode, flags, priority, fd, offset, address, length, flags of the call, tag."""

CQE: Final = struct.Struct("=QiI")
"""struct io_uring_cqe: tag, result, flags."""


class ReadRing:
    """Reads of one open file, on one event loop.

    Args:
        fd: the open file; it stays its owner's.

    Raises:
        OSError: the kernel has no io_uring, or does not let this process have it (many containers forbid it).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        params = ctypes.create_string_buffer(PARAMS.size)
        self._ring = self._setup(params)
        try:
            told = PARAMS.unpack(params)
            self._map(*told[:2], features=told[5], submission=told[7:15], completion=told[16:24])
        except BaseException:
            os.close(self._ring)
            raise
        self._waiting: dict[int, tuple[Callable[[int], None], memoryview]] = {}
        self._prepared: deque[tuple[int, int, memoryview]] = deque()
        self._last = 0
        self._due = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring, self._reap)

    @staticmethod
    def _setup(params: "ctypes.Array[ctypes.c_char]") -> int:
        for flags in (SETUP_COOP_TASKRUN, 0):
            PARAMS.pack_into(params, 0, *[0] * 2, flags, *[0] * 22)
            try:
                return linux.syscall(SYS_SETUP, ctypes.c_uint(ENTRIES), params)
            except OSError as problem:
                if problem.errno != errno.EINVAL or not flags:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _map(
        self, entries: int, completions: int, *, features: int, submission: tuple[int, ...], completion: tuple[int, ...]
    ) -> None:
        if not features & FEATURE_SINGLE_MMAP:
            raise OSError(errno.ENOSYS, "io_uring of a Linux before 5.4")
        head, tail, mask, _, _, _, array, _ = submission
        completion_head, completion_tail, completion_mask, _, _, cqes, _, _ = completion
        size = max(array + 4 * entries, cqes + CQE.size * completions)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._rings = mmap.mmap(self._ring, size, mmap.MAP_SHARED, access)
        self._sqes = mmap.mmap(self._ring, entries * SQE.size, mmap.MAP_SHARED, access, offset=OFFSET_SQES)
        # Words of 32 bits are read and written whole through this view, as the other side expects.
        self._words = words = memoryview(self._rings).cast("I")
        self._head, self._tail = head // 4, tail // 4
        self._completion_head, self._completion_tail = completion_head // 4, completion_tail // 4
        self._mask, self._completion_mask, self._cqes = words[mask // 4], words[completion_mask // 4], cqes
        assert words[head // 4] == words[tail // 4] == 0
        for slot in range(entries):
            words[array // 4 + slot] = slot

    def read(self, offset: int, into: memoryview) -> "asyncio.Future[int]":
        """Read into a buffer, which is the kernel's until this is done: how many bytes there were.

        Raises:
            OSError: what the file said.
        """
        done: asyncio.Future[int] = self._loop.create_future()

        def ended(result: int) -> None:
            if done.cancelled():
                pass  # whoever asked is gone; the buffer was kept for the kernel until now
            elif result < 0:
                done.set_exception(OSError(-result, os.strerror(-result)))
            else:
                done.set_result(result)

        self.put(offset, into, ended)
        if not self._due:
            self._due = True
            self._loop.call_soon(self._submit)
        return done

    def put(self, offset: int, into: memoryview, ended: Callable[[int], None]) -> None:
        """As `ReadQueue`."""
        self._last = tag = self._last + 1
        self._waiting[tag] = (ended, into)
        self._prepared.append((tag, offset, into))

    def submit(self) -> None:
        """As `ReadQueue`."""
        self._submit()
        self._reap()

    def _submit(self) -> None:
        """Hand over what this turn has prepared, as far as the kernel's ring has room."""
        self._due = False
        prepared, words, sqes, mask = self._prepared, self._words, self._sqes, self._mask
        count = min(len(prepared), ENTRIES - (len(self._waiting) - len(prepared)))
        if count <= 0:
            return
        tail = words[self._tail]
        for slot in range(tail, tail + count):
            tag, offset, into = prepared.popleft()
            length = len(into)
            address = ctypes.addressof(ctypes.c_char.from_buffer(into))
            SQE.pack_into(sqes, (slot & mask) * SQE.size, OPCODE_READ, 0, 0, self._fd, offset, address, length, 0, tag)
        words[self._tail] = (tail + count) & WORD
        self._enter()

    def _enter(self) -> None:
        words = self._words
        while count := (words[self._tail] - words[self._head]) & WORD:
            try:
                linux.syscall(
                    SYS_ENTER, ctypes.c_int(self._ring), ctypes.c_uint(count), ctypes.c_uint(0), ctypes.c_uint(0), None
                )
            except OSError as problem:
                if problem.errno in (errno.EAGAIN, errno.EINTR, errno.EBUSY):
                    # No memory at the moment, or answers that nobody has collected: both go by.
                    self._loop.call_soon(self._reap)
                    self._loop.call_soon(self._enter)
                    return
                self._take_back(problem)

    def _take_back(self, problem: OSError) -> None:
        """The kernel takes no more: what it has not taken has failed."""
        words = self._words
        head, tail = words[self._head], words[self._tail]
        words[self._tail] = head
        for slot in range(head, head + ((tail - head) & WORD)):
            tag = SQE.unpack_from(self._sqes, (slot & self._mask) * SQE.size)[-1]
            self._waiting.pop(tag)[0](-(problem.errno or errno.EIO))

    def _reap(self) -> None:
        """Tell those whose reads have ended."""
        words, rings, cqes, mask = self._words, self._rings, self._cqes, self._completion_mask
        head, tail = words[self._completion_head], words[self._completion_tail]
        while head != tail:
            tag, result, _ = CQE.unpack_from(rings, cqes + (head & mask) * CQE.size)
            head = (head + 1) & WORD
            words[self._completion_head] = head
            ended, _ = self._waiting.pop(tag)
            ended(result)
            if head == tail:
                tail = words[self._completion_tail]
        if self._prepared and not self._due:
            self._submit()

    def close(self) -> None:
        """Give the kernel's part back. Nothing is under way."""
        assert not self._waiting, f"{len(self._waiting)} reads are under way"
        self._loop.remove_reader(self._ring)
        self._words.release()
        self._rings.close()
        self._sqes.close()
        os.close(self._ring)
