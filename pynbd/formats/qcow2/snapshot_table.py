"""The snapshot table: parsed with every doubt, and built again (section "Snapshots").

Extra data that are not known are kept.
"""

import os
from array import array
from collections.abc import Sequence

import msgspec

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError
from pynbd.block.families import SnapshotInfo
from pynbd.block.options import MAX_SIZE_BYTES
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.image import Image

CHUNK_BYTES = 64 << 10
"""How much of the table is read at a time: nothing says how long it is."""

NO_ICOUNT = 0xFFFF_FFFF_FFFF_FFFF
MAX_U32 = 0xFFFF_FFFF


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the table. Sizes and offsets are in bytes.

    Args:
        id, name: what it is called.
        l1_table_offset, l1_size: its L1 table, and the entries of that.
        date_s, date_ns: when it was taken, since the epoch.
        vm_clock_ns: how long the guest had been running.
        vm_state_size: what is kept of the machine's state.
        disk_size: how long the disk was.
        icount: instructions of the guest, if it counted them.
        more_extra: extra data that are not known.
    """

    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_s: int = 0
    date_ns: int = 0
    vm_clock_ns: int = 0
    vm_state_size: int = 0
    disk_size: int = 0
    icount: int | None = None
    more_extra: bytes = b""

    def info(self) -> SnapshotInfo:
        """What others are told of it."""
        return SnapshotInfo(
            id=self.id,
            name=self.name,
            vm_state_size=self.vm_state_size,
            date_s=self.date_s,
            date_ns=self.date_ns,
            vm_clock_ns=self.vm_clock_ns,
            icount=self.icount,
            disk_size=self.disk_size,
        )


async def read_snapshots(image: Image, *, any_extra: bool = False) -> list[Snapshot]:
    """The snapshot table of an image.

    Args:
        image: the image.
        any_extra: extra data may be longer than is allowed; what there is too much of is left out.

    Raises:
        ImageError: it is not as the format demands, or goes beyond a limit. OSError: it can't be read.
    """
    reader = _Reader(image)
    return [await _read_entry(reader, image, any_extra=any_extra) for _ in range(image.header.nb_snapshots)]


class _Reader:
    """Bytes of the table, one after the other."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.start = image.header.snapshots_offset
        self.at = 0
        self._data = bytearray()

    async def take(self, length: int) -> bytes:
        """The next bytes."""
        end = self.at + length
        if end > layout.MAX_SNAPSHOT_TABLE_BYTES:
            most = layout.MAX_SNAPSHOT_TABLE_BYTES
            raise ImageError(self.image.name, f"the snapshot table has more than {most} bytes", self.start)
        if self.start + end > round_up(self.image.file.size, self.image.cluster_size):
            problem = f"the snapshot table goes on here, but the file ends at {self.image.file.size}"
            raise ImageError(self.image.name, problem, self.start + self.at)
        while len(self._data) < end:
            self._data += await self.image.read_bytes(
                self.start + len(self._data), max(CHUNK_BYTES, end - len(self._data))
            )
        found = bytes(self._data[self.at : end])
        self.at = end
        return found


async def _read_entry(reader: _Reader, image: Image, *, any_extra: bool) -> Snapshot:
    start = reader.start + reader.at
    fields = layout.parsed(layout.SNAPSHOT, await reader.take(layout.SNAPSHOT_BYTES))
    if fields.extra_data_size > layout.MAX_SNAPSHOT_EXTRA_BYTES and not any_extra:
        most = layout.MAX_SNAPSHOT_EXTRA_BYTES
        problem = f"a snapshot has {fields.extra_data_size} bytes of extra data, at most {most} are allowed"
        raise ImageError(image.name, problem, start + 36)
    extra = await reader.take(fields.extra_data_size)
    vm_state_size, disk_size, icount = fields.vm_state_size, image.header.size, None
    sizes = layout.SNAPSHOT_EXTRA_SIZES.sizeof()
    known = sizes + layout.SNAPSHOT_EXTRA_ICOUNT.sizeof()
    if len(extra) >= sizes:
        told = layout.parsed(layout.SNAPSHOT_EXTRA_SIZES, extra)
        vm_state_size, disk_size = told.vm_state_size_large, told.disk_size
    if len(extra) >= known:
        count = layout.parsed(layout.SNAPSHOT_EXTRA_ICOUNT, extra, sizes).icount
        icount = None if count == NO_ICOUNT else count
    identity, name = await reader.take(fields.id_size), await reader.take(fields.name_size)
    snapshot = Snapshot(
        id=os.fsdecode(identity),
        name=os.fsdecode(name),
        l1_table_offset=fields.l1_table_offset,
        l1_size=fields.l1_size,
        date_s=fields.date_s,
        date_ns=fields.date_ns,
        vm_clock_ns=fields.vm_clock_ns,
        vm_state_size=vm_state_size,
        disk_size=disk_size,
        icount=icount,
        more_extra=extra[known : layout.MAX_SNAPSHOT_EXTRA_BYTES],
    )
    _check(snapshot, start, image)
    reader.at = round_up(reader.at, 8)
    return snapshot


def _check(snapshot: Snapshot, start: int, image: Image) -> None:
    cluster = image.cluster_size
    what = f"snapshot {snapshot.id!r}"
    if snapshot.l1_size > layout.MAX_L1_BYTES // 8:
        most = layout.MAX_L1_BYTES // 8
        raise ImageError(image.name, f"{what}: l1_size is {snapshot.l1_size}, at most {most} are allowed", start + 8)
    offset = snapshot.l1_table_offset
    if snapshot.l1_size and (offset % cluster or not 0 < offset < layout.MAX_HOST_OFFSET):
        wanted = f"a multiple of {cluster}, and not 0"
        raise ImageError(image.name, f"{what}: l1_table_offset is {offset}, expected {wanted}", start)
    if snapshot.disk_size > MAX_SIZE_BYTES:
        problem = f"{what}: the disk's size is {snapshot.disk_size}, at most {MAX_SIZE_BYTES} bytes are allowed"
        raise ImageError(image.name, problem, start + 48)


async def read_l1(image: Image, snapshot: Snapshot) -> "array[int]":
    """The L1 table of a snapshot.

    Raises:
        ImageError: it does not lie inside the file. OSError: it can't be read.
    """
    return await image.read_words(
        snapshot.l1_table_offset, snapshot.l1_size, f"the L1 table of snapshot {snapshot.id!r}"
    )


def build_table(snapshots: Sequence[Snapshot]) -> bytes:
    """The bytes of a snapshot table."""
    return b"".join(_build_entry(snapshot) for snapshot in snapshots)


def _build_entry(snapshot: Snapshot) -> bytes:
    identity, name = os.fsencode(snapshot.id), os.fsencode(snapshot.name)
    sizes = {"vm_state_size_large": snapshot.vm_state_size, "disk_size": snapshot.disk_size}
    extra = layout.SNAPSHOT_EXTRA_SIZES.build(sizes)
    extra += layout.SNAPSHOT_EXTRA_ICOUNT.build({"icount": NO_ICOUNT if snapshot.icount is None else snapshot.icount})
    extra += snapshot.more_extra
    fixed: bytes = layout.SNAPSHOT.build(
        {
            "l1_table_offset": snapshot.l1_table_offset,
            "l1_size": snapshot.l1_size,
            "id_size": len(identity),
            "name_size": len(name),
            "date_s": snapshot.date_s,
            "date_ns": snapshot.date_ns,
            "vm_clock_ns": snapshot.vm_clock_ns,
            "vm_state_size": snapshot.vm_state_size if snapshot.vm_state_size <= MAX_U32 else 0,
            "extra_data_size": len(extra),
        }
    )
    entry: bytes = fixed + extra + identity + name
    return entry.ljust(round_up(len(entry), 8), b"\0")
