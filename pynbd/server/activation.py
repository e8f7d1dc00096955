"""Sockets that somebody else has opened for us: those of a service manager, and a client at the standard input.

A service manager (systemd, `systemd-socket-activate`, and libnbd, which does the same for `nbdinfo [ pynbd serve … ]`)
listens itself, starts us with the sockets as descriptors from 3 on, and says so in the environment: `LISTEN_FDS` is how
many there are, `LISTEN_PID` for whom they are, `LISTEN_FDNAMES` what they are called. Source: sd_listen_fds(3).
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Final

import msgspec

from nbd_protocol.uri import NbdUri
from pynbd.block.errors import BlockError

LISTEN_FDS_START: Final = 3
"""The first descriptor that a service manager hands over."""

MAX_SOCKETS: Final = 256
"""More addresses than anybody listens on: a number beyond it is a mistake."""

FAMILIES: Final = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK)
"""Where NBD can be spoken."""

EVERY_ADDRESS: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared with, not bound to
"""Addresses that stand for all of this machine's, and how it reaches itself."""

VMADDR_CID_LOCAL: Final = 1
"""The machine itself (vsock(7)); the module `socket` has no name for it before Python 3.14."""

LOCAL_CID: Final = struct.Struct("=I")
"""What the kernel answers to the question for it."""

VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class Handed(msgspec.Struct, frozen=True):
    """A socket that was handed over, non-blocking.

    Args:
        sock: ours from now on.
        name: what it is called where it comes from, "" if nothing.
        listens: whether clients come there; otherwise it is a client.
    """

    sock: socket.socket
    name: str
    listens: bool


def take_sockets(environment: MutableMapping[str, str], pid: int) -> list[Handed]:
    """The sockets that a service manager has for us. To be called once, and before the process forks.

    Args:
        environment: of the process; the variables are removed, since they are not for those whom we start.
        pid: ours.

    Raises:
        BlockError: it says something that can't be, or hands over what is no socket for NBD.
    """
    told = {name: environment.pop(name, "") for name in VARIABLES}
    if not told["LISTEN_FDS"] or not told["LISTEN_PID"]:
        return []
    if _number("LISTEN_PID", told["LISTEN_PID"], 2**31) != pid:
        return []  # they were for somebody else, who has started us
    count = _number("LISTEN_FDS", told["LISTEN_FDS"], MAX_SOCKETS)
    names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else [""] * count
    if len(names) != count:
        raise BlockError(f"LISTEN_FDNAMES: {len(names)} names for {count} sockets")
    with contextlib.ExitStack() as undo:
        handed = []
        for number, name in enumerate(names, LISTEN_FDS_START):
            one = handed_over(number, "" if name == "unknown" else name, f"LISTEN_FDS: descriptor {number}")
            undo.callback(one.sock.close)
            handed.append(one)
        undo.pop_all()
    return handed


def _number(variable: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= most):
        raise BlockError(f"{variable}: {text!r} is no number from 0 to {most}")
    return int(text)


def handed_over(descriptor: int, name: str, what: str) -> Handed:
    """An open descriptor as the socket that it is.

    Args:
        descriptor: closed with the socket that is returned.
        name: for `Handed`.
        what: how an error calls it.

    Raises:
        BlockError: it is no stream socket that listens or is connected; it stays open.
    """
    try:
        kind = os.fstat(descriptor).st_mode
    except OSError as problem:
        raise BlockError(f"{what}: {problem.strerror}") from None
    if not stat.S_ISSOCK(kind):
        raise BlockError(f"{what} is no socket")
    os.set_inheritable(descriptor, False)
    with closing_unless_kept(socket.socket(fileno=descriptor)) as sock:
        if sock.family not in FAMILIES or sock.type != socket.SOCK_STREAM:
            raise BlockError(f"{what} is no stream socket of TCP, vsock or Unix: {sock.family!r}, {sock.type!r}")
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if not listens:
            try:
                sock.getpeername()
            except OSError as problem:
                if problem.errno == errno.ENOTCONN:
                    raise BlockError(f"{what} is a socket that neither listens nor is connected") from None
                raise BlockError(f"{what}: {problem.strerror}") from None
        sock.setblocking(False)
        return Handed(sock, name, listens)


@contextlib.contextmanager
def closing_unless_kept(sock: socket.socket) -> Iterator[socket.socket]:
    """Leave the descriptor open where something is wrong: it is not ours then."""
    try:
        yield sock
    except BaseException:
        sock.detach()
        raise


def take_standard_streams() -> Handed:
    """The client at the other end of the standard input and output, as inetd and `nbd_connect_command` start servers.

    Whatever is printed from now on, or read from the standard input, is nothing.

    Raises:
        BlockError: there is none.
    """
    what = "--single: the standard input"
    try:
        descriptor = os.dup(0)
    except OSError as problem:
        raise BlockError(f"{what}: {problem.strerror}") from None
    try:
        client = handed_over(descriptor, "", what)
    except BlockError as problem:
        os.close(descriptor)
        raise BlockError(f"{problem}; it has to be the client's socket") from None
    if client.listens:
        client.sock.close()
        raise BlockError(f"{what} is a socket that listens; it has to be one client's")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2) if _is_open_file(2, descriptor) else (0, 1):
        os.dup2(null, stream)
    os.close(null)
    return client


def _is_open_file(descriptor: int, other: int) -> bool:
    """Whether both are the same: inetd makes the client the standard error as well."""
    try:
        return os.path.sameopenfile(descriptor, other)
    except OSError:
        return False


def uri_at(sock: socket.socket, *, tls: bool) -> NbdUri | None:
    """How clients reach a socket that listens; None if there is no name for that."""
    place = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # The name of an abstract one is bytes that begin with NUL; one without a name is the empty string.
        path = os.fsdecode(place)
        return NbdUri("nbds+unix" if tls else "nbd+unix", socket_path=path) if path else None
    if sock.family == socket.AF_VSOCK:
        cid, port = place
        cid = local_cid() if cid == socket.VMADDR_CID_ANY else cid
        return NbdUri("nbds+vsock" if tls else "nbd+vsock", host=str(cid), port=port)
    return NbdUri("nbds" if tls else "nbd", host=reachable(place[0]), port=place[1])


def local_cid() -> int:
    """The number by which this machine is known to those that reach it by vsock(7).

    That is 2 where it runs virtual machines, its own where it is one, and else 1, which is to each the machine itself.
    """
    try:
        with Path("/dev/vsock").open("rb") as device:
            raw = fcntl.ioctl(device, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(LOCAL_CID.size))
    except OSError:
        return VMADDR_CID_LOCAL
    (cid,) = LOCAL_CID.unpack(raw)
    return VMADDR_CID_LOCAL if cid == socket.VMADDR_CID_ANY else int(cid)


def reachable(host: str) -> str:
    """The address by which this machine reaches a listener: that of "every address" is none."""
    return EVERY_ADDRESS.get(host, host)
