"""Writing clusters compressed: one behind the other, host clusters shared by several."""

import asyncio
import errno
from typing import TYPE_CHECKING

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
        for start in range(offset, end, self.cluster):
            await self._write_cluster(start, data[start - offset : start - offset + self.cluster])

    async def _write_cluster(self, offset: int, data: memoryview) -> None:
        whole = bytes(data).ljust(self.cluster, b"\0")
        try:
            compress = compression.compressor(self.driver.header.compression_type)
        except compression.CompressionError as problem:
            raise unsupported(self.driver.node.name, str(problem)) from None
        packed = await asyncio.get_running_loop().run_in_executor(None, compress, whole)
        if len(packed) >= self.cluster:
            await self.writer.write(offset, data)
            return
        async with self.writer.track(offset, offset + len(data), exclusive=True):
            self.writer.check_inside(offset, offset + len(data))
            place = await self._place(len(packed))
            try:
                await self.writer.check_overlap(place, len(packed), "compressed data")
                self.driver.file.node.driver.debug_event("write_compressed")
                await self.writer.guest_file.write(place, memoryview(packed), 0)
            except BaseException:
                # Its clusters may be shared with others already: this reference is one too many.
                first = place >> self.map.bits
                last = (place + len(packed) - 1) >> self.map.bits
                await self.image.release(Run(first, last - first + 1))
                raise
            table, at = await self.map.writable(offset)
            old = table.words[at]
            self.map.put(table.words, at, self.map.compressed_entry(place, len(packed)), 0)
            self.map.mark(offset, at, at + self.map.words)
            self.writer.give_up_entry(old, Cause.OTHER)

    async def _place(self, length: int) -> int:
        """Take `length` bytes for compressed data: behind the last ones, if there is room.

        Each host cluster that they touch gets a reference.
        """
        async with self._packing:
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
