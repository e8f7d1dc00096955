"""`Driver`: what a kind of node can do. This is the seed's `struct BlockDriver`.

A driver is a class. Only `size` and `read` are compulsory; everything else has a default: "not supported"
(`ENOTSUP`) or "nothing to do", and for a `Filter` "ask the child".

    class Zeroes(Driver):
        size = 1 << 40

        async def read(self, offset, into, flags):
            into[:] = bytes(len(into))

The contract:

- Calls overlap, unless the class says `serial = True`. They are never cancelled.
- `async def` methods run on the event loop. In a driver that is not part of pynbd a method may also be a plain
  `def`, which then runs in a thread pool, may leave out trailing parameters that it does not need
  (`flags`), and `read` may return bytes instead of filling `into`.
- Errors are `OSError` with an errno.
- Offsets and lengths are in bytes and inside the node, except that a node whose parent may resize it is
  also written past its end and grows, if it says `growable = True`.
- `data` of a write is read-only and valid until the coroutine returns; who keeps it, copies it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from pynbd.block import errors
from pynbd.block.extents import Extent, Status
from pynbd.block.holding import Release, Revoke, hold_nothing
from pynbd.block.limits import UNLIMITED, Limits
from pynbd.block.options import NodeOptions, Size
from pynbd.block.permissions import ChildRole, Permission, default_permissions
from pynbd.block.ranges import Ranges

if TYPE_CHECKING:
    from pynbd.block.backend import BlockBackend
    from pynbd.block.child import Child
    from pynbd.block.node import Node


class Location(NamedTuple):
    """Where bytes lie verbatim.

    Args:
        fd: in which open file.
        host_offset: where in it, in bytes.
        length: how many of them.
        flags: for `preadv`, so that it does not wait for a disk: `RWF_NOWAIT`, or 0 where memory is the disk.
        memory: all of the file, where memory is the disk and is mapped. Only the kernel may look at what was never
            written, because it takes memory then: if there is none, a system call fails, and a program is ended.
    """

    fd: int
    host_offset: int
    length: int
    flags: int = os.RWF_NOWAIT
    memory: memoryview | None = None


Filler = Callable[[memoryview], int]
"""Has the kernel put bytes into memory, from its start on, and says how many: none if 0 or less."""


class Room(NamedTuple):
    """Where a `HostWriter` puts bytes.

    Args:
        fd: into which open file.
        places: (offset, length) in it. Bytes go to the first one until it is full, then to the next one.
        fresh: whether they read as zeroes.
        unit: ranges of so many bytes, or multiples of it, may be left out: those behind them move up. 0: every byte has
            its own place.
    """

    fd: int
    places: Ranges
    fresh: bool
    unit: int = 0


class Copied(NamedTuple):
    """What a `HostWriter` has done.

    Args:
        bytes: so many bytes of the ranges are dealt with, from the first one on; of the others it has put none there.
        left_out: which of them it has left out: (how many come before them, how many they are), from the first ones on.
    """

    bytes: int
    left_out: Ranges = ()


HostWriter = Callable[[Room], Copied]
"""Puts bytes into an open file, in a thread. What the file says against it, it raises."""


class Preallocation(Enum):
    """What is done with the space when an image is made or grown."""

    OFF = "off"  # nothing is reserved
    METADATA = "metadata"  # the format's tables are, the data is not
    FALLOC = "falloc"  # space is reserved, not written
    FULL = "full"  # zeroes are written


class ChildSpec(NamedTuple):
    """A child that a driver takes.

    Args:
        role: what it is for.
        optional: whether the driver works without it.
        writable: whether it may be written by a writable parent (a backing file is opened read-only).
    """

    role: ChildRole
    optional: bool = False
    writable: bool = True


FILTERED_CHILD: Mapping[str, ChildSpec] = {"file": ChildSpec(ChildRole.FILTERED | ChildRole.DATA)}
"""What every filter takes: one child, and all that is not overridden goes to it."""


class CreationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every new image takes; each format adds its own. Names are those of `qemu-img create -o`.

    Args:
        size: the length of the disk in bytes.
        preallocation: what is done with the space.
    """

    size: Size = 0
    preallocation: Preallocation = Preallocation.OFF


class ImageInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is worth telling of an image beyond its size (QEMU's `BlockDriverInfo` and `ImageInfoSpecific`).

    `specific` is what QEMU has as the `data` of `ImageInfoSpecific`, by its names: `{"compat": "1.1", …}`.
    """

    cluster_size: int = 0
    vm_state_offset: int = 0
    dirty: bool = False
    encrypted: bool = False
    compressed: bool = False
    specific: dict[str, Any] = {}


Finder = Callable[[int, int], tuple[int, int, int] | None]
"""Says where the bytes of a short read lie: `(offset, length)` gives the open file, the place in it, and the flags for
`preadv`, or None: then `locate` is asked. It holds until whoever asked for it next lets the loop run.
"""


class ReadQueue(Protocol):
    """Short reads of one open file, for which nobody waits: they are told when they have ended."""

    def put(self, offset: int, into: memoryview, ended: Callable[[int], None]) -> None:
        """Add a read; it begins with the next `submit`.

        Args:
            offset: where in the file, in bytes.
            into: memory for the bytes; it is not to be touched until the read has ended.
            ended: called by the event loop or from within `submit`, with how many bytes there were, or the negated
                number of an error. It raises nothing.
        """

    def submit(self) -> None:
        """Begin the reads that were added."""


class WritePlace(NamedTuple):
    """Where writes may be put, all of the disk in its order, until whoever asked next lets the loop run.

    Args:
        fd: in which open file.
        shift: where in it the disk begins, in bytes.
        size: how much of the disk lies there, in bytes: writes end before.
        made: to be told before the loop runs, if any write was made or has failed: where the last of them in the disk
            ends, and the time that all took together, in nanoseconds.
    """

    fd: int
    shift: int
    size: int
    made: Callable[[int, int], None]


class Driver:
    """The base of every driver; see the module's text for the contract.

    Args:
        options: the driver's own `Options`, checked and converted.
    """

    name: ClassVar[str] = ""
    """The driver's name, as in `driver=NAME`; the class's name in lower case, if it gives none."""
    schemes: ClassVar[tuple[str, ...]] = ()
    """The URI schemes that it serves (the seed's `protocol_name`): `nbd+unix` …"""
    Options: ClassVar[type[NodeOptions]] = NodeOptions
    CreateOptions: ClassVar[type[CreationOptions] | None] = None
    """What a new image of this format takes; None if none can be made (see `create_image`)."""
    FurtherCreateOptions: ClassVar[type[msgspec.Struct] | None] = None
    """What a new file in this storage takes besides a size and preallocation (see `create`)."""
    children: ClassVar[Mapping[str, ChildSpec]] = {}
    child_aliases: ClassVar[Mapping[str, str]] = {}
    """Other names under which options may give a child, and the child's own: QEMU's `image` of blkdebug."""
    is_format: ClassVar[bool] = False
    """Lays out bytes over a child, and may be found by probing."""
    serial: ClassVar[bool] = False
    """One call at a time, please."""
    growable: ClassVar[bool] = False
    """Writes past the end make it longer."""
    zero_past_end: ClassVar[bool] = False
    """Reads past the end give zeroes, without help from the block layer."""
    several_processes: ClassVar[Literal["never", "reading", "always"]] = "never"
    """Whether several processes may have the same disk open at once, each with a driver of its own, and clients of all
    see one disk (`pynbd serve --workers`): never, because a process keeps what the others would have to know; only for
    reading; or always: what one has answered to a write, the others read, and a flush of any of them covers it.
    """
    write_flags: int = 0
    """The request flags that `write` itself honours; the block layer does FUA by a flush otherwise."""
    write_zeroes_flags: int = 0
    """The same for `write_zeroes`."""

    limits: Limits = UNLIMITED
    size: int = 0
    """The length of the disk in bytes; to be right once `open` has returned."""
    for_check: bool = False
    """It is opened only to be checked or mended (QEMU's BDRV_O_CHECK): what a check would find is no reason to refuse,
    and nothing is mended unasked. Drivers of the family `Checkable` look at it.
    """
    for_info: bool = False
    """It is opened only to be described (QEMU's BDRV_O_NO_IO): nothing of the disk is read, and no file that an image
    names need be there, or is even looked at.
    """

    node: "Node"

    def __init__(self, options: NodeOptions) -> None:
        self.options = options

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def child(self, name: str) -> "Child":
        """The child of that name, which the driver declared as not optional."""
        return self.node.children[name]

    @property
    def file(self) -> "Child":
        """The child that most formats and all filters have."""
        return self.node.children["file"]

    # --- recognising, naming -------------------------------------------------------------------------------

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """How sure this format is that an image is its own, from 0 (no) to 100.

        Args:
            head: the first bytes of the image (`registry.PROBE_BYTES`, fewer if it is shorter).
            filename: its name, "" if it has none.
        """
        return 0

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """How sure this storage driver is that a file name is a device for it, from 0 (no) to 100."""
        return 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """The options that a URI of one of `schemes` stands for.

        Raises:
            OptionError: the URI is wrong.
        """
        raise errors.OptionError(f"{filename}: the driver {cls.name!r} can't be named by a URI")

    def filename(self) -> str:
        """The name under which this storage could be opened again; "" if it takes more than a name."""
        return ""

    # --- life ----------------------------------------------------------------------------------------------

    async def named_children(self) -> Mapping[str, Any]:
        """Children that the image itself names (a backing file, a data file): descriptions for `Graph.open`, or nodes.

        Asked before `open`, when the children that were given are there. Those that the options gave, or forbade
        (`backing=null`), are not opened from here; the others are, as untrusted: only drivers of an allow-list.

        Raises:
            OSError, BlockError: the image can't be read.
        """
        return {}

    async def open(self) -> None:
        """Get ready. The children are there already; `self.size` and `self.limits` are to be set here.

        Raises:
            OSError, BlockError: it can't be opened; whatever it had taken is released.
        """

    async def close(self) -> None:
        """Release everything. Nothing is in flight, and what had to be flushed was."""

    # --- the data path -------------------------------------------------------------------------------------

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        """Fill `into` with the bytes at `offset`."""
        raise errors.unsupported(self.node.name, f"driver {self.name} can't read")

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        """Put `data` at `offset`."""
        raise errors.unsupported(self.node.name, f"driver {self.name} can't write")

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make a range read as zeroes, more cheaply than by writing them.

        Raises:
            OSError: ENOTSUP if there is no cheaper way, and nothing was changed; the block layer then writes zeroes.
        """
        raise errors.unsupported(self.node.name, f"driver {self.name} has no write_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        """The bytes are no longer needed: a hint, which may be followed partly or not at all."""
        raise errors.unsupported(self.node.name, f"driver {self.name} has no discard")

    async def cache(self, offset: int, length: int) -> None:
        """The bytes will be read soon: a hint."""

    async def flush_to_os(self) -> None:
        """Hand everything that this driver holds back (metadata, buffers) to the nodes below."""

    async def flush_to_disk(self) -> None:
        """Make everything handed to this driver's own storage durable. (Children are flushed by the layer.)"""

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """What this layer holds in a range: extents from `offset` on, at least one, that may stop early.

        The default tells the truth for a driver that knows nothing of holes: it is all data.
        """
        return (Extent(length, Status.DATA | Status.ALLOCATED),)

    def locate(self, offset: int, length: int) -> Location | None:
        """Where the bytes lie verbatim in an open file, as far as this is known without waiting.

        A plain function, asked for every read. Whoever must see each read (or changes the bytes) says None.
        The answer may cover fewer bytes than asked for, and holds until the caller next lets the loop run,
        unless `located_for_good`, or somebody has said `hold_located`.
        """
        return None

    def located_for_good(self) -> bool:
        """Whether what `locate` says stays true as long as the node is open (raw files, not clusters)."""
        return False

    def hold_located(self, revoke: Revoke) -> Release | None:
        """Keep what `locate` says now true for longer.

        For bytes that are sent straight from a file, and are looked at when the client fetches them. Nothing waits for
        whoever holds: space that is given up meanwhile is used again later, that is all.

        Args:
            revoke: called when it can't be held any longer, also more than once; nothing is to be sent from there then.

        Returns:
            what ends it, to be called once; None if that can't be held.
        """
        return hold_nothing if self.located_for_good() else None

    def read_queue(self) -> ReadQueue | None:
        """Who makes short reads that have to wait, of the one file that `locate` names; None if nobody: then `read`
        is called for each. What was located for good is read past this driver so.
        """
        return None

    def finder(self) -> Finder | None:
        """Who says where many short reads lie, quicker than `locate` does for each; None if nobody.

        A plain function, asked once for all reads of a wake-up. What is the same for all of them is looked at here.
        """
        return None

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write a little without waiting, or say no: then `write` is called with the same bytes.

        A plain function, asked for every small write: where the bytes go is known, and the page cache takes them. It
        raises nothing; whatever goes wrong, `write` will find and tell. `data` is valid only during the call. A driver
        that is `growable` is also asked past its end, and sees to its size itself.
        """
        return False

    def place_writes(self) -> WritePlace | None:
        """Where several small writes may be put without waiting, or nowhere: then `write_now` is asked for each.

        A plain function, asked once for all writes of a wake-up: the disk is a file in its whole length, and the page
        cache takes what is written. Whoever gives the same object again spares others the trouble to look at it.
        """
        return None

    def fill_now(self, offset: int, length: int, filler: Filler) -> int | None:
        """Let bytes be put straight into the disk, where memory is the disk, or say no: then `write` is called.

        A plain function, for payloads that are just arriving.

        Args:
            offset, length: the range, in bytes, all of it inside the disk.
            filler: called at most once, and before this returns, with memory that is this range of the disk.

        Returns:
            what the filler says; None if it was not called.

        Raises:
            OSError: what the filler raises; EFAULT if there is no memory left.
        """
        return None

    async def write_by(self, ranges: Ranges, writer: HostWriter) -> int:
        """Let somebody else put bytes where they are to lie in an open file, or say no: then `write` is called.

        For those who have much to write and a way to get it there without the event loop. All of it may be declined,
        and any part at the end; what is written is so when this returns.

        Args:
            ranges: where, at least one.
            writer: called at most once; see `HostWriter`.

        Returns:
            how many bytes of the ranges, from the first one on, are dealt with now. The others are as they were, and
            so are those that `writer` has left out.

        Raises:
            OSError: what `writer` raised; any part may have been written.
        """
        return 0

    # --- size and shape ------------------------------------------------------------------------------------

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        """Change the length.

        Args:
            size: the new length in bytes.
            preallocation: what to do with space that is added.
            exact: the length must be `size`; otherwise longer will do (a block device).
        """
        raise errors.unsupported(self.node.name, f"driver {self.name} can't change its size")

    def child_resized(self, name: str) -> None:
        """A child has another size than before (called for each child before `open`, too)."""

    async def allocated_size(self) -> int | None:
        """Bytes used on the host, None if that can't be told."""
        return await self.file.node.allocated_size() if "file" in self.node.children else None

    def has_zero_init(self) -> bool:
        """Whether a new image of this kind reads as zeroes."""
        return False

    async def info(self) -> ImageInfo:
        """What is worth telling beyond the size."""
        return ImageInfo()

    @classmethod
    async def create(
        cls,
        options: NodeOptions,
        size: int,
        preallocation: Preallocation,
        further: msgspec.Struct | None = None,
    ) -> Sequence[str]:
        """Make a new image.

        Args:
            options: as for opening it.
            size: its length in bytes.
            preallocation: what to do with the space.
            further: of the class's `FurtherCreateOptions`; it is given only to a class that has them.

        Returns:
            what was asked for and could not be had, although the image was made: a sentence for each.

        Raises:
            OSError, BlockError: it can't be made; nothing half-made is left.
        """
        raise errors.OptionError(f"driver {cls.name!r} can't make new images")

    @classmethod
    async def create_image(
        cls, file: "BlockBackend", options: CreationOptions, *, data_file: "BlockBackend | None" = None
    ) -> None:
        """Lay a new image of this format out in a file.

        Args:
            file: where; it may be written and resized, and is empty or is to be overwritten.
            options: of the class's `CreateOptions`.
            data_file: where the guest's bytes go, for formats that can keep them apart.

        Raises:
            OSError, BlockError: it can't be made; the file holds anything.
        """
        raise errors.OptionError(f"format {cls.name!r} can't make new images")

    # --- the graph -----------------------------------------------------------------------------------------

    def child_permissions(self, name: str, held: Permission, shared: Permission) -> tuple[Permission, Permission]:
        """What this node holds and shares on a child, given what its own parents hold and share."""
        return default_permissions(self.children[name].role, held, shared, writable=not self.node.read_only)

    def check_permissions(self, held: Permission, shared: Permission) -> None:
        """May the parents of this node hold and share that? Storage takes its file locks here.

        Raises:
            PermissionConflict: no. Nothing has changed then.
        """

    def commit_permissions(self, held: Permission, shared: Permission) -> None:
        """What was checked last is now so: give up what is no longer needed. Never fails."""

    def abort_permissions(self, held: Permission, shared: Permission) -> None:
        """What was checked last will not be: back to `held` and `shared`. Never fails."""

    def debug_event(self, event: str) -> None:
        """A format above has come to a point (`blkdebug`'s events) where a test may want to interfere."""

    def passes(self, member: str) -> bool:
        """Whether a member of the data path is exactly that of the child `file`: then this node is left out of it."""
        return False


class Filter(Driver):
    """A driver that shows the bytes of its child `file`: what it does not override is the child's.

    Filters are passed over by walks through a chain of images.
    """

    children: ClassVar[Mapping[str, ChildSpec]] = FILTERED_CHILD

    def child_resized(self, name: str) -> None:
        if name == "file":
            self.size = self.file.node.size

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self.file.read(offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self.file.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        await self.file.cache(offset, length)

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        return await self.file.block_status(offset, length)

    def locate(self, offset: int, length: int) -> Location | None:
        # Who overrides `read` wants to see each read; who does not, is not asked (see `passes`).
        return None

    def located_for_good(self) -> bool:
        return self.passes("locate") and self.file.node.driver.located_for_good()

    def hold_located(self, revoke: Revoke) -> Release | None:
        return self.file.node.driver.hold_located(revoke) if self.passes("locate") else None

    def read_queue(self) -> ReadQueue | None:
        return self.file.node.driver.read_queue() if self.passes("locate") else None

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        await self.file.node.truncate(size, preallocation, exact=exact)

    def has_zero_init(self) -> bool:
        return self.file.node.driver.has_zero_init()

    async def info(self) -> ImageInfo:
        return await self.file.node.driver.info()

    def debug_event(self, event: str) -> None:
        self.file.node.driver.debug_event(event)

    def passes(self, member: str) -> bool:
        kind = type(self)
        if member in ("locate", "finder") and kind.read is not Filter.read:
            return False
        # Who wants to be asked for each request must not be passed by many at a time.
        if member == "finder" and kind.locate is not Filter.locate:
            return False
        if member == "place_writes" and kind.write_now is not Filter.write_now:
            return False
        if member in ("write_now", "place_writes", "fill_now", "write_by") and kind.write is not Filter.write:
            return False
        return getattr(kind, member) is getattr(Filter, member)
