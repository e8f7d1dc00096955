"""`pynbd img info`: what an image is, and the chain of its backing files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.graph import Graph
    from pynbd.block.node import Node

MAX_CHAIN = 10_000
"""Images of a chain that are told of, at the most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    common.add_output(parser)
    common.add_force_share(parser)
    parser.add_argument("--backing-chain", action="store_true", help="tell of all backing files, too")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.cli.img.images import describe

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    chain = [info async for info in _chain(graph, tree, arguments)]
    if arguments.output == "json":
        from pynbd.cli.img import qemu_json

        print(qemu_json.pretty(chain if arguments.backing_chain else chain[0]))
    else:
        print("\n\n".join("\n".join(human_lines(info)) for info in chain))
    return 0


async def _chain(graph: Graph, tree: Mapping[str, Any], arguments: argparse.Namespace) -> Any:
    """The facts about an image and, if wanted, its backing files, each opened alone."""
    from pynbd.block.errors import BlockError
    from pynbd.cli.img.images import open_node

    seen: set[str] = set()
    trusted = True
    while True:
        async with open_node(
            graph, {"backing": None, **tree}, force_share=arguments.force_share, trusted=trusted, for_info=True
        ) as node:
            info = await facts(node)
        if info["filename"] in seen or len(seen) >= MAX_CHAIN:
            raise BlockError(f"Backing file '{info['filename']}' creates an infinite loop.")
        seen.add(info["filename"])
        yield info
        if not arguments.backing_chain or "full-backing-filename" not in info:
            return
        below, below_format = info["full-backing-filename"], info.get("backing-filename-format", "")
        tree = graph.describe(below, format=below_format, trusted=False)
        trusted = False


# --- the facts ----------------------------------------------------------------------------------------------------


async def facts(node: Node) -> dict[str, Any]:
    """What QEMU's `ImageInfo` has of an open node, by its names."""
    from pynbd.block.families import Snapshots
    from pynbd.cli.img.images import filename_of, whole_sectors

    driver, told = node.driver, await node.info()
    found: dict[str, Any] = {
        "filename": filename_of(node),
        "format": driver.name,
        "virtual-size": whole_sectors(node.size),
        "dirty-flag": told.dirty,
    }
    allocated = await node.allocated_size()
    if allocated is not None:
        found["actual-size"] = allocated
    flags = {"encrypted": told.encrypted, "compressed": told.compressed, "cluster-size": told.cluster_size}
    found.update({name: value for name, value in flags.items() if value})
    if driver.is_format and told.specific and driver.name != "raw":
        found["format-specific"] = {"type": driver.name, "data": told.specific}
    found.update(backing_facts(node))
    if isinstance(driver, Snapshots):
        snapshots = [snapshot_facts(snapshot) for snapshot in driver.snapshot_list()]
        if snapshots:
            found["snapshots"] = snapshots
    return found


def backing_facts(node: Node) -> dict[str, str]:
    """The backing file as the image names it, and the name under which it is found from here."""
    from pynbd.block.families import Backed
    from pynbd.block.image_names import named_from

    if not isinstance(node.driver, Backed):
        return {}
    name, name_format = node.driver.backing_name()
    if not name:
        return {}
    found = {"backing-filename": name, "full-backing-filename": named_from(node.filename(), name)}
    if name_format:
        found["backing-filename-format"] = name_format
    return found


def snapshot_facts(snapshot: Any) -> dict[str, Any]:
    """What QEMU's `SnapshotInfo` has of a snapshot."""
    found = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_s,
        "date-nsec": snapshot.date_ns,
        "vm-clock-sec": snapshot.vm_clock_ns // 10**9,
        "vm-clock-nsec": snapshot.vm_clock_ns % 10**9,
    }
    if snapshot.icount is not None:
        found["icount"] = snapshot.icount
    return found


# --- for people ---------------------------------------------------------------------------------------------------


def human_lines(info: Mapping[str, Any]) -> Iterator[str]:
    """What `info` prints of an image."""
    from pynbd.cli.img.sizes import size_text

    size = info["virtual-size"]
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {size_text(size)} ({size} bytes)"
    yield f"disk size: {size_text(info['actual-size']) if 'actual-size' in info else 'unavailable'}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info["dirty-flag"]:
        yield "cleanly shut down: no"
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        yield f"backing file: {name}" + (f" (actual path: {full})" if full != name else "")
        if "backing-filename-format" in info:
            yield f"backing file format: {info['backing-filename-format']}"
    if "snapshots" in info:
        yield "Snapshot list:"
        yield from snapshot_lines(info["snapshots"])
    if "format-specific" in info:
        yield "Format specific information:"
        yield from _dumped(info["format-specific"]["data"], 1)


def snapshot_lines(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of snapshots, with its heading."""
    yield f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"
    for snapshot in snapshots:
        yield _snapshot_line(snapshot)


def _snapshot_line(snapshot: Mapping[str, Any]) -> str:
    import time

    from pynbd.cli.img.sizes import size_text

    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    seconds, milliseconds = snapshot["vm-clock-sec"], snapshot["vm-clock-nsec"] // 10**6
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    size = size_text(snapshot["vm-state-size"])
    icount = str(snapshot.get("icount", ""))
    return f"{snapshot['id']:<9} {snapshot['name']:<16} {size:>8} {date:>19} {clock:>12} {icount:>10}"


def _dumped(tree: Any, depth: int) -> Iterator[str]:
    """A tree of options, one line for each value, deeper levels indented."""
    from pynbd.cli.img.qemu_json import in_order

    blanks = "    " * depth
    items = (
        [(key.replace("-", " "), value) for key, value in in_order(tree)]
        if isinstance(tree, Mapping)
        else [(f"[{number}]", value) for number, value in enumerate(tree)]
    )
    for name, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield f"{blanks}{name}:"
            yield from _dumped(value, depth + 1)
        else:
            yield f"{blanks}{name}: {str(value).lower() if isinstance(value, bool) else value}"
