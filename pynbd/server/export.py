"""`Export`: a node of the graph under a name that clients can ask for, and what they are told of it."""

from collections.abc import Callable, Iterable, Sequence
from operator import and_, or_

from nbd_protocol.constants import (
    DIRTY,
    MAX_PAYLOAD_BYTES,
    META_BASE_ALLOCATION,
    META_QEMU_ALLOCATION_DEPTH,
    META_QEMU_DIRTY_BITMAP_PREFIX,
    AllocationState,
    TransmissionFlag,
)
from nbd_protocol.negotiation import MAX_MIN_BLOCK_BYTES, ExportInfo
from pynbd.block.backend import BlockBackend
from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.driver import ReadQueue
from pynbd.block.errors import OptionError
from pynbd.block.extents import ChainExtent, Status
from pynbd.block.node import Node
from pynbd.server.access import AccessList

MAX_STATUS_EXTENTS = 16384
"""Extents of one answer to BLOCK_STATUS; it may stop early, and the client asks for the rest."""

MAX_EXPORT_NAME_BYTES = 4096
"""The specification's limit for strings."""

PREFERRED_BLOCK_BYTES = 4096
MAX_PREFERRED_BLOCK_BYTES = 2 << 20


class Export:
    """A disk as clients see it.

    Args:
        name: what they ask for; "" is the default export.
        backend: attached to the node; the export's permissions are the backend's.
        description: for people who list the exports.
        read_only: whether clients may not write, whatever the backend may.
        allocation_depth: whether `qemu:allocation-depth` can be asked for.
        bitmaps: names of the node's dirty bitmaps that can be asked for.
        min_block: the block size that requests must be multiples of, in bytes.
        resize: whether clients may resize it (experimental in the protocol).
        access: which clients may use it, and which may write; None: all may.

    Raises:
        OptionError: the name is too long, a bitmap does not exist, or `min_block` is no power of two up to 64 KiB.
    """

    def __init__(
        self,
        name: str,
        backend: BlockBackend,
        *,
        description: str = "",
        read_only: bool = False,
        allocation_depth: bool = False,
        bitmaps: Sequence[str] = (),
        min_block: int = 1,
        resize: bool = False,
        access: AccessList | None = None,
    ) -> None:
        if len(name.encode()) > MAX_EXPORT_NAME_BYTES:
            raise OptionError(f"export name {name[:40]!r}…: longer than {MAX_EXPORT_NAME_BYTES} bytes")
        if min_block & (min_block - 1) or not 1 <= min_block <= MAX_MIN_BLOCK_BYTES:
            raise OptionError(f"min-block: {min_block} is no power of two from 1 to {MAX_MIN_BLOCK_BYTES}")
        known = bitmaps_of(backend.node)
        for bitmap in bitmaps:
            if bitmap not in known:
                names = ", ".join(known) or "none"
                raise OptionError(f"export {name!r}: there is no bitmap {bitmap!r}; there are: {names}")
            if known[bitmap].inconsistent:
                what = f"bitmap {bitmap!r} is inconsistent, for its image was not closed properly"
                raise OptionError(f"export {name!r}: {what}: it can only be removed")
        self.name = name
        self.backend = backend
        self.description = description
        self.read_only = read_only or not backend.writable
        self.allocation_depth = allocation_depth
        self.bitmaps = {bitmap: known[bitmap] for bitmap in bitmaps}
        self.min_block = min_block
        self.resize = resize
        self.access = access or AccessList()
        self.clients = 0

    @property
    def flags(self) -> TransmissionFlag:
        """What the export is able to, before it is known what a client can take."""
        return self._flags(self.read_only)

    def _flags(self, read_only: bool) -> TransmissionFlag:
        # A flush covers every write that was answered, on whatever connection: nodes count writes, not connections.
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_DF
            | TransmissionFlag.SEND_CACHE
            | TransmissionFlag.CAN_MULTI_CONN
            | TransmissionFlag.BLOCK_STATUS_PAYLOAD
        )
        if read_only:
            return flags | TransmissionFlag.READ_ONLY
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        return flags | TransmissionFlag.SEND_RESIZE if self.resize else flags

    def info(self, *, read_only: bool = False) -> ExportInfo:
        """What a client is told that asks for it now.

        Args:
            read_only: whether this client may not write, whatever others may.
        """
        optimal = self.backend.node.driver.limits.optimal_transfer
        preferred = max(PREFERRED_BLOCK_BYTES, self.min_block)
        if optimal and not optimal & (optimal - 1):
            preferred = min(max(preferred, optimal), MAX_PREFERRED_BLOCK_BYTES)
        return ExportInfo(
            size=self.backend.size,
            flags=self._flags(self.read_only or read_only),
            canonical_name=self.name,
            description=self.description or None,
            min_block=self.min_block,
            preferred_block=preferred,
            max_payload=MAX_PAYLOAD_BYTES,
        )

    def located_for_good(self) -> bool:
        """Whether what `BlockBackend.locate` says holds as long as the disk is open; see `Driver.located_for_good`."""
        return self.backend.node.driver.located_for_good()

    def read_queue(self) -> ReadQueue | None:
        """Who makes short reads of a file that have to wait; see `Driver.read_queue`."""
        driver = self.backend.node.driver
        return driver.read_queue() if driver.located_for_good() else None

    # --- metadata contexts --------------------------------------------------------------------------------

    def contexts(self) -> list[str]:
        """The metadata contexts that can be asked for."""
        names = [META_BASE_ALLOCATION]
        if self.allocation_depth:
            names.append(META_QEMU_ALLOCATION_DEPTH)
        return names + [META_QEMU_DIRTY_BITMAP_PREFIX + bitmap for bitmap in self.bitmaps]

    async def context_extents(self, context: str, offset: int, length: int, *, one: bool) -> list[tuple[int, int]]:
        """(length, status flags) of a range in one metadata context, from `offset` on; it may stop early.

        Args:
            context: one of `contexts()`.
            offset, length: the range in bytes, inside the disk, not empty.
            one: a single extent is enough.

        Raises:
            OSError: what lies where could not be told.
        """
        end = offset + length
        if context.startswith(META_QEMU_DIRTY_BITMAP_PREFIX):
            bitmap = self.bitmaps[context.removeprefix(META_QEMU_DIRTY_BITMAP_PREFIX)]
            pairs = ((size, DIRTY if dirty else 0) for size, dirty in bitmap.extents(offset, length))
            most = 1 if one and self.min_block == 1 else MAX_STATUS_EXTENTS
            return aligned(list(joined(pairs, most)), self.min_block, or_, length)
        told, mixed = (depth_flags, nearest) if context == META_QEMU_ALLOCATION_DEPTH else (allocation_flags, and_)
        found: list[tuple[int, int]] = []
        while offset < end and len(found) < MAX_STATUS_EXTENTS:
            extents = await self.backend.block_status(offset, end - offset)
            found.extend((extent.length, told(extent)) for extent in extents)
            offset += sum(extent.length for extent in extents)
            if one and any(told(extent) != found[0][1] for extent in extents):
                break
        return aligned(list(joined(found, MAX_STATUS_EXTENTS)), self.min_block, mixed, length)


def bitmaps_of(node: Node) -> dict[str, DirtyBitmap]:
    """The dirty bitmaps of a disk, also those below filters; the nearest, where there are two of a name."""
    found = dict(node.bitmaps)
    while node.is_filter:
        node = node.children["file"].node
        found = {**node.bitmaps, **found}
    return found


def allocation_flags(extent: ChainExtent) -> int:
    """`base:allocation` of an extent."""
    hole = 0 if extent.status & Status.DATA else AllocationState.HOLE
    return int(hole | (AllocationState.ZERO if extent.status & Status.ZERO else 0))


def depth_flags(extent: ChainExtent) -> int:
    """`qemu:allocation-depth` of an extent."""
    return extent.depth


def joined(pairs: Iterable[tuple[int, int]], most: int) -> Iterable[tuple[int, int]]:
    """Neighbours with the same flags made one; at most `most` of them."""
    size, last, count = 0, -1, 0
    for length, flags in pairs:
        if flags == last:
            size += length
            continue
        if size:
            yield size, last
            count += 1
            if count == most:
                return
        size, last = length, flags
    if size:
        yield size, last


def nearest(one: int, other: int) -> int:
    """`qemu:allocation-depth` of a block that has some of both: the layer nearest to the top that holds any of it."""
    return min(one, other) or max(one, other)


def aligned(
    extents: list[tuple[int, int]], block: int, mixed: Callable[[int, int], int], length: int
) -> list[tuple[int, int]]:
    """Extents with every boundary at a multiple of `block`, but for the end of the range.

    Args:
        extents: (length, flags) from a multiple of `block` on; they may stop early.
        block: bytes.
        mixed: the flags of a block that has some of each; if these stop in the middle of one, 0 counts as the rest.
        length: of the range.
    """
    if block == 1:
        return extents
    result: list[tuple[int, int]] = []
    rest, flags_of_rest = 0, 0
    for size, flags in extents:
        length -= size
        if rest:
            # Fill the block that was begun.
            taken = min(block - rest, size)
            rest += taken
            size -= taken
            flags_of_rest = mixed(flags_of_rest, flags)
            if rest < block:
                continue
            result.append((rest, flags_of_rest))
            rest = 0
        if size >= block:
            result.append((size - size % block, flags))
        rest, flags_of_rest = size % block, flags
    if rest and not length:
        result.append((rest, flags_of_rest))
    elif rest and not result:
        result.append((min(block, rest + length), mixed(flags_of_rest, 0)))
    return list(joined(result, len(result)))
