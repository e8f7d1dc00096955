"""The `pynbd` command: one module for each verb, imported when the verb is used."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pynbd import __version__


class Verb(NamedTuple):
    """A verb of the command line.

    Args:
        module: has `add_arguments(parser)` and `run(arguments) -> int`.
        summary: one line for `pynbd --help`.
    """

    module: str
    summary: str


VERBS = {
    "serve": Verb("pynbd.cli.serve", "serve disks over NBD"),
    "info": Verb("pynbd.cli.info", "tell what a server offers under a URI"),
    "list": Verb("pynbd.cli.list_exports", "list the exports of a server"),
    "copy": Verb("pynbd.cli.copy", "copy a disk, from anything to anything"),
    "drivers": Verb("pynbd.cli.drivers", "list the drivers and their options"),
}


def make_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the verb that is used gets its arguments, so that only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="pynbd",
        description="Software-defined disks: a graph of block drivers, served over NBD.",
        epilog="`pynbd VERB --help` tells more of each verb.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"pynbd {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, entry in VERBS.items():
        below = verbs.add_parser(
            name,
            help=entry.summary,
            description=entry.summary[:1].upper() + entry.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name == verb,
        )
        if name == verb:
            importlib.import_module(entry.module).add_arguments(below)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those of the process, if None.

    Returns:
        The exit status: 0, or 1 after an error that was told on stderr (argparse exits with 2 by itself).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in given if not word.startswith("-")), None)
    parsed = make_parser(verb if verb in VERBS else None).parse_args(given)
    try:
        status: int = importlib.import_module(VERBS[parsed.verb].module).run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
