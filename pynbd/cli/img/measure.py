"""`pynbd img measure`: how large a new image would be."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.backend import BlockBackend
    from pynbd.block.families import Measurement
    from pynbd.block.graph import Graph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "[--size SIZE | FILENAME]")
    common.add_image(parser)
    common.add_output(parser)
    parser.add_argument("-O", dest="target_format", default="raw", metavar="FORMAT", help="format of the image (raw)")
    common.add_creation_options(parser)
    parser.add_argument("--size", metavar="SIZE", help="an empty disk of that size")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="an internal snapshot of FILENAME")
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_size
    from pynbd.cli.img.images import open_image

    graph = common.new_graph(arguments)
    size = parse_size(arguments.size, what="--size") if arguments.size is not None else None
    if len(arguments.words) > 1:
        common.expect(arguments.words, 1, "at most one image file name")
    if (size is None) != bool(arguments.words):
        raise OptionError("either --size or the name of an image is needed")
    if size is not None and (arguments.image_opts or arguments.format or arguments.snapshot):
        raise OptionError("--image-opts, -f and -l tell of an image, and there is none")
    async with contextlib.AsyncExitStack() as opened:
        source = None
        if size is None:
            image = await opened.enter_async_context(
                open_image(
                    graph,
                    arguments.words[0],
                    format=arguments.format,
                    image_opts=arguments.image_opts,
                    force_share=arguments.force_share,
                    snapshot=arguments.snapshot,
                )
            )
            size, source = image.size, image.backend
        tell(await _measure(graph, arguments, size, source), arguments.output)
    return 0


async def _measure(graph: Graph, arguments: argparse.Namespace, size: int, source: BlockBackend | None) -> Measurement:
    from pynbd.block.errors import OptionError
    from pynbd.block.families import Measurable
    from pynbd.cli.img import creation

    given = {**common.parse_creation_options(arguments.options), "size": str(size)}
    new = creation.plan(graph, None, arguments.target_format, given)
    kind: Any = new.kind
    if not issubclass(kind, Measurable):
        raise OptionError(f"format {kind.name!r} can't tell how large an image would be")
    measured: Measurement = await kind.measure(new.options, source)
    return measured


def tell(measured: Measurement, output: str) -> None:
    """Print what was measured."""
    from pynbd.cli.img import qemu_json

    names = {"required": "required size", "fully-allocated": "fully allocated size", "bitmaps": "bitmaps size"}
    values = {
        "required": measured.required,
        "fully-allocated": measured.fully_allocated,
        "bitmaps": measured.bitmaps,
    }
    known = {name: value for name, value in values.items() if value is not None}
    if output == "json":
        print(qemu_json.pretty(known))
    else:
        print("\n".join(f"{names[name]}: {value}" for name, value in known.items()))
