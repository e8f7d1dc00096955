"""`pynbd drivers`: which drivers there are, what options each takes, and the JSON Schema of all of them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pynbd.cli.driver_reference import DriverFacts, Option

MIN_TEXT_COLUMNS = 30
"""However narrow the terminal: the text column of a table is at least so wide."""


MAX_KIND_COLUMNS = 24
"""What an option takes goes into a column of its own, unless it is longer than that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = "List the drivers, or tell what one of them is and which options it takes."
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a driver, or a Python file with one")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="tell it as JSON")
    form.add_argument("--schema", action="store_true", help="print the JSON Schema of the options")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.block.errors import OptionError
    from pynbd.block.registry import driver_class
    from pynbd.cli.driver_reference import all_drivers, describe
    from pynbd.cli.failure import told

    try:
        found = (
            [describe(driver_class(arguments.name), registered_name(arguments.name))]
            if arguments.name
            else all_drivers()
        )
    except OptionError as problem:
        print(f"pynbd drivers: {told(problem)}", file=sys.stderr)
        return 1
    if arguments.schema:
        return print_schema(arguments.name, found)
    if arguments.json:
        facts = [as_json(driver) for driver in found]
        print(json.dumps(facts[0] if arguments.name else facts, indent=2, ensure_ascii=False))
    elif arguments.name:
        print("\n".join(driver_lines(found[0], shutil.get_terminal_size().columns)))
    else:
        print("\n".join(list_lines(found, shutil.get_terminal_size().columns)))
    return 0


def registered_name(name: str) -> str:
    """The name that a driver is listed under, when it was asked for by this one; "" for one in a file."""
    from pynbd.block.registry import ALIASES, is_python_file

    return "" if is_python_file(name) else ALIASES.get(name, name)


def print_schema(name: str, found: Sequence[DriverFacts]) -> int:
    """Print the schema of all drivers, and of one in a Python file if that was named; the exit status.

    A driver that can't be loaded is left out, which is told on stderr.
    """
    from pynbd.block.registry import driver_class, is_python_file
    from pynbd.cli.driver_reference import all_drivers
    from pynbd.cli.options_schema import schema_of

    named = {name: driver_class(name)} if is_python_file(name) else {}
    known = all_drivers() if name else found
    for driver in known:
        if driver.problem:
            print(f"pynbd drivers: {driver.problem}", file=sys.stderr)
    schema = schema_of(named | {driver.name: driver_class(driver.name) for driver in known if not driver.problem})
    if name:
        title = name if named else found[0].name
        schema |= {"title": title, "$ref": schema["$defs"]["BlockdevOptions"]["discriminator"]["mapping"][title]}
    print(json.dumps(schema, indent=2, ensure_ascii=False))
    return 0


def as_json(driver: DriverFacts) -> dict[str, Any]:
    """The facts about a driver, for programs."""
    if driver.problem:
        return {"name": driver.name, "error": driver.problem}
    return {
        "name": driver.name,
        "kind": driver.kind,
        "summary": driver.summary,
        "limits": driver.limits,
        "aliases": list(driver.aliases),
        "schemes": list(driver.schemes),
        "children": [
            {
                "name": name,
                "aliases": [alias for alias, child in driver.child_aliases.items() if child == name],
                "optional": spec.optional,
                "writable": spec.writable,
            }
            for name, spec in driver.children.items()
        ],
        "options": [option._asdict() for option in driver.options],
    }


def list_lines(found: Iterable[DriverFacts], columns: int) -> list[str]:
    """A line for each driver: its name, its kind, what it is."""
    rows = []
    for driver in found:
        names = ", ".join((driver.name, *driver.aliases))
        rows.append((names, driver.kind, driver.summary or f"({driver.problem})"))
    return [*table(rows, columns), "", "`pynbd drivers NAME` tells of one driver and its options."]


def driver_lines(driver: DriverFacts, columns: int) -> list[str]:
    """All about one driver."""
    lines = [f"{driver.name} ({driver.kind}): {driver.summary}"]
    if driver.limits:
        lines += ["", *wrapped(f"Limits: {driver.limits}", columns)]
    if driver.aliases:
        lines += ["", f"Also called {', '.join(driver.aliases)}."]
    if driver.schemes:
        lines += ["", f"URIs: {', '.join(scheme + ':' for scheme in driver.schemes)}"]
    if driver.children:
        lines += ["", "Nodes that it takes:"]
        lines += table([(f"  {name}", child_text(driver, name)) for name in driver.children], columns)
    own = [option for option in driver.options if option.own]
    common = [option for option in driver.options if not option.own]
    lines += ["", "Options of its own:" if own else "It has no options of its own."]
    lines += option_lines(own, columns)
    return [*lines, "", "Options of every node:", *option_lines(common, columns)]


def child_text(driver: DriverFacts, child: str) -> str:
    """What a child is for, in words."""
    spec = driver.children[child]
    words = [*sorted(str(role.name).lower() for role in spec.role)]
    words += ["optional"] if spec.optional else []
    words += [] if spec.writable else ["only read"]
    words += [f"also called {alias}" for alias, name in driver.child_aliases.items() if name == child]
    return ", ".join(words)


def option_lines(options: Iterable[Option], columns: int) -> list[str]:
    """A table of options."""
    rows = []
    for option in options:
        value = "required" if option.required else f"default {option.default}" if option.default else ""
        kind, also = (
            (option.kind, "") if len(option.kind) <= MAX_KIND_COLUMNS else ("", f" [{option.kind.replace('|', ' | ')}]")
        )
        text = option.summary + (f" ({value})" if value else "") + also
        rows.append((f"  {option.name}", kind, text))
    return table(rows, columns)


def table(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """Rows in columns as wide as they need; the last one is wrapped to the terminal."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    before = sum(widths) + 2 * len(widths)
    lines = []
    for row in rows:
        begin = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths, strict=False))
        texts = wrapped(row[-1], columns - before) or [""]
        lines.append((begin + texts[0]).rstrip())
        lines += [" " * before + text for text in texts[1:]]
    return lines


def wrapped(text: str, columns: int) -> list[str]:
    """Text in lines of so many columns, names of options left in one piece."""
    return textwrap.wrap(text, max(columns, MIN_TEXT_COLUMNS), break_on_hyphens=False)
