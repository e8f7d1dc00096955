"""Everything that changes what the guest sees: writes here, zeroes and discards in `zeroing.py`, compressed clusters in
`packing.py`.

Those who only write into clusters that the image owns go side by side. Who changes an L2 entry waits for all others on
its cluster, and they for him; the entry changes in one piece, when the data are where it is going to point to.
"""

import errno
from array import array
from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down, round_up
from pynbd.block.data_path import by_nobody
from pynbd.block.driver import Copied, HostWriter, Room
from pynbd.block.errors import io_error
from pynbd.block.ranges import Ranges, end_of, first_bytes, reach, total_bytes, without
from pynbd.block.requests import RequestTracker, TrackedRequest
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    SUBCLUSTERS_ALL_ZERO,
)
from pynbd.formats.qcow2.mapping import NOWHERE, ZEROES
from pynbd.formats.qcow2.packing import Packing
from pynbd.formats.qcow2.refcounts import Run
from pynbd.formats.qcow2.zeroing import Zeroing

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2


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
        self.zeroing = Zeroing(self)
        self.packing = Packing(self)

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

    def check_inside(self, offset: int, end: int) -> None:
        """That a range lies on the disk.

        Raises:
            OSError: ENOSPC, it does not.
        """
        # The block layer has looked before; but while this request waited, the disk may have been made shorter.
        if end > self.driver.size:
            raise io_error(
                errno.ENOSPC, self.driver.node.name, f"write at {offset} up to {end}, size {self.driver.size}"
            )

    # --- in place ------------------------------------------------------------------------------------------

    async def check_overlap(self, host: int, length: int, what: str = "guest data") -> None:
        """That bytes of the file that an entry calls data belong to no structure of the image's own.

        Raises:
            OSError: EIO, they do; the image is corrupt.
        """
        bits = self.map.bits
        found = self.image.metadata.overlap(host >> bits, (host + length - 1) >> bits)
        if found is None or self.has_data_file:
            return
        cluster, kind = found
        problem = f"{what} are about to be written over {kind.text}"
        raise await self.image.corrupted(problem, max(cluster << bits, host), writing=True)

    def write_now(self, offset: int, data: memoryview) -> bool:
        """See `Driver.write_now`."""
        length = len(data)
        if self.driver.encryption is not None or self.image.fence is not None:
            return False
        kinds, bits = self.image.metadata.kinds, self.map.bits
        if host := self.map.owned_host_of(offset, length):
            if not self.has_data_file and host >> bits in kinds:
                return False
        else:
            host = self.map.owned_run_at(offset, length)
            if not host:
                return self._allocate_now(offset, data)
            clusters = range(host >> bits, (host + length - 1 >> bits) + 1)
            if not self.has_data_file and any(cluster in kinds for cluster in clusters):
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
        table = image.l2.get(offset >> self.map.slice_bits)
        if table is None or not image.l1[offset >> self.map.reach_bits] & COPIED:
            return False
        index = offset >> self.map.bits & self.map.index_mask
        entry = table.words[index]
        if entry & ~self.map.zero_flag or not (entry or self.is_nothing_below(base)):
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
        self.map.mark(offset, index, index + 1)
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
        await self.check_overlap(host, len(data))
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
                self.check_inside(offset, end)
                if await self._is_own(offset, end):  # nobody has discarded it meanwhile
                    await self._write_in_place(offset, data)
                    return
        async with self.track(offset, end, exclusive=True):
            self.check_inside(offset, end)
            await self.write_alone(offset, data)

    async def write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        """See `Driver.write_by`: whole clusters that have no place yet get places behind one another."""
        cluster = self.cluster
        start, end = ranges[0][0], end_of(ranges)
        if self.map.extended or self.guest_file.write_by is by_nobody:
            return 0
        if self.has_data_file or self.driver.encryption is not None or self.image.fence is not None:
            return 0
        async with self.track(start, end, exclusive=True):
            self.check_inside(start, end)
            placeless = await self._placeless(ranges)
            if not placeless:
                return 0
            run, fresh = await self.image.allocate(total_bytes(placeless) // cluster)
            try:
                filled, copied = await self._fill_by(run, writer, fresh=fresh)
            except BaseException:
                await self.image.release(run)
                raise
            whole = round_down(filled, cluster)
            await self.image.release_rest(run, whole // cluster, -(-filled // cluster), fresh=fresh)
            first, end = run.first, run.first + whole // cluster
            try:
                for offset, length in first_bytes(without(placeless, copied.left_out), whole):
                    await self.point(offset, offset + length, first << self.map.bits, owned=False)
                    first += length // cluster
            except OSError:
                await self.image.release(Run(first, end - first))  # a table can't be had
                raise
            if whole + total_bytes(copied.left_out) == copied.bytes:
                return copied.bytes
            return reach(copied.left_out, whole)

    async def _placeless(self, ranges: Ranges) -> Ranges:
        """Where the first bytes of some ranges lie that are whole clusters without a place, slice by slice."""
        found: list[tuple[int, int]] = []
        for offset, length in ranges:
            stop = round_down(offset + length, self.cluster)
            at = offset
            while at < stop and not at % self.cluster:
                piece = await self.map.piece(at, stop)
                if piece.kind != NOWHERE:
                    return found
                found.append((at, piece.stop - at))
                at = piece.stop
            if at < offset + length:
                break
        return found

    async def _fill_by(self, run: Run, writer: HostWriter, *, fresh: bool) -> tuple[int, Copied]:
        """(how many bytes of some clusters somebody else has written, which bytes of the ranges these are)."""
        host, length = run.first << self.map.bits, run.clusters << self.map.bits
        await self.check_overlap(host, length)

        copied = Copied(0)

        def filler(room: Room) -> Copied:
            nonlocal copied
            copied = writer(Room(room.fd, room.places, fresh, self.cluster))
            return Copied(copied.bytes - total_bytes(copied.left_out))

        return await self.guest_file.write_by([(host, length)], filler), copied

    async def write_alone(self, offset: int, data: memoryview) -> None:
        """Write where nobody else is at work, and take clusters as needed."""
        start, end = offset, offset + len(data)
        while start < end:
            piece = await self.map.piece(start, end)
            if piece.own:
                await self.write_host(piece.host, start, data[start - offset : piece.stop - offset])
                start = piece.stop
                continue
            reach = self.map.slice_reach
            stop = await self._end_of_foreign(piece.stop, min(end, round_down(start, reach) + reach))
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
        """Write into clusters that must be taken first, or completed; all of them belong to one slice of an L2 table.

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
                if not (piece.kind == ZEROES or (piece.kind == NOWHERE and self.is_nothing_below(start))):
                    if found is None:
                        found = bytearray(high - low)
                    self.driver.file.node.driver.debug_event("cow_read")
                    into = memoryview(found)[start - low : piece.stop - low]
                    await self.driver.read_piece(start, piece, into)
                start = piece.stop
        return found

    def is_nothing_below(self, offset: int) -> bool:
        """Whether there are no bytes of a backing file from here on."""
        backing = self.driver.node.children.get("backing")
        return backing is None or offset >= backing.size

    async def point(self, low: int, high: int, host: int, *, owned: bool) -> None:
        """Let the entries of the clusters in [low, high) point to host clusters, whose data were written."""
        cluster, words_each = self.cluster, self.map.words
        first, last = low // cluster, -(-high // cluster)
        table, at = await self.map.writable(low)
        words = table.words
        if not self.map.extended and not any(words[at : at + last - first]):
            places = range(host | COPIED, (host | COPIED) + (last - first) * cluster, cluster)
            words[at : at + last - first] = array(words.typecode, places)
            self.map.mark(low, at, at + last - first)
            return
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
                self.give_up_entry(old, Cause.OVERWRITTEN)
        self.map.mark(low, at, at + (last - first) * words_each)

    def give_up_entry(self, entry: int, cause: Cause) -> None:
        """What an L2 entry pointed to is not needed by it any more."""
        if entry & COMPRESSED:
            offset, length = self.map.compressed_place(entry)
            self.image.given_up.add(offset, length, cause)
            self.driver.unpacking.forget()
        elif entry & OFFSET_MASK and not self.has_data_file:
            self.image.given_up.add(entry & OFFSET_MASK, self.cluster, cause)
