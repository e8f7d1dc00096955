"""Reading what an L1 table leads to: the disk of an image, or that of one of its snapshots."""

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pynbd.block.child import Child
from pynbd.block.driver import Driver, Finder, Location
from pynbd.block.errors import io_error
from pynbd.block.extents import Extent, Status
from pynbd.block.holding import Release, Revoke, hold_all
from pynbd.block.options import NodeOptions
from pynbd.formats.qcow2.header import Header
from pynbd.formats.qcow2.holes import has_many_holes
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.mapping import DATA, NOWHERE, PACKED, ZEROES, ClusterMapping, Piece
from pynbd.formats.qcow2.unpacking import Unpacking

if TYPE_CHECKING:
    from pynbd.formats.qcow2.encryption import Encryption

MAX_STATUS_RUNS = 1024
"""Extents in one answer of block_status."""


class ClusterReader(Driver):
    """The part of a driver that reads clusters. What lies nowhere comes from the child `backing`, if there is one."""

    header: Header
    image: Image
    map: ClusterMapping
    storage: Child
    """Where the image lies."""
    guest_file: Child
    """Where the guest's bytes lie: there, or in the data file."""

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.encryption: Encryption | None = None
        self.unpacking = Unpacking(self)
        self._asks_for_holes: bool | None = None
        """Found out once, when somebody wants to know."""

    def locate(self, offset: int, length: int) -> Location | None:
        if self.encryption is not None:
            return None
        end = offset + length
        if end > self.size:
            end = self.size
        elif host := self.map.host_of(offset, length):
            if host > 0:
                return self.guest_file.locate(host, length)
            # What lies behind the end of the layer below is not there: it locates less, or nothing.
            below = self.node.children.get("backing")
            return None if below is None else below.locate(offset, length)
        if offset >= end:
            return None
        found = self.map.lookup(offset, end)
        if found is None:
            return None
        if found.kind == DATA:
            return self.guest_file.locate(found.host, found.stop - offset)
        if found.kind == NOWHERE and (backing := self.node.children.get("backing")) is not None:
            inside = min(found.stop, backing.size) - offset
            return backing.locate(offset, inside) if inside > 0 else None
        return None

    def hold_located(self, revoke: Revoke) -> Release | None:
        own = self.image.given_up.hold(revoke)
        return hold_all(revoke, self.guest_file, self.node.children.get("backing"), own=own)

    def finder(self) -> Finder | None:
        file = None if self.encryption is not None else self.guest_file.locate(0, self.guest_file.size)
        if file is None or file.length != self.guest_file.size:
            return None
        backing = self.node.children.get("backing")
        below = None if backing is None else backing.finder() or located_by(backing.locate)
        return self.map.finder(self.size, file, below)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        start, end = offset, offset + len(into)
        while start < end:
            epoch = self.image.given_up.begin_read()
            try:
                piece = await self.map.piece(start, end)
                if piece.kind == PACKED:
                    start = await self.unpacking.read(start, piece, into[start - offset :])
                else:
                    await self.read_piece(start, piece, into[start - offset : piece.stop - offset])
                    start = piece.stop
            finally:
                self.image.given_up.end_read(epoch)

    async def read_piece(self, offset: int, piece: Piece, into: memoryview) -> None:
        """Read bytes of the disk that are all alike."""
        if piece.kind == DATA:
            self.storage.node.driver.debug_event("read_aio")
            if self.encryption is None:
                await self.guest_file.read(piece.host, into, 0)
            else:
                await self._read_encrypted(offset, piece.host, into)
        elif piece.kind == NOWHERE:
            await self.read_below(offset, into)
        elif piece.kind == PACKED:
            await self.unpacking.read(offset, piece, into)
        else:
            into[:] = bytes(len(into))

    async def _read_encrypted(self, offset: int, host: int, into: memoryview) -> None:
        assert self.encryption is not None
        if self.encryption.cipher is None:
            raise io_error(errno.ENOKEY, self.node.name, "read without encrypt.key-secret")
        await self.guest_file.read(host, into, 0)
        await self.encryption.decrypt(offset, host, into)

    async def read_below(self, offset: int, into: memoryview) -> None:
        """Read what lies under this image."""
        backing = self.node.children.get("backing")
        inside = min(max(backing.size - offset, 0), len(into)) if backing is not None else 0
        if inside and backing is not None:
            self.storage.node.driver.debug_event("read_backing_aio")
            await backing.read(offset, into[:inside], 0)
        if inside < len(into):
            into[inside:] = bytes(len(into) - inside)

    async def cache(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            piece = await self.map.piece(offset, end)
            if piece.kind == DATA:
                await self.guest_file.cache(piece.host, piece.stop - offset)
            elif piece.kind == NOWHERE and "backing" in self.node.children:
                await self.child("backing").cache(offset, piece.stop - offset)
            offset = piece.stop

    async def asks_for_holes(self) -> bool:
        """Whether the file with the guest's bytes is asked for zeroes in clusters of data: a data file always is."""
        if self._asks_for_holes is None:
            allocated = None if self.header.has_data_file else await self.storage.node.allocated_size()
            self._asks_for_holes = self.header.has_data_file or (
                allocated is not None and await has_many_holes(self.image.refcounts, self.storage.size, allocated)
            )
        return self._asks_for_holes

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        found: list[Extent] = []
        end = offset + length
        verbatim = self.guest_file.node if self.encryption is None else None
        data = Status.DATA | Status.ALLOCATED
        if await self.asks_for_holes():
            data |= Status.RECURSE
        while offset < end and len(found) < MAX_STATUS_RUNS:
            empty_until = self.map.without_tables(offset, end)
            if empty_until > offset:
                found.append(Extent(empty_until - offset, Status.NONE))
                offset = empty_until
                continue
            piece = await self.map.piece(offset, end)
            run = piece.stop - offset
            if piece.kind == DATA:
                status = data
            elif piece.kind == PACKED:
                status = Status.DATA | Status.ALLOCATED
            else:
                status = Status.ZERO | Status.ALLOCATED if piece.kind == ZEROES else Status.NONE
            if verbatim is not None and (piece.kind == DATA or piece.allocated):
                found.append(Extent(run, status, verbatim, piece.host))
            else:
                found.append(Extent(run, status))
            offset = piece.stop
        return found


def located_by(locate: Callable[[int, int], Location | None]) -> Finder:
    """A finder that asks `locate` each time."""

    def find(offset: int, length: int) -> tuple[int, int, int] | None:
        found = locate(offset, length)
        return None if found is None or found.length != length else (found.fd, found.host_offset, found.flags)

    return find
