"""Servers of every kind that the driver `nbd` is to get along with, and how a test opens their exports."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pynbd.block.backend import BlockBackend
from pynbd.block.permissions import Permission
from pynbd.storage.nbd import Nbd
from tests import peers
from tests.storage.conftest import opened

SIZE = 1 << 18
"""Bytes of each server's disk."""

Start = Callable[[Path], AbstractContextManager[peers.Peer]]


def _qemu_nbd(file: Path) -> AbstractContextManager[peers.Peer]:
    return peers.qemu_nbd(file, "--discard=unmap", "--detect-zeroes=off")


def _qemu10(file: Path) -> AbstractContextManager[peers.Peer]:
    return peers.qemu_nbd(file, "--discard=unmap", qemu10=True)


def _nbdkit(*arguments: str, options: tuple[str, ...] = (), tcp: bool = False) -> Start:
    return lambda file: peers.nbdkit("memory", str(SIZE), *arguments, options=options, tcp=tcp)


@contextlib.contextmanager
def _nbd_server(file: Path) -> Iterator[peers.Peer]:
    with peers.nbd_server({"disk": file}, "flush = true", "fua = true", "trim = true") as peer:
        yield peer


SERVERS: dict[str, tuple[str, Start]] = {
    "qemu-nbd": ("structured", _qemu_nbd),
    "qemu-nbd 10": ("extended", _qemu10),
    "nbdkit": ("structured", _nbdkit()),
    "nbdkit over TCP": ("structured", _nbdkit(tcp=True)),
    "nbdkit in blocks of 4096": (
        "structured",
        _nbdkit(
            "blocksize-minimum=4096",
            "blocksize-error-policy=error",
            "blocksize-maximum=65536",
            options=("--filter=blocksize-policy",),
        ),
    ),
    "nbdkit with simple replies": ("simple", _nbdkit(options=("--no-sr",))),
    "nbdkit newstyle": ("simple", _nbdkit(options=("--mask-handshake=0",))),
    "nbd-server": ("simple", _nbd_server),
    "pynbd": ("extended", lambda file: peers.pynbd_serve("-f", "raw", "--discard=unmap", file)),
}
"""By name: the reply mode that is negotiated, and how the server is started."""


def options_of(uri: str, **options: Any) -> dict[str, Any]:
    """The options of a node that is a client of an export."""
    return {"driver": "nbd", **Nbd.parse_filename(uri), **options}


@contextlib.asynccontextmanager
async def client_of(uri: str, **options: Any) -> AsyncIterator[BlockBackend]:
    """A user of an export."""
    held = Permission.CONSISTENT_READ if options.get("read-only") else Permission.ALL
    async with opened(options_of(uri, **options), held) as backend:
        yield backend


@contextlib.asynccontextmanager
async def client(peer: peers.Peer, **options: Any) -> AsyncIterator[BlockBackend]:
    """A user of a server's default export."""
    async with client_of(peer.uri(), **options) as backend:
        yield backend


def driver_of(backend: BlockBackend) -> Nbd:
    """The driver of the node that a backend is attached to."""
    driver = backend.node.driver
    assert isinstance(driver, Nbd)
    return driver


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    """Bytes of a disk."""
    into = bytearray(b"?") * length
    await backend.read(offset, memoryview(into))
    return bytes(into)
