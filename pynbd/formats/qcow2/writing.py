"""Everything that changes what the guest sees: writes, zeroes and discards.

Those who only write into clusters that the image owns go side by side. Who changes an L2 entry waits for all others on
its cluster, and they for him; the entry changes in one piece, when the data are where it is going to point to.
"""

import asyncio
import errno
from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down, round_up
from pynbd.block.errors import io_error, unsupported
from pynbd.block.requests import RequestFlag, RequestTracker, TrackedRequest
from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_ALL_ZERO,
    ZERO,
)
from pynbd.formats.qcow2.mapping import NOWHERE, ZEROES
from pynbd.formats.qcow2.refcounts import Run

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2

MAY_UNMAP, NO_FALLBACK = int(RequestFlag.MAY_UNMAP), int(RequestFlag.NO_FALLBACK)

GIVEN_UP_BYTES = 1 << 20
"""So much that the guest has discarded is given back to the file at once."""

ZERO_PIECE_BYTES = 1 << 20
"""Zeroes that are written as data at a time."""


class Writer:
    """What the driver does for requests that change the disk.

    Args:
        driver: the driver.
    """

    def __init__(self, driver: "Qcow2") -> None:
        self.driver = driver
        self.image = driver.image
        self.map = driver.map
        self.cluster = driver.map.cluster
        self.unit = driver.map.unit
        self.guest_file = driver.guest_file
        self.has_data_file = driver.header.has_data_file
        self.requests = RequestTracker()
        self._packing = asyncio.Lock()
        self._pack_at = self._pack_end = 0
        """Where the next compressed cluster may go: behind the last one, in the same host cluster."""

    # --- who waits for whom --------------------------------------------------------------------------------

    def track(self, offset: int, end: int, *, exclusive: bool) -> TrackedRequest:
        """A request on all clusters that [offset, end) touches."""
        start = round_down(offset, self.cluster)
        return self.requests.track(start, round_up(end, self.cluster) - start, serialising=exclusive)

    def _is_changing(self, offset: int, end: int) -> bool:
        """Whether somebody is at work on what the tables say of these bytes' clusters, or waits to be."""
        return any(
            request.serialising and request.offset < end and offset < request.end for request in self.requests.in_flight
        )

    def _check_inside(self, offset: int, end: int) -> None:
        # The block layer has looked before; but while this request waited, the disk may have been made shorter.
        if end > self.driver.size:
            raise io_error(
                errno.ENOSPC, self.driver.node.name, f"write at {offset} up to {end}, size {self.driver.size}"
            )

    # --- in place ------------------------------------------------------------------------------------------

    def _hits_metadata(self, host: int, length: int) -> bool:
        """Whether bytes of the file that an entry calls data belong to the image's own structures."""
        if self.has_data_file:
            return False
        bits, metadata = self.map.bits, self.image.metadata
        first, last = host >> bits, (host + length - 1) >> bits
        if first == last:
            return first in metadata
        return any(cluster in metadata for cluster in range(first, last + 1))

    def write_now(self, offset: int, data: memoryview) -> bool:
        """See `Driver.write_now`."""
        length = len(data)
        if self.driver.encryption is not None or self.image.fence is not None:
            return False
        host = self.map.owned_host_of(offset, length)
        if not host:
            return self._allocate_now(offset, data)
        if host >> self.map.bits in self.image.metadata and not self.has_data_file:
            return False
        if self.requests.in_flight and self._is_changing(offset, offset + length):
            return False
        return self.guest_file.write_now(host, data)

    def _allocate_now(self, offset: int, data: memoryview) -> bool:
        """Take a cluster for a write, if nothing has to be waited for: where nothing was, and nothing lies below."""
        cluster, image = self.cluster, self.image
        base = offset - offset % cluster
        if self.map.extended or self.has_data_file or offset + len(data) > base + cluster or image.is_full:
            return False
        l1_index = offset // self.map.reach
        table = image.l2.get(l1_index)
        if table is None or not image.l1[l1_index] & COPIED:
            return False
        index = offset >> self.map.bits & self.map.index_mask
        entry = table.words[index]
        if entry & ~self.map.zero_flag or not (entry or self._is_nothing_below(base)):
            return False
        for request in self.requests.in_flight:
            if request.offset < base + cluster and base < request.end:
                return False
        host = image.allocate_now()
        if not host:
            return False
        if not self.guest_file.write_now(host + offset - base, data):
            image.refcounts.put_back(host >> self.map.bits)
            return False
        table.words[index] = host | COPIED
        image.l2.mark(l1_index, index, index + 1)
        return True

    async def _is_own(self, offset: int, end: int) -> bool:
        """Whether all of a range may be written in place."""
        while offset < end:
            piece = await self.map.piece(offset, end)
            if not piece.own:
                return False
            offset = piece.stop
        return True

    async def _write_in_place(self, offset: int, data: memoryview) -> None:
        start, end = offset, offset + len(data)
        while start < end:
            piece = await self.map.piece(start, end)
            await self.write_host(piece.host, start, data[start - offset : piece.stop - offset])
            start = piece.stop

    async def write_host(self, host: int, offset: int, data: memoryview) -> None:
        """Write bytes of the disk (which are at `offset` there) where they lie in the file."""
        if self._hits_metadata(host, len(data)):
            what = "guest data are about to be written over the image's own structures"
            raise await self.image.corrupted(what, host, writing=True)
        if self.driver.encryption is not None:
            data = await self.driver.encryption.encrypted(offset, host, data)
        self.driver.file.node.driver.debug_event("write_aio")
        await self.guest_file.write(host, data, 0)

    # --- writing -------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """Put data on the disk."""
        end = offset + len(data)
        if not data:
            return
        self.image.check_fence()
        if await self._is_own(offset, end):
            async with self.track(offset, end, exclusive=False):
                self._check_inside(offset, end)
                if await self._is_own(offset, end):  # nobody has discarded it meanwhile
                    await self._write_in_place(offset, data)
                    return
        async with self.track(offset, end, exclusive=True):
            self._check_inside(offset, end)
            await self._write_alone(offset, data)

    async def _write_alone(self, offset: int, data: memoryview) -> None:
        """Write where nobody else is at work, and take clusters as needed."""
        start, end = offset, offset + len(data)
        while start < end:
            piece = await self.map.piece(start, end)
            if piece.own:
                await self.write_host(piece.host, start, data[start - offset : piece.stop - offset])
                start = piece.stop
                continue
            stop = await self._end_of_foreign(piece.stop, min(end, round_down(start, self.map.reach) + self.map.reach))
            start = await self._allocate(start, data[start - offset : stop - offset])

    async def _end_of_foreign(self, offset: int, end: int) -> int:
        """Where the bytes end that can't be written in place."""
        while offset < end:
            piece = await self.map.piece(offset, end)
            if piece.own:
                break
            offset = piece.stop
        return offset

    async def _allocate(self, offset: int, data: memoryview) -> int:
        """Write into clusters that must be taken first, or completed; all of them belong to one L2 table.

        Returns:
            up to where it was written: free clusters that follow each other may be few.
        """
        end, cluster = offset + len(data), self.cluster
        first, last = offset // cluster, (end - 1) // cluster + 1
        entry, _ = await self.map.entry(offset)
        self.driver.file.node.driver.debug_event("cluster_alloc")
        if entry & COPIED and not entry & COMPRESSED:
            # It has a place already, whose bytes are not (all) in use.
            stop = min(end, (first + 1) * cluster)
            await self._fill(offset, data[: stop - offset], entry & OFFSET_MASK, fresh=False, owned=True)
            return stop
        count = 1
        while first + count < last and not await self._has_place(first + count):
            count += 1
        if self.has_data_file:
            host, fresh, run = first * cluster, False, Run(0, 0)
        else:
            run, fresh = await self.image.allocate(count)
            host, count = run.first << self.map.bits, run.clusters
        stop = min(end, (first + count) * cluster)
        try:
            await self._fill(offset, data[: stop - offset], host, fresh=fresh, owned=False)
        except BaseException:
            if run.clusters:
                await self.image.release(run)
            raise
        return stop

    async def _has_place(self, cluster: int) -> bool:
        entry, _ = await self.map.entry(cluster * self.cluster)
        return bool(entry & COPIED) and not entry & COMPRESSED

    async def _fill(self, offset: int, data: memoryview, host: int, *, fresh: bool, owned: bool) -> None:
        """Write data into host clusters with what the disk holds around it, then let the entries point there.

        Args:
            offset, data: where on the disk, and what.
            host: the place of the cluster that `offset` lies in.
            fresh: that place reads as zeroes.
            owned: it is the cluster's place already.
        """
        unit, cluster, end = self.unit, self.cluster, offset + len(data)
        base = round_down(offset, cluster)
        low, high = round_down(offset, unit), round_up(end, unit)
        if self.map.extended and not owned:
            low, high = await self._with_old_units(low, high)
        # A data file has the length of the disk, which may end within a cluster.
        top = min(high, self.driver.size) if self.has_data_file else high
        if low == offset and top == end:
            await self.write_host(host + low - base, low, data)
        else:
            around = await self._around(low, offset, end, top)
            if around is None and fresh and self.driver.encryption is None:
                await self.write_host(host + offset - base, offset, data)
            else:
                whole = around or bytearray(top - low)
                whole[offset - low : end - low] = data
                self.driver.file.node.driver.debug_event("cow_write")
                await self.write_host(host + low - base, low, memoryview(whole))
        await self.point(low, high, host, owned=owned)

    async def _with_old_units(self, low: int, high: int) -> tuple[int, int]:
        """A range made wider, so that no subcluster of a shared cluster is left behind."""
        for at, is_first in ((low, True), (high - 1, False)):
            entry, bitmap = await self.map.entry(at)
            allocated = bitmap & 0xFFFF_FFFF
            base = round_down(at, self.cluster)
            if entry & COMPRESSED:
                low, high = (base, high) if is_first else (low, base + self.cluster)
            elif allocated:
                first, last = (allocated & -allocated).bit_length() - 1, allocated.bit_length()
                if is_first:
                    low = min(low, base + first * self.unit)
                if not is_first or high <= base + self.cluster:
                    high = max(high, base + last * self.unit)
        return low, high

    async def _around(self, low: int, offset: int, end: int, high: int) -> bytearray | None:
        """What the disk holds in [low, offset) and [end, high), in a buffer of the whole range; None if only zeroes."""
        found: bytearray | None = None
        for start, stop in ((low, offset), (end, high)):
            stop = min(stop, self.driver.size)
            while start < stop:
                piece = await self.map.piece(start, stop)
                if not (piece.kind == ZEROES or (piece.kind == NOWHERE and self._is_nothing_below(start))):
                    if found is None:
                        found = bytearray(high - low)
                    self.driver.file.node.driver.debug_event("cow_read")
                    into = memoryview(found)[start - low : piece.stop - low]
                    await self.driver.read_piece(start, piece, into)
                start = piece.stop
        return found

    def _is_nothing_below(self, offset: int) -> bool:
        """Whether there are no bytes of a backing file from here on."""
        backing = self.driver.node.children.get("backing")
        return backing is None or offset >= backing.size

    async def point(self, low: int, high: int, host: int, *, owned: bool) -> None:
        """Let the entries of the clusters in [low, high) point to host clusters, whose data were written."""
        cluster, words_each = self.cluster, self.map.words
        first, last = low // cluster, -(-high // cluster)
        table, at = await self.map.writable(low)
        words, l1_index = table.words, low // self.map.reach
        for number in range(first, last):
            index = at + (number - first) * words_each
            place = host + (number - first) * cluster
            old = words[index]
            words[index] = place | COPIED
            if self.map.extended:
                start, stop = max(low, number * cluster), min(high, (number + 1) * cluster)
                begin, until = start % cluster // self.unit, (stop - number * cluster) // self.unit
                taken = ((1 << (until - begin)) - 1) << begin
                bitmap = 0 if old & COMPRESSED else words[index + 1]
                kept = bitmap & 0xFFFF_FFFF if owned else 0
                zeroes = bitmap & SUBCLUSTERS_ALL_ZERO & ~(taken << SUBCLUSTERS)
                words[index + 1] = zeroes | kept | taken
            if not owned:
                self._give_up_entry(old)
        self.image.l2.mark(l1_index, at, at + (last - first) * words_each)

    def _give_up_entry(self, entry: int) -> None:
        """What an L2 entry pointed to is not needed by it any more."""
        if entry & COMPRESSED:
            offset, length = self.map.compressed_place(entry)
            self.image.give_up(offset, length)
            self.driver.forget_unpacked()
        elif entry & OFFSET_MASK and not self.has_data_file:
            self.image.give_up(entry & OFFSET_MASK, self.cluster)

    # --- compressed ----------------------------------------------------------------------------------------

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Store whole clusters compressed, those that do not get smaller as they are.

        Raises:
            OSError: EINVAL, it is not a multiple of clusters (the disk's last one may be short).
        """
        self.image.check_fence()
        if self.has_data_file or self.driver.encryption is not None:
            why = "an image with a data file" if self.has_data_file else "an encrypted image"
            raise unsupported(self.driver.node.name, f"compressed clusters in {why}")
        end = offset + len(data)
        if offset % self.cluster or (end % self.cluster and end != self.driver.size):
            what = f"compressed write at {offset} for {len(data)} bytes, clusters have {self.cluster}"
            raise io_error(errno.EINVAL, self.driver.node.name, what)
        for start in range(offset, end, self.cluster):
            await self._write_packed(start, data[start - offset : start - offset + self.cluster])

    async def _write_packed(self, offset: int, data: memoryview) -> None:
        whole = bytes(data).ljust(self.cluster, b"\0")
        try:
            compress = compression.compressor(self.driver.header.compression_type)
        except compression.CompressionError as problem:
            raise unsupported(self.driver.node.name, str(problem)) from None
        packed = await asyncio.get_running_loop().run_in_executor(None, compress, whole)
        if len(packed) >= self.cluster:
            await self.write(offset, data)
            return
        async with self.track(offset, offset + len(data), exclusive=True):
            self._check_inside(offset, offset + len(data))
            place = await self._place_packed(len(packed))
            try:
                if self._hits_metadata(place, len(packed)):
                    what = "compressed data are about to be written over the image's own structures"
                    raise await self.image.corrupted(what, place, writing=True)
                self.driver.file.node.driver.debug_event("write_compressed")
                await self.guest_file.write(place, memoryview(packed), 0)
            except BaseException:
                # Its clusters may be shared with others already: this reference is one too many.
                first = place >> self.map.bits
                last = (place + len(packed) - 1) >> self.map.bits
                await self.image.release(Run(first, last - first + 1))
                raise
            table, at = await self.map.writable(offset)
            old = table.words[at]
            self.map.put(table.words, at, self.map.compressed_entry(place, len(packed)), 0)
            self.image.l2.mark(offset // self.map.reach, at, at + self.map.words)
            self._give_up_entry(old)

    async def _place_packed(self, length: int) -> int:
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

    # --- zeroes --------------------------------------------------------------------------------------------

    def _whole_units(self, offset: int, end: int) -> tuple[int, int]:
        """[first, last): the bytes of all units that lie wholly in a range; the disk's last one may be short."""
        first = round_up(offset, self.unit)
        last = round_up(end, self.unit) if end >= self.driver.size else round_down(end, self.unit)
        return first, max(first, last)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Let a range read as zeroes."""
        end = offset + length
        self.image.check_fence()
        async with self.track(offset, end, exclusive=True):
            self._check_inside(offset, end)
            if self.driver.header.version < 3 and "backing" in self.driver.node.children:
                raise unsupported(self.driver.node.name, "zeroes over a backing file in an image of compat 0.10")
            await self.zero_alone(offset, end, flags)

    async def zero_alone(self, offset: int, end: int, flags: int = 0) -> None:
        """`write_zeroes` where nobody else is at work."""
        length = end - offset
        first, last = self._whole_units(offset, end)
        if self.driver.header.version < 3 and "backing" in self.driver.node.children:
            first = last = offset
            parts = [(offset, end)]
        else:
            first, last, parts = await self._with_parts(offset, end, first, last)
        parts += await self._packed_in_part(first, last)
        if flags & NO_FALLBACK and parts:
            raise unsupported(self.driver.node.name, f"zeroes at {offset} for {length} bytes take writes of data")
        for start, stop in parts:
            await self.zeroes_as_data(start, stop)
        if first < last:
            await self._zero_units(first, last, unmap=bool(flags & MAY_UNMAP))
        if self.driver.header.data_file_raw:
            await self.guest_file.write_zeroes(offset, length, flags & MAY_UNMAP)

    async def _with_parts(self, offset: int, end: int, first: int, last: int) -> tuple[int, int, list[tuple[int, int]]]:
        """What is to be done with a range whose whole units are [first, last).

        Returns:
            (first, last, parts): the same, with the units at either end that are covered in part, but read as zeroes
            elsewhere; and the parts of the others.
        """
        if first >= last:
            first = last = min(round_up(offset, self.unit), end)
        parts = []
        if offset < first:
            if await self._is_zero_around(offset, first):
                first = round_down(offset, self.unit)
                last = max(last, round_up(first + 1, self.unit))
            else:
                parts.append((offset, first))
        if last < end:
            if await self._is_zero_around(last, end):
                first, last = (first if first < last else last), last + self.unit
            else:
                parts.append((last, end))
        return first, last, parts

    async def _is_zero_around(self, offset: int, end: int) -> bool:
        """Whether the unit that a range lies in holds no data, and reads as zeroes before and behind the range."""
        base = round_down(offset, self.unit)
        stop = min(base + self.unit, self.driver.size)
        piece = await self.map.piece(offset, end)
        if piece.kind == ZEROES:
            return True
        return (
            piece.kind == NOWHERE and await self._is_zero_below(base, offset) and await self._is_zero_below(end, stop)
        )

    async def _is_zero_below(self, offset: int, end: int) -> bool:
        """Whether a range of the backing file is known to read as zeroes."""
        backing = self.driver.node.children.get("backing")
        end = min(end, backing.size if backing is not None else 0)
        while backing is not None and offset < end:
            for extent in await backing.node.block_status(offset, end - offset):
                if not extent.zero:
                    return False
                offset += extent.length
        return True

    async def zeroes_as_data(self, offset: int, end: int) -> None:
        """Write zeroes, where nobody else is at work."""
        zeroes = memoryview(bytes(min(end - offset, ZERO_PIECE_BYTES)))
        while offset < end:
            stop = min(end, offset + len(zeroes))
            await self._write_alone(offset, zeroes[: stop - offset])
            offset = stop

    async def _packed_in_part(self, first: int, last: int) -> list[tuple[int, int]]:
        """Units of compressed clusters that are not covered whole: only data can be written there."""
        if not self.map.extended or first >= last:
            return []
        found = []
        for base in {round_down(first, self.cluster), round_down(last - 1, self.cluster)}:
            start, stop = max(first, base), min(last, base + self.cluster)
            entry, _ = await self.map.entry(base)
            if entry & COMPRESSED and stop - start < self.cluster:
                found.append((start, min(stop, self.driver.size)))
        return found

    async def _zero_units(self, first: int, last: int, *, unmap: bool) -> None:
        """Let whole units read as zeroes."""
        while first < last:
            stop = min(last, round_down(first, self.cluster) + self.cluster)
            if stop - first < self.cluster and self.map.extended:
                await self._zero_subclusters(first, stop)
            else:
                await self._zero_cluster(first, unmap=unmap)
            first = stop

    async def _zero_cluster(self, offset: int, *, unmap: bool) -> None:
        entry, _ = await self.map.entry(offset)
        keep = bool(entry & OFFSET_MASK or (self.has_data_file and entry)) and not unmap and not entry & COMPRESSED
        # Also where nothing lies below: the image may come to lie over something else.
        if self.driver.header.version < 3:
            await self._set_entry(offset, 0, 0, give_up=True)
        elif self.map.extended:
            await self._set_entry(offset, entry if keep else 0, SUBCLUSTERS_ALL_ZERO, give_up=not keep)
        else:
            await self._set_entry(offset, entry | ZERO if keep else ZERO, 0, give_up=not keep)

    async def _zero_subclusters(self, first: int, last: int) -> None:
        entry, bitmap = await self.map.entry(first)
        if entry & COMPRESSED:
            return  # written as data
        begin, until = first % self.cluster // self.unit, (last - 1) % self.cluster // self.unit + 1
        bits = ((1 << (until - begin)) - 1) << begin
        await self._set_entry(first, entry, bitmap & ~bits | bits << SUBCLUSTERS, give_up=False)

    async def _set_entry(self, offset: int, entry: int, bitmap: int, *, give_up: bool) -> None:
        """Change the entry of one cluster, on which nobody else is at work."""
        if await self.map.entry(offset) == (entry, bitmap):
            return
        table, at = await self.map.writable(offset)
        old = table.words[at]
        self.map.put(table.words, at, entry, bitmap)
        self.image.l2.mark(offset // self.map.reach, at, at + self.map.words)
        if give_up:
            self._give_up_entry(old)

    # --- discard -------------------------------------------------------------------------------------------

    async def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed: whole clusters are given up and read as zeroes."""
        end = min(offset + length, self.driver.size)
        self.image.check_fence()
        if self.driver.header.version < 3 and "backing" in self.driver.node.children:
            raise unsupported(self.driver.node.name, "discard over a backing file in an image of compat 0.10")
        async with self.track(offset, end, exclusive=True):
            self._check_inside(offset, end)
            first = round_up(offset, self.cluster)
            last = round_up(end, self.cluster) if end == self.driver.size else round_down(end, self.cluster)
            for start in range(first, last, self.cluster):
                await self._discard_cluster(start)
            if self.has_data_file and first < last:
                stop = min(last, end)
                if self.driver.header.data_file_raw:
                    await self.guest_file.write_zeroes(first, stop - first, MAY_UNMAP)
                else:
                    await self.guest_file.discard(first, stop - first)
        # Who discards much wants the space back now, not at some later flush.
        if self.image.discard_freed and self.image.given_up_bytes >= GIVEN_UP_BYTES:
            await self.image.commit()

    async def _discard_cluster(self, offset: int) -> None:
        entry, bitmap = await self.map.entry(offset)
        if not entry and not bitmap and "backing" not in self.driver.node.children:
            return
        if self.map.extended:
            await self._set_entry(offset, 0, SUBCLUSTERS_ALL_ZERO, give_up=True)
        else:
            await self._set_entry(offset, ZERO if self.driver.header.version >= 3 else 0, 0, give_up=True)

    async def forget(self, first: int, last: int) -> None:
        """Clusters [first, last) (bytes) hold nothing any more: the backing file shows through."""
        for start in range(first, last, self.cluster):
            await self._set_entry(start, 0, 0, give_up=True)
