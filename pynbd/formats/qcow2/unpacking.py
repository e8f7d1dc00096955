"""Reading compressed clusters, many at once where many are wanted."""

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pynbd.block.errors import unsupported
from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.mapping import PACKED, Piece

if TYPE_CHECKING:
    from pynbd.formats.qcow2.reading import ClusterReader

KEPT_CLUSTERS = 16
"""Clusters that were decompressed lately and are kept: readers of 4 KiB come back for the rest of them."""


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

    @property
    def keeps(self) -> bool:
        """Whether a cluster that was decompressed is still there."""
        return bool(self._kept)

    def forget(self) -> None:
        """Compressed clusters were given up; what comes to lie there may have the same descriptor."""
        # Another dictionary: who is reading now must not put into it what lay there before.
        self._kept = {}

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
        kept, mapping, end, stop = self._kept, self.reader.map, offset + len(into), piece.stop
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
            within, length = start & (mapping.cluster - 1), part.stop - start
            into[start - offset : part.stop - offset] = memoryview(found[part.host])[within : within + length]
            if length < mapping.cluster and part.host not in kept:
                while len(kept) >= KEPT_CLUSTERS:
                    del kept[next(iter(kept))]
                kept[part.host] = found[part.host]
        return stop

    async def _unpack(self, descriptors: Iterable[int]) -> dict[int, bytes]:
        """Clusters by their descriptors."""
        try:
            unpack = compression.decompressor(self.reader.header.compression_type)
        except compression.CompressionError as problem:
            raise unsupported(self.reader.node.name, str(problem)) from None
        packed = await self._read_packed(descriptors)
        unpack_all = functools.partial(_unpack_all, unpack, self.reader.map.cluster)
        try:
            return dict(await compression.in_threads(unpack_all, packed))
        except Damaged as problem:
            raise await self.reader.image.corrupted(str(problem), problem.host) from None

    async def _read_packed(self, descriptors: Iterable[int]) -> list[Packed]:
        """The bytes that descriptors tell of; those that lie behind one another are read at once."""
        image, storage = self.reader.image, self.reader.storage
        groups: list[list[tuple[int, int, int]]] = []
        group_end = -1
        for (host, length), descriptor in sorted((self.reader.map.compressed_place(one), one) for one in descriptors):
            end = min(host + length, storage.size)
            if end <= host:
                raise await image.corrupted("compressed data lie here, behind the end of the file", host)
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


def _unpack_all(unpack: compression.Decompress, cluster: int, packed: Sequence[Packed]) -> list[tuple[int, bytes]]:
    """(descriptor, decompressed) of each; runs in a thread."""
    found = []
    for one in packed:
        try:
            found.append((one.descriptor, unpack(one.data, cluster)))
        except compression.CompressionError as problem:
            raise Damaged(one.host, problem) from None
    return found
