"""`pynbd img`: the verbs of qemu-img, with its flags, its exit statuses and its output.

Each verb is one module with `add_arguments(parser)` and `async run(arguments) -> int`, imported when it is used. What
scripts read (standard output and the exit status) is as qemu-img has it; what people read is not.
"""

import gc
import importlib
import signal
from collections.abc import Sequence

from pynbd import __version__
from pynbd.cli import Parser, Verb

VERBS = {
    "amend": Verb("pynbd.cli.img.amend", "change options of an image"),
    "bench": Verb("pynbd.cli.img.bench", "time requests to a disk"),
    "bitmap": Verb("pynbd.cli.img.bitmap", "change the dirty bitmaps that an image keeps"),
    "check": Verb("pynbd.cli.img.check", "tell whether an image is sound, and mend it"),
    "commit": Verb("pynbd.cli.img.commit", "write what an image holds into its backing file"),
    "compare": Verb("pynbd.cli.img.compare", "tell whether two images hold the same disk"),
    "convert": Verb("pynbd.cli.img.convert", "copy a disk into an image of any format"),
    "create": Verb("pynbd.cli.img.create", "make an image"),
    "dd": Verb("pynbd.cli.img.dd", "copy a part of a disk, with the operands of dd"),
    "info": Verb("pynbd.cli.img.info", "tell what an image is"),
    "map": Verb("pynbd.cli.img.map", "tell where the bytes of a disk lie"),
    "measure": Verb("pynbd.cli.img.measure", "tell how large a new image would be"),
    "rebase": Verb("pynbd.cli.img.rebase", "give an image another backing file"),
    "resize": Verb("pynbd.cli.img.resize", "change the size of a disk"),
    "snapshot": Verb("pynbd.cli.img.snapshot", "list, make, apply and delete internal snapshots"),
}


GARBAGE_OBJECTS = 50_000
"""After so many new ones Python looks for garbage, instead of after 700: what is imported makes 35,000, and none is."""


class VerbParser(Parser):
    """A parser that takes options and words in any order, and long options abbreviated, as getopt_long does."""

    more_words_for = "words"


def main(arguments: Sequence[str]) -> int:
    """Run a verb.

    Args:
        arguments: what follows `pynbd img`.

    Returns:
        The exit status: that of qemu-img.
    """
    gc.set_threshold(GARBAGE_OBJECTS)
    signal.signal(signal.SIGUSR1, _pass_over)
    name, given = _split(arguments)
    module = importlib.import_module(VERBS[name].module)
    parser = VerbParser(
        prog=f"pynbd img {name}",
        description=VERBS[name].summary[:1].upper() + VERBS[name].summary[1:] + ".",
    )
    module.add_arguments(parser)
    if hasattr(module, "protect"):
        given = module.protect(given)
    parsed = parser.parse_args(given)
    from pynbd.cli.failure import complete

    return complete(f"img {name}", module.run(parsed), failed=getattr(module, "FAILED", 1))


def _pass_over(*_: object) -> None:
    """SIGUSR1 asks how far a verb is, and ends none: neither those that have nothing to say, nor one that is done."""


def _split(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The verb, and what follows it, once the options before it have been dealt with.

    It ends the program where that is what an option is for, or where there is no verb.
    """
    # The rest is the verb's: a parser that looks at it would stumble over its options.
    first = next((number for number, word in enumerate(arguments) if _is_verb(arguments, number)), len(arguments))
    parser = _parser()
    parser.parse_args(arguments[:first])
    if first == len(arguments):
        parser.error(f"a verb is missing (one of: {', '.join(VERBS)})")
    name = arguments[first]
    if name not in VERBS:
        parser.error(f"there is no verb {name!r}; there are: {', '.join(VERBS)}")
    return name, arguments[first + 1 :]


def _is_verb(arguments: Sequence[str], number: int) -> bool:
    is_value = number > 0 and arguments[number - 1] in ("-T", "--trace")
    return not arguments[number].startswith("-") and not is_value


def _parser() -> Parser:
    width = max(len(name) for name in VERBS)  # `map` is a module here
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    parser = Parser(
        prog="pynbd img",
        usage="%(prog)s [-h] [-V] VERB …",
        description="Makes, tells of, changes and copies disk images, as qemu-img does.",
        epilog=f"verbs:\n{verbs}\n\n`pynbd img VERB --help` tells more of each verb.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"pynbd img {__version__}")
    parser.add_argument("-T", "--trace", action="append", metavar="PATTERN", help="accepted; nothing is traced")
    return parser
