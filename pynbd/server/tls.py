"""What a server has to do with TLS: whether clients may or must use it, who we are to them, and who may come in."""

import errno
import socket
from typing import Literal

import msgspec

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto.tls_credentials import TlsCredentials, TlsCredsX509, TlsCredsX509Options
from pynbd.crypto.tls_socket import TlsFailure, TlsSocket
from pynbd.server.authz import Authorization
from pynbd.server.config import ListenOptions


class ServerTls(msgspec.Struct, frozen=True):
    """TLS as a server offers it.

    Args:
        policy: `allowed`: clients may use it; `required`: they must.
        credentials: who we are, and whether clients have to say who they are.
        authorization: who of those may come in; None: everybody.
    """

    policy: Literal["allowed", "required"]
    credentials: TlsCredentials
    authorization: Authorization | None = None

    async def begin(self, sock: socket.socket) -> TlsSocket:
        """TLS with a client that has been told to begin.

        Raises:
            TlsFailure: it can't be, or the client may not come in. The socket is to be closed.
            OSError: the connection is lost.
        """
        secured = self.credentials.begin(sock)
        await secured.handshake()
        if self.authorization is not None and not self.authorization.allows(secured.identity):
            raise TlsFailure(errno.EACCES, f"{secured.identity!r} is not authorized")
        return secured


def server_tls(where: ListenOptions, objects: Objects) -> ServerTls:
    """What a configuration says of TLS, which it has credentials for, with all files read.

    Raises:
        OptionError: it names what is not there, or files have the wrong content.
        OSError: a file can't be read.
    """
    credentials = _credentials(where, objects)
    if credentials.endpoint != "server":
        raise OptionError(f"{credentials.kind} {credentials.id!r} is of a client: a server needs endpoint=server")
    policy: Literal["allowed", "required"] = "allowed" if where.tls == "allowed" else "required"
    return ServerTls(policy, credentials, _authorization(where, objects, credentials))


def authorized_anew(tls: ServerTls, where: ListenOptions, objects: Objects) -> ServerTls:
    """The same TLS, and what a configuration says now of who may come in.

    Raises:
        OptionError: there is no such object, or nobody has a name.
    """
    return msgspec.structs.replace(tls, authorization=_authorization(where, objects, tls.credentials))


def _authorization(where: ListenOptions, objects: Objects, credentials: TlsCredentials) -> Authorization | None:
    authorization = objects.find(where.tls_authz, Authorization) if where.tls_authz else None
    if authorization is not None and not credentials.wants_client_identity:
        raise OptionError(
            f"tls-authz {authorization.id!r}: nobody can be told by name, because clients need no certificate "
            "(verify-peer is off)"
        )
    return authorization


def _credentials(where: ListenOptions, objects: Objects) -> TlsCredentials:
    if where.tls_creds:
        return objects.find(where.tls_creds, TlsCredentials)
    if where.tls_psk:
        from pynbd.crypto.tls_psk import TlsCredsPsk, TlsCredsPskOptions

        keys = TlsCredsPskOptions(qom_type="tls-creds-psk", id="tls-psk", endpoint="server", file=where.tls_psk)
        return TlsCredsPsk(keys, objects)
    described = TlsCredsX509Options(
        qom_type="tls-creds-x509",
        id="tls-certificates",
        endpoint="server",
        dir=where.tls_certificates,
        verify_peer=where.tls_verify_peer,
    )
    return TlsCredsX509(described, objects)
