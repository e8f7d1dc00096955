"""`Visitor`: who has come, as far as it is known: from the socket at first, by a name once TLS has proved one."""

import ipaddress
import socket
import struct

import msgspec

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

PEER_CREDENTIALS = struct.Struct("iII")
"""What SO_PEERCRED gives: the process, its user and its group (`struct ucred`)."""

SO_PEERGROUPS = 59
"""The socket option that tells that user's further groups (Linux 4.13); the module `socket` has no name for it."""

MAX_GROUPS_BYTES = 1024
"""What Python gives to a socket option: room for 256 groups. Of who has more of them none is known but the first."""

V6_NETWORK_BITS = 64
"""Whoever has one address of IPv6 has all of such a network: they count as one."""


class Refused(Exception):
    """A client is sent away; the text says why, for the log."""


class Visitor(msgspec.Struct):
    """A client.

    Args:
        label: where it is, for the log.
        key: what it is counted under, before it has a name: an address (of IPv6 a network), or a user of this machine.
        address: where it comes from, None if not by IP. An IPv4 address inside of IPv6 is an IPv4 address.
        uid: the user at the other end of a Unix socket, when it connected.
        gids: that user's groups.
        is_unix: it comes by a Unix socket.
        cid: the number of the virtual machine it comes from, or of its host (vsock(7)), None if not by vsock.
        name: what TLS has proved: the distinguished name of a certificate, or the user of a key; "" if nothing.
    """

    label: str
    key: str = ""
    address: IpAddress | None = None
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    is_unix: bool = False
    cid: int | None = None
    name: str = ""

    def __str__(self) -> str:
        return f"{self.label} ({self.name!r})" if self.name else self.label


def visitor_at(sock: socket.socket, address: object) -> Visitor:
    """Who is at the other end of a connection.

    Args:
        sock: connected.
        address: of the other end, as `accept` gives it.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        host, port = address[:2]
        ip = plain_address(host)
        label = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return Visitor(label, key=counted_as(ip), address=ip)
    if sock.family == socket.AF_UNIX:
        pid, uid, gid = PEER_CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        )
        label = f"unix#{sock.fileno()} (uid {uid}, pid {pid})"
        return Visitor(label, key=f"uid {uid}", uid=uid, gids=frozenset({gid, *groups_of(sock)}), is_unix=True)
    if sock.family == socket.AF_VSOCK and isinstance(address, tuple):
        cid, port = address
        return Visitor(f"vsock:{cid}:{port}", key=f"vsock {cid}", cid=cid)
    return Visitor(str(address) or f"socket#{sock.fileno()}", key=str(sock.family))


def plain_address(host: str) -> IpAddress:
    """An address without its zone, and as IPv4 if it is one inside of IPv6."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def counted_as(ip: IpAddress) -> str:
    """What all are counted under who may be the same client."""
    if ip.version == 4:
        return str(ip)
    return str(ipaddress.ip_network((ip, V6_NETWORK_BITS), strict=False))


def groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The further groups of who is at the other end of a Unix socket; none where the kernel does not tell them."""
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS_BYTES)
    except OSError:
        return ()
    return struct.unpack(f"{len(found) // 4}I", found)
