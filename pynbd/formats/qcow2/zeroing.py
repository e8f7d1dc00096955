"""Zeroes and discards: what changes entries, and writes data only where no entry can say so."""

from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down, round_up
from pynbd.block.errors import unsupported
from pynbd.block.requests import RequestFlag
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, SUBCLUSTERS, SUBCLUSTERS_ALL_ZERO, ZERO
from pynbd.formats.qcow2.mapping import NOWHERE, ZEROES

if TYPE_CHECKING:
    from pynbd.formats.qcow2.writing import Writer

MAY_UNMAP, NO_FALLBACK = int(RequestFlag.MAY_UNMAP), int(RequestFlag.NO_FALLBACK)

GIVEN_UP_BYTES = 1 << 20
"""So much that the guest has discarded is given back to the file at once."""

ZERO_PIECE_BYTES = 1 << 20
"""Zeroes that are written as data at a time."""


class Zeroing:
    """What the driver does for zeroes and discards.

    Args:
        writer: the driver's.
    """

    def __init__(self, writer: "Writer") -> None:
        self.writer = writer
        self.driver = writer.driver
        self.image = writer.image
        self.map = writer.map
        self.cluster = writer.cluster
        self.unit = writer.unit
        self.guest_file = writer.guest_file
        self.has_data_file = writer.has_data_file

    # --- zeroes --------------------------------------------------------------------------------------------

    def _whole_units(self, offset: int, end: int) -> tuple[int, int]:
        """[first, last): the bytes of all units that lie wholly in a range; the disk's last one may be short."""
        first = round_up(offset, self.unit)
        last = round_up(end, self.unit) if end >= self.driver.size else round_down(end, self.unit)
        return first, max(first, last)

    async def write(self, offset: int, length: int, flags: int) -> None:
        """Let a range read as zeroes."""
        end = offset + length
        self.image.check_fence()
        async with self.writer.track(offset, end, exclusive=True):
            self.writer.check_inside(offset, end)
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
            last = self._to_the_end(first, last)
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

    def _to_the_end(self, first: int, last: int) -> int:
        """The end of whole units [first, last); where the disk ends in a cluster, that cluster's when it is covered."""
        whole = round_up(last, self.cluster)
        return whole if last >= self.driver.size and first <= whole - self.cluster else last

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
            await self.writer.write_alone(offset, zeroes[: stop - offset])
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
            await self._set_entry(offset, 0, 0, Cause.REQUEST)
        elif self.map.extended:
            await self._set_entry(offset, entry if keep else 0, SUBCLUSTERS_ALL_ZERO, None if keep else Cause.REQUEST)
        else:
            await self._set_entry(offset, entry | ZERO if keep else ZERO, 0, None if keep else Cause.REQUEST)

    async def _zero_subclusters(self, first: int, last: int) -> None:
        entry, bitmap = await self.map.entry(first)
        if entry & COMPRESSED:
            return  # written as data
        begin, until = first % self.cluster // self.unit, (last - 1) % self.cluster // self.unit + 1
        bits = ((1 << (until - begin)) - 1) << begin
        await self._set_entry(first, entry, bitmap & ~bits | bits << SUBCLUSTERS, None)

    async def _set_entry(self, offset: int, entry: int, bitmap: int, given_up: Cause | None) -> None:
        """Change the entry of one cluster, on which nobody else is at work.

        Args:
            offset: of the cluster on the disk.
            entry, bitmap: what it becomes.
            given_up: why the cluster that it has is given up; None if it is kept.
        """
        if await self.map.entry(offset) == (entry, bitmap):
            return
        table, at = await self.map.writable(offset)
        old = table.words[at]
        self.map.put(table.words, at, entry, bitmap)
        self.map.mark(offset, at, at + self.map.words)
        if given_up is not None:
            self.writer.give_up_entry(old, given_up)

    # --- discard -------------------------------------------------------------------------------------------

    @property
    def passes_requests(self) -> bool:
        """Whether the file hears of what the guest discards."""
        return Cause.REQUEST in self.image.given_up.passed

    async def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed: whole clusters are given up and read as zeroes."""
        end = min(offset + length, self.driver.size)
        self.image.check_fence()
        if self.driver.header.version < 3 and "backing" in self.driver.node.children:
            raise unsupported(self.driver.node.name, "discard over a backing file in an image of compat 0.10")
        async with self.writer.track(offset, end, exclusive=True):
            self.writer.check_inside(offset, end)
            first = round_up(offset, self.cluster)
            last = round_up(end, self.cluster) if end == self.driver.size else round_down(end, self.cluster)
            for start in range(first, last, self.cluster):
                await self._discard_cluster(start)
            if self.has_data_file and first < last:
                stop = min(last, end)
                if self.driver.header.data_file_raw:
                    await self.guest_file.write_zeroes(first, stop - first, MAY_UNMAP)
                elif self.passes_requests:
                    await self.guest_file.discard(first, stop - first)
        # Who discards much wants the space back now, not at some later flush.
        if self.passes_requests and self.image.given_up.bytes >= GIVEN_UP_BYTES:
            await self.image.commit()

    async def _discard_cluster(self, offset: int) -> None:
        entry, bitmap = await self.map.entry(offset)
        if not entry and not bitmap and "backing" not in self.driver.node.children:
            return
        if self.map.extended:
            await self._set_entry(offset, 0, SUBCLUSTERS_ALL_ZERO, Cause.REQUEST)
        else:
            await self._set_entry(offset, ZERO if self.driver.header.version >= 3 else 0, 0, Cause.REQUEST)

    async def forget(self, first: int, last: int, cause: Cause) -> None:
        """Clusters [first, last) (bytes) hold nothing any more: the backing file shows through."""
        for start in range(first, last, self.cluster):
            await self._set_entry(start, 0, 0, cause)
