"""`Export`: a node of the graph under a name that clients can ask for, and what they are told of it."""

from collections.abc import Iterable, Sequence

from nbd_protocol.constants import (
    DIRTY,
    MAX_PAYLOAD_BYTES,
    META_BASE_ALLOCATION,
    META_QEMU_ALLOCATION_DEPTH,
    META_QEMU_DIRTY_BITMAP_PREFIX,
    AllocationState,
    TransmissionFlag,
)
from nbd_protocol.negotiation import ExportInfo
from pynbd.block.backend import BlockBackend
from pynbd.block.errors import OptionError
from pynbd.block.extents import ChainExtent, Status

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

    Raises:
        OptionError: the name is too long, or a bitmap does not exist.
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
    ) -> None:
        if len(name.encode()) > MAX_EXPORT_NAME_BYTES:
            raise OptionError(f"export name {name[:40]!r}…: longer than {MAX_EXPORT_NAME_BYTES} bytes")
        for bitmap in bitmaps:
            if bitmap not in backend.node.bitmaps:
                known = ", ".join(backend.node.bitmaps) or "none"
                raise OptionError(f"export {name!r}: there is no bitmap {bitmap!r}; there are: {known}")
        self.name = name
        self.backend = backend
        self.description = description
        self.read_only = read_only or not backend.writable
        self.allocation_depth = allocation_depth
        self.bitmaps = tuple(bitmaps)
        self.min_block = min_block
        self.resize = resize
        self.clients = 0

    @property
    def flags(self) -> TransmissionFlag:
        """What the export is able to, before it is known what a client can take."""
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
        if self.read_only:
            return flags | TransmissionFlag.READ_ONLY
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        return flags | TransmissionFlag.SEND_RESIZE if self.resize else flags

    def info(self) -> ExportInfo:
        """What a client is told that asks for it now."""
        optimal = self.backend.node.driver.limits.optimal_transfer
        preferred = max(PREFERRED_BLOCK_BYTES, self.min_block)
        if optimal and not optimal & (optimal - 1):
            preferred = min(max(preferred, optimal), MAX_PREFERRED_BLOCK_BYTES)
        return ExportInfo(
            size=self.backend.size,
            flags=self.flags,
            canonical_name=self.name,
            description=self.description or None,
            min_block=self.min_block,
            preferred_block=preferred,
            max_payload=MAX_PAYLOAD_BYTES,
        )

    def located_for_good(self) -> bool:
        """Whether what `BlockBackend.locate` says holds as long as the disk is open; see `Driver.located_for_good`."""
        return self.backend.node.driver.located_for_good()

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
        if context.startswith(META_QEMU_DIRTY_BITMAP_PREFIX):
            bitmap = self.backend.node.bitmaps[context.removeprefix(META_QEMU_DIRTY_BITMAP_PREFIX)]
            pairs = ((size, DIRTY if dirty else 0) for size, dirty in bitmap.extents(offset, length))
            return list(joined(pairs, 1 if one else MAX_STATUS_EXTENTS))
        told = depth_flags if context == META_QEMU_ALLOCATION_DEPTH else allocation_flags
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end and len(found) < MAX_STATUS_EXTENTS:
            extents = await self.backend.block_status(offset, end - offset)
            found.extend((extent.length, told(extent)) for extent in extents)
            offset += sum(extent.length for extent in extents)
            if one and len({flags for _, flags in found}) > 1:
                break
        whole = list(joined(found, MAX_STATUS_EXTENTS))
        return aligned(whole, self.min_block) if self.min_block > 1 and told is allocation_flags else whole


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


def aligned(extents: list[tuple[int, int]], block: int) -> list[tuple[int, int]]:
    """`base:allocation` extents with every boundary at a multiple of `block`: a block of several kinds is data."""
    result: list[tuple[int, int]] = []
    rest, flags_of_rest = 0, 0
    for position, (length, flags) in enumerate(extents):
        if rest:
            # Fill the block that was begun; what it mixes can only be called data.
            taken = min(block - rest, length)
            rest += taken
            length -= taken
            flags_of_rest &= flags
            if rest < block and position + 1 < len(extents):
                continue
            result.append((rest, flags_of_rest))
            rest = 0
        whole = length - length % block
        if whole:
            result.append((whole, flags))
        if length - whole:
            rest, flags_of_rest = length - whole, flags
    if rest:
        result.append((rest, flags_of_rest))
    return list(joined(result, len(result)))
