"""`qcow2-snapshot`: an internal snapshot as a disk of its own, beside the disk that it belongs to.

Limits: read-only; it shows what the snapshot keeps, and the snapshot can't be deleted meanwhile.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from pynbd.block.driver import ChildSpec, ImageInfo
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.options import NodeOptions
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.status import without_filters
from pynbd.formats.qcow2.cache_cleaning import CacheCleaning
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.mapping import ClusterMapping
from pynbd.formats.qcow2.reading import ClusterReader
from pynbd.formats.qcow2.snapshot_table import Snapshot

L2_CACHE_BYTES = 8 << 20
"""What L2 tables of a snapshot may take, beside those of the disk."""


class SnapshotOptions(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `qcow2-snapshot`.

    Args:
        snapshot: which one, by its id or else by its name.
        snapshot_id: by its id, and nothing else.
        snapshot_name: by its name; with the id, both must be right.
    """

    snapshot: str | None = None
    snapshot_id: str | None = None
    snapshot_name: str | None = None


class Qcow2Snapshot(ClusterReader):
    """A snapshot of a qcow2 image."""

    name = "qcow2-snapshot"
    several_processes = "reading"
    Options = SnapshotOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {
        "file": ChildSpec(ChildRole.METADATA, writable=False),
        "backing": ChildSpec(ChildRole.COW, optional=True, writable=False),
    }
    options: SnapshotOptions
    live: Qcow2
    """The driver of the image."""
    shown: Snapshot

    async def named_children(self) -> Mapping[str, Any]:
        backing = self._image_driver().node.children.get("backing")
        return {"backing": backing.node} if backing is not None else {}

    def _image_driver(self) -> Qcow2:
        driver = without_filters(self.file.node).driver
        if not isinstance(driver, Qcow2):
            raise OptionError(f"file: {self.file.node.name!r} is a node of driver {driver.name!r}, expected qcow2")
        return driver

    def _choose(self) -> Snapshot:
        by_id, by_name, by_either = self.options.snapshot_id, self.options.snapshot_name, self.options.snapshot
        if (by_either is None) == (by_id is None and by_name is None):
            raise OptionError("snapshot: give this, or snapshot-id, snapshot-name or both of them")
        if by_either is not None:
            return self.live.snapshots.find(by_either)
        return self.live.snapshots.find_by(id=by_id, name=by_name)

    async def open(self) -> None:
        self.live = live = self._image_driver()
        if live.header.has_data_file:
            raise BlockError(f"{live.image_name}: snapshots in an image with a data file are not supported")
        self.shown, l1 = await live.snapshots.pin(self._choose)
        self.node.read_only = True
        self.storage = self.guest_file = live.storage
        self.encryption = live.encryption
        self.header = msgspec.structs.replace(live.header, size=self.shown.disk_size, l1_size=self.shown.l1_size)
        # The image's own tables are those of the disk; what these lead to never changes while the snapshot is there.
        name = f"{live.image_name} (snapshot {self.shown.name!r})"
        self.image = Image(live.storage, self.header, name, l2_cache=L2_CACHE_BYTES, refcount_cache=0)
        self.image.l1[:] = l1
        self.map = ClusterMapping(self.image)
        self.cleaning = CacheCleaning(self.image, live.options.cache_clean_interval)
        self.size = self.header.size
        self.limits = live.limits

    async def close(self) -> None:
        self.cleaning.end()
        self.live.snapshots.unpin(self.shown)

    async def asks_for_holes(self) -> bool:
        return await self.live.asks_for_holes()

    def child_permissions(self, name: str, held: Permission, shared: Permission) -> tuple[Permission, Permission]:
        if name == "file":
            # Whoever writes to the disk takes other clusters than the snapshot's.
            return held & Permission.CONSISTENT_READ, Permission.ALL
        return super().child_permissions(name, held, shared)

    async def info(self) -> ImageInfo:
        told = await self.live.info()
        return msgspec.structs.replace(told, vm_state_offset=0)
