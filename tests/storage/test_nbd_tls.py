"""The driver `nbd` through TLS: with the servers of others, and with those that it must not believe."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError
from pynbd.block.graph import Graph
from pynbd.block.objects import Objects
from pynbd.block.permissions import Permission
from tests import peers
from tests.conftest import DiskMaker

MIB = 1 << 20
SIZE = 8 * MIB

Start = Callable[[Path, Path], AbstractContextManager[peers.Peer]]


def qemu_nbd(disk: Path, pki: Path) -> AbstractContextManager[peers.Peer]:
    peers.require_tool("qemu-nbd", package="qemu-utils")
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={pki},verify-peer=on"
    return peers.qemu_nbd(disk, "--object", creds, "--tls-creds", "tls0", tcp=True)


def nbdkit(disk: Path, pki: Path) -> AbstractContextManager[peers.Peer]:
    tls = ["--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer"]
    return peers.nbdkit("file", disk, options=tls, tcp=True)


def pynbd(disk: Path, pki: Path) -> AbstractContextManager[peers.Peer]:
    return peers.pynbd_serve("-f", "raw", "--tls-certificates", pki, "--tls-verify-peer", disk, tcp=True)


SERVERS: dict[str, Start] = {"qemu-nbd": qemu_nbd, "nbdkit": nbdkit, "pynbd": pynbd}


def at(peer: peers.Peer, pki: Path, **options: Any) -> dict[str, Any]:
    place = {"driver": "nbd", "host": "localhost", "port": peer.endpoint.port, "tls-certificates": str(pki)}
    return {**place, **{key.replace("_", "-"): value for key, value in options.items()}}


@asynccontextmanager
async def opened(tree: dict[str, Any], objects: Objects | None = None) -> AsyncIterator[BlockBackend]:
    graph = Graph(objects)
    backend = BlockBackend("test")
    try:
        node = await graph.open(tree)
        graph.attach(backend, node, Permission.CONSISTENT_READ | Permission.WRITE)
        yield backend
    finally:
        if backend.root is not None:
            graph.detach(backend)
        await graph.close_all()


@pytest.mark.parametrize("kind", SERVERS)
async def test_many_requests_at_once(kind: str, make_disk: DiskMaker, pki: Path) -> None:
    """All sizes on both sides of what a record holds, overlapping in time and not in place."""
    source = random.Random(11)
    disk = make_disk(SIZE, seed=4)
    expected = bytearray(disk.read_bytes())
    sizes = [1, 512, 4096, 16 << 10, (16 << 10) + 1, 65536, 300_000, MIB]

    async def work(backend: BlockBackend, start: int) -> None:
        for _ in range(25):
            length = source.choice(sizes)
            offset = start + source.randrange(2 * MIB - length + 1)
            if source.random() < 0.5:
                data = source.randbytes(length)
                await backend.write(offset, memoryview(data))
                expected[offset : offset + length] = data
            else:
                into = memoryview(bytearray(length))
                await backend.read(offset, into)
                assert into == expected[offset : offset + length]

    with SERVERS[kind](disk, pki) as peer:
        async with opened(at(peer, pki, connections=2)) as backend:
            await asyncio.gather(*(work(backend, quarter * SIZE // 4) for quarter in range(4)))
            await backend.flush()
    assert disk.read_bytes() == expected


@pytest.mark.parametrize("kind", SERVERS)
async def test_who_is_not_believed(kind: str, random_disk: Path, pki: Path, tmp_path: Path) -> None:
    (tmp_path / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    with SERVERS[kind](random_disk, pki) as peer:
        for options, said in (
            (
                {"tls_certificates": str(pki / "stranger")},
                "is not accepted: (unable to get local issuer|self-signed)",
            ),
            ({"tls_hostname": "elsewhere.example"}, "is not accepted: Hostname mismatch"),
            ({"tls_certificates": str(tmp_path)}, "certificate required|hung up|closed the connection|reset by peer"),
        ):
            with pytest.raises(OSError, match=f"Failed to connect to 'localhost:{peer.endpoint.port}': .*({said})"):
                async with opened(at(peer, pki, **options)):
                    pass


async def test_without_a_word_of_tls(random_disk: Path, pki: Path) -> None:
    said = "the server demands TLS for export '': use a URI with nbds"
    with pynbd(random_disk, pki) as peer, pytest.raises(PermissionError, match=said):
        async with opened({"driver": "nbd", "host": "localhost", "port": peer.endpoint.port}):
            pass


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "nbdkit oldstyle", "pynbd"])
async def test_a_server_without_tls(kind: str, random_disk: Path, pki: Path) -> None:
    """Nothing is said to it, not even the name of the export."""
    start: dict[str, Callable[[], AbstractContextManager[peers.Peer]]] = {
        "qemu-nbd": lambda: peers.qemu_nbd(random_disk, tcp=True),
        "nbdkit": lambda: peers.nbdkit("file", random_disk, tcp=True),
        "nbdkit oldstyle": lambda: peers.nbdkit("file", random_disk, options=["--oldstyle"], tcp=True),
        "pynbd": lambda: peers.pynbd_serve("-f", "raw", random_disk, tcp=True),
    }
    with start[kind]() as peer, pytest.raises(PermissionError, match="the server does not begin TLS: "):
        async with opened(at(peer, pki)):
            pass


async def test_an_object_and_a_unix_socket(random_disk: Path, pki: Path) -> None:
    objects = Objects()
    objects.make({"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(pki)})
    objects.make({"qom-type": "tls-creds-x509", "id": "tls1", "dir": str(pki), "endpoint": "server"})
    with peers.pynbd_serve("-f", "raw", "--tls-certificates", pki, random_disk) as peer:
        place = {"driver": "nbd", "path": str(peer.endpoint.socket_path)}
        async with opened({**place, "tls-creds": "tls0"}, objects) as backend:
            into = memoryview(bytearray(SIZE))
            await backend.read(0, into)
            assert into == random_disk.read_bytes()
            assert backend.node.filename() == f"nbds+unix:///?socket={peer.endpoint.socket_path}"
        with pytest.raises(OSError, match="Hostname mismatch"):
            async with opened({**place, "tls-creds": "tls0", "tls-hostname": "other.example"}, objects):
                pass
        with pytest.raises(BlockError, match="is of a server: a client needs endpoint=client"):
            async with opened({**place, "tls-creds": "tls1"}, objects):
                pass


async def test_a_server_that_comes_back(make_disk: DiskMaker, pki: Path, tmp_path: Path) -> None:
    """A new connection, a new handshake, and what was not answered is asked again."""
    disk = make_disk(SIZE, seed=8)
    port = peers.free_port()
    serve = [
        "-f",
        "raw",
        "--tls-certificates",
        str(pki),
        "--tls-verify-peer",
        "-b",
        "127.0.0.1",
        "-p",
        str(port),
        str(disk),
    ]
    with peers.pynbd_serve(*serve) as first:
        place = {
            "driver": "nbd",
            "host": "localhost",
            "port": port,
            "tls-certificates": str(pki),
            "reconnect-delay": 60,
        }
        async with opened(place) as backend:
            await backend.write(0, memoryview(b"before"))
            await backend.flush()
            first.stop()
            later = asyncio.ensure_future(backend.read(0, into := memoryview(bytearray(6))))
            await asyncio.sleep(0)
            with peers.pynbd_serve(*serve):
                await later
                assert bytes(into) == b"before"
                await backend.write(10, memoryview(b"after"))
                await backend.flush()


async def test_plain_text_behind_the_answer_to_starttls(pki: Path) -> None:
    """Whoever sits between the ends puts an answer there that we would take for the server's."""
    ready, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def lie() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
            connection.recv(4 + 16, socket.MSG_WAITALL)
            reply = bytes.fromhex("0003e889045565a9")
            ack = reply + (5).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes(4)
            injected = reply + (8).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes(4)
            connection.sendall(ack + injected)
            ready.wait(30)

    thread = threading.Thread(target=lie)
    thread.start()
    try:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match="bytes in plain text after STARTTLS") as caught:
            async with opened({"driver": "nbd", "host": "localhost", "port": port, "tls-certificates": str(pki)}):
                pass
        assert caught.value.errno == errno.EPROTO
    finally:
        ready.set()
        thread.join()
        listener.close()
