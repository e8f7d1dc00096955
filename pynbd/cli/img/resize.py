"""`pynbd img resize`: another size for a disk."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Sequence

from pynbd.cli.img import arguments as common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME [+|-]SIZE")
    common.add_image(parser)
    parser.add_argument(
        "--preallocation",
        default="off",
        choices=common.PREALLOCATION_MODES,
        help="what is done with space that is added (off)",
    )
    parser.add_argument("--shrink", action="store_true", help="allow what is behind the new end to be lost")
    common.add_quiet(parser)


def protect(words: Sequence[str]) -> Sequence[str]:
    """The words, with a size like `-1G` at their end kept from being taken for an option."""
    if "--" not in words and words and words[-1][:1] == "-" and words[-1][1:2].isdigit():
        return [*words[:-1], "--", words[-1]]
    return words


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.driver import Preallocation
    from pynbd.block.errors import BlockError, OptionError
    from pynbd.block.options import MAX_SIZE_BYTES, parse_size
    from pynbd.cli.img.images import open_image
    from pynbd.cli.interruption import Interruption

    graph = common.new_graph(arguments)
    filename, text = common.expect(arguments.words, 2, "an image file name and a size")
    relative = text[0] if text[:1] in ("+", "-") else ""
    amount = parse_size(text.removeprefix(relative), what="size")
    async with open_image(
        graph, filename, format=arguments.format, image_opts=arguments.image_opts, resizing=True, writing=True
    ) as image:
        before = image.size
        size = {"": amount, "+": before + amount, "-": before - amount}[relative]
        if not 0 < size <= MAX_SIZE_BYTES:
            raise OptionError(f"size: {text!r} would be {size} bytes; it must be 1 to {MAX_SIZE_BYTES}")
        if size < before and not arguments.shrink:
            raise BlockError(
                f"{filename}: from {before} to {size} bytes: whatever lies behind the new end would be lost; --shrink "
                f"allows that"
            )
        preallocation = Preallocation(arguments.preallocation)
        if size <= before and preallocation is not Preallocation.OFF:
            raise OptionError(f"--preallocation={arguments.preallocation}: only for a disk that grows")
        try:
            with Interruption().listening():
                await image.backend.truncate(size, preallocation, exact=True)
        except OSError as problem:
            if problem.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise BlockError(f"{filename}: this image can't be resized so: {problem.strerror}") from problem
            raise
    if not arguments.quiet:
        print("Image resized.")
    return 0
