"""Spans: bytes that are sent straight from a file's pages, with no copy of them in this process."""

import abc
import os
from collections.abc import Callable

from pynbd.block.driver import Location
from pynbd.server.buffers import Buffer
from pynbd.storage import linux


class SpanFile:
    """A file that spans are sent from, and its descriptor for all of them.

    It is a descriptor of its own: the file may be closed, or the node replaced, before a slow client has taken all.
    And it is one: a client that asks for much and takes nothing must not use up the descriptors of the process.

    Args:
        fd: the open file.
        status: which file that is.

    Raises:
        OSError: there are no more descriptors.
    """

    __slots__ = ("_identity", "fd", "spans")

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self._identity = (status.st_dev, status.st_ino)
        self.fd = os.dup(fd)
        self.spans = 0

    def serves(self, status: os.stat_result) -> bool:
        """Whether it is open still, and can serve for another span of this file."""
        return self.spans > 0 and (status.st_dev, status.st_ino) == self._identity

    def release(self) -> None:
        """One span less; with the last one the descriptor is closed."""
        self.spans -= 1
        if not self.spans:
            os.close(self.fd)


def span_file(last: SpanFile | None, fd: int, status: os.stat_result) -> SpanFile:
    """The file that the next span is sent from: that of the last ones, if it is the same and open still.

    Raises:
        OSError: there are no more descriptors.
    """
    return last if last is not None and last.serves(status) else SpanFile(fd, status)


def has_hole(fd: int, offset: int, length: int, status: os.stat_result, *, in_memory: bool) -> bool:
    """Whether part of a range was never written, or was given back: clients are told, and not sent zeroes.

    A file that has all its blocks is not asked: the answer would take the longer, the larger the file is. Those in
    memory look at every page up to the next hole, wherever that is, so they are asked first for the pages in the range.

    Args:
        fd: the file.
        offset, length: the range, in bytes.
        status: of the file.
        in_memory: whether it is one of those whose pages are the file.

    Raises:
        OSError: the file is shorter than that.
    """
    if status.st_blocks * 512 >= status.st_size:
        return False
    if in_memory and linux.resident_bytes(fd, offset, length) == length:
        return False
    return os.lseek(fd, offset, os.SEEK_HOLE) < offset + length


def is_whole(located: Location) -> bool:
    """Whether a range of a file has no hole, and the file is as long as that."""
    fd, offset, length, flags, _ = located
    try:
        return not has_hole(fd, offset, length, os.fstat(fd), in_memory=not flags)
    except OSError:
        return False


class Deferred(abc.ABC):
    """Part of an answer whose bytes are fetched when it is their turn to be sent; its length is how many."""

    __slots__ = ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def release(self) -> None:
        """It is sent, or never will be."""


class FileSpan(Deferred):
    """Bytes that are sent straight from a file's pages, and what is to be sent behind them.

    Args:
        file: the open file; the span is one of its spans until it is released.
        offset: where in it, in bytes.
        length: how many bytes; exactly so many are sent, zeroes if the file fails.
        finish: called when they have left, or are copied, with the error if there was one; gives the end of the reply.
            Raises OSError where the reply can't tell the error: the connection has to end.
    """

    __slots__ = ("file", "finish", "length", "offset")

    def __init__(self, file: SpanFile, offset: int, length: int, finish: Callable[[OSError | None], Buffer]) -> None:
        self.file = file
        file.spans += 1
        self.offset = offset
        self.length = length
        self.finish = finish

    def __len__(self) -> int:
        return self.length

    def release(self) -> None:
        self.file.release()
