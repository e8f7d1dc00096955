"""TLS as a client of NBD: whom we believe, who we are, and what the server must be called."""

from __future__ import annotations

import getpass
import socket

import msgspec

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto.tls_credentials import TlsCredentials, TlsCredsX509, TlsCredsX509Options
from pynbd.crypto.tls_socket import TlsSocket
from pynbd.storage.nbd.address import NbdPlace


class ClientTls(msgspec.Struct, frozen=True):
    """TLS, without which nothing is said to the server.

    Args:
        credentials: whom we believe, and who we are.
        hostname: the name that the server's certificate must bear; None if any will do.
    """

    credentials: TlsCredentials
    hostname: str | None

    async def begin(self, sock: socket.socket) -> TlsSocket:
        """TLS with a server that has agreed to it.

        Raises:
            TlsFailure: it can't be. The socket is to be closed.
            OSError: the connection is lost.
        """
        secured = self.credentials.begin(sock, self.hostname)
        await secured.handshake()
        return secured


def client_tls(place: NbdPlace, objects: Objects) -> ClientTls | None:
    """What is said of TLS for a place, with all files read; None if nothing is.

    Raises:
        OptionError: there is no such object, or it is a server's, or files have the wrong content.
        OSError: a file can't be read.
    """
    if not place.uses_tls:
        return None
    if place.tls_creds is not None:
        credentials = objects.find(place.tls_creds, TlsCredentials)
        if credentials.endpoint != "client":
            raise OptionError(f"{credentials.kind} {credentials.id!r} is of a server: a client needs endpoint=client")
    elif place.tls_psk_file:
        from pynbd.crypto.tls_psk import TlsCredsPsk, TlsCredsPskOptions

        user = place.tls_username or getpass.getuser()
        keys = TlsCredsPskOptions(qom_type="tls-creds-psk", id="nbds", file=place.tls_psk_file, username=user)
        credentials = TlsCredsPsk(keys, objects)
    else:
        described = TlsCredsX509Options(
            qom_type="tls-creds-x509",
            id="nbds",
            endpoint="client",
            dir=place.tls_certificates,
            verify_peer=place.tls_verify_peer,
        )
        credentials = TlsCredsX509(described, objects)
    address = place.address()
    # Over a Unix socket or vsock there is no name to be wrong about, unless one is given.
    named = (address.host or "localhost").partition("%")[0] if address.type == "inet" else None
    return ClientTls(credentials, place.tls_hostname or named)
