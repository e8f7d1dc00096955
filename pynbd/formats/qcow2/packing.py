"""Writing clusters compressed: one behind the other, host clusters shared by several."""

import asyncio
import errno
import functools
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pynbd.block.alignment import pieces
from pynbd.block.errors import io_error, unsupported
from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.refcounts import Run

if TYPE_CHECKING:
    from pynbd.formats.qcow2.writing import Writer


class Packing:
    """What the driver does for compressed writes.

    Args:
        writer: the driver's.
    """

    def __init__(self, writer: "Writer") -> None:
        self.writer = writer
        self.driver = writer.driver
        self.image = writer.image
        self.map = writer.map
        self.cluster = writer.cluster
        self._packing = asyncio.Lock()
        self._pack_at = self._pack_end = 0
        """Where the next compressed cluster may go: behind the last one, in the same host cluster."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Store whole clusters compressed, those that do not get smaller as they are.

        Raises:
            OSError: EINVAL, it is not a multiple of clusters (the disk's last one may be short).
        """
        self.image.check_fence()
        if self.writer.has_data_file or self.driver.encryption is not None:
            why = "an image with a data file" if self.writer.has_data_file else "an encrypted image"
            raise unsupported(self.driver.node.name, f"compressed clusters in {why}")
        end = offset + len(data)
        if offset % self.cluster or (end % self.cluster and end != self.driver.size):
            what = f"compressed write at {offset} for {len(data)} bytes, clusters have {self.cluster}"
            raise io_error(errno.EINVAL, self.driver.node.name, what)
        try:
            compress = compression.compressor(self.driver.header.compression_type)
        except compression.CompressionError as problem:
            raise unsupported(self.driver.node.name, str(problem)) from None
        for start, length in pieces(offset, len(data), max(compression.BATCH_BYTES, self.cluster), self.cluster):
            await self._write_batch(start, data[start - offset : start - offset + length], compress)

    async def _write_batch(self, offset: int, data: memoryview, compress: compression.Compress) -> None:
        """Some clusters: those beside one another that get smaller are stored together, as are those that do not."""
        clusters = [data[start : start + self.cluster] for start in range(0, len(data), self.cluster)]
        packed = await compression.in_threads(functools.partial(_compress_all, compress, self.cluster), clusters)
        first = 0
        for smaller, group in groupby(packed, lambda found: len(found) < self.cluster):
            found = list(group)
            start, first = first * self.cluster, first + len(found)
            part = data[start : first * self.cluster]
            if smaller:
                await self._store(offset + start, len(part), found)
            else:
                await self.writer.write(offset + start, part)

    async def _store(self, offset: int, length: int, packed: Sequence[bytes]) -> None:
        """Write compressed clusters, and let their entries point there.

        Args:
            offset, length: where on the disk they are.
            packed: what each became.
        """
        async with self.writer.track(offset, offset + length, exclusive=True):
            self.writer.check_inside(offset, offset + length)
            places: list[int] = []
            pointed = 0
            try:
                async with self._packing:
                    for found in packed:
                        places.append(await self._place(len(found)))  # noqa: PERF401  # those before a failure count
                await self._write_packed(places, packed)
                for place, found in zip(places, packed, strict=True):
                    table, at = await self.map.writable(offset)
                    old = table.words[at]
                    self.map.put(table.words, at, self.map.compressed_entry(place, len(found)), 0)
                    self.map.mark(offset, at, at + self.map.words)
                    pointed += 1
                    self.writer.give_up_entry(old, Cause.OTHER)
                    offset += self.cluster
            except BaseException:
                # Their clusters may be shared with others already: these references are too many.
                for place, found in list(zip(places, packed, strict=False))[pointed:]:
                    first, last = place >> self.map.bits, (place + len(found) - 1) >> self.map.bits
                    await self.image.release(Run(first, last - first + 1))
                raise

    async def _write_packed(self, places: Sequence[int], packed: Sequence[bytes]) -> None:
        """Write compressed data, those that follow one another at once."""
        first = 0
        for number in range(1, len(places) + 1):
            if number < len(places) and places[number] == places[number - 1] + len(packed[number - 1]):
                continue
            joined = b"".join(packed[first:number])
            await self.writer.check_overlap(places[first], len(joined), "compressed data")
            self.driver.file.node.driver.debug_event("write_compressed")
            await self.writer.guest_file.write(places[first], memoryview(joined), 0)
            first = number

    async def _place(self, length: int) -> int:
        """Take `length` bytes for compressed data: behind the last ones, if there is room.

        Each host cluster that they touch gets a reference. Who calls it holds `_packing`.
        """
        bits, counts = self.map.bits, self.image.refcounts
        shared = await self._may_share()
        if not shared or self._pack_end - self._pack_at < length:
            run, _ = await self.image.allocate(1)
            # If the next cluster follows, data may lie across.
            shared = await self._may_share() and run.first << bits == self._pack_end
            counts.packing, self._pack_end = run.first, (run.first + 1) << bits
            if not shared:
                self._pack_at = run.first << bits
        place, self._pack_at = self._pack_at, self._pack_at + length
        if shared:
            await counts.change(place >> bits, 1, 1)
        return place

    async def _may_share(self) -> bool:
        """Whether compressed data lie in the cluster before `_pack_end`, and it may have another reference."""
        counts = self.image.refcounts
        cluster = (self._pack_end >> self.map.bits) - 1
        if counts.packing != cluster or self._pack_at in (self._pack_end, cluster << self.map.bits):
            return False
        return 0 < await counts.get(cluster) < counts.most


def _compress_all(compress: compression.Compress, cluster: int, parts: Sequence[memoryview]) -> list[bytes]:
    """What becomes of each cluster, the disk's last one made whole; runs in a thread."""
    return [compress(part if len(part) == cluster else bytes(part).ljust(cluster, b"\0")) for part in parts]
