"""`pynbd info URI`: what an export is, or where its data, holes and dirty blocks lie; as nbdinfo tells it."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from pynbd.cli.server_place import add_tls_arguments, server_place

if TYPE_CHECKING:
    from pynbd.cli.server_place import ServerPlace
    from pynbd.storage.nbd.connection import Connection, Request

BASE_ALLOCATION = "base:allocation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = "Tell what an NBD server says of an export."
    parser.usage = "%(prog)s [OPTION…] [--json] [--size | --map[=CONTEXT] [--totals] | --list] URI"
    # Optional only because argparse gives a URI that follows a bare --map to --map.
    parser.add_argument(
        "uri", metavar="URI", nargs="?", help="nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH …"
    )
    parser.add_argument("--json", action="store_true", help="tell it as JSON, with nbdinfo's names")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", action="store_true", help="tell only the size in bytes")
    what.add_argument(
        "--map",
        nargs="?",
        const=BASE_ALLOCATION,
        metavar="CONTEXT",
        help=f"tell what lies where, by a metadata context ({BASE_ALLOCATION} unless given as --map=CONTEXT)",
    )
    what.add_argument("--list", action="store_true", help="tell of all exports of the server, like `pynbd list --full`")
    parser.add_argument("--totals", action="store_true", help="with --map: sum up each kind of extents")
    add_tls_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.cli.failure import complete

    return complete("info", _run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from pynbd.block.errors import OptionError
    from pynbd.cli.export_description import ask_about, describe_server, export_lines, server_line
    from pynbd.cli.list_exports import print_exports

    uri, context = arguments.uri, arguments.map
    if uri is None and context is not None:
        uri, context = context, BASE_ALLOCATION
    if uri is None:
        raise OptionError("the URI of an export is missing")
    server = server_place(uri, arguments)
    export = server.place.export
    if arguments.list:
        return await print_exports(server, as_json=arguments.json, in_full=True)
    if context is not None:
        return await _print_map(server, export, context, arguments)
    async with server.handshake() as handshake:
        told = await ask_about(handshake, server.place, export)
        described = describe_server(handshake.negotiation)
        await handshake.end()
    if arguments.size:
        print(told["export-size"])
    elif arguments.json:
        print(json.dumps({**described, "exports": [told]}, indent=2, ensure_ascii=False))
    else:
        print("\n".join([server_line(described), *export_lines(told)]))
    return 0


# --- the map --------------------------------------------------------------------------------------------------


async def _print_map(server: ServerPlace, export: str, context: str, arguments: argparse.Namespace) -> int:
    from pynbd.storage.nbd.connection import Connection
    from pynbd.storage.nbd.durability import Durability

    async with server.handshake() as handshake:
        connected, established = await handshake.connect(export, [context])
        trailing = handshake.negotiation.trailing_data
    connection = Connection(str(server), connected, established, trailing, Durability(), _fail_all)
    try:
        if context not in connection.contexts:
            raise OSError(errno.ENOENT, f"export {export!r} of '{server}' has no metadata context {context!r}")
        extents = _merged(_extents(connection, context))
        await (_print_totals if arguments.totals else _print_extents)(
            extents, context, established.info.size, as_json=arguments.json
        )
    finally:
        connection.close()
    return 0


def _fail_all(connection: Connection, reason: str, unanswered: list[Request]) -> None:
    for request in unanswered:
        request.fail(errno.EIO, f"'{connection.name}': {request}: the connection was lost: {reason}")


async def _extents(connection: Connection, context: str) -> AsyncIterator[tuple[int, int, int]]:
    """(offset, length, state) of everything, as the server tells it."""
    from nbd_protocol.constants import MAX_EXTENT_LENGTH_32, Command, ReplyMode
    from pynbd.storage.nbd.connection import Request

    established = connection.established
    size = established.info.size
    longest = size if established.mode is ReplyMode.EXTENDED else MAX_EXTENT_LENGTH_32
    offset = 0
    while offset < size:
        request = Request(Command.BLOCK_STATUS, offset, min(longest, size - offset))
        connection.submit(request)
        await request.future
        for length, state in request.extents[connection.contexts[context]]:
            length = min(length, size - offset)
            if length:
                yield offset, length, state
            offset += length


async def _merged(extents: AsyncIterator[tuple[int, int, int]]) -> AsyncIterator[tuple[int, int, int]]:
    start, total, kind = 0, 0, -1
    async for offset, length, state in extents:
        if total and state == kind:
            total += length
            continue
        if total:
            yield start, total, kind
        start, total, kind = offset, length, state
    if total:
        yield start, total, kind


def state_name(context: str, state: int) -> str:
    """What a state of a context is called; "" if its context is unknown here."""
    if context == BASE_ALLOCATION:
        return {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}.get(state, "")
    if context.startswith("qemu:dirty-bitmap:"):
        return {0: "clean", 1: "dirty"}.get(state, "")
    if context == "qemu:allocation-depth":
        return {0: "unallocated", 1: "local"}.get(state, f"backing depth {state}")
    return ""


async def _print_extents(
    extents: AsyncIterator[tuple[int, int, int]], context: str, size: int, *, as_json: bool
) -> None:
    """One line for each extent, as they come: a map may be larger than memory."""
    between = "[\n" if as_json else ""
    async for offset, length, state in extents:
        name = state_name(context, state)
        if as_json:
            entry = {"offset": offset, "length": length, "type": state, "description": name}
            print(between + json.dumps(entry), end="")
            between = ",\n"
        else:
            print(f"{offset:10}  {length:10}  {state:3}  {name}".rstrip())
    if as_json:
        print("[]" if between == "[\n" else "\n]")


async def _print_totals(
    extents: AsyncIterator[tuple[int, int, int]], context: str, size: int, *, as_json: bool
) -> None:
    totals: dict[int, int] = {}
    async for _, length, state in extents:
        totals[state] = totals.get(state, 0) + length
    rows = [
        {"size": total, "percent": 100 * total / size, "type": state, "description": state_name(context, state)}
        for state, total in sorted(totals.items())
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['size']:10} {row['percent']:5.1f}% {row['type']:3} {row['description']}".rstrip())
