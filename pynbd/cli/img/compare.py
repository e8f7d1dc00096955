"""`pynbd img compare`: whether two images hold the same disk.

The exit status is 0 if they do, 1 if they do not, and more if that can't be told: 2 if an image can't be opened, 3 if
what lies where can't be found out, 4 if a read fails.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from pynbd.cli.img import arguments as common
from pynbd.cli.walk import walk

if TYPE_CHECKING:
    from pynbd.block.extents import ChainExtent
    from pynbd.cli.img.images import Image

FAILED = 2
STATUS_FAILED = 3
READ_FAILED = 4

PIECE_BYTES = 1 << 20
"""What is read of each image at a time."""

SECTOR_BYTES = 512

PROGRESS_STEP = 2.0
"""More than so many percent lie between two numbers of `-p`; it is qemu-img's."""

ZEROES = bytearray(PIECE_BYTES)


class Different(Exception):
    """The images are not alike; the text says in what."""


class Unknown(Exception):
    """It can't be told; the second argument is the exit status."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME1 FILENAME2")
    common.add_image(parser)
    parser.add_argument("-F", dest="second_format", default="", metavar="FORMAT", help="format of FILENAME2")
    common.add_cache(parser, "-T", "cache", "writeback", "both images")
    parser.add_argument("-s", "--strict", action="store_true", help="sizes and allocation must be the same, too")
    common.add_progress(parser)
    common.add_quiet(parser)
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.cli.img.images import open_image
    from pynbd.cli.progress import Progress

    if len(arguments.words) != 2:
        print("pynbd img compare: expected two image file names", file=sys.stderr)
        return 1
    graph = common.new_graph(arguments)
    first_name, second_name = arguments.words
    more = {"cache": arguments.cache, "force_share": arguments.force_share, "image_opts": arguments.image_opts}
    with Progress(wanted=arguments.progress and not arguments.quiet, step=PROGRESS_STEP) as progress:
        async with (
            open_image(graph, first_name, format=arguments.format, **more) as first,
            open_image(graph, second_name, format=arguments.second_format, **more) as second,
        ):
            comparison = Comparison(first, second, arguments)
            with progress.follow(comparison.total, lambda: comparison.done_bytes):
                verdict, status = await comparison.run()
        if not arguments.quiet or status > 1:
            print(verdict, file=sys.stdout if status <= 1 else sys.stderr)
    return status


class Comparison:
    """Two images that are being compared.

    Args:
        first, second: the images.
        arguments: `strict` and `quiet`.
    """

    def __init__(self, first: Image, second: Image, arguments: argparse.Namespace) -> None:
        self.first, self.second = first, second
        self.total = max(first.size, second.size)
        self.done_bytes = 0
        self._strict = arguments.strict
        self._quiet = arguments.quiet

    async def run(self) -> tuple[str, int]:
        """(what is to be told, exit status)."""
        first, second = self.first, self.second
        common_size = min(first.size, second.size)
        try:
            if self._strict and first.size != second.size:
                raise Different("Strict mode: Image size mismatch!")
            async for offset, length, one, other in self._both(common_size):
                await self._compare(offset, length, one, other)
                self.done_bytes = offset + length
            if first.size != second.size:
                if not self._quiet:
                    print("Warning: Image size mismatch!", flush=True)
                await self._rest(first if first.size > second.size else second, common_size)
        except Different as difference:
            return str(difference), 1
        except Unknown as problem:
            return f"pynbd img compare: {problem.args[0]}", problem.args[1]
        return "Images are identical.", 0

    async def _both(self, size: int) -> AsyncIterator[tuple[int, int, ChainExtent, ChainExtent]]:
        """(offset, length, the one's extent, the other's) of ranges where neither changes."""
        ones, others = Extents(self.first, 0, size), Extents(self.second, 0, size)
        offset = 0
        while offset < size:
            one, other = await ones.at(offset), await others.at(offset)
            length = min(ones.end, others.end) - offset
            yield offset, length, one, other
            offset += length

    async def _compare(self, offset: int, length: int, one: ChainExtent, other: ChainExtent) -> None:
        # Whether bytes have a place of their own in a file counts, too: compressed ones are stored in another way.
        if self._strict and (one.status, one.where is None) != (other.status, other.where is None):
            raise Different(f"Strict mode: Offset {offset} block status mismatch!")
        if one.zero and other.zero:
            return
        if one.zero or other.zero:
            await self._expect_zeroes(self.second if one.zero else self.first, offset, length)
            return
        await self._expect_equal(offset, length)

    async def _rest(self, longer: Image, offset: int) -> None:
        """What only one of the images has must be zeroes."""
        extents = Extents(longer, offset, longer.size)
        while offset < longer.size:
            extent = await extents.at(offset)
            if not extent.zero:
                await self._expect_zeroes(longer, offset, extents.end - offset)
            offset = self.done_bytes = extents.end

    async def _expect_zeroes(self, image: Image, offset: int, length: int) -> None:
        buffers = [memoryview(bytearray(min(PIECE_BYTES, length))) for _ in range(2)]
        async for start, (data,) in _read([image], offset, length, [buffers]):
            self.done_bytes = start
            zeroes = memoryview(ZEROES)[: len(data)]
            if not _same(zeroes, data):
                raise Different(f"Content mismatch at offset {start + _first_difference(data, zeroes)}!")

    async def _expect_equal(self, offset: int, length: int) -> None:
        size = min(PIECE_BYTES, length)
        buffers = [[memoryview(bytearray(size)) for _ in range(2)] for _ in range(2)]
        async for start, (one, other) in _read([self.first, self.second], offset, length, buffers):
            self.done_bytes = start
            if not _same(one, other):
                raise Different(f"Content mismatch at offset {start + _first_difference(one, other)}!")


async def _read(
    images: Sequence[Image], offset: int, length: int, buffers: Sequence[Sequence[memoryview]]
) -> AsyncIterator[tuple[int, list[memoryview]]]:
    """(offset, the bytes of each image) of one piece after another; the next one is read meanwhile.

    Args:
        images: what is read.
        offset, length: the range.
        buffers: two for each image.
    """

    async def read(image: Image, start: int, into: memoryview) -> None:
        try:
            await image.read(start, into)
        except OSError as problem:
            raise Unknown(f"{image.name}: {problem.strerror}", READ_FAILED) from problem

    end, number = offset + length, 0
    pending: asyncio.Future[list[None]] | None = None
    before: tuple[int, list[memoryview]] | None = None
    try:
        while offset < end or before is not None:
            following = None
            if pending is not None:
                await pending
                pending = None
            if offset < end:
                size = min(PIECE_BYTES, end - offset)
                parts = [pair[number % 2][:size] for pair in buffers]
                pending = asyncio.gather(
                    *(read(image, offset, part) for image, part in zip(images, parts, strict=True))
                )
                following = (offset, parts)
                number += 1
                offset += size
            if before is not None:
                yield before
            before = following
    finally:
        if pending is not None:
            await asyncio.gather(pending, return_exceptions=True)


def _same(one: memoryview, other: memoryview) -> bool:
    # A bytearray is compared at the speed of memory, with whatever it is compared; a memoryview item by item.
    whole = one.obj if isinstance(one.obj, bytearray) and len(one.obj) == len(one) else bytearray(one)
    return whole == other


def _first_difference(one: memoryview, other: memoryview) -> int:
    """Where the first sector begins that is not the same in both."""
    for start in range(0, len(one), SECTOR_BYTES):
        if bytes(one[start : start + SECTOR_BYTES]) != bytes(other[start : start + SECTOR_BYTES]):
            return start
    raise AssertionError("there is no difference")


class Extents:
    """What lies where in an image, asked about when it is needed.

    Args:
        image: the image.
        start, end: where.
    """

    def __init__(self, image: Image, start: int, end: int) -> None:
        self._image = image
        self._extents = walk(image.block_status, start, end)
        self._last: ChainExtent | None = None
        self.end = start

    async def at(self, offset: int) -> ChainExtent:
        """The extent that a byte lies in; `end` is where it ends. Offsets must not fall.

        Raises:
            Unknown: it could not be found out.
        """
        while self._last is None or self.end <= offset:
            try:
                extent = self._last = await anext(self._extents)
            except OSError as problem:
                raise Unknown(f"{self._image.name}: {problem.strerror}", STATUS_FAILED) from problem
            self.end += extent.length
        return self._last
