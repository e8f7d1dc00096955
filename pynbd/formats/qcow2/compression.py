"""Compressed clusters: raw deflate with a window of 4 KiB, or one zstd frame (section "Compressed Clusters")."""

import asyncio
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from pynbd.formats.qcow2.layout import CompressionType

WINDOW_BITS = -12
"""Raw deflate with a window of 2¹² bytes."""

MEMORY_LEVEL = 9

BATCH_BYTES = 4 << 20
"""How much of the disk is compressed or decompressed at once, if clusters are not longer."""

IGZIP_LEVEL = 2
"""Of 0 to 3. What comes out is up to a tenth longer than zlib's, in a tenth of the time; 3 is slower, for 1 % less."""


T = TypeVar("T")
R = TypeVar("R")


class CompressionError(Exception):
    """The bytes are not what compression of a cluster gives; the text says why."""


Decompress = Callable[[bytes | bytearray | memoryview, int], bytes]
Compress = Callable[[bytes | memoryview], bytes]


def inflate_by(library: Any) -> Decompress:
    """The function that gives a cluster from raw deflate data, which may be followed by anything.

    Args:
        library: zlib, or what has the same functions.
    """

    def inflate(data: bytes | bytearray | memoryview, length: int) -> bytes:
        stream = library.decompressobj(WINDOW_BITS)
        try:
            found: bytes = stream.decompress(data, length)
        except library.error as problem:
            raise CompressionError(str(problem)) from None
        return _whole(found, length)

    return inflate


@cache
def _inflate() -> Decompress:
    """By the quickest library: the package isal, if it is there."""
    try:
        from isal import isal_zlib
    except ImportError:
        return inflate_by(zlib)
    return inflate_by(isal_zlib)


def deflate(data: bytes | memoryview) -> bytes:
    """Raw deflate data of a cluster, by zlib."""
    stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL)
    return stream.compress(data) + stream.flush()


@cache
def _deflate() -> Compress:
    """The quickest function that makes raw deflate data: of the package isal, if it is there."""
    try:
        from isal import igzip_lib
    except ImportError:
        return deflate

    def compress(data: bytes | memoryview) -> bytes:
        return igzip_lib.compress(
            data, IGZIP_LEVEL, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_DEFAULT, hist_bits=-WINDOW_BITS
        )

    return compress


@cache
def _zstd() -> tuple[Decompress, Compress]:
    """(decompress, compress), from Python's own module (3.14) or its backport.

    Raises:
        CompressionError: neither is there.
    """
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            from backports import zstd  # type: ignore[import-not-found, unused-ignore, no-redef]
        except ImportError:
            raise CompressionError("zstd needs the package backports.zstd: pip install 'pynbd[zstd]'") from None

    def decompress(data: bytes | bytearray | memoryview, length: int) -> bytes:
        try:
            return _whole(zstd.ZstdDecompressor().decompress(data, length), length)
        except zstd.ZstdError as problem:
            raise CompressionError(str(problem)) from None

    threads = threading.local()

    def compress(data: bytes | memoryview) -> bytes:
        # A new compressor for each cluster would take a fifth more time: each thread keeps its own.
        compressor = getattr(threads, "compressor", None)
        if compressor is None:
            compressor = threads.compressor = zstd.ZstdCompressor()
        return bytes(compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME))

    return decompress, compress


def _whole(found: bytes, length: int) -> bytes:
    if len(found) != length:
        raise CompressionError(f"{len(found)} bytes came out, expected {length}")
    return found


def decompressor(kind: CompressionType) -> Decompress:
    """The function that gives a cluster of a length from its compressed bytes; it may run in any thread.

    Raises:
        CompressionError: a library is missing.
    """
    return _inflate() if kind == CompressionType.ZLIB else _zstd()[0]


def compressor(kind: CompressionType) -> Compress:
    """The function that compresses a cluster; it may run in any thread.

    Raises:
        CompressionError: a library is missing.
    """
    return _deflate() if kind == CompressionType.ZLIB else _zstd()[1]


def processors() -> int:
    """How many processors there are for this process."""
    return len(os.sched_getaffinity(0))


async def in_threads(function: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """What a function makes of items, in their order: as many threads are at it as there are processors.

    Args:
        function: is given some of them, and holds no lock of the interpreter most of the time.
        items: all of them.

    Raises:
        Exception: what `function` raised. Other threads may still be at work then.
    """
    loop = asyncio.get_running_loop()
    each = max(-(-len(items) // processors()), 1)
    shares = (items[first : first + each] for first in range(0, len(items), each))
    done = await asyncio.gather(*(loop.run_in_executor(None, function, share) for share in shares))
    return [one for share in done for one in share]
