"""Internal snapshots: kept, applied and deleted (section "Snapshots").

A snapshot is a copy of the L1 table; all that it leads to is shared with the disk (`references.py`). What the header
points to, the snapshot table or the L1 table, changes in one write of its sector. Before it, only counts are raised and
flags cleared, which is safe with the old table; after it, counts are lowered, which is safe with the new one.
"""

import asyncio
import contextlib
import errno
import logging
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from pynbd.block.drain import drained
from pynbd.block.errors import BlockError, ImageError, io_error, unsupported
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.active_l1 import replace_l1
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import Run
from pynbd.formats.qcow2.references import References, in_doubt
from pynbd.formats.qcow2.snapshot_table import Snapshot, build_table, read_l1, read_snapshots
from pynbd.formats.qcow2.tables import to_disk

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2

log = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
"""As in QEMU, which could not name longer ones."""

MAX_NOTED_L1_BYTES = 64 << 20
"""L1 tables of snapshots that are read when an image is opened, so that nothing is written over their L2 tables."""

POINTER = (60, 72)
"""The fields of the header that tell of the snapshot table."""


class SnapshotStore:
    """The snapshots of one image.

    Args:
        driver: the image's.
    """

    def __init__(self, driver: "Qcow2") -> None:
        self.driver = driver
        self.image = driver.image
        self.references = References(driver.image, driver.map)
        self.entries: list[Snapshot] = []
        self.pinned: Counter[str] = Counter()
        """How many nodes show the snapshot of an id."""
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Read the snapshot table.

        Raises:
            ImageError: it is wrong. OSError: it can't be read.
        """
        self.entries = await read_snapshots(self.image)
        if not self.driver.node.read_only:
            await self._note_metadata()

    async def _note_metadata(self) -> None:
        image, left = self.image, MAX_NOTED_L1_BYTES
        image.metadata.note(Kind.SNAPSHOT_TABLE, image.header.snapshots_offset, len(build_table(self.entries)))
        for snapshot in self.entries:
            image.metadata.note(Kind.INACTIVE_L1, snapshot.l1_table_offset, snapshot.l1_size * 8)
            left -= snapshot.l1_size * 8
            if left < 0:
                continue
            try:
                l1 = await read_l1(image, snapshot)
            except ImageError as problem:
                log.warning("%s", problem)
                continue
            tables = {(entry & OFFSET_MASK) >> image.cluster_bits for entry in set(l1) if entry}
            image.metadata.note_clusters(Kind.INACTIVE_L2, tables)

    # --- looking -------------------------------------------------------------------------------------------

    def find(self, name_or_id: str) -> Snapshot:
        """The snapshot of an id, or else of a name.

        Raises:
            BlockError: there is none.
        """
        for snapshot in self.entries:
            if snapshot.id == name_or_id:
                return snapshot
        return self.find_by(name=name_or_id)

    def find_by(self, *, id: str | None = None, name: str | None = None) -> Snapshot:
        """The snapshot of an id and a name, as far as they are given.

        Raises:
            BlockError: there is none.
        """
        for snapshot in self.entries:
            if id in (None, snapshot.id) and name in (None, snapshot.name):
                return snapshot
        wanted = " and ".join(f"{what} {value!r}" for what, value in (("id", id), ("name", name)) if value is not None)
        known = ", ".join(repr(snapshot.name) for snapshot in self.entries[:20]) or "none"
        raise BlockError(f"{self.image.name}: there is no snapshot of {wanted}; there are: {known}")

    async def pin(self, choose: Callable[[], Snapshot]) -> tuple[Snapshot, "array[int]"]:
        """Somebody is going to show a snapshot: it can't be deleted until it is unpinned.

        Args:
            choose: says which one, when nobody is at work on them.

        Returns:
            the snapshot and its L1 table.

        Raises:
            BlockError: there is none, or its L1 table is wrong. OSError: that can't be read.
        """
        async with self._lock:
            snapshot = choose()
            l1 = await self._read_l1(snapshot)
            self.pinned[snapshot.id] += 1
            return snapshot, l1

    def unpin(self, snapshot: Snapshot) -> None:
        """It is not shown any more."""
        self.pinned[snapshot.id] -= 1

    async def _read_l1(self, snapshot: Snapshot) -> "array[int]":
        """The L1 table of a snapshot, which reaches to the end of its disk."""
        needed = self.image.header.l1_entries_for(snapshot.disk_size)
        if snapshot.l1_size < needed:
            what = f"the L1 table of snapshot {snapshot.id!r} has {snapshot.l1_size} entries, its disk takes {needed}"
            raise ImageError(self.image.name, what, snapshot.l1_table_offset)
        return await read_l1(self.image, snapshot)

    # --- changing ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _at_work(self, deleted: Snapshot | None = None) -> AsyncIterator[None]:
        """A section in which nobody else is at work on the image, and all of it is on disk when it begins.

        Raises:
            OSError: it may not be written to.
            BlockError: the snapshot that is to be deleted is in use.
        """
        node = self.driver.node
        if node.read_only:
            raise io_error(errno.EROFS, node.name, "a change of its snapshots")
        if self.driver.header.has_data_file:
            raise unsupported(node.name, "snapshots in an image with a data file")
        async with self._lock, drained(node):
            self.image.check_fence()
            if deleted is not None and self.pinned[deleted.id]:
                raise BlockError(f"{self.image.name}: snapshot {deleted.name!r} is in use: a node shows it")
            await self.image.commit_all()
            node.touch()
            yield

    async def create(self, name: str, vm_clock_ns: int, vm_state_size: int) -> Snapshot:
        """Keep what the disk holds now; see `Snapshots.snapshot_create`."""
        if not 0 < len(name.encode(errors="surrogateescape")) <= MAX_NAME_BYTES or "\0" in name:
            raise BlockError(
                f"snapshot name {name[:40]!r}: its length must be 1 to {MAX_NAME_BYTES} bytes, without NUL"
            )
        image = self.image
        async with self._at_work():
            if any(snapshot.name == name for snapshot in self.entries):
                raise BlockError(f"{image.name}: there is a snapshot named {name!r} already")
            if len(self.entries) >= layout.MAX_SNAPSHOTS:
                raise BlockError(f"{image.name}: it has {layout.MAX_SNAPSHOTS} snapshots, the most there may be")
            now_s, now_ns = divmod(time.time_ns(), 10**9)
            snapshot = Snapshot(
                id=str(1 + max((int(s.id) for s in self.entries if s.id.isascii() and s.id.isdigit()), default=0)),
                name=name,
                l1_table_offset=0,
                l1_size=0,
                date_s=now_s & 0xFFFF_FFFF,
                date_ns=now_ns,
                vm_clock_ns=vm_clock_ns,
                vm_state_size=vm_state_size,
                disk_size=image.header.size,
            )
            async with in_doubt(image):
                if not vm_state_size:
                    await self.forget_vm_state()
                snapshot = await self._keep(snapshot)
                # The next snapshot has no use for it, and writing over what is shared would be dear.
                await self.forget_vm_state()
        return snapshot

    async def _keep(self, snapshot: Snapshot) -> Snapshot:
        """Write a snapshot of the active L1 table into the image."""
        image, references = self.image, self.references
        l1 = array("Q", [entry & ~COPIED for entry in image.l1])
        await references.add(l1, Kind.INACTIVE_L2)
        offset = 0
        try:
            if l1:
                offset = await image.allocate_metadata(Kind.INACTIVE_L1, len(l1) * 8)
                await image.write_metadata(Kind.INACTIVE_L1, offset, to_disk(l1).ljust(image.cluster_size, b"\0"))
            await references.clear_copied()
            snapshot = msgspec.structs.replace(snapshot, l1_table_offset=offset, l1_size=len(l1))
            await self._write_entries([*self.entries, snapshot])
        except BaseException:
            await image.release_metadata(offset, len(l1) * 8 if offset else 0)
            await references.take_back(l1)
            await references.restore_copied(references.tables())
            raise
        return snapshot

    async def goto(self, snapshot: Snapshot) -> None:
        """Let the disk hold what a snapshot keeps; see `Snapshots.snapshot_goto`."""
        image, node, references = self.image, self.driver.node, self.references
        if snapshot.disk_size != image.header.size and Permission.RESIZE not in node.held_by_parents()[1]:
            what = f"snapshot {snapshot.name!r} has another size, and somebody relies on that of {node.describe()}"
            raise BlockError(f"{image.name}: {what}")
        async with self._at_work(), in_doubt(image):
            old = image.l1[:]
            new = array("Q", [entry & ~COPIED for entry in await self._read_l1(snapshot)])
            await references.add(new, Kind.ACTIVE_L2)
            try:
                await references.clear_copied_below(new)
                await replace_l1(image, new, snapshot.disk_size)
            except BaseException:
                await references.take_back(new)
                raise
            image.l2.forget_all()
            self._content_changed()
            await references.drop(old, Cause.SNAPSHOT)

    def _content_changed(self) -> None:
        """The disk holds something else than before, and may have another size."""
        driver, node = self.driver, self.driver.node
        driver.unpacking.forget()
        driver.size = self.image.header.size
        node.resized()
        for bitmap in node.bitmaps.values():
            bitmap.mark(0, driver.size)

    async def delete(self, snapshot: Snapshot) -> None:
        """Forget a snapshot; see `Snapshots.snapshot_delete`."""
        image, references = self.image, self.references
        async with self._at_work(snapshot), in_doubt(image):
            l1 = await read_l1(image, snapshot)
            await self._write_entries([other for other in self.entries if other is not snapshot])
            await references.drop(l1, Cause.SNAPSHOT)
            if snapshot.l1_size:
                clusters = -(-snapshot.l1_size * 8 // image.cluster_size)
                place = Run(snapshot.l1_table_offset >> image.cluster_bits, clusters)
                await image.given_up.drop_references(place, Cause.SNAPSHOT, structure=True)
            shared = [index for index in references.tables() if index < len(l1) and l1[index] & OFFSET_MASK]
            await references.restore_copied(shared)

    async def forget_vm_state(self) -> None:
        """Nothing keeps the state of a machine any more but snapshots."""
        image = self.image
        first = image.header.l1_entries_for(image.header.size)
        if not any(image.l1[first:]):
            return
        gone = array("Q", [0]) * first + image.l1[first:]
        for index in range(first, len(image.l1)):
            if image.l1[index]:
                image.forget_l2(index)
                image.l1[index] = 0
                image.dirty_l1.add(index)
        await image.commit()
        await image.barrier()
        await self.references.drop(gone, Cause.OVERWRITTEN)

    async def rewrite(self) -> None:
        """Write the table anew, with all that entries have in version 3."""
        if self.entries:
            await self._write_entries(self.entries)

    async def _write_entries(self, entries: Sequence[Snapshot]) -> None:
        """Write the snapshot table to a new place, and let the header point there.

        Raises:
            BlockError: it gets too long. OSError: it could not be written; the old one stays.
        """
        image, header = self.image, self.image.header
        data = build_table(entries)
        if len(data) > layout.MAX_SNAPSHOT_TABLE_BYTES:
            most = layout.MAX_SNAPSHOT_TABLE_BYTES
            raise BlockError(
                f"{image.name}: the snapshot table would take {len(data)} bytes, at most {most} are allowed"
            )
        offset = await image.allocate_metadata(Kind.SNAPSHOT_TABLE, len(data)) if data else 0
        try:
            if data:
                await image.write_metadata(Kind.SNAPSHOT_TABLE, offset, data)
            await image.commit_all()
            await image.write_counts_now()
        except BaseException:
            await image.release_metadata(offset, len(data))
            raise
        old_count, old_offset = header.nb_snapshots, header.snapshots_offset
        # Should this fail, the new table keeps its place: either is good, whatever is on the disk.
        await image.change_fields(*POINTER, nb_snapshots=len(entries), snapshots_offset=offset)
        if old_count:
            image.given_up.add(old_offset, len(build_table(self.entries)), Cause.SNAPSHOT, structure=True)
        self.entries = list(entries)
