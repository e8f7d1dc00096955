"""`qcow2`: QEMU's image format, versions 2 and 3, read and written.

What is read lies in the image's own clusters, in the backing file that it names, or is zero; `mapping.py` tells which,
`writing.py` changes it, and `image.py` sees to it that the image is sound at any time.

`check.py` finds what is wrong with it, and repairs it. An image that was not closed properly (lazy refcounts) is
repaired when it is opened for writing; one that is corrupt is refused then. Who opens one to check or repair it says so
(`Graph.open(…, for_check=True)`): then neither happens.

Limits: no compressed clusters in encrypted images and in those with a data file; one that is marked as corrupt is
opened for writing only to be repaired.
"""

import errno
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from pynbd.block import registry
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import ChildSpec, CreationOptions, HostWriter, ImageInfo, Preallocation
from pynbd.block.errors import BlockError, OptionError, PermissionConflict, io_error
from pynbd.block.families import BitmapInfo, CheckResult, Measurement, Progress, Repair, SnapshotInfo, no_progress
from pynbd.block.image_names import named_from
from pynbd.block.limits import Limits
from pynbd.block.options import NodeOptions, OnOff, Size
from pynbd.block.permissions import ChildRole, Permission
from pynbd.block.ranges import Ranges
from pynbd.block.requests import RequestFlag
from pynbd.formats.qcow2 import amending, creation, layout, resizing
from pynbd.formats.qcow2.cache_cleaning import DEFAULT_INTERVAL_S, CacheCleaning, Interval
from pynbd.formats.qcow2.creation import Qcow2CreationOptions
from pynbd.formats.qcow2.encrypt_options import EncryptOptions
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.header_file import read_header
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import CryptMethod, Incompatible
from pynbd.formats.qcow2.mapping import ClusterMapping
from pynbd.formats.qcow2.overlap import OverlapOptions, Template, checked_kinds
from pynbd.formats.qcow2.reading import ClusterReader
from pynbd.formats.qcow2.vm_state import VmState
from pynbd.formats.qcow2.writing import Writer

MAX_L2_CACHE_BYTES = 32 << 20
"""What L2 tables may take by default; tables are kept when they are used, so that small disks take little."""

REFCOUNT_CACHE_TABLES = 64

MIN_L2_SLICE_BYTES = 512
COMPRESSED = int(RequestFlag.COMPRESSED)

if TYPE_CHECKING:
    from pynbd.formats.qcow2.bitmaps import BitmapStore
    from pynbd.formats.qcow2.snapshots import SnapshotStore


class Qcow2Options(NodeOptions, frozen=True, kw_only=True):
    """Options of the driver `qcow2`.

    Args:
        lazy_refcounts: write reference counts late; the image's own choice, if it is not given.
        overlap_check: which of the image's own structures nothing else is written over; a template, or a group.
        pass_discard_request: what the guest discards is discarded in the file; with discard=unmap, if not given.
        pass_discard_snapshot: what only a snapshot kept is discarded in the file when that goes.
        pass_discard_other: what becomes free for another reason is discarded in the file.
        l2_cache_size: bytes of L2 tables that are kept in memory.
        refcount_cache_size: bytes of refcount blocks that are kept in memory.
        cache_size: both together.
        l2_cache_entry_size: bytes of an L2 table that are read and kept by themselves; whole tables, if not given.
        cache_clean_interval: seconds after which tables that nobody has used are dropped from memory; 0 for never.
        encrypt: how an encrypted image is opened.
    """

    lazy_refcounts: OnOff | None = None
    overlap_check: Template | OverlapOptions = "all"
    pass_discard_request: OnOff | None = None
    pass_discard_snapshot: OnOff = True
    pass_discard_other: OnOff = False
    l2_cache_size: Size | None = None
    refcount_cache_size: Size | None = None
    cache_size: Size | None = None
    l2_cache_entry_size: Size | None = None
    cache_clean_interval: Interval = DEFAULT_INTERVAL_S
    encrypt: EncryptOptions = EncryptOptions()


class Qcow2(ClusterReader):
    """QEMU's image format."""

    name = "qcow2"
    is_format = True
    several_processes = "reading"  # who writes keeps tables and reference counts in memory
    Options = Qcow2Options
    CreateOptions = Qcow2CreationOptions
    AmendOptions: ClassVar[type[msgspec.Struct]] = amending.Qcow2AmendOptions
    children: ClassVar[Mapping[str, ChildSpec]] = {
        "file": ChildSpec(ChildRole.DATA | ChildRole.METADATA),
        "backing": ChildSpec(ChildRole.COW, optional=True, writable=False),
        "data-file": ChildSpec(ChildRole.DATA, optional=True),
    }
    write_flags = COMPRESSED
    options: Qcow2Options
    writer: Writer
    cleaning: CacheCleaning
    vm_state: VmState

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[:8] in (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3") else 0

    # --- life ----------------------------------------------------------------------------------------------

    @property
    def image_name(self) -> str:
        """The image's name for messages."""
        return self.file.node.filename() or self.node.name

    async def named_children(self) -> Mapping[str, Any]:
        header = await read_header(self.file, self.image_name, for_check=self.for_check)
        named: dict[str, Any] = {}
        if header.backing_file:
            named["backing"] = self._description(header.backing_file, header.backing_format)
        if header.has_data_file and self.for_info:
            named["data-file"] = {"driver": "null", "size": 0}
        elif header.has_data_file and header.data_file:
            # Unlike that of a backing file, QEMU takes its name as it is, wherever the image lies.
            device = registry.driver_class("host_device")
            kind = device.name if device.probe_device(header.data_file) else "file"
            named["data-file"] = {"driver": kind, "filename": header.data_file}
        return named

    def _description(self, name: str, format: str | None) -> Any:
        full = named_from(self.file.node.filename(), name)
        if full.startswith("json:"):
            return full
        return {"driver": format, "file": {"filename": full}} if format else {"filename": full}

    async def open(self) -> None:
        self.storage = self.file
        self.header = header = await read_header(self.file, self.image_name, for_check=self.for_check)
        if header.has_data_file and "data-file" not in self.node.children:
            raise BlockError(f"{self.image_name}: its data are in another file: give data-file")
        if not header.has_data_file and "data-file" in self.node.children:
            raise OptionError(f"{self.image_name}: data-file was given, but the image keeps its data in itself")
        l2_cache, refcount_cache = self._cache_sizes()
        data_file = self.node.children["data-file"] if header.has_data_file else None
        self.image = image = Image(
            self.file,
            header,
            self.image_name,
            l2_cache=l2_cache,
            refcount_cache=refcount_cache,
            l2_slice_bytes=self._l2_slice_bytes(),
            data_file=data_file,
            for_check=self.for_check,
        )
        self.guest_file = data_file or self.file
        image.metadata.checked = int(checked_kinds(self.options.overlap_check))
        await image.load()
        self.map = ClusterMapping(image)
        self.writer = Writer(self)
        self.vm_state = VmState(self)
        self.size = header.size
        if not self.for_check:
            await self._load_snapshots()
            if header.bitmaps is not None:
                await self.bitmaps.load()
        alignment = 1
        if header.crypt_method != CryptMethod.NONE:
            from pynbd.formats.qcow2.encryption import Encryption

            self.encryption = await Encryption.opened(image, self.options.encrypt, self.node.objects)
            alignment = layout.COMPRESSED_SECTOR
        elif self.options.encrypt.key_secret is not None:
            raise OptionError(f"{self.image_name}: encrypt.key-secret was given, but the image is not encrypted")
        self.limits = Limits(
            request_alignment=alignment,
            optimal_transfer=header.cluster_size,
            discard_alignment=header.cluster_size,
        )
        if not self.node.read_only and not self.for_check:
            await self._open_for_writing()
        self.cleaning = CacheCleaning(image, self.options.cache_clean_interval)

    # What most images do not have is imported for those that do: small commands are done in little more time.

    @functools.cached_property
    def snapshots(self) -> "SnapshotStore":
        """The snapshots that the image keeps."""
        from pynbd.formats.qcow2.snapshots import SnapshotStore

        return SnapshotStore(self)

    async def _load_snapshots(self) -> None:
        if self.header.nb_snapshots or "snapshots" in vars(self):
            await self.snapshots.load()

    @functools.cached_property
    def bitmaps(self) -> "BitmapStore":
        """The bitmaps that it keeps."""
        from pynbd.formats.qcow2.bitmaps import BitmapStore

        return BitmapStore(self)

    async def _open_for_writing(self) -> None:
        header, image = self.header, self.image
        if Incompatible.CORRUPT in header.incompatible:
            raise BlockError(f"{self.image_name}: the image is marked as corrupt: repair it, or open it read-only")
        await image.begin_writing()
        if Incompatible.DIRTY in header.incompatible:
            from pynbd.formats.qcow2 import check

            await check.repair_dirty(image)
            await self._load_snapshots()
        lazy = self.options.lazy_refcounts
        if lazy and header.version < 3:
            raise OptionError(f"{self.image_name}: lazy-refcounts needs an image of compat 1.1 or newer")
        image.lazy = header.lazy_refcounts if lazy is None else lazy
        image.given_up.passed = self._passed_causes()
        if header.bitmaps is not None:
            await self.bitmaps.begin_writing()

    def _passed_causes(self) -> set[Cause]:
        """Causes for which the file hears of what becomes free."""
        options, request = self.options, self.options.pass_discard_request
        wanted = {
            Cause.CUT_OFF: True,
            Cause.REQUEST: options.discard in ("unmap", "on") if request is None else request,
            Cause.SNAPSHOT: options.pass_discard_snapshot,
            Cause.OTHER: options.pass_discard_other,
        }
        return {cause for cause, is_passed in wanted.items() if is_passed}

    def _cache_sizes(self) -> tuple[int, int]:
        """(L2, refcount) bytes of tables that may be kept."""
        options, cluster = self.options, self.header.cluster_size
        l2, counts, both = options.l2_cache_size, options.refcount_cache_size, options.cache_size
        if both is not None and l2 is not None and counts is not None:
            raise OptionError("cache-size, l2-cache-size and refcount-cache-size can't all be given")
        if both is not None:
            for name, part in (("l2-cache-size", l2), ("refcount-cache-size", counts)):
                if part is not None and part > both:
                    raise OptionError(f"{name} is {part}, more than cache-size ({both})")
            if l2 is None and counts is None:
                l2 = max(both - REFCOUNT_CACHE_TABLES * cluster, both // 2)
            l2 = both - counts if l2 is None and counts is not None else l2
            counts = both - l2 if counts is None and l2 is not None else counts
        return (
            MAX_L2_CACHE_BYTES if l2 is None else l2,
            REFCOUNT_CACHE_TABLES * cluster if counts is None else counts,
        )

    def _l2_slice_bytes(self) -> int:
        wanted, cluster = self.options.l2_cache_entry_size, self.header.cluster_size
        if wanted is None:
            return cluster
        if not MIN_L2_SLICE_BYTES <= wanted <= cluster or wanted & (wanted - 1):
            least = MIN_L2_SLICE_BYTES
            raise OptionError(
                f"l2-cache-entry-size is {wanted}, expected a power of two from {least} to the cluster size ({cluster})"
            )
        return wanted

    def check_permissions(self, held: Permission, shared: Permission) -> None:
        if self.encryption is not None and self.encryption.cipher is None and held & ~Permission.RESIZE:
            raise PermissionConflict(f"{self.node.describe()} is encrypted; give its passphrase by encrypt.key-secret")

    async def check(self, repair: Repair, progress: Progress = no_progress) -> CheckResult:
        """See `Checkable`."""
        from pynbd.formats.qcow2 import check

        if repair is not Repair.NOTHING:
            if self.node.read_only:
                raise io_error(errno.EROFS, self.image_name, "it is to be repaired, but was opened read-only")
            await self.image.begin_writing()
        try:
            return await check.check(self.image, repair, progress)
        finally:
            if repair is not Repair.NOTHING and not self.for_check:
                await self._load_snapshots()
                if self.header.bitmaps is not None or "bitmaps" in vars(self):
                    await self.bitmaps.look_again()

    async def close(self) -> None:
        self.cleaning.end()
        if self.node.read_only or self.image.fence is not None:
            return
        try:
            if not self.for_check and (self.node.bitmaps or "bitmaps" in vars(self)):
                await self.bitmaps.store()
        finally:
            await self.image.close()

    async def flush_to_os(self) -> None:
        await self.image.commit()

    # --- writing -------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        if flags & COMPRESSED:
            await self.writer.packing.write(offset, data)
        else:
            await self.writer.write(offset, data)

    def write_now(self, offset: int, data: memoryview) -> bool:
        return self.writer.write_now(offset, data)

    async def write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        return await self.writer.write_by(ranges, writer)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.writer.zeroing.write(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.writer.zeroing.discard(offset, length)

    # --- snapshots -----------------------------------------------------------------------------------------

    def snapshot_list(self) -> Sequence[SnapshotInfo]:
        """All snapshots, oldest first."""
        if not self.header.nb_snapshots and "snapshots" not in vars(self):
            return ()
        return [snapshot.info() for snapshot in self.snapshots.entries]

    async def snapshot_create(self, name: str, *, vm_clock_ns: int = 0) -> SnapshotInfo:
        """Keep what the disk holds now, with the machine's state if one was saved; see `Snapshots`."""
        snapshot = await self.snapshots.create(name, vm_clock_ns, self.vm_state.length)
        self.vm_state.length = 0
        return snapshot.info()

    async def snapshot_goto(self, name_or_id: str) -> None:
        """Let the disk hold what a snapshot keeps, and the state that it keeps be the one that is loaded."""
        await self.snapshots.goto(self.snapshots.find(name_or_id))
        self.vm_state.length = 0

    async def snapshot_delete(self, name_or_id: str) -> None:
        """Forget a snapshot; see `Snapshots`."""
        await self.snapshots.delete(self.snapshots.find(name_or_id))

    async def save_vmstate(self, offset: int, data: memoryview) -> None:
        """Write into the state of a machine; see `VmStates`."""
        await self.vm_state.save(offset, data)

    async def load_vmstate(self, offset: int, into: memoryview) -> None:
        """Read from it; what was not saved is zero."""
        await self.vm_state.load(offset, into)

    # --- bitmaps -------------------------------------------------------------------------------------------

    def stored_bitmaps(self) -> Sequence[BitmapInfo]:
        """What the image keeps, as it stands on disk."""
        return self.bitmaps.stored()

    def can_store_bitmap(self, name: str, granularity: int) -> None:
        """Whether one more can be kept; see `PersistentBitmaps`."""
        self.bitmaps.can_store(name, granularity)

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        await resizing.truncate(self, size, preallocation)

    async def make_empty(self) -> None:
        """Drop all data; see `Emptiable`."""
        await resizing.make_empty(self)

    async def change_backing_file(self, filename: str, format: str) -> None:
        """Write another backing file's name into the image; see `Backed`."""
        await resizing.change_backing_file(self, filename, format)

    async def amend(self, changes: Mapping[str, Any], progress: Progress = no_progress, *, force: bool = False) -> None:
        """Change options of the image; see `Amendable`."""
        await amending.amend(self, changes, progress, force=force)

    @classmethod
    async def create_image(
        cls, file: BlockBackend, options: CreationOptions, *, data_file: BlockBackend | None = None
    ) -> None:
        assert isinstance(options, Qcow2CreationOptions)
        await creation.create_image(file, options, data_file, file.node.filename() or file.node.name)

    @classmethod
    async def measure(cls, options: CreationOptions, source: BlockBackend | None) -> Measurement:
        """The size of the file that a new image would need; see `Measurable`."""
        assert isinstance(options, Qcow2CreationOptions)
        return await creation.measure(options, source)

    def has_zero_init(self) -> bool:
        return "backing" not in self.node.children

    async def allocated_size(self) -> int | None:
        own = await self.file.node.allocated_size()
        if "data-file" not in self.node.children or self.for_info:
            return own
        other = await self.child("data-file").node.allocated_size()
        return None if own is None or other is None else own + other

    def backing_name(self) -> tuple[str, str]:
        """(file name, format) of the backing file as they stand in the image; "" where it gives none."""
        return self.header.backing_file or "", self.header.backing_format or ""

    async def info(self) -> ImageInfo:
        header = self.header
        specific: dict[str, Any] = {"compat": "1.1" if header.version >= 3 else "0.10"}
        specific["compression-type"] = header.compression_type.name.lower()
        if header.version >= 3:
            specific["lazy-refcounts"] = header.lazy_refcounts
            if header.bitmaps is not None and self.bitmaps.entries:
                specific["bitmaps"] = [
                    {"flags": list(bitmap.flags), "name": bitmap.name, "granularity": bitmap.granularity}
                    for bitmap in self.stored_bitmaps()
                ]
            specific["refcount-bits"] = header.refcount_bits
            specific["corrupt"] = Incompatible.CORRUPT in header.incompatible
            specific["extended-l2"] = header.extended_l2
        else:
            specific["refcount-bits"] = header.refcount_bits
        if header.has_data_file:
            specific["data-file"] = header.data_file or ""
            specific["data-file-raw"] = header.data_file_raw
        if self.encryption is not None:
            specific["encrypt"] = self.encryption.describe()
        return ImageInfo(
            cluster_size=header.cluster_size,
            vm_state_offset=self.vm_state.offset,
            dirty=Incompatible.DIRTY in header.incompatible,
            encrypted=header.crypt_method != CryptMethod.NONE,
            specific=specific,
        )
