"""Where a server is and how to talk to it, for the verbs that only ask: a URI, and what it can't say of TLS."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from pynbd.cli.objects import add_object_argument, make_objects

if TYPE_CHECKING:
    from pynbd.storage.nbd.address import NbdPlace
    from pynbd.storage.nbd.handshake import Handshake
    from pynbd.storage.nbd.tls import ClientTls


class ServerPlace(NamedTuple):
    """A server, and one of its exports.

    Args:
        place: where it is.
        tls: TLS, if there is to be any.
    """

    place: NbdPlace
    tls: ClientTls | None

    def __str__(self) -> str:
        return str(self.place.address())

    def handshake(self) -> Handshake:
        """A new conversation with it."""
        from pynbd.storage.nbd.handshake import Handshake

        return Handshake(self.place.address(), tls=self.tls)


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a verb take what a URI can't say of TLS."""
    add_object_argument(parser)
    parser.add_argument(
        "--tls-creds",
        metavar="ID",
        help="the --object tls-creds-x509 to use TLS with (or nbds://…?tls-certificates=DIR)",
    )
    parser.add_argument(
        "--tls-hostname", metavar="NAME", help="what the server's certificate must be for, if it is not the host"
    )


def server_place(uri: str, arguments: argparse.Namespace) -> ServerPlace:
    """What a URI and those arguments stand for; the files of TLS are read.

    Raises:
        OptionError: one of them is wrong.
        OSError: a file can't be read.
    """
    from pynbd.storage.nbd.address import place_of
    from pynbd.storage.nbd.tls import client_tls

    place = place_of(uri, tls_creds=arguments.tls_creds, tls_hostname=arguments.tls_hostname)
    return ServerPlace(place, client_tls(place, make_objects(arguments.object)))
