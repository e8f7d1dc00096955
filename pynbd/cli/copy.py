"""`pynbd copy SRC DST`: copy any disk to any other, sparsely and with many requests in flight."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynbd.cli.objects import add_object_argument, make_objects
from pynbd.cli.progress import bar

if TYPE_CHECKING:
    from pynbd.block.backend import BlockBackend
    from pynbd.block.graph import Graph
    from pynbd.cli.interruption import Interruption

REQUESTS = 64
"""As nbdcopy's: enough for a server a few milliseconds away, and 16 MiB of buffers."""

REQUEST_SIZE = "256k"
CONNECTIONS = 4

MAX_REQUESTS = 1024
"""More in flight than this only takes memory."""

MAX_REQUEST_BYTES = 32 << 20
"""What every NBD server takes in one request."""

MIN_REQUEST_BYTES = 4096

MAX_BUFFER_BYTES = 1 << 30
"""Buffers of all requests together."""

NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What file systems say that know of no second name for a file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = (
        "Copy a disk. SRC and DST are file names, URIs, driver=… or json:{…}; a file DST that does not exist is made."
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("-f", "--source-format", default="", metavar="FORMAT", help="SRC's format (default: probed)")
    parser.add_argument("-O", "--destination-format", default="", metavar="FORMAT", help="DST's format (default: raw)")
    add_object_argument(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show a progress bar, on a terminal")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help="requests in flight (%(default)s)")
    parser.add_argument(
        "--request-size", default=REQUEST_SIZE, metavar="SIZE", help="largest read and write (%(default)s)"
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=CONNECTIONS,
        metavar="N",
        help="to an NBD server that allows several (%(default)s)",
    )
    parser.add_argument("--allocated", action="store_true", help="make zeroes take space at the destination")
    parser.add_argument(
        "--destination-is-zero", action="store_true", help="the destination reads as zeroes: do not write any"
    )
    parser.add_argument(
        "--flush",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="see that everything is on stable storage at the end (default)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.cli.failure import complete

    return complete("copy", _run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from pynbd.block.graph import Graph
    from pynbd.cli.interruption import Interruption

    request_bytes = _checked(arguments)
    interruption = Interruption()
    graph = Graph(make_objects(arguments.object))
    source_tree = _tree(graph, arguments.source, arguments.source_format, arguments.connections)
    filename = _file_to_make(graph, arguments)
    with interruption.listening():
        async with _disk(graph, source_tree, arguments.source, writing=False) as source:
            if filename is not None:
                async with _new_file(filename, source.size, durable=arguments.flush) as tree:
                    await _copy(graph, arguments, source, tree, request_bytes, interruption, is_zero=True)
            else:
                # What is written must not decide how it is taken when it is opened again.
                raw = "" if _is_description(arguments.destination) else "raw"
                wanted = arguments.destination_format or raw
                tree = _tree(graph, arguments.destination, wanted, arguments.connections)
                is_zero = arguments.destination_is_zero
                await _copy(graph, arguments, source, tree, request_bytes, interruption, is_zero=is_zero)
    return 0


def _checked(arguments: argparse.Namespace) -> int:
    """The request size in bytes, when all numbers are in their ranges."""
    from pynbd.block.errors import OptionError
    from pynbd.block.options import parse_size

    request_bytes = parse_size(arguments.request_size, what="--request-size")
    for what, value, least, most in (
        ("--request-size", request_bytes, MIN_REQUEST_BYTES, MAX_REQUEST_BYTES),
        ("--requests", arguments.requests, 1, MAX_REQUESTS),
        ("--requests times --request-size", arguments.requests * request_bytes, 1, MAX_BUFFER_BYTES),
    ):
        if not least <= value <= most:
            raise OptionError(f"{what}: {value} is not in {least} to {most}")
    if request_bytes % MIN_REQUEST_BYTES:
        raise OptionError(f"--request-size: {request_bytes} is no multiple of {MIN_REQUEST_BYTES}")
    return request_bytes


# --- names ----------------------------------------------------------------------------------------------------


def _is_description(name: str) -> bool:
    """Whether it tells the driver itself, so that no format is to be put over it."""
    return name.startswith(("json:", "driver="))


def _tree(graph: Graph, name: str, format: str, connections: int) -> dict[str, Any]:
    """What a name stands for, with several connections wherever an NBD server is in it."""
    tree = graph.describe(name, format=format)
    _add_connections(tree, connections)
    return tree


def _add_connections(tree: dict[str, Any], connections: int) -> None:
    if tree.get("driver") == "nbd":
        tree.setdefault("connections", connections)
    for value in tree.values():
        if isinstance(value, dict):
            _add_connections(value, connections)


def _file_to_make(graph: Graph, arguments: argparse.Namespace) -> str | None:
    """The destination's file name, if it names a file that does not exist."""
    from pynbd.block.errors import OptionError

    if _is_description(arguments.destination):
        return None
    storage = graph.storage_tree(arguments.destination)
    if storage["driver"] != "file" or os.path.lexists(storage["filename"]):
        return None
    if arguments.destination_format not in ("", "raw"):
        raise OptionError(f"{arguments.destination}: only raw files can be made, not {arguments.destination_format}")
    return str(storage["filename"])


# --- disks ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _disk(
    graph: Graph, tree: dict[str, Any], name: str, *, writing: bool, flush: bool = True
) -> AsyncIterator[BlockBackend]:
    """An open disk, and a user of it that may read or write. It is flushed (if wanted) and closed on leaving."""
    from pynbd.block.backend import BlockBackend
    from pynbd.block.permissions import Permission

    node = await graph.open(tree, read_only=not writing, discard="unmap", cache={"no-flush": not flush})
    backend = BlockBackend(name)
    try:
        # Who else may write to them meanwhile is the business of those who do; it is the size that must stay.
        held = Permission.WRITE if writing else Permission.CONSISTENT_READ
        graph.attach(backend, node, held, Permission.ALL & ~Permission.RESIZE)
        yield backend
    finally:
        if backend.root is not None:
            graph.detach(backend)
        await graph.close(node)


@contextlib.asynccontextmanager
async def _new_file(filename: str, size: int, *, durable: bool) -> AsyncIterator[dict[str, Any]]:
    """The tree of a new raw disk in a file that bears its name only once all went well."""
    from pynbd.block.driver import Preallocation
    from pynbd.block.errors import BlockError
    from pynbd.storage.file import File, FileOptions

    final = Path(filename)
    temporary = final.with_name(f".{final.name[:200]}.{secrets.token_hex(4)}.partial")
    try:
        await File.create(FileOptions(filename=str(temporary)), size, Preallocation.OFF)
    except BlockError as problem:
        raise BlockError(str(problem).replace(str(temporary), filename)) from problem
    try:
        yield {"driver": "raw", "file": {"driver": "file", "filename": str(temporary)}}
        _give_name(temporary, final, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)


def _give_name(temporary: Path, final: Path, *, durable: bool) -> None:
    try:
        # Not a rename: that would silently replace a file that somebody has made meanwhile.
        os.link(temporary, final)
    except OSError as problem:
        if problem.errno not in NO_HARD_LINKS:
            raise OSError(problem.errno, f"{final}: the copy can't be given its name: {problem.strerror}") from None
        temporary.rename(final)
    if durable:
        folder = os.open(final.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- the copy -------------------------------------------------------------------------------------------------


async def _copy(
    graph: Graph,
    arguments: argparse.Namespace,
    source: BlockBackend,
    tree: dict[str, Any],
    request_bytes: int,
    interruption: Interruption,
    *,
    is_zero: bool,
) -> None:
    from pynbd.block.errors import BlockError
    from pynbd.cli.copier import Copier

    name = arguments.destination
    async with _disk(graph, tree, name, writing=True, flush=arguments.flush) as target:
        if target.size < source.size:
            raise BlockError(
                f"{name}: the destination has {target.size} bytes, too few for the {source.size} of {arguments.source}"
            )
        copier = Copier(
            source,
            target,
            requests=arguments.requests,
            request_bytes=request_bytes,
            allocated=arguments.allocated,
            target_is_zero=is_zero,
        )
        shown = arguments.progress and sys.stderr.isatty()
        drawn = bar(source.size, lambda: copier.done_bytes) if shown else contextlib.nullcontext()
        with interruption.stops(copier), drawn:
            await copier.run()
            if copier.stopped:
                raise BlockError(f"interrupted; {name} holds a part of {arguments.source}")
            await target.flush()
