"""Options of a verb from variables of the environment: PYNBD_SERVE_READ_ONLY=on is `pynbd serve --read-only`.

A variable bears the long name of an option, DISK for the disks. It counts where the command line is silent: what is
said there of the same option, or of one that does not go together with it, replaces the variable. An empty one says
nothing.
"""

import argparse
import difflib
import os
import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple

YES_OR_NO = {"on": 1, "yes": 1, "true": 1, "1": 1, "off": 0, "no": 0, "false": 0, "0": 0}
"""What a variable may say for an option that takes no value."""

MAX_REPEATS = 9
"""How often an option that counts may be given by its number: PYNBD_SERVE_VERBOSE=2 is -vv."""

SAY_NO_VALUE = (argparse._StoreTrueAction, argparse._CountAction)  # noqa: SLF001  # argparse has no public names for them

IN_ORDER = ("DENY", "ALLOW_READ_ONLY", "ALLOW")
"""Variables have no order, but of rules the first one that fits decides: first who may not come in, last who may."""

Parse = Callable[[list[str], argparse.Namespace], tuple[argparse.Namespace, list[str]]]
"""argparse's own parsing: words and what to fill in; what came of it, and words that are left over."""


class Variable(NamedTuple):
    """A variable, the argument that it stands for, and what it says of it.

    Args:
        words: what would be on the command line instead.
    """

    name: str
    action: argparse.Action
    words: list[str]


def parse_with_environment(
    parser: argparse.ArgumentParser, prefix: str, words: list[str], parse: Parse
) -> tuple[argparse.Namespace, list[str]]:
    """What the command line says, and what variables say where it is silent.

    Ends through `parser.error` if a variable stands for no option, or says what its option can't be.

    Args:
        parser: of the verb.
        prefix: how the names of its variables begin.
        words: the command line.
        parse: how the parser takes words.
    """
    # Whatever is still None or an empty list afterwards was not said.
    silence: dict[str, list[str] | None] = {
        action.dest: [] if _says_several(action) else None for action in _arguments(parser).values()
    }
    given, rest = parse(words, argparse.Namespace(**silence))
    said = {name for name, value in vars(given).items() if value not in (None, [])}
    variables = [one for one in _variables(parser, prefix) if not said & _excluded_by(one.action, parser)]
    from_variables = _parse_variables(parser, variables, parse, argparse.Namespace(**silence))
    for name in silence.keys() - said:
        value = getattr(from_variables, name)
        if value in (None, []):
            default = parser.get_default(name)
            value = [] if default is None and silence[name] is not None else default
        setattr(given, name, value)
    return given, rest


def _says_several(action: argparse.Action) -> bool:
    return isinstance(action.default, list) or not action.option_strings


def _arguments(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What variables can say, by the end of the variable's name."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:  # noqa: SLF001  # argparse tells of its arguments nowhere else
        long = next((name for name in action.option_strings if name.startswith("--")), action.dest)
        if action.help != argparse.SUPPRESS and action.dest != "help":
            found[long.removeprefix("--").replace("-", "_").upper()] = action
    return found


def _variables(parser: argparse.ArgumentParser, prefix: str) -> Iterator[Variable]:
    known = _arguments(parser)
    ordered = [prefix + name for name in IN_ORDER]
    for name, value in sorted(
        os.environ.items(), key=lambda one: (one[0] in ordered and ordered.index(one[0]), one[0])
    ):
        if not name.startswith(prefix) or not value:
            continue
        action = known.get(name.removeprefix(prefix))
        if action is None:
            near = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
            parser.error(f"{name}: there is no such option" + (f" (did you mean {prefix}{near[0]}?)" if near else ""))
        try:
            yield Variable(name, action, _words(action, value))
        except ValueError as problem:
            parser.error(f"{name}: {problem}")


def _words(action: argparse.Action, value: str) -> list[str]:
    """What would be on the command line instead of the variable.

    Raises:
        ValueError: the value says neither yes nor no where it has to, or has a quotation mark too many.
    """
    if not action.option_strings:
        return shlex.split(value)
    option = action.option_strings[-1]
    if isinstance(action, SAY_NO_VALUE):
        counts = {str(number): number for number in range(MAX_REPEATS + 1)} if action.dest == "verbose" else {}
        times = (YES_OR_NO | counts).get(value.lower())
        if times is None:
            raise ValueError(f"{value!r} is neither on nor off")
        return [option] * times
    return [f"{option}={word}" for word in (shlex.split(value) if _says_several(action) else [value])]


def _excluded_by(action: argparse.Action, parser: argparse.ArgumentParser) -> set[str]:
    """The arguments of which any one on the command line replaces this one."""
    found = {action.dest}
    for group in parser._mutually_exclusive_groups:  # noqa: SLF001  # as in _arguments
        if action in group._group_actions:  # noqa: SLF001  # as in _arguments
            found.update(member.dest for member in group._group_actions)  # noqa: SLF001  # as in _arguments
    return found


def _parse_variables(
    parser: argparse.ArgumentParser, variables: list[Variable], parse: Parse, into: argparse.Namespace
) -> argparse.Namespace:
    names = {"/".join(one.action.option_strings): one.name for one in variables}
    parser.exit_on_error = False
    try:
        parse([word for one in variables if one.action.option_strings for word in one.words], into)
    except argparse.ArgumentError as problem:
        message = problem.message
        for flags, name in names.items():
            message = message.replace(f"with argument {flags}", f"with {name}")
        parser.error(f"{names[problem.argument_name or '']}: {message}")
    finally:
        parser.exit_on_error = True
    for one in variables:
        if not one.action.option_strings:
            setattr(into, one.action.dest, one.words)
    return into
