"""The `pynbd` command: one module for each verb, imported when the verb is used."""

import argparse
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from pynbd import __version__

DEFAULT_COLUMNS = 80
"""Where nobody says how wide the terminal is."""


class Verb(NamedTuple):
    """A verb of the command line.

    Args:
        module: has `add_arguments(parser)` and `run(arguments) -> int`; or `main(words) -> int`, see `has_verbs`.
        summary: one line for `pynbd --help`.
        has_verbs: whether it has verbs of its own, and looks at everything that follows its name itself.
    """

    module: str
    summary: str
    has_verbs: bool = False


VERBS = {
    "serve": Verb("pynbd.cli.serve", "serve disks over NBD"),
    "info": Verb("pynbd.cli.info", "tell what a server offers under a URI"),
    "list": Verb("pynbd.cli.list_exports", "list the exports of a server"),
    "copy": Verb("pynbd.cli.copy", "copy a disk, from anything to anything"),
    "img": Verb("pynbd.cli.img", "make, convert and repair disk images, as qemu-img does", has_verbs=True),
    "certs": Verb("pynbd.cli.certs", "make certificates for TLS"),
    "health": Verb("pynbd.cli.health", "tell whether a server answers"),
    "drivers": Verb("pynbd.cli.drivers", "list the drivers and their options"),
}


def _formatter(*, prog: str) -> argparse.HelpFormatter:
    """What prints help: as wide as the terminal.

    argparse makes one for each argument that is declared, and would import shutil to ask how wide that is.
    """
    columns = os.environ.get("COLUMNS", "")
    try:
        width = int(columns) if columns.isdecimal() else os.get_terminal_size(1).columns
    except OSError:  # standard output is no terminal
        width = 0
    return argparse.RawDescriptionHelpFormatter(prog, width=(width or DEFAULT_COLUMNS) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with status 1, as all errors of the command are."""

    more_words_for = ""
    """The argument that takes what stands between and behind options, where argparse would give up."""

    variables = ""
    """How variables of the environment begin that say what the command line does not; there are none if empty."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=_formatter, **arguments)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        self.exit(1, f"{self.prog}: {message.removeprefix('argument ')}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over here, where the verb's options are known."""
        parsed, rest = self._parse(args, namespace)
        options, words = rest, []
        if "--" in rest and self.more_words_for:
            options, words = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        for word in options:
            if word.startswith("-") or not self.more_words_for:
                self.refuse(word)
        if rest:
            setattr(parsed, self.more_words_for, [*getattr(parsed, self.more_words_for), *options, *words])
        return parsed, []

    def _parse(self, args: Any, namespace: Any) -> tuple[Any, list[str]]:
        if self.variables and any(name.startswith(self.variables) for name in os.environ):
            from pynbd.cli.environment import parse_with_environment

            return parse_with_environment(self, self.variables, args, super().parse_known_args)
        return super().parse_known_args(args, namespace)

    def refuse(self, word: str) -> NoReturn:
        """Say that a word means nothing here, and which one was meant most likely."""
        if not word.startswith("-"):
            self.error(f"{word!r} is one argument too many (see {self.prog} --help)")
        import difflib  # for the few who mistype

        option = word.partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        self.error(f"there is no option {option} ({hint})")


def make_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the verb that is used gets its arguments, so that only its module is imported."""
    parser = Parser(
        prog="pynbd",
        description="Software-defined disks: a graph of block drivers, served over NBD.",
        epilog="`pynbd VERB --help` tells more of each verb.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"pynbd {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, entry in VERBS.items():
        below = verbs.add_parser(
            name,
            help=entry.summary,
            description=entry.summary[:1].upper() + entry.summary[1:] + ".",
            add_help=name == verb,
            allow_abbrev=False,
        )
        if name == verb and not entry.has_verbs:
            importlib.import_module(entry.module).add_arguments(below)
    return parser


def command() -> int:
    """What the process `pynbd` does: `main`, and nothing after it."""
    try:
        return main()
    finally:
        # At its end the interpreter looks through all objects for garbage, twice. With all that is imported this takes
        # a third of the time that a small command takes, and then the memory is given back anyway.
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those of the process, if None.

    Returns:
        The exit status: 0, or 1 after an error that was told on stderr (argparse exits by itself, with 1 as well).
    """
    _have_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names are bytes, and what is printed of them is to be pasted: they go out as they came in.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = _run(given)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _have_standard_streams() -> None:
    """Open /dev/null for those that were closed: messages for one must not end in another, or in a disk."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115  # as long as the process lives
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # so is this
    sys.stderr = sys.stderr or open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115  # and this


def _run(given: list[str]) -> int:
    verb = next((word for word in given if not word.startswith("-")), None)
    status: int
    if given and given[0] in VERBS and VERBS[given[0]].has_verbs:
        status = importlib.import_module(VERBS[given[0]].module).main(given[1:])
    else:
        parsed = make_parser(verb if verb in VERBS else None).parse_args(given)
        status = importlib.import_module(VERBS[parsed.verb].module).run(parsed)
    return status
