"""When a file's bytes are on stable storage, and what it means that they could not be brought there."""

import errno
import os
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from pynbd.block import pool
from pynbd.storage.in_place import SLOW_FLUSH_S, InPlace, keeps_others_waiting

if TYPE_CHECKING:
    from pynbd.storage import aio

FEW_FLUSHES = 8
"""Flushes that are made in threads first: giving back what the kernel's queue takes costs tens of milliseconds, which
is no price for a server, but for a command that flushes once."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Flushing:
    """The flushes of one open file, and its durable writes.

    Once a flush has failed, all later ones do. The kernel reports a failed write-back once, marks the pages clean and
    may drop them: a flush that is tried again would succeed, and what was written would be lost all the same. Only who
    opens the file again starts from what is really there. With O_DIRECT there are no such pages.

    Args:
        fd: the file.
        direct: whether it was opened with O_DIRECT.
        failed: makes the error that callers get of the kernel's.
    """

    def __init__(self, fd: int, *, direct: bool, failed: Callable[[OSError], OSError]) -> None:
        self._fd = fd
        self._direct = direct
        self._failed = failed
        self._error: OSError | None = None
        self._has_dsync = True
        self._in_place = InPlace()
        self._queue: aio.FlushQueue | None = None
        self._in_threads = False
        self._few = 0

    def close(self) -> None:
        """Give back what the kernel holds for this. No flush is under way any more."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    async def flush(self) -> None:
        """Come back when all that was written is on stable storage.

        Raises:
            OSError: it is not, now or since an earlier flush.
        """
        if self._error is not None:
            raise self._error
        started = perf_counter()
        if started >= self._in_place.paused_until and not keeps_others_waiting():
            self._sync()
            ended = perf_counter()
            if ended - started > SLOW_FLUSH_S:
                self._in_place.was_slow(ended)
        elif not await self._sync_in_kernel():
            await pool.run(pool.syncs, self._sync)

    def write(self, write: Callable[[int], None]) -> None:
        """Write, and come back when that is on stable storage. In a thread.

        Args:
            write: writes, with flags of pwritev2.

        Raises:
            OSError: it is not, now or since an earlier flush.
        """
        if self._error is not None:
            raise self._error
        if self._has_dsync:
            try:
                write(os.RWF_DSYNC)
            except OSError as problem:
                if problem.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    if problem.errno in NO_ROOM:
                        write(0)  # fails as before, if it was the write; if not, it was the flush that is a part of it
                    self._remember(problem)
                    raise
                self._has_dsync = False
            else:
                return
        write(0)
        self._sync()

    async def _sync_in_kernel(self) -> bool:
        """Flush without a thread; False if the kernel can't."""
        if self._in_threads:
            return False
        if self._few < FEW_FLUSHES:
            self._few += 1
            return False
        try:
            if self._queue is None:
                from pynbd.storage import aio

                self._queue = aio.FlushQueue(self._fd)
            await self._queue.fdatasync()
        except OSError as problem:
            if problem.errno in (errno.EAGAIN, errno.EINVAL, errno.ENOSYS, errno.EPERM):
                self._in_threads = True
                return False
            raise self._remember(self._failed(problem)) from problem
        return True

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as problem:
            raise self._remember(self._failed(problem)) from problem

    def _remember(self, problem: OSError) -> OSError:
        if not self._direct:
            self._error = problem
        return problem
