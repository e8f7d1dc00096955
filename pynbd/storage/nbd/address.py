"""Where an NBD server is, in all the ways to say it, and how a socket gets there."""

import asyncio
import os
import re
import socket
from typing import Annotated, Any, Literal

import msgspec

from nbd_protocol.constants import DEFAULT_PORT
from nbd_protocol.uri import NbdUri, UriError, parse_uri
from pynbd.block.errors import OptionError

SOCKET_BUFFER_BYTES = 4 << 20
"""What is asked of the kernel for each direction; it gives as much as its limits allow."""

TLS_MISSING = "TLS is not supported yet"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

_LEGACY = re.compile(
    r"nbd:(?:unix:(?P<path>.*?)|(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[^:]*))"
    r"(?::exportname=(?P<export>.*))?",
    re.DOTALL,
)


class ServerAddress(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Where a server listens; QEMU's `SocketAddress`.

    Args:
        type: `inet` (TCP) or `unix`.
        host: for inet: a name or an address, IPv6 without brackets; "" is localhost.
        port: for inet.
        path: for unix: the socket's path; a leading NUL names an abstract socket.
    """

    type: Literal["inet", "unix"]
    host: str = ""
    port: Port = DEFAULT_PORT
    path: str = ""

    def __post_init__(self) -> None:
        if self.type == "unix" and not self.path:
            raise ValueError("a server of type 'unix' needs its path")
        if self.type == "unix" and (self.host or self.port != DEFAULT_PORT):
            raise ValueError("a server of type 'unix' has a path, and neither host nor port")
        if self.type == "inet" and self.path:
            raise ValueError("a server of type 'inet' has host and port, and no path")

    def uri(self, export: str) -> NbdUri:
        """The URI of one of its exports."""
        if self.type == "unix":
            return NbdUri("nbd+unix", socket_path=self.path, export=export)
        return NbdUri("nbd", host=self.host, port=self.port, export=export)

    def __str__(self) -> str:
        return self.uri("").address


def parse_name(name: str) -> dict[str, Any]:
    """The options `server` and `export` that a name stands for.

    Args:
        name: an NBD URI (`nbd://host:port/export`, `nbd+unix:///export?socket=path`), or what QEMU took before
            there were URIs: `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH[:exportname=NAME]`.

    Raises:
        OptionError: it is neither, or it wants TLS.
    """
    if name.startswith("nbd:") and not name.startswith(("nbd://", "nbd:/")):
        return _parse_legacy(name)
    try:
        uri = parse_uri(name)
    except UriError as problem:
        raise OptionError(f"{name}: {problem}") from None
    if uri.is_tls_required or uri.tls_certificates or uri.tls_psk_file or uri.tls_type:
        raise OptionError(f"{name}: {TLS_MISSING}")
    if uri.is_unix:
        return {"server": {"type": "unix", "path": uri.socket_path}, "export": uri.export}
    return {"server": {"type": "inet", "host": uri.host, "port": uri.port}, "export": uri.export}


def server_and_export(name: str) -> tuple[ServerAddress, str]:
    """What `parse_name` gives, for those who only want to talk to the server.

    Raises:
        OptionError: as `parse_name`.
    """
    place = parse_name(name)
    return msgspec.convert(place["server"], ServerAddress), place["export"]


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
