"""`null` (QEMU's `null-co` and `null-aio`): a disk that swallows what is written and reads as zeroes.

Limits: what is written is lost at once.
"""

import asyncio
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from pynbd.block.driver import Driver, Location, Preallocation
from pynbd.block.errors import OptionError
from pynbd.block.extents import Extent, Status
from pynbd.block.options import NodeOptions, OnOff, Size
from pynbd.block.requests import RequestFlag

FUA = int(RequestFlag.FUA)

DEFAULT_SIZE_BYTES = 1 << 30
"""As QEMU's."""


class NullOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `null`.

    Args:
        size: the length of the disk in bytes.
        latency_ns: how long a request takes, in nanoseconds.
        read_zeroes: whether block status promises that the disk reads as zeroes.
    """

    size: Size = DEFAULT_SIZE_BYTES
    latency_ns: Size = 0
    read_zeroes: OnOff = False


class Null(Driver):
    """A disk that holds nothing."""

    name = "null"
    schemes: ClassVar[tuple[str, ...]] = ("null-co", "null-aio")
    Options = NullOptions
    zero_past_end = True
    several_processes = "always"
    write_flags = FUA
    write_zeroes_flags = FUA

    options: NullOptions

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        if not filename.endswith("://") or filename.count(":") > 1:
            raise OptionError(f"{filename}: a null disk is named null-co:// or null-aio://, and nothing else")
        return {}

    def filename(self) -> str:
        options = self.options
        usual = options.size == DEFAULT_SIZE_BYTES and not options.read_zeroes and not options.latency_ns
        return "null-co://" if usual else ""

    @classmethod
    async def create(
        cls, options: NodeOptions, size: int, preallocation: Preallocation, further: msgspec.Struct | None = None
    ) -> Sequence[str]:
        raise OptionError("driver 'null' can't make new images: there is nothing to keep")

    async def open(self) -> None:
        self.size = self.options.size
        self._latency_s = self.options.latency_ns / 1e9
        self._zero = -1 if self._latency_s else os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)

    async def close(self) -> None:
        if self._zero >= 0:
            os.close(self._zero)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        # Filled even without `read-zeroes`: what was in the buffer before is nobody's business.
        into[:] = bytes(len(into))

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def discard(self, offset: int, length: int) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def flush_to_disk(self) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        status = Status.ZERO if self.options.read_zeroes else Status.DATA
        return (Extent(length, status | Status.ALLOCATED, self.node, offset),)

    def locate(self, offset: int, length: int) -> Location | None:
        return None if self._latency_s else Location(self._zero, offset, length, 0)

    def located_for_good(self) -> bool:
        return True

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        self.size = size

    async def allocated_size(self) -> int | None:
        return 0

    def has_zero_init(self) -> bool:
        return True
