"""The state of a machine, kept beside the disk: at the disk's offsets behind what its L1 table needs (section
"Snapshots", Size of the VM state). A snapshot keeps it with the disk; without one it is lost when the next is taken.
"""

import errno
from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down
from pynbd.block.errors import io_error, unsupported
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.active_l1 import grow_l1
from pynbd.formats.qcow2.mapping import NOWHERE, ZEROES

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2

CLUSTERS_AT_ONCE = 16


class VmState:
    """The state that belongs to what the disk holds now.

    Args:
        driver: the image's.
    """

    def __init__(self, driver: "Qcow2") -> None:
        self.driver = driver
        self.image = driver.image
        self.map = driver.map
        self.length = 0
        """Bytes that were saved and that no snapshot keeps yet."""

    @property
    def offset(self) -> int:
        """Where it begins, in bytes of the disk."""
        return self.image.header.l1_entries_for(self.image.header.size) * self.map.reach

    async def save(self, offset: int, data: memoryview) -> None:
        """Write into the state; see `VmStates.save_vmstate`."""
        driver = self.driver
        if driver.node.read_only:
            raise io_error(errno.EROFS, driver.node.name, "a machine's state")
        if driver.header.has_data_file:
            raise unsupported(driver.node.name, "a machine's state in an image with a data file")
        self.image.check_fence()
        start, end = self.offset + offset, self.offset + offset + len(data)
        await self._make_room(end)
        async with driver.writer.track(start, end, exclusive=True):
            at = start
            while at < end:
                at = await self._write_some(at, data[at - start :])
        self.length = max(self.length, offset + len(data))
        driver.node.touch()

    async def _make_room(self, end: int) -> None:
        """Let the L1 table reach to a byte of the disk."""
        entries = -(-end // self.map.reach)
        if entries <= len(self.image.l1):
            return
        if entries * 8 > layout.MAX_L1_BYTES:
            raise io_error(errno.EFBIG, self.driver.node.name, f"a machine's state up to {end - self.offset}")
        # Some more, so that it is not to be done again for each piece of a state that grows.
        await grow_l1(self.image, min(entries + entries // 8, layout.MAX_L1_BYTES // 8))

    async def _write_some(self, offset: int, data: memoryview) -> int:
        """Write the first part of some data, as far as one slice of an L2 table tells of it; gives where it ends."""
        cluster, writer = self.map.cluster, self.driver.writer
        low = round_down(offset, cluster)
        most = min(low + CLUSTERS_AT_ONCE * cluster, round_down(offset, self.map.slice_reach) + self.map.slice_reach)
        end = min(offset + len(data), most)
        piece = await self.map.piece(offset, end)
        if piece.own:
            await self._write_in_place(offset, data[: piece.stop - offset], piece.host)
            return piece.stop
        # Whole clusters: with what they hold already, of which nothing comes from a backing file.
        high = -(-end // cluster) * cluster
        run, _ = await self.image.allocate((high - low) // cluster)
        high = low + run.clusters * cluster
        end = min(end, high)
        try:
            whole = bytearray(high - low)
            for edge in {low, high - cluster}:
                await self._read(edge, memoryview(whole)[edge - low : edge - low + cluster])
            whole[offset - low : end - low] = data[: end - offset]
            await writer.write_host(run.first << self.map.bits, low, memoryview(whole))
        except BaseException:
            await self.image.release(run)
            raise
        await writer.point(low, high, run.first << self.map.bits, owned=False)
        return end

    async def _write_in_place(self, offset: int, data: memoryview, host: int) -> None:
        low, high = self._whole_sectors(offset, offset + len(data))
        whole = bytearray(high - low) if high - low > len(data) else None
        if whole is not None:
            await self._read(low, memoryview(whole))
            whole[offset - low : offset - low + len(data)] = data
        await self.driver.writer.write_host(host - (offset - low), low, data if whole is None else memoryview(whole))

    def _whole_sectors(self, offset: int, end: int) -> tuple[int, int]:
        """A range made wider to what can be read and written by itself: whole sectors, if they are encrypted."""
        unit = 1 if self.driver.encryption is None else layout.COMPRESSED_SECTOR
        return round_down(offset, unit), -(-end // unit) * unit

    async def load(self, offset: int, into: memoryview) -> None:
        """Read from the state; see `VmStates.load_vmstate`."""
        start = self.offset + offset
        low, high = self._whole_sectors(start, start + len(into))
        if high - low == len(into):
            await self._read(start, into)
            return
        whole = bytearray(high - low)
        await self._read(low, memoryview(whole))
        into[:] = whole[start - low : start - low + len(into)]

    async def _read(self, offset: int, into: memoryview) -> None:
        start, end = offset, offset + len(into)
        known = min(end, len(self.image.l1) * self.map.reach)
        while start < known:
            epoch = self.image.given_up.begin_read()
            try:
                piece = await self.map.piece(start, known)
                part = into[start - offset : piece.stop - offset]
                if piece.kind in (NOWHERE, ZEROES):
                    part[:] = bytes(len(part))
                else:
                    await self.driver.read_piece(start, piece, part)
            finally:
                self.image.given_up.end_read(epoch)
            start = piece.stop
        if start < end:
            into[start - offset :] = bytes(end - start)
