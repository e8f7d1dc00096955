"""Reading compressed clusters, many at once where many are wanted."""

import asyncio
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pynbd.block import pool
from pynbd.block.errors import unsupported
from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.mapping import PACKED, Piece

if TYPE_CHECKING:
    from pynbd.formats.qcow2.reading import ClusterReader

KEPT_CLUSTERS = 16
"""Clusters that were decompressed lately and are kept: readers of 4 KiB come back for the rest of them."""

IN_PLACE_BYTES = 64 << 10
"""Clusters up to this length are decompressed in the event loop if no others are wanted: 0.1 ms, and a trip to a thread
and back takes longer."""


class Packed(NamedTuple):
    """A compressed cluster.

    Args:
        descriptor: what the L2 entry says.
        host: where it lies in the file.
        data: its bytes, and a few that follow.
    """

    descriptor: int
    host: int
    data: memoryview


class Damaged(Exception):
    """Bytes at `host` are not what compression of a cluster gives."""

    def __init__(self, host: int, why: compression.CompressionError) -> None:
        super().__init__(f"compressed data can't be decompressed: {why}")
        self.host = host


class Unpacking:
    """What a reader of clusters does for compressed ones.

    Args:
        reader: whose they are.
    """

    def __init__(self, reader: "ClusterReader") -> None:
        self.reader = reader
        self._kept: dict[int, bytes] = {}
        self._coming: dict[int, asyncio.Future[bytes | None]] = {}
        """Those that a reader is at, for others that want the same."""

    @property
    def keeps(self) -> bool:
        """Whether a cluster that was decompressed is still there."""
        return bool(self._kept)

    def forget(self) -> None:
        """Compressed clusters were given up; what comes to lie there may have the same descriptor."""
        # Other dictionaries: who is reading now must not put into them what lay there before.
        self._kept, self._coming = {}, {}

    async def read(self, offset: int, piece: Piece, into: memoryview) -> int:
        """Read a compressed cluster, and those behind it as long as they are compressed and not too many.

        Args:
            offset: of the disk.
            piece: what lies there, as it was found right before.
            into: what is filled.

        Returns:
            up to where on the disk it was filled.

        Raises:
            OSError: they can't be read, or not be decompressed.
        """
        # Those that are kept now, before anything else happens: see `forget`.
        kept, coming, mapping, end, stop = self._kept, self._coming, self.reader.map, offset + len(into), piece.stop
        if stop == end:
            data = kept.get(piece.host) or await self._unpack_once(piece.host, coming)
            self._take(piece.host, data, offset, into, kept)
            return stop
        parts = [(offset, piece)]
        while stop < end and len(parts) << mapping.bits < compression.BATCH_BYTES:
            following = await mapping.piece(stop, end)
            if following.kind != PACKED:
                break
            parts.append((stop, following))
            stop = following.stop
        found = {part.host: kept[part.host] for _, part in parts if part.host in kept}
        missing = {part.host for _, part in parts if part.host not in found}
        if missing:
            found |= await self._unpack(missing)
        for start, part in parts:
            self._take(part.host, found[part.host], start, into[start - offset : part.stop - offset], kept)
        return stop

    def _take(self, descriptor: int, data: bytes, offset: int, into: memoryview, kept: dict[int, bytes]) -> None:
        """Copy what is wanted of a cluster, and keep it if that is not all of it."""
        within, cluster = offset & (self.reader.map.cluster - 1), self.reader.map.cluster
        into[:] = memoryview(data)[within : within + len(into)]
        if len(into) < cluster and descriptor not in kept:
            while len(kept) >= KEPT_CLUSTERS:
                del kept[next(iter(kept))]
            kept[descriptor] = data

    @functools.cached_property
    def _decompress(self) -> compression.Decompress:
        try:
            return compression.decompressor(self.reader.header.compression_type)
        except compression.CompressionError as problem:
            raise unsupported(self.reader.node.name, str(problem)) from None

    @functools.cached_property
    def _jobs(self) -> pool.Batch:
        """Decompress single clusters that are wanted at the same time."""
        in_place = self.reader.map.cluster <= IN_PLACE_BYTES
        workers = min(compression.processors(), pool.WORKERS)
        return pool.Batch(_unpack_into, always_waits=True, workers=workers, alone_in_place=in_place)

    async def _unpack_once(self, descriptor: int, coming: "dict[int, asyncio.Future[bytes | None]]") -> bytes:
        """A cluster; who wants one that another reader is at waits for that."""
        while (others := coming.get(descriptor)) is not None:
            if (data := await asyncio.shield(others)) is not None:
                return data
        future = coming[descriptor] = asyncio.get_running_loop().create_future()
        data = None
        try:
            data = await self._unpack_one(descriptor)
        finally:
            # If this failed, or its reader was cancelled, the others see for themselves.
            del coming[descriptor]
            future.set_result(data)
        return data

    async def _unpack_one(self, descriptor: int) -> bytes:
        """A cluster by its descriptor: `_unpack` without what only several need."""
        unpack = self._decompress
        host, end = await self._place(descriptor)
        self.reader.storage.node.driver.debug_event("read_compressed")
        packed = await self.reader.image.read_bytes(host, end - host)
        data: list[bytes] = []
        try:
            await self._jobs.run(unpack, packed, self.reader.map.cluster, data)
        except compression.CompressionError as problem:
            raise await self._corrupted(Damaged(host, problem)) from None
        return data[0]

    async def _unpack(self, descriptors: Iterable[int]) -> dict[int, bytes]:
        """Clusters by their descriptors."""
        unpack_all = functools.partial(_unpack_all, self._decompress, self.reader.map.cluster)
        packed = await self._read_packed(descriptors)
        try:
            return dict(await compression.in_threads(unpack_all, packed))
        except Damaged as problem:
            raise await self._corrupted(problem) from None

    async def _corrupted(self, damaged: Damaged) -> OSError:
        return await self.reader.image.corrupted(str(damaged), damaged.host)

    async def _place(self, descriptor: int) -> tuple[int, int]:
        """(offset, end) of a compressed cluster in the file.

        Raises:
            OSError: it lies behind the end.
        """
        host, length = self.reader.map.compressed_place(descriptor)
        end = min(host + length, self.reader.storage.size)
        if end <= host:
            raise await self.reader.image.corrupted("compressed data lie here, behind the end of the file", host)
        return host, end

    async def _read_packed(self, descriptors: Iterable[int]) -> list[Packed]:
        """The bytes that descriptors tell of; those that lie behind one another are read at once."""
        image, storage = self.reader.image, self.reader.storage
        groups: list[list[tuple[int, int, int]]] = []
        group_end = -1
        for (host, end), descriptor in sorted([(await self._place(one), one) for one in descriptors]):
            if host > group_end:
                groups.append([])
                group_end = end
            groups[-1].append((descriptor, host, end))
            group_end = max(group_end, end)
        packed: list[Packed] = []
        for group in groups:
            start, stop = group[0][1], max(end for _, _, end in group)
            storage.node.driver.debug_event("read_compressed")
            data = memoryview(await image.read_bytes(start, stop - start))
            packed += [Packed(descriptor, host, data[host - start : end - start]) for descriptor, host, end in group]
        return packed


def _unpack_into(unpack: compression.Decompress, packed: bytearray, cluster: int, data: list[bytes]) -> None:
    """Decompress one, and add it to `data`; may run in a thread."""
    data.append(unpack(packed, cluster))


def _unpack_all(unpack: compression.Decompress, cluster: int, packed: Sequence[Packed]) -> list[tuple[int, bytes]]:
    """(descriptor, decompressed) of each; runs in a thread."""
    found = []
    for one in packed:
        try:
            found.append((one.descriptor, unpack(one.data, cluster)))
        except compression.CompressionError as problem:
            raise Damaged(one.host, problem) from None
    return found
