"""Where an NBD server is, in all the ways to say it, and how a socket gets there."""

import asyncio
import os
import re
import socket
from typing import Annotated, Any, Literal

import msgspec

from nbd_protocol.constants import DEFAULT_PORT
from nbd_protocol.uri import MAX_VSOCK_NUMBER, NbdUri, UriError, parse_uri
from pynbd.block import options as opt
from pynbd.block.errors import OptionError
from pynbd.block.options import NodeOptions

SOCKET_BUFFER_BYTES = 4 << 20
"""What is asked of the kernel for each direction; it gives as much as its limits allow."""

MAX_TCP_PORT = 65535

Port = Annotated[int, msgspec.Meta(ge=1, le=MAX_TCP_PORT)]
VsockNumber = Annotated[int, msgspec.Meta(ge=0, le=MAX_VSOCK_NUMBER)]

_LEGACY = re.compile(
    r"nbd:(?:unix:(?P<path>.*?)|(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[^:]*))"
    r"(?::exportname=(?P<export>.*))?",
    re.DOTALL,
)


class ServerAddress(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Where a server listens; QEMU's `SocketAddress`.

    Args:
        type: `inet` (TCP), `unix`, or `vsock`, between virtual machines and the machine that runs them.
        host: for inet: a name or an address, IPv6 without brackets; "" is localhost.
        port: for inet and vsock.
        path: for unix: the socket's path; a leading NUL names an abstract socket.
        cid: for vsock: the number of the machine: 2 is the one that runs us, 1 ourselves, others run below us.
    """

    type: Literal["inet", "unix", "vsock"]
    host: str = ""
    port: VsockNumber = DEFAULT_PORT
    path: str = ""
    cid: VsockNumber | None = None

    def __post_init__(self) -> None:
        if self.type == "unix" and not self.path:
            raise ValueError("a server of type 'unix' needs its path")
        if self.type == "unix" and (self.host or self.port != DEFAULT_PORT or self.cid is not None):
            raise ValueError("a server of type 'unix' has a path, and no host, port and cid")
        if self.type == "inet" and (self.path or self.cid is not None):
            raise ValueError("a server of type 'inet' has host and port, and no path and cid")
        if self.type == "inet" and not 1 <= self.port <= MAX_TCP_PORT:
            raise ValueError(f"port {self.port} is not in 1 to {MAX_TCP_PORT}")
        if self.type == "vsock" and (self.path or self.host):
            raise ValueError("a server of type 'vsock' has cid and port, and no path and host")
        if self.type == "vsock" and self.cid is None:
            raise ValueError("a server of type 'vsock' needs its cid")

    def uri(self, export: str, *, tls: bool = False) -> NbdUri:
        """The URI of one of its exports."""
        if self.type == "unix":
            return NbdUri("nbds+unix" if tls else "nbd+unix", socket_path=self.path, export=export)
        if self.type == "vsock":
            return NbdUri("nbds+vsock" if tls else "nbd+vsock", host=str(self.cid), port=self.port, export=export)
        return NbdUri("nbds" if tls else "nbd", host=self.host, port=self.port, export=export)

    def __str__(self) -> str:
        return self.uri("").address


class NbdPlace(NodeOptions, frozen=True, kw_only=True):
    """Where an export is, and how to reach it. The names are QEMU's, and those with tls- that it lacks are libnbd's.

    Args:
        server: where the server is; or else, flat, `host` and `port`, or `path`.
        host: the server's name or address.
        port: its TCP port.
        path: its Unix socket.
        export: the export's name, "" for the server's default.
        tls: whether nothing may be said without TLS; the options below ask for it as well. If they do not say what
            the server's certificate is verified with, it is the authorities that the system believes.
        tls_creds: the object that says whom we believe and who we are; or else
        tls_certificates: a folder with ca-cert.pem, and client-cert.pem and client-key.pem if we have some.
        tls_psk_file: a file with a line `USER:KEY`, instead of certificates.
        tls_username: whose key of that file we use.
        tls_verify_peer: whether the server's certificate is verified at all; with tls-creds, that says it.
        tls_hostname: the name that the server's certificate must bear, if it is not the host's.
    """

    server: ServerAddress | None = None
    host: str = ""
    port: Port | None = None
    path: str = ""
    export: str = ""
    tls: opt.OnOff = False
    tls_creds: str | None = None
    tls_certificates: str = ""
    tls_psk_file: str = ""
    tls_username: str = ""
    tls_verify_peer: opt.OnOff = True
    tls_hostname: str | None = None

    def __post_init__(self) -> None:
        self.address()
        if self.tls_creds is not None and (self.tls_certificates or self.tls_psk_file or not self.tls_verify_peer):
            raise ValueError("'tls-creds' says already what 'tls-certificates' and 'tls-verify-peer' would say")
        if self.tls_psk_file and (self.tls_certificates or self.tls_hostname or not self.tls_verify_peer):
            raise ValueError("with 'tls-psk-file' there are no certificates, and nothing to say of them")
        if self.tls_username and not self.tls_psk_file:
            raise ValueError("'tls-username' needs 'tls-psk-file'")
        if not self.uses_tls and (self.tls_hostname is not None or not self.tls_verify_peer):
            raise ValueError("'tls-hostname' and 'tls-verify-peer' need TLS: give 'tls-creds' or 'tls'")

    @property
    def uses_tls(self) -> bool:
        """Whether TLS is asked for."""
        return self.tls or self.tls_creds is not None or bool(self.tls_certificates or self.tls_psk_file)

    def address(self) -> ServerAddress:
        """Where the server is."""
        flat = [name for name, value in (("host", self.host), ("port", self.port), ("path", self.path)) if value]
        if self.server is not None:
            if flat:
                raise ValueError(f"'server' and {flat[0]!r} both say where the server is")
            return self.server
        if self.path:
            if len(flat) > 1:
                raise ValueError("'path' and 'host' or 'port' both say where the server is")
            return ServerAddress(type="unix", path=self.path)
        if not flat:
            raise ValueError("one of 'server', 'host' and 'path' is needed")
        if self.port is None:
            return ServerAddress(type="inet", host=self.host)
        return ServerAddress(type="inet", host=self.host, port=self.port)

    def uri(self, export: str | None = None) -> NbdUri:
        """The URI of this export, or of another one there. Objects are none that a URI could name."""
        uri = self.address().uri(self.export if export is None else export, tls=self.uses_tls)
        return msgspec.structs.replace(
            uri,
            tls_certificates=self.tls_certificates or None,
            tls_psk_file=self.tls_psk_file or None,
            tls_username=self.tls_username or None,
            tls_hostname=self.tls_hostname,
            tls_verify_peer=None if self.tls_verify_peer else False,
        )


def parse_name(name: str) -> dict[str, Any]:
    """The options that a name stands for: `server`, `export`, and what it says of TLS.

    Args:
        name: an NBD URI (`nbd://host:port/export`, `nbd+unix:///export?socket=path`, `nbd+vsock://cid:port/export`), or
            what QEMU took before there were URIs: `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH[:exportname=NAME]`.

    Raises:
        OptionError: it is neither, or it asks for TLS in a way that there is not.
    """
    if name.startswith("nbd:") and not name.startswith(("nbd://", "nbd:/")):
        return _parse_legacy(name)
    try:
        uri = parse_uri(name)
    except UriError as problem:
        raise OptionError(f"{name}: {problem}") from None
    server: dict[str, Any] = {"type": "inet", "host": uri.host, "port": uri.port}
    if uri.is_unix:
        server = {"type": "unix", "path": uri.socket_path}
    elif uri.is_vsock:
        server = {"type": "vsock", "cid": int(uri.host), "port": uri.port}
    return {"server": server, "export": uri.export, **_tls_options(uri, name)}


def _tls_options(uri: NbdUri, name: str) -> dict[str, Any]:
    given = {
        "tls-certificates": uri.tls_certificates,
        "tls-psk-file": uri.tls_psk_file,
        "tls-username": uri.tls_username,
        "tls-hostname": uri.tls_hostname,
        "tls-verify-peer": uri.tls_verify_peer,
    }
    said = {key: value for key, value in given.items() if value is not None}
    if uri.tls_type == "anon":
        raise OptionError(f"{name}: tls-type=anon: there is TLS only with certificates (x509) and with keys (psk)")
    if uri.tls_type is not None and (uri.tls_type == "psk") != (uri.tls_psk_file is not None):
        raise OptionError(f"{name}: tls-type=psk and tls-psk-file go together, and no certificates with them")
    if not uri.is_tls_required:
        if said or uri.tls_type:
            raise OptionError(
                f"{name}: {next(iter(said), 'tls-type')} belongs to nbds://, nbds+unix:// and nbds+vsock://"
            )
        return {}
    return {"tls": True, **said}


def place_of(name: str, **more: Any) -> NbdPlace:
    """Where a name leads, for those who only want to talk to the server.

    Args:
        name: as `parse_name` takes it.
        more: options of TLS by their Python names that are said beside it; None is unsaid.

    Raises:
        OptionError: as `parse_name`; or the options contradict each other.
    """
    said = {key.replace("_", "-"): value for key, value in more.items() if value is not None}
    return opt.convert({**parse_name(name), **said}, NbdPlace, driver="nbd")


def _parse_legacy(name: str) -> dict[str, Any]:
    parts = _LEGACY.fullmatch(name)
    if parts is None:
        raise OptionError(
            f"{name}: expected nbd:HOST:PORT[:exportname=NAME], nbd:unix:PATH[:exportname=NAME] or an NBD URI"
        )
    export = parts["export"] or ""
    if parts["path"] is not None:
        return {"server": {"type": "unix", "path": parts["path"]}, "export": export}
    port = parts["port"]
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise OptionError(f"{name}: port {port!r} is not in 1 to 65535")
    return {
        "server": {"type": "inet", "host": parts["ipv6"] or parts["host"] or "", "port": int(port)},
        "export": export,
    }


async def connect_socket(address: ServerAddress) -> socket.socket:
    """A connected, non-blocking socket; the caller closes it.

    Raises:
        OSError: "Failed to connect to 'localhost:10809': Connection refused"; no socket is left open.
    """
    try:
        if address.type == "unix":
            return await _connected(socket.AF_UNIX, address.path)
        if address.type == "vsock":
            return await _connected(socket.AF_VSOCK, (address.cid, address.port))
        return await _connect_tcp(address)
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno and problem.errno > 0 else problem.strerror or str(problem)
        if isinstance(problem, socket.gaierror):
            reason = str(problem.strerror)
        raise OSError(problem.errno, f"Failed to connect to '{address}': {reason}") from None


async def _connect_tcp(address: ServerAddress) -> socket.socket:
    """Try every address of the host in turn; the error is that of the last."""
    loop = asyncio.get_running_loop()
    host = address.host or "localhost"
    failure: OSError | None = None
    for family, _, _, _, place in await loop.getaddrinfo(host, address.port, type=socket.SOCK_STREAM):
        try:
            connected = await _connected(family, place)
        except OSError as problem:
            failure = problem
            continue
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connected
    raise failure or OSError(f"{host} has no address")


async def _connected(family: int, place: Any) -> socket.socket:
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        if family == socket.AF_UNIX:
            # TCP finds its windows itself; a Unix socket has what it is given.
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(connecting, place)
    except BaseException:
        connecting.close()
        raise
    return connecting
