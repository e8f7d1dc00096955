"""`pynbd img dd`: copy a part of a disk into a new image, with the operands of dd."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.extents import ChainExtent
    from pynbd.cli.img.images import Image

OPERANDS = ("bs", "count", "if", "of", "skip")

DEFAULT_BLOCK_BYTES = 512
MAX_BLOCK_BYTES = (1 << 31) - 1

REQUESTS = 8
PIECE_BYTES = 2 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "[bs=SIZE] [count=N] [skip=N] if=INPUT of=OUTPUT")
    common.add_image(parser)
    parser.add_argument("-O", dest="target_format", default="raw", metavar="FORMAT", help="format of OUTPUT (raw)")
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.cli.img import creation
    from pynbd.cli.img.images import attached, open_image, open_node, whole_sectors

    graph = common.new_graph(arguments)
    operands = parse_operands(arguments.words)
    block_bytes, count, skip = numbers(operands)
    async with open_image(
        graph,
        operands["if"],
        format=arguments.format,
        image_opts=arguments.image_opts,
        force_share=arguments.force_share,
    ) as image:
        part = Part(image, *_range(image, block_bytes, count, skip))
        new = creation.plan(graph, operands["of"], arguments.target_format, {"size": str(whole_sectors(part.size))})
        with creation.removed_after_failure(new):
            await creation.make(graph, new)
            tree = {"driver": new.kind.name, "file": new.storage}
            async with (
                open_node(graph, tree, writing=True, discard="unmap") as node,
                attached(graph, node, operands["of"], writing=True) as target,
            ):
                await _copy(part, target)
    return 0


def parse_operands(words: Sequence[str]) -> dict[str, str]:
    """The operands by name.

    Raises:
        OptionError: one is unknown, or a file is missing.
    """
    from pynbd.block.errors import OptionError

    operands = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in OPERANDS:
            raise OptionError(f"there is no operand {name!r}; there are: {', '.join(OPERANDS)}")
        operands[name] = value
    if "if" not in operands or "of" not in operands:
        raise OptionError("both if=INPUT and of=OUTPUT are needed")
    return operands


def numbers(operands: dict[str, str]) -> tuple[int, int | None, int]:
    """(bytes of a block, blocks, blocks that are left out at the beginning).

    Raises:
        OptionError: one is no number, or out of range.
    """
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_size

    block_bytes = parse_size(operands.get("bs", str(DEFAULT_BLOCK_BYTES)), what="bs")
    if not 1 <= block_bytes <= MAX_BLOCK_BYTES:
        raise OptionError(f"bs: {block_bytes} is not in 1 to {MAX_BLOCK_BYTES}")
    count = parse_size(operands["count"], what="count") if "count" in operands else None
    return block_bytes, count, parse_size(operands.get("skip", "0"), what="skip")


def _range(image: Image, block_bytes: int, count: int | None, skip: int) -> tuple[int, int]:
    """(start, end) of what is copied: as qemu-img has it, `count` counts from the beginning of the disk."""
    end = image.size if count is None else min(count * block_bytes, image.size)
    if skip * block_bytes > end:
        print(f"pynbd img dd: {image.name}: there are no {skip} blocks to be left out", file=sys.stderr)
        return end, end
    return skip * block_bytes, end


class Part:
    """A part of an image, which is copied.

    Args:
        image: the image.
        start, end: the part.
    """

    def __init__(self, image: Image, start: int, end: int) -> None:
        self._image = image
        self._start = start
        self.size = end - start

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""
        await self._image.read(self._start + offset, into)

    async def block_status(self, offset: int, length: int) -> Sequence[ChainExtent]:
        """What lies where."""
        return await self._image.block_status(self._start + offset, length)


async def _copy(part: Part, target: Image) -> None:
    from pynbd.cli.copier import Copier
    from pynbd.cli.interruption import Interruption

    copier = Copier(
        part,
        target.backend,
        requests=REQUESTS,
        request_bytes=PIECE_BYTES,
        target_is_zero=target.node.driver.has_zero_init(),
        in_order=target.node.driver.name != "raw",
    )
    interruption = Interruption()
    with interruption.listening(), interruption.stops(copier):
        await copier.run()
        if copier.stopped:
            raise interruption.stopped(f"{target.name} holds a part of the disk")
        await target.backend.flush()
