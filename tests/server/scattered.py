"""A storage driver for tests whose clusters lie anywhere in its file, as those of an image do. Named by its file."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pynbd.block.driver import Driver, Location
from pynbd.block.errors import io_error
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions, Size

SCATTERED = str(Path(__file__).resolve())
"""What to write for `driver`."""


class ScatteredOptions(NodeOptions, frozen=True, kw_only=True):
    """The options: `size` in bytes, and how long a cluster is."""

    size: Size = 4 << 20
    cluster: Size = 64 << 10


class Scattered(Driver):
    """Random bytes, in a file whose clusters are in no order."""

    Options = ScatteredOptions
    options: ScatteredOptions

    async def open(self) -> None:
        self.size, self.cluster = self.options.size, self.options.cluster
        self.content = bytearray(random.Random(self.size).randbytes(self.size))
        self.order = list(range(self.size // self.cluster))
        random.Random(2).shuffle(self.order)
        self.fd = os.memfd_create("scattered")
        os.ftruncate(self.fd, self.size)
        for number, place in enumerate(self.order):
            start = number * self.cluster
            os.pwrite(self.fd, self.content[start : start + self.cluster], place * self.cluster)
        self.elsewhere: set[int] = set()
        """Clusters that are not to be located."""
        self.fails = False
        self.on_locate: Callable[[int], None] | None = None
        self.located = 0
        self.read_bytes = 0

    async def close(self) -> None:
        os.close(self.fd)

    def locate(self, offset: int, length: int) -> Location | None:
        if self.on_locate is not None:
            self.on_locate(offset)
        number, within = divmod(offset, self.cluster)
        if number in self.elsewhere:
            return None
        self.located += 1
        place = self.order[number] * self.cluster + within
        return Location(self.fd, place, min(length, self.cluster - within), 0)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        if self.fails:
            raise io_error(5, self.node.name, "it was to fail")
        self.read_bytes += len(into)
        into[:] = self.content[offset : offset + len(into)]

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        raise AssertionError("it is only read")


def scattered(node: Node) -> Scattered:
    """The driver of a node."""
    return cast("Scattered", node.driver)
