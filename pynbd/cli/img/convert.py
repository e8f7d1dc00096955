"""`pynbd img convert`: copy a disk into an image of any format."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.bitmaps import DirtyBitmap
    from pynbd.block.graph import Graph
    from pynbd.cli.copier import Copier
    from pynbd.cli.img.creation import NewImage
    from pynbd.cli.img.images import Image
    from pynbd.cli.img.sources import Concatenation, Top
    from pynbd.cli.interruption import Interruption
    from pynbd.cli.progress import Progress

MAX_COROUTINES = 16
DEFAULT_COROUTINES = 8

PIECE_BYTES = 2 << 20
"""The largest read and write."""

MAX_SPARSE_BYTES = 16 << 20
SECTOR_BYTES = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME [FILENAME2 …] OUTPUT")
    common.add_image(parser)
    _add_target_arguments(parser)
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="copy an internal snapshot")
    parser.add_argument("-S", dest="sparse", metavar="SIZE", help="zeroes shorter than this are data (4k; 0: all are)")
    parser.add_argument(
        "-m", dest="coroutines", type=common.integer, default=DEFAULT_COROUTINES, metavar="N", help="at once (8)"
    )
    parser.add_argument("-W", dest="any_order", action="store_true", help="write in any order")
    parser.add_argument("-C", dest="offload", action="store_true", help="accepted; the copy is the usual one")
    parser.add_argument("-r", dest="rate", metavar="SIZE", help="bytes per second, at the most")
    parser.add_argument("--salvage", action="store_true", help="take what can't be read for zeroes")
    parser.add_argument("--bitmaps", action="store_true", help="copy persistent bitmaps, too")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="leave inconsistent bitmaps out")
    common.add_cache(parser, "-T", "source_cache", "writeback", "the source")
    common.add_force_share(parser)
    common.add_progress(parser)
    common.add_quiet(parser)


def _add_target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-O", dest="target_format", metavar="FORMAT", help="format of OUTPUT (raw)")
    common.add_creation_options(parser)
    parser.add_argument("-B", dest="backing", metavar="FILE", help="backing file of OUTPUT; what it has is not copied")
    parser.add_argument("-F", dest="backing_format", metavar="FORMAT", help="format of the backing file")
    parser.add_argument("-c", dest="compressed", action="store_true", help="store compressed")
    parser.add_argument("-n", dest="no_create", action="store_true", help="write into an image that is there")
    parser.add_argument("--target-image-opts", action="store_true", help="OUTPUT is driver=…,file.filename=…")
    parser.add_argument("--target-is-zero", action="store_true", help="OUTPUT reads as zeroes already")
    common.add_cache(parser, "-t", "cache", "unsafe", "the target")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.cli.img import create
    from pynbd.cli.interruption import Interruption
    from pynbd.cli.progress import Progress

    if common.asks_for_help(arguments.options):
        output = arguments.words[-1] if len(arguments.words) > 1 else ""
        print("\n".join(create.option_lines(arguments.target_format or "raw", output)))
        return 0
    graph = common.new_graph(arguments)
    check(arguments)
    interruption = Interruption()
    with interruption.listening(), Progress(wanted=arguments.progress and not arguments.quiet) as progress:
        progress.tell(0)
        async with contextlib.AsyncExitStack() as opened:
            sources = [
                await opened.enter_async_context(_source(graph, arguments, name)) for name in arguments.words[:-1]
            ]
            await _convert(graph, arguments, sources, interruption, progress)
        progress.tell(100)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that make no sense together.

    Raises:
        OptionError: they do not.
    """
    from pynbd.block.errors import OptionError

    if len(arguments.words) < 2:
        raise OptionError("expected the names of one image or more, and of the output")
    several = len(arguments.words) > 2
    for wrong, why in (
        (not 1 <= arguments.coroutines <= MAX_COROUTINES, f"-m: the number must be 1 to {MAX_COROUTINES}"),
        (arguments.target_is_zero and not arguments.no_create, "--target-is-zero is of use with -n only"),
        (arguments.target_image_opts and not arguments.no_create, "--target-image-opts is of use with -n only"),
        (arguments.target_image_opts and arguments.target_format, "--target-image-opts and -O exclude each other"),
        (arguments.no_create and arguments.options, "-o has no effect on an image that is there (-n)"),
        (arguments.offload and arguments.sparse is not None, "-C and -S exclude each other"),
        (arguments.offload and arguments.salvage, "-C and --salvage exclude each other"),
        (arguments.offload and arguments.compressed, "-C and -c exclude each other"),
        (several and arguments.snapshot is not None, "-l: snapshots of several images can't be put together"),
        (several and arguments.bitmaps, "--bitmaps: those of several images can't be put together"),
        (
            arguments.skip_broken_bitmaps and not arguments.bitmaps,
            "--skip-broken-bitmaps is of use with --bitmaps only",
        ),
    ):
        if wrong:
            raise OptionError(why)
    sparse_bytes(arguments)
    common.cache_mode(arguments.cache)


def sparse_bytes(arguments: argparse.Namespace) -> int:
    """How long zeroes must be to be left out; 0 if none are."""
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_size
    from pynbd.cli.zero_runs import BLOCK_BYTES

    if arguments.sparse is None:
        return BLOCK_BYTES
    size = parse_size(arguments.sparse, what="-S")
    if size % SECTOR_BYTES or size > MAX_SPARSE_BYTES:
        raise OptionError(f"-S: {size} is no multiple of {SECTOR_BYTES} up to {MAX_SPARSE_BYTES}")
    return size


@contextlib.asynccontextmanager
async def _source(graph: Graph, arguments: argparse.Namespace, name: str) -> AsyncIterator[Image]:
    from pynbd.block.permissions import Permission
    from pynbd.cli.img.images import open_image

    async with open_image(
        graph,
        name,
        format=arguments.format,
        image_opts=arguments.image_opts,
        force_share=arguments.force_share,
        cache=arguments.source_cache,
        # What is copied while it changes is neither what was there before nor what is there after it.
        shared=Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED,
        snapshot=arguments.snapshot,
    ) as image:
        yield image


# --- the target ---------------------------------------------------------------------------------------------------


async def _convert(
    graph: Graph,
    arguments: argparse.Namespace,
    sources: Sequence[Image],
    interruption: Interruption,
    progress: Progress,
) -> None:
    from pynbd.cli.img import bitmap_copies, creation
    from pynbd.cli.img.images import attached, describe, open_node
    from pynbd.cli.img.sources import Concatenation

    output = arguments.words[-1]
    bitmaps: Sequence[DirtyBitmap] = ()
    if arguments.bitmaps:
        bitmaps = bitmap_copies.bitmaps_of(sources[0].node, skip_broken=arguments.skip_broken_bitmaps)
    source = Concatenation(sources)
    async with contextlib.AsyncExitStack() as opened:
        if arguments.no_create:
            tree = describe(graph, output, arguments.target_format or "", image_opts=arguments.target_image_opts)
            if not arguments.target_image_opts and not arguments.target_format:
                tree = {"driver": "raw", **tree} if "driver" not in tree else tree
        else:
            new = await _planned(graph, arguments, source.size, several=len(sources) > 1)
            opened.enter_context(creation.removed_after_failure(new))
            await creation.make(graph, new)
            tree = _tree_of(new)
        discard = "unmap" if sparse_bytes(arguments) else "ignore"
        node = await opened.enter_async_context(
            open_node(graph, tree, writing=True, cache=arguments.cache, discard=discard)
        )
        target = await opened.enter_async_context(attached(graph, node, output, writing=True, cache=arguments.cache))
        if arguments.bitmaps:
            bitmap_copies.check_target(node, bitmaps)
        copier = await _copier(arguments, sources, source, target)
        with interruption.stops(copier), progress.follow(source.size, lambda: copier.done_bytes):
            await copier.run()
            if copier.stopped:
                raise interruption.stopped(f"{target.name} holds a part of the disk")
            await target.backend.flush()
        await bitmap_copies.copy_bitmaps(graph, bitmaps, node)


async def _planned(graph: Graph, arguments: argparse.Namespace, size: int, *, several: bool) -> NewImage:
    """The image that is to be made.

    Raises:
        OptionError: it can't be made so.
    """
    from pynbd.block import registry
    from pynbd.block.errors import OptionError
    from pynbd.block.requests import RequestFlag
    from pynbd.cli.img import creation

    given = common.parse_creation_options(arguments.options)
    if arguments.backing is not None:
        given["backing_file"] = arguments.backing
    if arguments.backing_format is not None:
        given["backing_fmt"] = arguments.backing_format
    name = arguments.target_format or "raw"
    new = creation.plan(graph, arguments.words[-1], name, {**given, "size": str(size)})
    if arguments.compressed and not registry.driver_class(name).write_flags & RequestFlag.COMPRESSED:
        raise OptionError(f"format {name!r} can't store anything compressed")
    if given.get("backing_file"):
        if several:
            raise OptionError("a target with a backing file can't be made of several images")
        if "backing_fmt" not in given:
            raise OptionError("a backing file needs its format: give it with -F")
    return new


def _tree_of(new: NewImage) -> dict[str, Any]:
    """How a new image is opened: with the secret that it was made with."""
    tree: dict[str, Any] = {"driver": new.kind.name, "file": new.storage}
    if "key-secret" in new.given:
        tree["key-secret"] = new.given["key-secret"]
    encryption = new.given.get("encrypt")
    if isinstance(encryption, dict):
        tree["encrypt"] = {key: value for key, value in encryption.items() if key in ("format", "key-secret")}
    return tree


# --- the copy -----------------------------------------------------------------------------------------------------


async def _copier(
    arguments: argparse.Namespace, sources: Sequence[Image], whole: Concatenation, target: Image
) -> Copier:
    """What copies the sources to the target.

    Raises:
        BlockError: the target is too small.
    """
    from pynbd.block.errors import BlockError
    from pynbd.block.options import parse_size
    from pynbd.block.requests import RequestFlag
    from pynbd.cli.copier import Copier
    from pynbd.cli.img.sources import Top
    from pynbd.cli.pump import Pump

    if target.node.size < whole.size:
        raise BlockError(f"{target.name}: it has {target.node.size} bytes, too few for the {whole.size} of the source")
    source: Concatenation | Top = whole
    backing = target.node.backing()
    if arguments.backing is not None and backing is not None:
        source = Top(sources[0], backing.size)
    sparse = sparse_bytes(arguments)
    cluster = (await target.node.info()).cluster_size
    unit = cluster if arguments.compressed else 1
    new_zeroes = not arguments.no_create and backing is None and target.node.driver.has_zero_init()
    is_zero = new_zeroes or arguments.target_is_zero
    block = max(sparse, unit)
    pump = None
    if not arguments.compressed and Pump.takes(block if sparse else 0):
        pump = Pump(source.locate, block_bytes=block if sparse else 0, cluster_bytes=cluster, skips_zeroes=is_zero)
    return Copier(
        source,
        target.backend,
        requests=arguments.coroutines,
        request_bytes=PIECE_BYTES,
        zeroes_as_data=not sparse,
        target_is_zero=is_zero,
        block_bytes=block,
        unit=unit,
        in_order=not arguments.any_order and target.node.driver.name != "raw",
        flags=int(RequestFlag.COMPRESSED) if arguments.compressed else 0,
        salvage=arguments.salvage,
        bytes_per_s=parse_size(arguments.rate, what="-r") if arguments.rate is not None else 0,
        pump=pump,
    )
