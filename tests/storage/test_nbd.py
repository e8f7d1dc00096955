"""The driver `nbd` with real servers: whatever they speak, their exports are rows of bytes."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from pathlib import Path

import pytest

from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError
from pynbd.block.graph import Graph
from pynbd.block.requests import RequestFlag
from tests import peers
from tests.conftest import DiskMaker
from tests.storage.conftest import opened
from tests.storage.nbd_liar import Talk, server
from tests.storage.nbd_servers import SERVERS, SIZE, client, driver_of, options_of, read
from tests.storage.test_disks import follow

KINDS = ["write", "zeroes", "discard", "read", "status", "flush"]
FLAGS = [RequestFlag.NONE, RequestFlag.FUA, RequestFlag.MAY_UNMAP]


@pytest.mark.parametrize("kind", SERVERS)
async def test_an_export_is_a_row_of_bytes(kind: str, make_disk: DiskMaker) -> None:
    """Any requests in any order, aligned or not: the bytes are those of a model."""
    mode, start = SERVERS[kind]
    source = random.Random(kind)
    with start(make_disk(SIZE)) as peer:
        for _ in range(8):
            async with client(peer, discard=source.choice(["unmap", "ignore"])) as backend:
                assert backend.size == SIZE
                assert (await backend.node.info()).specific["replies"] == mode
                await backend.write_zeroes(0, SIZE)
                steps = [
                    (source.choice(KINDS), source.randrange(SIZE), source.randrange(1 << 17), source.choice(FLAGS))
                    for _ in range(25)
                ]
                await follow(backend, steps, seed=source.randrange(1 << 32))


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("kind", SERVERS)
async def test_many_requests_in_flight(kind: str, connections: int, make_disk: DiskMaker) -> None:
    """Hundreds at once, of all sizes: each lands where it belongs, over one connection or several."""
    with SERVERS[kind][1](make_disk(SIZE)) as peer:
        async with client(peer, connections=connections) as backend:
            source = random.Random(1)
            cuts = sorted({0, SIZE, *(source.randrange(SIZE) for _ in range(300))})
            whole = source.randbytes(SIZE)
            ranges = list(itertools.pairwise(cuts))
            source.shuffle(ranges)
            await asyncio.gather(*(backend.write(a, memoryview(whole)[a:b], source.choice([0, 1])) for a, b in ranges))
            await backend.flush()
            assert await asyncio.gather(*(read(backend, a, b - a) for a, b in ranges)) == [
                whole[a:b] for a, b in ranges
            ]
            assert await asyncio.gather(*(read(backend, 0, SIZE) for _ in range(8))) == [whole] * 8


async def test_an_oldstyle_export_is_read(random_disk: Path) -> None:
    """Without any negotiation. (Of this server, nbdkit 1.32, no more can be had: it forgets what it has offered.)"""
    with peers.nbdkit("file", random_disk, options=["--oldstyle", "-r"]) as peer:
        async with client(peer, **{"read-only": True}) as backend:
            whole = random_disk.read_bytes()
            assert await read(backend, 0, len(whole)) == whole


async def test_large_payloads_both_ways_at_once(make_disk: DiskMaker) -> None:
    """Reads and writes of megabytes, more than any buffer on the way holds, and beyond the largest request."""
    size = 80 << 20
    with peers.qemu_nbd(make_disk(size, extents=[])) as peer:
        async with client(peer) as backend:
            source = random.Random(2)
            half = source.randbytes(size // 2)
            await backend.write(0, memoryview(half))
            answers = await asyncio.gather(
                read(backend, 0, size // 2),
                *(
                    backend.write(size // 2 + at, memoryview(half)[at : at + (3 << 20)])
                    for at in range(0, size // 2, 3 << 20)
                ),
            )
            assert answers[0] == half
            assert await read(backend, size // 2, size // 2) == half


async def test_holes_are_told_and_read_as_zeroes(sparse_disk: Path) -> None:
    for qemu10 in (False, True):
        if qemu10 and not (peers.QEMU10 / "bin" / "qemu-nbd").exists():
            continue
        with peers.qemu_nbd(sparse_disk, qemu10=qemu10) as peer:
            async with client(peer, **{"read-only": True}) as backend:
                whole = sparse_disk.read_bytes()
                assert await read(backend, 0, len(whole)) == whole
                extents = await backend.block_status(0, backend.size)
                assert sum(extent.length for extent in extents) == backend.size
                assert [(extent.length >> 10, extent.data, extent.zero) for extent in extents] == [
                    (64, True, False),
                    (16320, False, True),
                    (1024, True, False),
                    (48064, False, True),
                    (64, True, False),
                ]


async def test_a_disk_of_terabytes_is_zeroed_whole() -> None:
    """Requests longer than the protocol's 32 bits can say, with and without extended headers."""
    with peers.nbdkit("memory", "6T") as peer:
        async with client(peer, discard="unmap") as backend:
            await backend.write((5 << 40) + 7, memoryview(b"x"))
            extents = await backend.block_status(5 << 40, 1 << 20)
            assert extents[0].data
            await backend.write_zeroes(5 << 40, 16 << 30, RequestFlag.MAY_UNMAP)
            extents = await backend.block_status((5 << 40), 1 << 20)
            assert all(extent.zero for extent in extents)
            assert await read(backend, (5 << 40) + 7, 1) == b"\0"


# --- flags ----------------------------------------------------------------------------------------------------


async def test_flags_reach_the_server(tmp_path: Path) -> None:
    """FUA, NO_HOLE and FAST_ZERO are asked for exactly where the block layer's flags mean them."""
    log = tmp_path / "requests.log"
    with peers.nbdkit("memory", "1M", f"logfile={log}", options=["--filter=log"]) as peer:
        async with client(peer, discard="unmap") as backend:
            await backend.write(0, memoryview(b"x" * 512), RequestFlag.FUA)
            await backend.write(512, memoryview(b"x" * 512))
            await backend.write_zeroes(1024, 512)
            await backend.write_zeroes(2048, 512, RequestFlag.MAY_UNMAP | RequestFlag.FUA)
            await backend.write_zeroes(4096, 512, RequestFlag.MAY_UNMAP | RequestFlag.NO_FALLBACK)
            await backend.discard(8192, 512)
            await backend.cache(0, 4096)
            await backend.flush()
    said = [line for line in log.read_text().splitlines() if "offset=" in line or "Flush" in line]
    requests = [line.split("connection=1 ", 1)[1] for line in said if " id=" in line]
    for wanted, fua in (("Write id=1 offset=0x0 ", "fua=1"), ("Write id=2 offset=0x200 ", "fua=0")):
        assert any(request.startswith(wanted) and fua in request for request in requests), requests
    assert any("Zero id=3 " in r and "trim=0" in r and "fua=0" in r and "fast=0" in r for r in requests), requests
    assert any("Zero id=4 " in r and "trim=1" in r and "fua=1" in r and "fast=0" in r for r in requests), requests
    assert any("Zero id=5 " in r and "trim=1" in r and "fast=1" in r for r in requests), requests
    assert any("Trim id=6 offset=0x2000 count=0x200" in r for r in requests), requests
    assert any("Cache id=7 offset=0x0 count=0x1000" in r for r in requests), requests
    assert any("Flush id=8" in r for r in requests), requests


async def test_fast_zero_or_nothing() -> None:
    """Where zeroes are not quick NO_FALLBACK fails with ENOTSUP, and nothing has changed."""
    for options in (["--filter=nozero"], ["--filter=nozero", "--filter=fua"]):
        with peers.nbdkit("memory", "1M", "zeromode=none", options=options[:1]) as peer:
            async with client(peer) as backend:
                await backend.write(0, memoryview(b"x" * 4096))
                with pytest.raises(OSError) as caught:
                    await backend.write_zeroes(0, 4096, RequestFlag.NO_FALLBACK)
                assert caught.value.errno == errno.ENOTSUP
                assert await read(backend, 0, 4096) == b"x" * 4096
                await backend.write_zeroes(0, 4096)
                assert await read(backend, 0, 4096) == bytes(4096)


async def test_a_disk_that_ends_within_a_block(tmp_path: Path) -> None:
    """The last bytes of an export whose size is no multiple of its minimum block can be had."""
    disk = tmp_path / "odd.raw"
    whole = random.Random(3).randbytes(10_000)
    disk.write_bytes(whole)
    options = ["--filter=blocksize-policy"]
    with peers.nbdkit("file", disk, "blocksize-minimum=4096", options=options) as peer:
        async with client(peer) as backend:
            assert backend.node.driver.limits.request_alignment == 4096
            assert await read(backend, 0, 10_000) == whole
            await backend.write(9_990, memoryview(b"0123456789"))
            assert await read(backend, 9_000, 1_000) == whole[9_000:9_990] + b"0123456789"
    assert disk.stat().st_size == 10_000


# --- errors of requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["EPERM", "EIO", "ENOMEM", "ENOSPC", "ESHUTDOWN"])
@pytest.mark.parametrize("options", [[], ["--no-sr"]])
async def test_errors_of_the_server_are_errors_of_the_request(code: str, options: list[str]) -> None:
    """One request fails, and says which and why; the connection and all other requests go on."""
    with peers.nbdkit(
        "memory", "1M", f"error-pwrite={code}", "error-pwrite-rate=100%", options=[*options, "--filter=error"]
    ) as peer:
        async with client(peer) as backend:
            answers = await asyncio.gather(
                backend.write(4096, memoryview(b"x" * 512)), read(backend, 0, 512), return_exceptions=True
            )
            problem, data = answers
            assert isinstance(problem, OSError)
            assert problem.errno == getattr(errno, code)
            assert "write at 4096 for 512 bytes" in str(problem)
            assert peer.uri() in str(problem)
            assert data == bytes(512)


async def test_slow_requests_do_not_hold_up_others() -> None:
    """Replies come in any order."""
    with peers.nbdkit("memory", "1M", "rdelay=300ms", options=["--filter=delay"]) as peer:
        async with client(peer) as backend:
            order: list[str] = []

            async def slow() -> None:
                await read(backend, 0, 512)
                order.append("read")

            async def quick() -> None:
                await backend.write(4096, memoryview(b"x"))
                order.append("write")

            await asyncio.gather(slow(), quick())
            assert order == ["write", "read"]


# --- what can't be opened, or done -----------------------------------------------------------------------------


async def test_read_only_exports() -> None:
    """They are opened for reading only, or by `auto-read-only`; not for writing."""
    with peers.nbdkit("memory", "1M", options=["-r"]) as peer:
        with pytest.raises(BlockError, match="this export read-only; open it with read-only=on"):
            async with client(peer, **{"open-timeout": 60}):  # which is no reason to go on trying
                pass
        async with client(peer, **{"read-only": True}) as backend:
            assert await read(backend, 0, 4) == bytes(4)


async def test_auto_read_only() -> None:
    with peers.nbdkit("memory", "1M", options=["-r"]) as peer:
        graph = Graph()
        node = await graph.open(options_of(peer.uri(), **{"auto-read-only": True}))
        assert node.read_only
        await graph.close_all()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nbd://127.0.0.1:1/", "Failed to connect to '127.0.0.1:1': Connection refused"),
        ("nbd+unix:///?socket=/nonexistent", "Failed to connect to '/nonexistent': No such file or directory"),
    ],
)
async def test_no_server(uri: str, said: str) -> None:
    with pytest.raises(OSError) as caught:
        async with opened(uri):
            pass
    assert caught.value.strerror == said


async def test_no_such_export(random_disk: Path) -> None:
    with peers.qemu_nbd(random_disk, "-x", "there") as peer:
        graph = Graph()
        with pytest.raises(OSError, match="the server refuses export 'elsewhere'") as caught:
            await graph.open(peer.uri("elsewhere"))
        assert caught.value.errno == errno.ENOENT
        assert not graph.nodes


async def test_a_server_that_is_no_nbd_server() -> None:
    """Whatever listens there, it says so."""

    async def greet(talk: Talk) -> None:
        talk.writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
        assert await talk.is_left()

    async with server(greet) as uri:
        with pytest.raises(OSError, match="no NBD server: it greets with b'SSH-2") as caught:
            async with opened(uri):
                pass
        assert caught.value.errno == errno.EPROTO


async def test_an_export_is_not_resized_where_the_server_can_not() -> None:
    with peers.nbdkit("memory", "1M") as peer:
        async with client(peer) as backend:
            await backend.truncate(1 << 20)
            await backend.truncate(4096, Preallocation.OFF, exact=False)
            with pytest.raises(OSError) as caught:
                await backend.truncate(1 << 21)
            assert caught.value.errno == errno.ENOTSUP
            assert backend.size == 1 << 20


async def test_an_export_is_resized_under_its_clients(tmp_path: Path) -> None:
    """By one client's RESIZE: whoever comes later finds the new size, and so does a connection that is made again."""
    disk, config = tmp_path / "disk.raw", tmp_path / "pynbd.toml"
    disk.write_bytes(b"a" * (1 << 20))
    config.write_text(f'[export.disk]\ndisk = "{disk}"\nformat = "raw"\nresize = true\n')
    with peers.pynbd_serve("--config", config) as peer:
        again = {"connections": 2, "reconnect-delay": 20}
        async with client(peer, export="disk", **again) as backend:
            with pytest.raises(OSError, match="preallocation full"):
                await backend.truncate(3 << 20, Preallocation.FULL)
            await backend.truncate(3 << 20)
            assert backend.size == disk.stat().st_size == 3 << 20
            await backend.write((3 << 20) - 4, memoryview(b"last"))
            async with client(peer, export="disk") as second:
                assert await read(second, (1 << 20) - 1, 2) == b"a\0"
                assert await read(second, (3 << 20) - 4, 4) == b"last"
            await backend.truncate(1 << 20)
            assert backend.size == disk.stat().st_size == 1 << 20
            await backend.flush()
            peer.stop()
            with peers.pynbd_serve("--config", config, "-k", peer.endpoint.socket_path or ""):
                await backend.write(0, memoryview(b"b"))
                await backend.flush()
    assert disk.read_bytes() == b"b" + b"a" * ((1 << 20) - 1)


async def test_several_connections_only_where_allowed(random_disk: Path) -> None:
    """More than one is made where the server says that a flush on one covers all."""
    with peers.nbdkit("memory", "1M") as peer:
        async with client(peer, connections=4) as backend:
            assert (await backend.node.info()).specific["connections"] == 4
    with peers.qemu_nbd(random_disk) as peer:  # writable: no CAN_MULTI_CONN in this version
        async with client(peer, connections=4) as backend:
            flags = (await backend.node.info()).specific["flags"]
            allowed = 4 if "CAN_MULTI_CONN" in flags else 1
            assert (await backend.node.info()).specific["connections"] == allowed


async def test_a_closed_node_says_goodbye(tmp_path: Path) -> None:
    """Closing sends DISC: the server sees an end, not a lost connection."""
    log = tmp_path / "requests.log"
    with peers.nbdkit("memory", "1M", f"logfile={log}", options=["--filter=log", "-v"]) as peer:
        async with client(peer) as backend:
            await read(backend, 0, 1)
            driver = driver_of(backend)
        assert driver.filename() == peer.uri()
        peer.stop()
        assert "client sent NBD_CMD_DISC" in peer.log()


async def test_all_ways_to_give_the_options(random_disk: Path) -> None:
    """A URI, QEMU's old names, dotted keys, JSON, flat or grouped: the same export."""
    with peers.qemu_nbd(random_disk, "-x", "a,b", "-r") as peer:
        path = peer.endpoint.socket_path
        for description in (
            peer.uri("a,b"),
            f"nbd:unix:{path}:exportname=a,b",
            f"driver=nbd,server.type=unix,server.path={path},export=a,,b,reconnect-delay=1,open-timeout=2",
            f"driver=nbd,path={path},export=a,,b",
            f'json:{{"driver": "nbd", "server.type": "unix", "server.path": "{path}", "export": "a,b"}}',
            f'json:{{"driver": "raw", "file": {{"driver": "nbd", "path": "{path}", "export": "a,b"}}}}',
            {"driver": "nbd", "server": {"type": "unix", "path": str(path)}, "export": "a,b"},
        ):
            graph = Graph()
            node = await graph.open(description, read_only=True)
            assert node.size == random_disk.stat().st_size
            assert node.filename() == f"nbd+unix:///a,b?socket={path}"
            await graph.close_all()


async def test_ports_are_numbers_or_text() -> None:
    """QEMU's are text; both are taken."""
    with peers.nbdkit("memory", "1M", tcp=True) as peer:
        for port in (peer.endpoint.port, str(peer.endpoint.port)):
            async with opened({"driver": "nbd", "host": "127.0.0.1", "port": port}) as backend:
                assert backend.size == 1 << 20


async def test_wrong_options_are_named() -> None:
    for options, said in (
        ({}, "one of 'server', 'host' and 'path' is needed"),
        ({"host": "a", "path": "b"}, "'path' and 'host' or 'port' both say where the server is"),
        ({"server": {"type": "unix", "path": "a"}, "port": 1}, "'server' and 'port' both say where the server is"),
        ({"server": {"type": "unix"}}, "a server of type 'unix' needs its path"),
        ({"host": "a", "port": "0"}, "port"),
        ({"host": "a", "tls-creds": "tls0"}, "there is no tls-creds-x509 'tls0'"),
        ({"host": "a", "connections": 17}, "connections"),
        ({"host": "a", "sever": 1}, "sever: driver 'nbd' has no such option"),
    ):
        with pytest.raises(BlockError, match=said):
            async with opened({"driver": "nbd", **options}):
                pass
