"""`pynbd img snapshot`: internal snapshots, listed, made, applied and deleted."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pynbd.cli.img import arguments as common

if TYPE_CHECKING:
    from pynbd.block.node import Node


class Once(argparse.Action):
    """What may be asked for only once: the second name would take the place of the first unseen."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{self.option_strings[0]} is given twice")
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    common.add_words(parser, "FILENAME")
    common.add_image(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-l", dest="list", action="store_true", help="list them (this is done if nothing else is said)")
    what.add_argument("-c", dest="create", action=Once, metavar="NAME", help="keep what the disk holds now")
    what.add_argument(
        "-a", dest="apply", action=Once, metavar="SNAPSHOT", help="let the disk hold again what it held then"
    )
    what.add_argument("-d", dest="delete", action=Once, metavar="SNAPSHOT", help="forget one")
    common.add_quiet(parser)
    common.add_force_share(parser)


async def run(arguments: argparse.Namespace) -> int:
    """Carry the verb out; its exit status."""
    from pynbd.block.drain import drained
    from pynbd.block.errors import BlockError
    from pynbd.block.families import Snapshots
    from pynbd.cli.img.images import describe, open_node

    graph = common.new_graph(arguments)
    (filename,) = common.expect(arguments.words, 1, "one image file name")
    tree = describe(graph, filename, arguments.format, image_opts=arguments.image_opts)
    changes = any(name is not None for name in (arguments.create, arguments.apply, arguments.delete))
    async with open_node(graph, tree, writing=changes, force_share=arguments.force_share) as node:
        if not changes:
            _list(node)
            return 0
        if not isinstance(node.driver, Snapshots):
            raise BlockError(f"{filename}: format {node.driver.name!r} has no snapshots")
        async with drained(node):
            if arguments.create is not None:
                await node.driver.snapshot_create(arguments.create)
            elif arguments.apply is not None:
                await node.driver.snapshot_goto(arguments.apply)
            else:
                # By its name only, as qemu-img does it: what is a name to a script must not be another one's number.
                ids = [known.id for known in node.driver.snapshot_list() if known.name == arguments.delete]
                if not ids:
                    raise BlockError(f"{filename}: there is no snapshot named {arguments.delete!r}")
                await node.driver.snapshot_delete(ids[0])
    return 0


def _list(node: Node) -> None:
    from pynbd.block.families import Snapshots
    from pynbd.cli.img.info import snapshot_facts, snapshot_lines

    found = node.driver.snapshot_list() if isinstance(node.driver, Snapshots) else ()
    if found:
        print("Snapshot list:")
        print("\n".join(snapshot_lines([snapshot_facts(snapshot) for snapshot in found])))
