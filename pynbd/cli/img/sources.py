"""What is copied: several images behind one another, or what an image has over its backing file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from pynbd.block.extents import ChainExtent, Status

if TYPE_CHECKING:
    from pynbd.block.driver import Location
    from pynbd.block.node import Node
    from pynbd.cli.img.images import Image


class Concatenation:
    """Images behind one another.

    Args:
        images: at least one.
    """

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = images
        self._starts = [0, *accumulate(image.size for image in images)]

    @property
    def size(self) -> int:
        """The length of all together in bytes."""
        return self._starts[-1]

    def _at(self, offset: int) -> int:
        """The number of the image that a byte lies in."""
        return bisect_right(self._starts, offset) - 1

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`, from several images if need be."""
        while into:
            number = self._at(offset)
            length = min(len(into), self._starts[number + 1] - offset)
            await self._images[number].read(offset - self._starts[number], into[:length])
            offset += length
            into = into[length:]

    def locate(self, offset: int, length: int) -> Location | None:
        """Where the bytes lie verbatim, as far as one image goes."""
        number = self._at(offset)
        length = min(length, self._starts[number + 1] - offset)
        return self._images[number].locate(offset - self._starts[number], length)

    async def block_status(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What lies where, as far as one image goes."""
        number = self._at(offset)
        length = min(length, self._starts[number + 1] - offset)
        return await self._images[number].block_status(offset - self._starts[number], length)


class Above:
    """What an image holds above a base.

    Args:
        image: the image.
        base: the backing file where it ends; None for all that the image shows.
    """

    def __init__(self, image: Image, base: Node | None) -> None:
        self._image = image
        self._base = base

    @property
    def size(self) -> int:
        """The length of the disk in bytes."""
        return self._image.size

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""
        await self._image.read(offset, into)

    def locate(self, offset: int, length: int) -> Location | None:
        """Where the bytes lie verbatim."""
        return self._image.locate(offset, length)

    async def block_status(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What lies where; of depth 0 is what the base has already."""
        return await self._image.block_status(offset, length, self._base)


class Top(Above):
    """What an image has over its backing file, for a target with a backing file that holds the rest.

    Args:
        image: the image.
        backing_bytes: the length of the target's backing file; behind it the target reads as zeroes.
    """

    def __init__(self, image: Image, backing_bytes: int) -> None:
        super().__init__(image, image.node.backing())
        self._backing_bytes = backing_bytes

    async def block_status(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What lies where; of depth 0 is what the target shows without being written to."""
        if offset < self._backing_bytes:
            return await super().block_status(offset, min(length, self._backing_bytes - offset))
        found = await super().block_status(offset, length)
        return [ChainExtent(extent.length, Status.NONE, 0) if extent.zero else extent for extent in found]
