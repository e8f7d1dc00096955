"""Other servers' exports as the disk below `pynbd serve`: our client on one side, their clients on the other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.contents import sha256, write_random
from tests.interop.wire_client import FLUSH, READ, WRITE, WireClient
from tests.peers import Peer, nbd_server, nbdkit, pynbd_serve, qemu_nbd, require_tool, run

SIZE_BYTES = 32 << 20
MIB = 1 << 20
EIO = 5

Backend = Callable[[Path], contextlib.AbstractContextManager[Peer]]


def nbd_server_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    """nbd-server over TCP, with every command it has."""
    return nbd_server({"disk": disk}, "flush = true", "fua = true", "trim = true", tcp=True)


def plain_nbd_server_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    """nbd-server that offers nothing but reads and writes: no flush, no FUA, no trim."""
    return nbd_server({"disk": disk})


def nbdkit_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    return nbdkit("file", disk)


def plain_nbdkit_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    """nbdkit with simple replies, for blocks of 512 bytes and more only."""
    return nbdkit("file", disk, options=["--no-sr", "--filter=blocksize-policy"])


def strict_nbdkit_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    """nbdkit that refuses what is no multiple of 4096, and requests beyond 64 KiB."""
    policy = [
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    ]
    return nbdkit("file", disk, *policy, options=["--filter=blocksize-policy"])


def unfixed_nbdkit_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    """nbdkit with the first form of newstyle, which knows no option but the export's name."""
    return nbdkit("file", disk, options=["--mask-handshake=0"])


def qemu_nbd_of(disk: Path) -> contextlib.AbstractContextManager[Peer]:
    return qemu_nbd(disk, "--discard=unmap")


BACKENDS: dict[str, Backend] = {
    "nbd-server": nbd_server_of,
    "plain-nbd-server": plain_nbd_server_of,
    "nbdkit": nbdkit_of,
    "plain-nbdkit": plain_nbdkit_of,
    "strict-nbdkit": strict_nbdkit_of,
    "unfixed-nbdkit": unfixed_nbdkit_of,
    "qemu-nbd": qemu_nbd_of,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@contextlib.contextmanager
def through(backend: Backend, disk: Path, *options: str) -> Iterator[tuple[Peer, Peer]]:
    """A server of theirs on a file, and ours on top of it."""
    with backend(disk) as below, pynbd_serve("-f", "raw", "--discard=unmap", *options, below.uri()) as peer:
        yield below, peer


def image_map(image: str | Path) -> list[tuple[int, int, bool, bool]]:
    """(start, length, data, zero) of each extent, as qemu-img sees it."""
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", image))
    return [(extent["start"], extent["length"], extent["data"], extent["zero"]) for extent in extents]


def test_both_see_the_same(backend: Backend, tmp_path: Path) -> None:
    """What is written through ours is there through theirs, in the file, and again through ours."""
    require_tool("qemu-img", package="qemu-utils")
    require_tool("nbdcopy", package="libnbd-bin")
    source = write_random(tmp_path / "source.raw", SIZE_BYTES)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(SIZE_BYTES))
    with through(backend, disk) as (below, peer):
        run("nbdcopy", "--connections=4", "--threads=4", "--flush", source, peer.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", peer.uri(), below.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", peer.uri(), source)
    assert sha256(disk) == sha256(source)


def test_every_command_is_carried_out_or_made_up_for(backend: Backend, tmp_path: Path) -> None:
    """Odd offsets, zeroes, discards and FUA work whatever the server below has."""
    require_tool("qemu-io", package="qemu-utils")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xff" * SIZE_BYTES)
    commands = ["write -P 1 513 77", "read -P 1 513 77", "read -P 0xff 0 513", "read -P 0xff 590 4000"]
    commands += ["write -f -P 2 1M 5M", "read -P 2 1M 5M", "write -z 2M 1M", "write -z -u 4M 1M", "read -P 0 2M 1M"]
    commands += ["read -P 0 4M 1M", "write -z 100001 11", "read -P 0 100001 11", "flush", "discard 16M 4M"]
    commands += ["read -P 0xff 20M 12M", "read -P 0xff 6M 10M", "write -P 3 32767k 1k", "read -P 3 32767k 1k"]
    with through(backend, disk) as (_, peer):
        said = run("qemu-io", "-f", "raw", "-d", "unmap", *[w for c in commands for w in ("-c", c)], peer.uri())
    assert "failed" not in said
    content = disk.read_bytes()
    assert content[512:591] == b"\xff" + b"\x01" * 77 + b"\xff"
    assert content[MIB : 2 * MIB] == b"\x02" * MIB
    assert content[2 * MIB : 3 * MIB] == content[4 * MIB : 5 * MIB] == bytes(MIB)


def test_bench_at_depth(backend: Backend, tmp_path: Path) -> None:
    """64 writes in flight, each of them durable before it is answered."""
    require_tool("qemu-img", package="qemu-utils")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(4 * MIB))
    options = ["-w", "-c", "512", "-d", "64", "-s", "8192", "--pattern=90", "-t", "writethrough", "-f", "raw"]
    with through(backend, disk) as (_, peer):
        run("qemu-img", "bench", *options, peer.uri())
    assert disk.read_bytes() == b"\x5a" * (4 * MIB)


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd"])
def test_holes_are_told_through_us(name: str, sparse_disk: Path) -> None:
    require_tool("qemu-img", package="qemu-utils")
    with through(BACKENDS[name], sparse_disk) as (_, peer):
        assert image_map(peer.uri()) == image_map(sparse_disk)


def test_a_server_that_is_read_only_makes_ours_read_only(random_disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with qemu_nbd(random_disk, "-r") as below, pynbd_serve("-f", "raw", "-r", below.uri()) as peer:
        run("nbdinfo", "--is", "read-only", peer.uri())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", peer.uri(), random_disk)


def test_an_oldstyle_server_can_be_read(sparse_disk: Path) -> None:
    """nbdkit that negotiates nothing: it tells the size, and that is it. (It refuses what it offers, FUA and flush.)"""
    require_tool("qemu-img", package="qemu-utils")
    with (
        nbdkit("file", sparse_disk, options=["--oldstyle", "-r"]) as below,
        pynbd_serve("-f", "raw", "-r", below.uri()) as peer,
    ):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", peer.uri(), sparse_disk)


def test_errors_of_the_server_below_reach_the_client(tmp_path: Path) -> None:
    """An error is passed on as what it is, for that request alone."""
    require_tool("qemu-io", package="qemu-utils")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xff" * SIZE_BYTES)
    flag = tmp_path / "fail"
    failing = ["error=ENOSPC", "error-rate=100%", f"error-file={flag}"]
    with (
        nbdkit("file", disk, *failing, options=["--filter=error"]) as below,
        pynbd_serve("-f", "raw", below.uri()) as peer,
    ):
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", peer.uri())
        flag.touch()
        said = run("qemu-io", "-f", "raw", "-c", "write -P 2 0 4k", peer.uri(), status=1)
        assert "No space left on device" in said
        flag.unlink()
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 4k", "-c", "write -P 3 0 4k", peer.uri())


def test_ours_below_ours(sparse_disk: Path, tmp_path: Path) -> None:
    """A chain of three of our servers, copied through with `pynbd copy`."""
    copy = tmp_path / "copy.raw"
    with (
        pynbd_serve("-f", "raw", sparse_disk) as first,
        pynbd_serve("-f", "raw", first.uri()) as second,
        pynbd_serve("-f", "raw", second.uri()) as third,
    ):
        run(sys.executable, "-m", "pynbd", "copy", third.uri(), copy)
    assert sha256(copy) == sha256(sparse_disk)
    assert copy.stat().st_blocks <= sparse_disk.stat().st_blocks


async def test_a_server_below_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """With reconnect-delay clients above see but a pause, every answered write is there, and a flush tells of it."""
    program = require_tool("qemu-nbd", package="qemu-utils")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(SIZE_BYTES))
    with contextlib.ExitStack() as at_end:
        folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix="pynbd-"))
        command = [program, "-f", "raw", "-t", "-e", "16", "-k", f"{folder}/below.sock", str(disk)]

        def start_below() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command)
            at_end.callback(process.wait)
            at_end.callback(process.kill)
            return process

        below = start_below()
        options = f"driver=nbd,path={folder}/below.sock,open-timeout=30,reconnect-delay=60"
        peer = at_end.enter_context(pynbd_serve(options))
        client = await WireClient.connect(peer.endpoint, "structured")
        for step in range(3):
            for number in range(64):
                client.send(WRITE, (step * 64 + number) * 65536, payload=bytes([step * 64 + number]) * 65536)
            for number in range(64):
                assert (await client.reply()).error == 0
                if number == 16 and step < 2:
                    below.kill()
                    below.wait()
                    below = start_below()
        for number in range(192):
            assert (await client.call(READ, number * 65536, 65536)).data == bytes([number]) * 65536
        # What was answered and not flushed may be gone: that is told, once.
        assert [(await client.call(FLUSH)).error for _ in range(2)] == [EIO, 0]
        await client.end()
