"""`pynbd health`: whether a server answers, for those who watch over it: containers, Kubernetes, scripts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pynbd.cli.server_place import add_tls_arguments, server_place

if TYPE_CHECKING:
    from pynbd.cli.server_place import ServerPlace
    from pynbd.server.config import Address

TIMEOUT_S = 4.0
"""How long a server may take to answer, if nothing else is said; who watches gives up after 5 s mostly."""

EPILOG = """\
Without a URI it asks the server that `pynbd serve` is in the same environment:
at all the addresses that PYNBD_SERVE_… and the configuration file named there
say. A server that refuses to say more without TLS has answered.
"""

HERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # nobody listens here: it is what we ask instead
"""Where a server is asked that listens on all addresses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = "Tell whether a server answers: status 0 if it does, 1 if not."
    parser.epilog = EPILOG
    parser.add_argument("uri", nargs="?", metavar="URI", help="nbd://HOST[:PORT], nbd+unix://?socket=PATH …")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long it may take (default: {TIMEOUT_S:g})",
    )
    add_tls_arguments(parser)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds (more than 0, at most 3600)")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.cli.failure import complete

    return complete("health", _run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    import asyncio
    import errno

    servers = _configured() if arguments.uri is None else [server_place(arguments.uri, arguments)]
    for server in servers:
        try:
            async with asyncio.timeout(arguments.timeout):
                answer = await _ask(server)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"'{server}' does not answer within {arguments.timeout:g} s") from None
        print(f"{server}: {answer}")
    return 0


async def _ask(server: ServerPlace) -> str:
    """What a server has answered to the question for its exports.

    Raises:
        OSError: it did not, or not as an NBD server does.
    """
    from nbd_protocol.constants import Option, OptionReplyType
    from nbd_protocol.negotiation_events import Refused

    async with server.handshake() as handshake:
        handshake.negotiation.list_exports()
        event = await handshake.answer()
        if not isinstance(event, Refused):
            await handshake.end()
            return "answers"
        if event.option == Option.STARTTLS:
            raise handshake.refusal(event, "")
        await handshake.end()
        if event.reply_type == OptionReplyType.ERR_TLS_REQD:
            return "answers, and says no more without TLS"
        return "answers, and does not list its exports"


def _configured() -> list[ServerPlace]:
    """The servers that `pynbd serve` is by its variables.

    Raises:
        OptionError: they are wrong, or say a port that nobody knows before it is taken.
    """
    import contextlib

    from pynbd.cli import make_parser
    from pynbd.cli.serve_config import listen_addresses
    from pynbd.server import config as configs

    arguments = make_parser("serve").parse_args(["serve"])
    config = configs.load(arguments.config) if arguments.config else configs.Config()
    with contextlib.ExitStack() as nothing_made:
        arguments.run = None
        addresses = listen_addresses(arguments, config, nothing_made)
    return [_place(configs.parse_address(address), address) for address in addresses]


def _place(address: Address, text: str) -> ServerPlace:
    from pynbd.block.errors import OptionError
    from pynbd.cli.server_place import ServerPlace
    from pynbd.server.activation import VMADDR_CID_LOCAL
    from pynbd.storage.nbd.address import NbdPlace, ServerAddress

    if address.path:
        return ServerPlace(NbdPlace(server=ServerAddress(type="unix", path=address.path)), None)
    if address.port == 0:
        raise OptionError(f"{text}: the server takes any port there; give a URI to say which")
    if address.is_vsock:
        cid = VMADDR_CID_LOCAL if address.cid is None else address.cid
        return ServerPlace(NbdPlace(server=ServerAddress(type="vsock", cid=cid, port=address.port)), None)
    host = HERE.get(address.host, address.host)
    return ServerPlace(NbdPlace(server=ServerAddress(type="inet", host=host, port=address.port)), None)
