"""New images: what is asked for, checked before anything is made, and the making."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from pynbd.block import options as opt
from pynbd.block import registry
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import CreationOptions, Driver, Preallocation
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.graph import Graph
from pynbd.block.image_names import named_from, names_itself
from pynbd.block.permissions import Permission
from pynbd.cli.img.images import whole_sectors

FILES = ("file", "host_device")
"""Storage that can be named where a format is: the bytes of a disk lie in it as they are."""


class NewImage(NamedTuple):
    """An image that is to be made.

    Args:
        kind: its format.
        format: how that was named.
        filename: as it was given.
        storage: the tree of the storage that it will lie in.
        options: checked.
        further: what the storage takes besides, if it takes anything; checked.
        given: the same as they were written, and what was added to them.
    """

    kind: type[Driver]
    format: str
    filename: str
    storage: dict[str, Any]
    options: CreationOptions
    further: msgspec.Struct | None
    given: Mapping[str, Any]


def format_class(name: str) -> type[Driver]:
    """The driver of a format that new images can be made in; for the names of files and devices themselves, `raw`.

    Raises:
        OptionError: there is none, or it can't make images.
    """
    kind = registry.driver_class("raw" if name in FILES else name)
    if not kind.is_format:
        raise OptionError(f"{name!r} is no image format")
    if kind.CreateOptions is None:
        raise OptionError(f"format {name!r} can't make new images")
    return kind


def takes(kind: type[Driver], option: str) -> bool:
    """Whether new images of a format take an option."""
    fields = msgspec.structs.fields(kind.CreateOptions) if kind.CreateOptions is not None else ()
    return any(field.encode_name == option for field in fields)


def plan(graph: Graph, filename: str | None, format: str, given: Mapping[str, Any]) -> NewImage:
    """Check what is asked for.

    Args:
        graph: where it will be opened.
        filename: where it will lie, a name or a URI; None if it will not be made.
        format: the format's name.
        given: options of the new image, `size` among them.

    Raises:
        OptionError: it can't be made so.
    """
    if filename is not None and not filename:
        raise OptionError("the name of the new image is empty")
    if filename is not None and filename.startswith("json:"):
        raise OptionError(f"{filename}: a new image is named by a file name or a URI, not by options")
    kind = format_class(format)
    for option, what in (("backing_file", "a backing file"), ("backing_fmt", "the format of a backing file")):
        if option in given and not takes(kind, option):
            raise OptionError(f"format {format!r} has no place for {what}")
    backing = given.get("backing_file")
    if filename and backing and names_itself(filename, backing):
        raise OptionError(f"{filename}: an image can't be its own backing file")
    assert kind.CreateOptions is not None
    storage = graph.storage_tree(filename) if filename else {}
    if format in FILES and storage and storage["driver"] != format:
        raise OptionError(f"{filename} is nothing for driver {format!r}, but for {storage['driver']!r}")
    further, own = _of_storage(storage, given)
    options = opt.convert(own, kind.CreateOptions, driver=format)
    return NewImage(kind, format, filename or "", storage, options, further, given)


def storage_class(tree: Mapping[str, Any]) -> type[Driver]:
    """The driver of some storage, that of files if nobody says which."""
    return registry.driver_class(str(tree.get("driver", "file")))


def _of_storage(tree: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[msgspec.Struct | None, dict[str, Any]]:
    """(options that a storage takes besides, None if it has none; the others).

    Raises:
        OptionError: one of the storage's is wrong.
    """
    kind = storage_class(tree)
    if kind.FurtherCreateOptions is None:
        return None, dict(given)
    names = {field.encode_name for field in msgspec.structs.fields(kind.FurtherCreateOptions)}
    wanted = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    return opt.convert(wanted, kind.FurtherCreateOptions, driver=kind.name), others


async def make(graph: Graph, new: NewImage) -> None:
    """Make an image.

    Raises:
        OSError, BlockError: it can't be made. A file that was not there before is removed again.
    """
    with removed_after_failure(new):
        await _make(graph, new)


async def _make(graph: Graph, new: NewImage) -> None:
    async with contextlib.AsyncExitStack() as made:
        file = await made.enter_async_context(_new_storage(graph, new.storage, new.further))
        name = getattr(new.options, "data_file", None)
        data_file = None
        if name:
            tree = graph.storage_tree(name)
            further, _ = _of_storage(tree, new.given)
            data_file = await made.enter_async_context(_new_storage(graph, tree, further))
        await new.kind.create_image(file, new.options, data_file=data_file)


@contextlib.asynccontextmanager
async def _new_storage(
    graph: Graph, tree: dict[str, Any], further: msgspec.Struct | None
) -> AsyncIterator[BlockBackend]:
    """A user of new, empty storage. What could not be had of what was asked for is told on stderr."""
    kind = registry.driver_class(str(tree["driver"]))
    options = {key: value for key, value in tree.items() if key != "driver"}
    if kind.create.__func__ is not Driver.create.__func__:  # type: ignore[attr-defined]  # bound class methods
        wanted = opt.convert(options, kind.Options, driver=kind.name)
        more = () if further is None else (further,)
        for problem in await kind.create(wanted, 0, Preallocation.OFF, *more) or ():
            print(f"warning: {tree.get('filename', kind.name)}: {problem}", file=sys.stderr)
    node = await graph.open(tree, read_only=False, discard="unmap")
    try:
        backend = BlockBackend(f"new image {tree.get('filename', kind.name)}")
        held = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        graph.attach(backend, node, held, Permission.CONSISTENT_READ)
        try:
            yield backend
        finally:
            graph.detach(backend)
    finally:
        await graph.close(node)


@contextlib.contextmanager
def removed_after_failure(new: NewImage) -> Iterator[None]:
    """Remove the files of a new image if the block fails, as far as they were not there before it.

    Of a symbolic link to a file that was not there, that file is removed, and the link stays.
    """
    names = [new.storage.get("filename"), getattr(new.options, "data_file", None)]
    files = [os.path.realpath(name) for name in names if isinstance(name, str) and name]
    fresh = [file for file in files if not os.path.lexists(file)]
    try:
        yield
    except BaseException:
        for file in fresh:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(file)  # noqa: PTH108  # importing pathlib takes longer than all this
        raise


async def backing_size(graph: Graph, image: str, backing: str, format: str) -> int:
    """The length of the disk in a backing file, in bytes.

    Args:
        graph: where it is opened.
        image: the file name of the image over it, from which a relative name starts.
        backing: the name of the backing file.
        format: its format.

    Raises:
        OSError, BlockError: it can't be opened.
    """
    from pynbd.cli.img.images import describe, open_node

    name = named_from(image, backing)
    try:
        async with open_node(graph, describe(graph, name, format, image_opts=False), force_share=True) as node:
            return whole_sectors(node.size)
    except (OSError, BlockError) as problem:
        raise BlockError(f"the backing file can't be opened: {problem}") from problem
