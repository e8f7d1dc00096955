"""A thousand idle connections, floods of them, handshakes that never end: others are served, and memory is bounded."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.wire_client import GO, NO_ZEROES_AND_FIXED, OPTION, OPTION_MAGIC
from tests.peers import Endpoint, Peer, pynbd_serve, require_tool, run

MIB = 1 << 20
IDLE = 1000
MAX_IDLE_CONNECTION_BYTES = 32 << 10
"""What an idle connection may take of the server's memory."""

HONEST, HOSTILE = "127.0.0.1", "127.0.0.2"
"""Addresses that clients come from."""

GREETING_BYTES = 18
CHOICE = struct.pack(">I", NO_ZEROES_AND_FIXED) + OPTION.pack(OPTION_MAGIC, GO, 6) + bytes(6)
"""The shortest handshake that leads to the default export."""


@pytest.fixture(autouse=True)
def _tools() -> None:
    require_tool("qemu-io", package="qemu-utils")


def resident_bytes(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def connected(endpoint: Endpoint, source: str = HONEST) -> socket.socket:
    """A socket that is connected from an address of this machine."""
    if endpoint.socket_path is not None:
        return endpoint.connect()
    return socket.create_connection((endpoint.host, endpoint.port), 30, (source, 0))


def received(sock: socket.socket, count: int) -> bytes:
    """So many bytes; fewer if the server hangs up before."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while len(data) < count and (more := sock.recv(count - len(data))):
            data += more
    return data


def choose_export(sock: socket.socket) -> None:
    """Come to the transmission phase."""
    assert len(received(sock, GREETING_BYTES)) == GREETING_BYTES
    sock.sendall(CHOICE)
    while True:
        _, _, kind, length = struct.unpack(">QIII", received(sock, 20))
        received(sock, length)
        if kind == 1:
            return


@contextlib.contextmanager
def closing_all() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def assert_served(peer: Peer) -> None:
    """Somebody else writes and reads, by QEMU's own client."""
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", "-c", "flush", peer.uri())


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_thousand_idle_connections(tcp: bool, random_disk: Path) -> None:
    with pynbd_serve("-f", "raw", random_disk, tcp=tcp) as peer, closing_all() as idle:
        assert_served(peer)
        before = resident_bytes(peer.pid)
        for _ in range(IDLE):
            idle.append(connected(peer.endpoint))
            choose_export(idle[-1])
        assert (resident_bytes(peer.pid) - before) / IDLE < MAX_IDLE_CONNECTION_BYTES
        assert_served(peer)
        # They are all there still.
        request = struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 0, 512)
        for sock in (idle[0], idle[IDLE // 2], idle[-1]):
            sock.sendall(request)
            assert received(sock, 16 + 512)[:16] == struct.pack(">IIQ", 0x67446698, 0, 77)


def test_a_flood_from_one_address(random_disk: Path) -> None:
    """Whoever floods has as many connections as it may; others find places, and the log is short."""
    limits = "connections=20"
    with pynbd_serve("-e", "50", "--client-limits", limits, "-f", "raw", random_disk, tcp=True) as peer:
        with closing_all() as flood:
            for _ in range(20):
                flood.append(connected(peer.endpoint, HOSTILE))
                choose_export(flood[-1])
            for _ in range(2000):
                with connected(peer.endpoint, HOSTILE) as sock:
                    assert received(sock, 1) == b""
            assert_served(peer)
        assert peer.log().count("127.0.0.2 has 20 connections already") == 10
        status = peer.stop()
        assert status == 0
        assert "127.0.0.2: 1990 more lines like these" in peer.log()


def test_handshakes_that_never_end(random_disk: Path) -> None:
    """They hold all places there are, but not for long: then whoever waits comes in."""
    limits = "handshake-timeout=1"
    with pynbd_serve("-e", "100", "--client-limits", limits, "-f", "raw", random_disk, tcp=True) as peer:
        with closing_all() as slow:
            slow += [connected(peer.endpoint, HOSTILE) for _ in range(100)]
            assert_served(peer)
            for sock in slow:
                assert len(received(sock, GREETING_BYTES + 1)) == GREETING_BYTES
        peer.until_logged("no export was chosen within 1 s")


def test_drip_by_drip(random_disk: Path) -> None:
    """Who sends a byte now and then has no more time than who sends nothing."""
    with pynbd_serve("--client-limits", "handshake-timeout=0.5", "-f", "raw", random_disk, tcp=True) as peer:
        with connected(peer.endpoint) as sock:
            assert len(received(sock, GREETING_BYTES)) == GREETING_BYTES
            sock.settimeout(0.1)
            gone = False
            for number in range(1000):
                try:
                    sock.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7"[number : number + 1] or b"\0")
                    gone = sock.recv(1) == b""
                except TimeoutError:
                    continue
                except ConnectionError:
                    gone = True
                if gone:
                    break
            assert gone
        peer.until_logged("no export was chosen within 0.5 s")
        assert_served(peer)


def test_those_who_come_and_go(random_disk: Path) -> None:
    """Thousands of connections, most of them closed at once: nothing is left of them."""
    with pynbd_serve("-q", "-f", "raw", random_disk, tcp=True) as peer:
        assert_served(peer)
        before, descriptors = resident_bytes(peer.pid), len(list(Path(f"/proc/{peer.pid}/fd").iterdir()))
        for number in range(3000):
            with connected(peer.endpoint, HOSTILE) as sock:
                if number % 3 == 0:
                    choose_export(sock)
                elif number % 3 == 1:
                    sock.sendall(b"\xff" * 100)
        assert_served(peer)
        assert resident_bytes(peer.pid) - before < 16 * MIB
        assert len(list(Path(f"/proc/{peer.pid}/fd").iterdir())) <= descriptors + 5
