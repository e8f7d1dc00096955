"""`pynbd img check`: whether an image's own structures are sound, and mending them.

The exit status is 0 if they are (or were mended), 1 if that can't be told, 2 if the image is corrupt, 3 if clusters
have leaked, and 63 if the format has nothing to check.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.families import CheckResult
    from pynbd.block.node import Node

NOT_CHECKED = 1
CORRUPT = 2
LEAKED = 3
NOTHING_TO_CHECK = 63


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    common.add_force_share(parser)
    common.add_cache(parser, "-T", "cache", "writeback", "the image")
    parser.add_argument("-r", "--repair", choices=("leaks", "all"), help="mend leaks only, or all")


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.families import Checkable, Repair
    from pynbd.cli.img.images import describe, filename_of, open_node

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    repair = Repair(arguments.repair) if arguments.repair else Repair.NOTHING
    # What lies below is no business of this image's structures, and may be missing.
    async with open_node(
        graph,
        {"backing": None, **tree},
        writing=repair is not Repair.NOTHING,
        cache=arguments.cache,
        force_share=arguments.force_share,
        for_check=True,
    ) as node:
        if not isinstance(node.driver, Checkable):
            print(f"pynbd img check: {filename}: format {node.driver.name!r} has nothing to check", file=sys.stderr)
            return NOTHING_TO_CHECK
        result = await _check(node, repair, quiet=arguments.quiet or arguments.output == "json")
        facts = facts_of(result, filename_of(node), node.driver.name)
    if arguments.quiet:
        pass
    elif arguments.output == "json":
        from pynbd.cli.img import qemu_json

        print(qemu_json.pretty(facts))
    else:
        print(human_text(result), end="")
    return status_of(result)


async def _check(node: Node, repair: Any, *, quiet: bool) -> CheckResult:
    """What a check found; after repairs, what a second one found, with what the first one mended."""
    from pynbd.block.families import Repair

    result = await _checked(node, repair)
    if not (result.leaks_fixed or result.corruptions_fixed):
        return result
    if not quiet:
        print(
            f"The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n"
            f"    {result.corruptions_fixed} corruptions\n\n"
            f"Double checking the fixed image now..."
        )
    again = await _checked(node, Repair.NOTHING)
    again.leaks_fixed, again.corruptions_fixed = result.leaks_fixed, result.corruptions_fixed
    return again


async def _checked(node: Node, repair: Any) -> CheckResult:
    from pynbd.block.drain import drained
    from pynbd.block.families import Checkable

    assert isinstance(node.driver, Checkable)
    async with drained(node):
        result = await node.driver.check(repair)
    for message in result.messages:
        print(message, file=sys.stderr)
    return result


def status_of(result: CheckResult) -> int:
    """The exit status that tells what was found."""
    if result.check_errors:
        return NOT_CHECKED
    return CORRUPT if result.corruptions else LEAKED if result.leaks else 0


def facts_of(result: CheckResult, filename: str, format: str) -> dict[str, Any]:
    """What QEMU's `ImageCheck` has, by its names."""
    found = {"filename": filename, "format": format, "check-errors": result.check_errors}
    counts = {
        "image-end-offset": result.image_end_offset,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return {**found, **{name: count for name, count in counts.items() if count}}


def human_text(result: CheckResult) -> str:
    """What is told of a check, in the lines that scripts know."""
    lines = []
    if not (result.corruptions or result.leaks or result.check_errors):
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines += [
            "",
            f"{result.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if result.leaks:
        lines += [
            "",
            f"{result.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if result.check_errors:
        lines += ["", f"{result.check_errors} internal errors have occurred during the check."]
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        lines.append(
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * result.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * result.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "".join(f"{line}\n" for line in lines)
