"""`TlsCredsX509`: certificates for TLS under an id, as QEMU's object `tls-creds-x509`.

tls-creds-x509,id=tls0,endpoint=server,dir=/etc/pki/pynbd           ca-cert.pem, server-cert.pem, server-key.pem
tls-creds-x509,id=tls0,endpoint=client,dir=/etc/pki/pynbd           ca-cert.pem, and client-cert.pem, client-key.pem
tls-creds-x509,id=tls0,endpoint=client                              the authorities that the system believes
tls-creds-x509,id=tls0,endpoint=server,cert-file=a.pem,key-file=a.key,verify-peer=off
"""

import socket
import ssl
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

from pynbd.block import options as opt
from pynbd.block.errors import OptionError
from pynbd.block.objects import ObjectOptions, Objects, UserObject
from pynbd.crypto.distinguished_name import distinguished_name
from pynbd.crypto.secrets import Secret
from pynbd.crypto.tls_socket import TlsSocket

SYSTEM = "system"
"""As `ca-file`: the authorities that the system believes."""


class TlsCredsX509Options(ObjectOptions, frozen=True, kw_only=True):
    """Options of certificates.

    Args:
        endpoint: which end they are for, `client` or `server`.
        dir: a folder with the files by QEMU's names, ca-cert.pem, server-cert.pem …; what is given by itself goes
            before.
        verify_peer: whether the other end must have a certificate of one of the authorities; a server then wants one
            of each client.
        ca_file: certificates of the authorities that are believed; `system` is those of the system, and the default
            where there is no dir.
        crl_file: certificates that those have revoked.
        cert_file: our own certificate, and those that lead to its authority.
        key_file: its private key.
        passwordid: the secret that the key is encrypted with.
    """

    endpoint: Literal["client", "server"] = "client"
    dir: str = ""
    verify_peer: opt.OnOff = True
    ca_file: str = ""
    crl_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    passwordid: str | None = None


class TlsCredentials(UserObject):
    """What one end of TLS knows of itself and of others."""

    kind: ClassVar[str] = "tls-creds-x509"
    endpoint: str

    def begin(self, sock: socket.socket, hostname: str | None = None) -> TlsSocket:
        """TLS on a connected, non-blocking socket; what is left to do is its handshake.

        Args:
            sock: closed with what is returned.
            hostname: for a client: whom it wants to reach. None: whoever is believed will do.
        """
        raise NotImplementedError

    def reload(self) -> None:
        """Read the files again, for connections that come from now on.

        Raises:
            OptionError, OSError: there is something wrong with them; what was read before stays in use.
        """
        raise NotImplementedError

    def files(self) -> list[Path]:
        """The files and folders that `reload` reads."""
        raise NotImplementedError

    @property
    def wants_client_identity(self) -> bool:
        """Whether clients have to say who they are, and to prove it."""
        raise NotImplementedError


class TlsCredsX509(TlsCredentials):
    """Certificates."""

    kind = "tls-creds-x509"
    Options: ClassVar[type[ObjectOptions]] = TlsCredsX509Options

    def __init__(self, options: ObjectOptions, objects: Objects) -> None:
        super().__init__(options, objects)
        assert isinstance(options, TlsCredsX509Options)
        self.options = options
        self.endpoint = options.endpoint
        self._password = (
            objects.find(options.passwordid, Secret).passphrase() if options.passwordid is not None else None
        )
        self._context = self._load()

    @property
    def wants_client_identity(self) -> bool:
        return self.options.verify_peer

    def begin(self, sock: socket.socket, hostname: str | None = None) -> TlsSocket:
        self._context.check_hostname = hostname is not None and self.options.verify_peer
        identify = peer_name if self.options.verify_peer else no_name
        return TlsSocket(
            sock, self._context, server_side=self.endpoint == "server", hostname=hostname, identify=identify
        )

    def reload(self) -> None:
        self._context = self._load()

    def files(self) -> list[Path]:
        options = self.options
        named = (options.dir, options.cert_file, options.key_file, options.ca_file, options.crl_file)
        system = ssl.get_default_verify_paths()
        usual = [system.cafile, system.capath] if options.ca_file == SYSTEM else []
        return [Path(name) for name in (*named, *usual) if name and name != SYSTEM]

    # --- the files --------------------------------------------------------------------------------------------

    def _load(self) -> ssl.SSLContext:
        context = new_context(self.endpoint)
        certificate = self._own(f"{self.endpoint}-cert.pem", self.options.cert_file)
        key = self._own(f"{self.endpoint}-key.pem", self.options.key_file)
        if certificate is not None:
            self._load_own(context, certificate, certificate if key is None else key)
        elif self.endpoint == "server":
            raise OptionError(f"{self._name}: a server needs a certificate: give dir, or cert-file and key-file")
        elif key is not None:
            raise OptionError(f"{self._name}: {key} is the key of no certificate: give cert-file as well")
        if self.options.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            self._load_authorities(context)
        return context

    @property
    def _name(self) -> str:
        return f"{self.kind} {self.id!r}"

    def _own(self, name: str, given: str) -> Path | None:
        """A file of our own end; a client need not have any, so that in its folder they may be missing."""
        if given or not self.options.dir:
            return Path(given) if given else None
        path = Path(self.options.dir, name)
        return path if self.endpoint == "server" or path.exists() else None

    def _load_own(self, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        for path in (certificate, key):
            self._check_readable(path)
        try:
            context.load_cert_chain(certificate, key, self._password if self._password is not None else self._no_way)
        except ssl.SSLError as problem:
            raise self._wrong(f"{certificate} with {key}", problem) from problem

    def _no_way(self) -> NoReturn:
        """Instead of OpenSSL's own question on the terminal."""
        raise OptionError(f"{self._name}: the key is encrypted: give a passwordid, the id of a secret")

    def _load_authorities(self, context: ssl.SSLContext) -> None:
        options = self.options
        if options.ca_file == SYSTEM or not (options.ca_file or options.dir):
            server = self.endpoint == "server"
            if server and not options.ca_file:
                raise OptionError(
                    f"{self._name}: whose clients are believed? give ca-file (or ca-file=system), or verify-peer=off"
                )
            context.load_default_certs(ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH)
        else:
            self._load_file(context, Path(options.ca_file or Path(options.dir, "ca-cert.pem")))
        revoked = Path(options.crl_file or Path(options.dir, "ca-crl.pem"))
        if options.crl_file or (options.dir and revoked.exists()):
            self._load_file(context, revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _load_file(self, context: ssl.SSLContext, path: Path) -> None:
        self._check_readable(path)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as problem:
            raise self._wrong(str(path), problem) from problem

    def _check_readable(self, path: Path) -> None:
        try:
            path.open("rb").close()
        except OSError as problem:
            raise OSError(problem.errno, f"{self._name}: {path}: {problem.strerror}") from None

    def _wrong(self, what: str, problem: ssl.SSLError) -> OptionError:
        unsaid = "this is no PEM" if self._password is None else "this is no PEM, or not encrypted with that secret"
        reason = problem.reason.replace("_", " ").lower() if problem.reason else unsaid
        return OptionError(f"{self._name}: {what}: {reason}")


def new_context(endpoint: str) -> ssl.SSLContext:
    """A context without certificates: TLS 1.2 or later, 1.3 where both ends know it, nothing to resume later."""
    server = endpoint == "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    if server:
        context.num_tickets = 0  # sent behind the handshake, for a next connection that no NBD client makes
    return context


def peer_name(connection: ssl.SSLObject) -> str:
    """Who the certificate of the other end says it is."""
    return distinguished_name((connection.getpeercert() or {}).get("subject", ()))


def no_name(_: ssl.SSLObject) -> str:
    """Of somebody whose certificate is not looked at."""
    return ""
