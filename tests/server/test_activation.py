"""Sockets that others have opened: what is told of them in the environment, and what they are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError
from pynbd.server.activation import handed_over, local_cid, take_sockets, uri_at

PID = 1234


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": str(PID)}, {"LISTEN_FDS": "1", "LISTEN_PID": "99", "LISTEN_FDNAMES": "a"}],
)
def test_what_is_for_somebody_else_is_left(environment: dict[str, str]) -> None:
    assert take_sockets(environment, PID) == []
    assert environment == {}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LISTEN_FDS": "one"}, "LISTEN_FDS: 'one' is no number from 0 to 256"),
        ({"LISTEN_FDS": "257"}, "LISTEN_FDS: '257' is no number from 0 to 256"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS: '-1' is no number from 0 to 256"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "me"}, "LISTEN_PID: 'me' is no number from 0 to 2147483648"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"}, "LISTEN_FDNAMES: 1 names for 2 sockets"),
    ],
)
def test_what_can_not_be_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(BlockError) as refused:
        take_sockets({"LISTEN_PID": str(PID), **environment}, PID)
    assert str(refused.value) == said


HANDS_OVER = """
import os, socket, sys
held = [os.dup(0) for _ in range(8)]                  # so that 3 and 4 are whatever this puts there
first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
first.bind("\\0pynbd-test-%d" % os.getpid())
first.listen()
os.dup2(first.fileno(), 3)
os.dup2(second.fileno() if len(sys.argv) > 1 else first.fileno(), 4)
from pynbd.block.errors import BlockError
from pynbd.server.activation import take_sockets
environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:unknown", "OTHER": "stays"}
try:
    found = take_sockets(environment, os.getpid())
except BlockError as problem:
    sys.exit(str(problem))
print([(one.name, one.listens, one.sock.fileno(), os.get_inheritable(one.sock.fileno())) for one in found], environment)
"""


def test_descriptors_from_three_on_are_taken_with_their_names() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANDS_OVER], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[('a', True, 3, False), ('', True, 4, False)] {'OTHER': 'stays'}\n"


def test_a_socket_that_is_neither_is_told_with_its_descriptor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANDS_OVER, "bad"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.stderr == "LISTEN_FDS: descriptor 4 is a socket that neither listens nor is connected\n"


def test_what_is_no_stream_socket_is_refused_and_left_open(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, (tmp_path / "file").open("wb") as file:
        with pytest.raises(BlockError, match=r"^it is no stream socket of TCP, vsock or Unix"):
            handed_over(datagrams.fileno(), "", "it")
        with pytest.raises(BlockError, match=r"^it is no socket$"):
            handed_over(file.fileno(), "", "it")
        os.fstat(datagrams.fileno())
        os.fstat(file.fileno())
    with pytest.raises(BlockError, match=r"^it: Bad file descriptor$"):
        handed_over(999_999, "", "it")


def test_a_client_is_told_from_a_listener() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        taken = handed_over(os.dup(its.fileno()), "", "it")
        assert not taken.listens
        assert not taken.sock.getblocking()
        taken.sock.close()


def test_how_a_listener_is_reached() -> None:
    with socket.socket(socket.AF_UNIX) as nameless:
        assert uri_at(nameless, tls=False) is None
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0pynbd test {os.getpid()}")
        assert str(uri_at(abstract, tls=False)) == f"nbd+unix:///?socket=%00pynbd%20test%20{os.getpid()}"
    with socket.create_server(("::", 0), family=socket.AF_INET6) as everywhere:
        assert str(uri_at(everywhere, tls=True)) == f"nbds://[::1]:{everywhere.getsockname()[1]}/"


def test_how_a_listener_at_vsock_is_reached() -> None:
    """Who listens for all numbers of this machine is reached by the one that its kernel tells, if there are any."""
    try:
        everywhere = socket.socket(socket.AF_VSOCK)
    except OSError as problem:
        pytest.skip(f"this kernel has no vsock: {problem}")
    with everywhere:
        try:
            everywhere.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        except OSError as problem:
            pytest.skip(f"this kernel lets nobody listen at vsock: {problem}")
        assert str(uri_at(everywhere, tls=True)) == f"nbds+vsock://{local_cid()}:{everywhere.getsockname()[1]}/"
        assert 1 <= local_cid() < socket.VMADDR_CID_ANY
