"""`pynbd img bench`: how long a number of requests of the same kind take."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.cli.img.images import Image

DEFAULT_COUNT = 75000
DEFAULT_DEPTH = 64
DEFAULT_BUFFER = "4096"
MAX_COUNT = (1 << 31) - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    common.add_cache(parser, "-t", "cache", "writeback", "the image")
    parser.add_argument(
        "-c", "--count", type=common.integer, default=DEFAULT_COUNT, metavar="N", help="requests (%(default)s)"
    )
    parser.add_argument(
        "-d", "--depth", type=common.integer, default=DEFAULT_DEPTH, metavar="N", help="at once (%(default)s)"
    )
    parser.add_argument("-s", "--buffer-size", default=DEFAULT_BUFFER, metavar="SIZE", help="of each (%(default)s)")
    parser.add_argument("-S", "--step-size", metavar="SIZE", help="from one to the next (as the buffer size)")
    parser.add_argument("-o", "--offset", default="0", metavar="OFFSET", help="of the first")
    parser.add_argument("-w", "--write", action="store_true", help="write instead of reading")
    parser.add_argument(
        "--pattern", type=common.integer, default=0, metavar="BYTE", help="what is written (%(default)s)"
    )
    parser.add_argument(
        "--flush-interval", type=common.integer, default=0, metavar="N", help="flush after so many writes"
    )
    parser.add_argument("--no-drain", action="store_true", help="do not wait for all requests before a flush")
    parser.add_argument("-i", "--aio", choices=("threads", "native", "io_uring"), default="threads", help="who reads")
    parser.add_argument("-n", "--native", action="store_true", help="the same as -i native")
    common.add_quiet(parser)
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.errors import BlockError
    from pynbd.cli.img.images import open_image

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    offset, size, step = _sizes(arguments)
    _check(arguments, size, step)
    async with open_image(
        graph,
        filename,
        format=arguments.format,
        image_opts=arguments.image_opts,
        writing=arguments.write,
        cache=arguments.cache,
        force_share=arguments.force_share,
    ) as image:
        room = image.node.size if arguments.write else image.size
        if arguments.count and (size > room or offset >= room):
            raise BlockError(f"{filename}: a request of {size} bytes at {offset} does not fit into a disk of {room}")
        _announce(arguments, offset, size, step)
        bench = Bench(image, arguments, offset, size, step)
        started = asyncio.get_running_loop().time()
        await bench.run()
        seconds = asyncio.get_running_loop().time() - started
        print(f"Run completed in {seconds:3.3f} seconds.")
    return 0


def _sizes(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """(offset, bytes of a request, bytes from one to the next)."""
    from pynbd.block.options import parse_size

    size = parse_size(arguments.buffer_size, what="-s")
    step = parse_size(arguments.step_size, what="-S") if arguments.step_size is not None else 0
    return parse_size(arguments.offset, what="-o"), size, step or size


def _check(arguments: argparse.Namespace, size: int, step: int) -> None:
    from pynbd.block.errors import OptionError

    is_native = arguments.native or arguments.aio == "native"
    is_direct = common.cache_mode(arguments.cache).direct

    for wrong, why in (
        (not 0 <= arguments.count <= MAX_COUNT, f"-c: {arguments.count} is not in 0 to {MAX_COUNT}"),
        (not 1 <= arguments.depth <= MAX_COUNT, f"-d: {arguments.depth} is not in 1 to {MAX_COUNT}"),
        (not 1 <= size <= MAX_COUNT, f"-s: {size} is not in 1 to {MAX_COUNT}"),
        (not 0 <= step <= MAX_COUNT, f"-S: {step} is not in 0 to {MAX_COUNT}"),
        (is_native and not is_direct, "-i native needs a cache mode that goes around the page cache: -t none"),
        (not 0 <= arguments.pattern <= 255, f"--pattern: {arguments.pattern} is no byte"),
        (arguments.flush_interval < 0, f"--flush-interval: {arguments.flush_interval} is negative"),
        (arguments.flush_interval and not arguments.write, "--flush-interval is for writes only (-w)"),
        (
            arguments.flush_interval and arguments.flush_interval < arguments.depth,
            f"--flush-interval: {arguments.flush_interval} is less than the {arguments.depth} requests at once",
        ),
    ):
        if wrong:
            raise OptionError(why)


def _announce(arguments: argparse.Namespace, offset: int, size: int, step: int) -> None:
    print(
        f"Sending {arguments.count} {'write' if arguments.write else 'read'} requests, {size} bytes each, "
        f"{arguments.depth} in parallel (starting at offset {offset}, step size {step})"
    )
    if arguments.flush_interval:
        print(f"Sending flush every {arguments.flush_interval} requests", flush=True)


class Bench:
    """One run.

    Args:
        image: what is read or written.
        arguments: the rest.
        offset, size, step: in bytes.
    """

    def __init__(self, image: Image, arguments: argparse.Namespace, offset: int, size: int, step: int) -> None:
        self._image = image
        self._left = arguments.count
        self._depth = arguments.depth
        self._writes = arguments.write
        self._pattern = arguments.pattern
        self._flush_interval = arguments.flush_interval
        self._drains = not arguments.no_drain
        self._offset, self._size, self._step = offset, size, step
        self._begun = 0

    async def run(self) -> None:
        """Send all requests.

        Raises:
            OSError: one failed.
        """
        if self._flush_interval and self._drains:
            while self._left:
                batch = min(self._left, self._flush_interval)
                await self._send(batch)
                await self._image.backend.flush()
            return
        await self._send(self._left)

    async def _send(self, count: int) -> None:
        """Send so many requests, and wait for all of them."""
        self._stop_at = self._left - count
        results = await asyncio.gather(*(self._work() for _ in range(min(self._depth, count))), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _work(self) -> None:
        buffer = memoryview(bytearray((self._pattern,)) * self._size)
        backend = self._image.backend
        while self._left > self._stop_at:
            self._left -= 1
            self._begun += 1
            number, offset = self._begun, self._next_offset()
            if self._writes:
                await backend.write(offset, buffer)
                if self._flush_interval and not self._drains and number % self._flush_interval == 0:
                    await backend.flush()
            else:
                await self._image.read(offset, buffer)

    def _next_offset(self) -> int:
        """Where the next request goes: behind the end the disk begins anew, and also where one would not fit."""
        size = self._image.node.size if self._writes else self._image.size
        offset = self._offset
        if offset + self._size > size:
            offset = 0
        self._offset = (self._offset + self._step) % size
        return offset
