"""`pynbd img map`: where the bytes of a disk lie, and in which file of its chain."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pynbd.cli.img import arguments as common
from pynbd.cli.walk import walk

if TYPE_CHECKING:
    from pynbd.block.extents import Extent
    from pynbd.block.node import Node
    from pynbd.cli.img.images import Image


class Entry(NamedTuple):
    """A run of bytes that is all alike (QEMU's `MapEntry`). Offsets and lengths are in bytes.

    Args:
        start, length: the run.
        depth: of the layer that decides, 0 the image itself.
        present: whether that layer holds it.
        zero: whether it reads as zeroes.
        data: whether there are bytes for it.
        offset: where they lie in `file`, -1 if that can't be told.
        file: the node of the file.
    """

    start: int
    length: int
    depth: int = 0
    present: bool = False
    zero: bool = False
    data: bool = False
    offset: int = -1
    file: Node | None = None

    def continued_by(self, other: Entry) -> bool:
        """Whether the next run only goes on with this one."""
        if self[2:6] != other[2:6] or self.file is not other.file:
            return False
        return other.offset == (self.offset + self.length if self.offset >= 0 else -1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    common.add_output(parser)
    common.add_force_share(parser)
    parser.add_argument("-s", "--start-offset", default="0", metavar="OFFSET", help="begin there")
    parser.add_argument("-l", "--max-length", metavar="LENGTH", help="end after so many bytes")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.options import MAX_SIZE_BYTES, parse_size
    from pynbd.cli.img.images import open_image

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    start = parse_size(arguments.start_offset, what="--start-offset")
    longest = MAX_SIZE_BYTES
    if arguments.max_length is not None:
        longest = parse_size(arguments.max_length, what="--max-length")
    async with open_image(
        graph,
        filename,
        format=arguments.format,
        image_opts=arguments.image_opts,
        force_share=arguments.force_share,
    ) as image:
        entries = merged(entries_of(image, start, min(image.size, start + longest)), start)
        if arguments.output == "json":
            await _print_json(entries)
        else:
            await _print_human(entries)
    return 0


# --- the entries --------------------------------------------------------------------------------------------------


async def entries_of(image: Image, start: int, end: int) -> AsyncIterator[Entry]:
    """What lies where in [start, end)."""
    last: Entry | None = None

    async def ask(offset: int, length: int) -> Sequence[Entry]:
        return [entry async for entry in _layer(image.node, offset, length, 0)]

    async for entry in walk(ask, start, min(end, image.node.size)):
        start += entry.length
        last = entry
        yield entry
    if start < end:
        # The part of the last sector that is not there: a hole where the file would go on.
        file, offset = (None, -1) if last is None or last.offset < 0 else (last.file, last.offset + last.length)
        yield Entry(start, end - start, present=True, zero=True, offset=offset, file=file)


async def _layer(node: Node, start: int, length: int, depth: int) -> AsyncIterator[Entry]:
    """The same of one layer and those below it; it may stop early, but not before it has told something."""
    from pynbd.block.extents import Status

    told = False
    for extent in await node.layer_status(start, length):
        backing = node.backing()
        if extent.status & (Status.ALLOCATED | Status.DATA | Status.ZERO):
            yield _entry(extent, start, depth)
        elif backing is None or start >= backing.size:
            yield _entry(extent, start, depth)._replace(zero=True)
        else:
            below = 0
            async for entry in _layer(backing, start, min(extent.length, backing.size - start), depth + 1):
                below += entry.length
                yield entry
            if below < extent.length:
                return
        told = True
        start += extent.length
    assert told


def _entry(extent: Extent, start: int, depth: int) -> Entry:
    from pynbd.block.extents import Status

    return Entry(
        start,
        extent.length,
        depth,
        present=bool(extent.status & Status.ALLOCATED),
        zero=bool(extent.status & Status.ZERO),
        data=bool(extent.status & Status.DATA),
        offset=-1 if extent.where is None else extent.host_offset,
        file=extent.where,
    )


async def merged(entries: AsyncIterator[Entry], start: int) -> AsyncIterator[Entry]:
    """The same with neighbours that go on with one another made one; an empty entry at `start` if there are none."""
    last: Entry | None = None
    async for entry in entries:
        if last is not None and last.continued_by(entry):
            last = last._replace(length=last.length + entry.length)
            continue
        if last is not None:
            yield last
        last = entry
    yield Entry(start, 0) if last is None else last


# --- what is told -------------------------------------------------------------------------------------------------


async def _print_json(entries: AsyncIterator[Entry]) -> None:
    between = "["
    async for entry in entries:
        members = {
            "start": entry.start,
            "length": entry.length,
            "depth": entry.depth,
            "present": entry.present,
            "zero": entry.zero,
            "data": entry.data,
        }
        if entry.offset >= 0:
            members["offset"] = entry.offset
        print(f"{between}{{ {json.dumps(members)[1:]}", end="")
        between = ",\n"
    print("]")


async def _print_human(entries: AsyncIterator[Entry]) -> None:
    from pynbd.block.errors import BlockError
    from pynbd.cli.img.images import filename_of

    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    async for entry in entries:
        if not entry.data or entry.zero:
            continue
        if entry.offset < 0 or entry.file is None:
            raise BlockError(
                f"what lies at {entry.start} is compressed, encrypted or in no file, so that it has no place in one; "
                f"--output=json tells of it all the same"
            )
        name = filename_of(entry.file)
        print(f"{_hexadecimal(entry.start)}{_hexadecimal(entry.length)}{_hexadecimal(entry.offset)}{name}")


def _hexadecimal(number: int) -> str:
    # C's %#-16lx, which writes no 0x before a zero.
    return f"{f'{number:#x}' if number else '0':<16}"
