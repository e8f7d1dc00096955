"""`--object`: secrets and other objects, for every verb that opens disks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.block.objects import Objects


def add_object_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Let a verb take `--object KIND,id=ID,…`, any number of times; the texts are in `arguments.object`."""
    parser.add_argument(
        "--object",
        action="append",
        default=[],
        metavar="KIND,id=ID,…",
        help="an object that others refer to: secret,id=ID,file=PATH, tls-creds-x509,id=ID,dir=DIR … (repeatable)",
    )


def make_objects(texts: Iterable[str]) -> Objects:
    """The objects that the command line describes, for a `Graph`; each may refer to those before it.

    Raises:
        OptionError: one is wrong.
        OSError: a file that one names can't be read.
    """
    from pynbd.block import objects

    made = objects.Objects()
    for text in texts:
        made.make(objects.parse(text))
    return made
