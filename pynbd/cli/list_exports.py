"""`pynbd list URI`: which exports a server has, with their sizes and descriptions."""

from __future__ import annotations

import argparse
import errno
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from pynbd.cli.server_place import add_tls_arguments, server_place

if TYPE_CHECKING:
    from nbd_protocol.messages import ServerReply
    from pynbd.cli.server_place import ServerPlace
    from pynbd.storage.nbd.handshake import Handshake


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = "List the exports of an NBD server."
    parser.add_argument("uri", metavar="URI", help="nbd://HOST[:PORT], nbd+unix://?socket=PATH …")
    parser.add_argument("--json", action="store_true", help="tell it as JSON, with nbdinfo's names")
    parser.add_argument("--full", action="store_true", help="tell all that `pynbd info` tells, of each export")
    add_tls_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.cli.failure import complete

    return complete("list", _run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    server = server_place(arguments.uri, arguments)
    return await print_exports(server, as_json=arguments.json, in_full=arguments.full)


async def print_exports(server: ServerPlace, *, as_json: bool, in_full: bool) -> int:
    """Print what a server has: a line for each export, or all that is known of it, or JSON.

    Returns:
        the exit status.

    Raises:
        OSError: the server does not tell.
    """
    from pynbd.cli.export_description import export_lines, server_line

    described, exports = await _ask(server)
    if as_json:
        print(json.dumps({**described, "exports": exports}, indent=2, ensure_ascii=False))
    elif in_full:
        print(server_line(described))
        for export in exports:
            print("\n".join(export_lines(export) if "export-size" in export else _short(export)))
    else:
        width = max((len(export["export-name"]) for export in exports), default=0) + 2
        for export in exports:
            words = export.get("description") or (f"({export['error']})" if "error" in export else "")
            size = export.get("export-size-str", "?")
            print(f"{_name(export):{width}}  {size:>8}  {words}".rstrip())
    return 0


def _name(export: dict[str, Any]) -> str:
    return json.dumps(export["export-name"], ensure_ascii=False)


def _short(export: dict[str, Any]) -> list[str]:
    return [
        f'export="{export["export-name"]}":',
        *(f"\t{key}: {export[key]}" for key in ("description", "error") if key in export),
    ]


async def _ask(server: ServerPlace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the server tells of itself and of each of its exports, over as many connections as that takes."""
    from pynbd.cli.export_description import describe_server

    exports: list[dict[str, Any]] = []
    async with server.handshake() as handshake:
        left = await _names(handshake, server)
        described = describe_server(handshake.negotiation)
        await _describe_some(handshake, server, left, exports)
    while left:
        async with server.handshake() as handshake:
            await _describe_some(handshake, server, left, exports)
    return described, exports


async def _names(handshake: Handshake, server: ServerPlace) -> deque[ServerReply]:
    from nbd_protocol.constants import Option
    from nbd_protocol.negotiation_events import ExportsListed, Refused

    handshake.negotiation.list_exports()
    event = await handshake.answer()
    if isinstance(event, Refused):
        if event.option == Option.STARTTLS:
            raise handshake.refusal(event, "")
        raise OSError(errno.EPERM, f"'{server}' does not list its exports: {event.exception()}")
    assert isinstance(event, ExportsListed), event
    return deque(event.exports)


async def _describe_some(
    handshake: Handshake, server: ServerPlace, left: deque[ServerReply], exports: list[dict[str, Any]]
) -> None:
    """Take exports off the list and describe them, while this connection serves further options."""
    from nbd_protocol.client_negotiation import State
    from pynbd.cli.export_description import ask_about
    from pynbd.cli.failure import told

    negotiation = handshake.negotiation
    while left:
        listed = left.popleft()
        try:
            described = await ask_about(handshake, server.place, listed.name)
        except OSError as problem:
            # One export that is refused is no reason not to tell of the others.
            described = {"export-name": listed.name, "error": told(problem)}
        if listed.details:
            described.setdefault("description", listed.details)
        exports.append(described)
        if negotiation.state is not State.COMMAND:
            return
        if not left or negotiation.should_reconnect:
            await handshake.end()
            return
