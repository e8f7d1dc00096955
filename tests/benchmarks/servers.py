"""The servers that are measured, and how each serves each kind of disk."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from tests import peers
from tests.benchmarks.commands import Tool
from tests.benchmarks.disks import PYTHON_DISKS, Disks
from tests.benchmarks.image_files import ImageFiles

MEMORY_BYTES = 256 << 20
"""The size of the disks in memory; small enough to be filled before each measurement."""

QEMU_CLIENTS = 80
"""More than the most connections of any cell; qemu-nbd takes one client unless told otherwise."""


UNDER_UVLOOP = Path(__file__).parent / "under_uvloop"
"""A folder that has Python run asyncio on uvloop when it is on PYTHONPATH."""


class Disk(Enum):
    """What is served."""

    RANDOM = "a raw file of random data"
    FILTERED = "the same under three filters that pass all through"
    TLS = "the same through TLS, over TCP"
    SPARSE = "a sparse file of 1 TiB"
    MEMORY = "memory"
    PYTHON = "a user's driver in Python"
    IMAGE = "a qcow2 image, all of it allocated"
    EMPTY_IMAGE = "a qcow2 image, nothing of it allocated"
    CHAIN = "a chain of four qcow2 images"
    ZLIB_IMAGE = "a qcow2 image, all of it compressed by zlib"
    ZSTD_IMAGE = "the same by zstd"
    FILES = "image files, which a command is given"


@dataclass(frozen=True)
class Setup:
    """What all servers of a run are started with."""

    disks: Disks
    tcp: bool
    pynbd_python: str = sys.executable
    uvloop: bool = False
    workers: int = 1

    @property
    def files(self) -> ImageFiles:
        """The files that commands are given; those that are compressed are served as well."""
        return ImageFiles(self.disks.folder, self.disks.size_bytes)

    def workers_for(self, arguments: Sequence[str | Path]) -> list[str]:
        """The option for pynbd that several processes serve, where that can be: raw files need nothing else."""
        return ["--workers", str(self.workers)] if self.workers > 1 and "raw" in arguments else []

    def environment(self) -> dict[str, str]:
        """What the environment of pynbd has beside the usual."""
        # Another Python than the tests' own has pynbd's dependencies, not pynbd.
        path = [peers.ROOT, peers.ROOT / "protocol"] if self.pynbd_python != sys.executable else []
        path = [UNDER_UVLOOP, *path] if self.uvloop else path
        return {"PYTHONPATH": ":".join(map(str, path))} if path else {}


Serve = Callable[[Setup], AbstractContextManager[peers.Peer]]


@dataclass(frozen=True)
class Server:
    """One contender: its name, the program it needs, how it serves what it can serve, and its commands about files."""

    name: str
    program: str
    serves: dict[Disk, Serve] = field(default_factory=dict)
    tool: Callable[[Setup], Tool] | None = None

    def takes_part(self, disk: Disk) -> bool:
        """Whether it can be measured on such a disk."""
        return disk in self.serves or (disk is Disk.FILES and self.tool is not None)

    def missing(self) -> str:
        """Why it can't take part, "" if it can."""
        if shutil.which(self.program, path=peers.SYSTEM_PATH) is None:
            return f"{self.program} is not installed"
        return ""


def _pynbd(*arguments: str | Path, disk: Callable[[Setup], list[str | Path]]) -> Serve:
    @contextlib.contextmanager
    def serve(setup: Setup) -> Iterator[peers.Peer]:
        command = [*setup.workers_for(arguments), *arguments, *disk(setup)]
        python, environment = setup.pynbd_python, setup.environment()
        with peers.pynbd_serve(*command, tcp=setup.tcp, python=python, env=environment) as peer:
            yield peer

    return serve


def _qemu_nbd(disk: Callable[[Setup], Path], format: str = "raw") -> Serve:
    return lambda setup: peers.qemu_nbd(disk(setup), "-f", format, tcp=setup.tcp, clients=QEMU_CLIENTS)


def _nbdkit(plugin: str, argument: Callable[[Setup], str | Path], filters: int = 0) -> Serve:
    options = ["--filter=nofilter"] * filters
    return lambda setup: peers.nbdkit(plugin, argument(setup), options=options, tcp=setup.tcp)


def _nbd_server(disk: Callable[[Setup], Path]) -> Serve:
    return lambda setup: peers.nbd_server({"disk": disk(setup)}, tcp=setup.tcp)


def _random(setup: Setup) -> Path:
    return setup.disks.random


def _sparse(setup: Setup) -> Path:
    return setup.disks.sparse


def _tls(serve: Callable[[Setup, Path], AbstractContextManager[peers.Peer]]) -> Serve:
    """Over TCP in any case: certificates are for the names of hosts."""

    def serve_with_certificates(setup: Setup) -> AbstractContextManager[peers.Peer]:
        setup.disks.make_certificates()
        return serve(replace(setup, tcp=True), setup.disks.certificates)

    return serve_with_certificates


def _pynbd_tls(setup: Setup, certificates: Path) -> AbstractContextManager[peers.Peer]:
    return _pynbd("-f", "raw", "--tls-certificates", certificates, disk=lambda setup: [_random(setup)])(setup)


def _nbdkit_tls(setup: Setup, certificates: Path) -> AbstractContextManager[peers.Peer]:
    options = ["--tls=require", f"--tls-certificates={certificates}"]
    return peers.nbdkit("file", _random(setup), options=options, tcp=True)


def _qemu_nbd_tls(setup: Setup, certificates: Path) -> AbstractContextManager[peers.Peer]:
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=off,dir={certificates}"
    options = ["--object", credentials, "--tls-creds", "tls0"]
    return peers.qemu_nbd(_random(setup), *options, tcp=True, clients=QEMU_CLIENTS)


PYNBD = Server(
    "pynbd",
    sys.executable,
    {
        Disk.RANDOM: _pynbd("-f", "raw", disk=lambda setup: [_random(setup)]),
        Disk.FILTERED: _pynbd("-f", "raw", *["--filter", "nofilter"] * 3, disk=lambda setup: [_random(setup)]),
        Disk.TLS: _tls(_pynbd_tls),
        Disk.SPARSE: _pynbd("-f", "raw", disk=lambda setup: [_sparse(setup)]),
        Disk.MEMORY: _pynbd(disk=lambda _: [f"driver=memory,size={MEMORY_BYTES}"]),
        Disk.PYTHON: _pynbd(disk=lambda _: [PYTHON_DISKS / "for_pynbd.py"]),
        Disk.IMAGE: _pynbd("-f", "qcow2", disk=lambda setup: [setup.disks.image]),
        Disk.EMPTY_IMAGE: _pynbd("-f", "qcow2", disk=lambda setup: [setup.disks.empty_image]),
        Disk.CHAIN: _pynbd("-f", "qcow2", disk=lambda setup: [setup.disks.chain[-1]]),
        Disk.ZLIB_IMAGE: _pynbd("-f", "qcow2", disk=lambda setup: [setup.files.text_image("zlib")]),
        Disk.ZSTD_IMAGE: _pynbd("-f", "qcow2", disk=lambda setup: [setup.files.text_image("zstd")]),
    },
    lambda setup: Tool([setup.pynbd_python, "-m", "pynbd", "img"], setup.environment()),
)

PEERS = (
    Server(
        "nbdkit",
        "nbdkit",
        {
            Disk.RANDOM: _nbdkit("file", _random),
            Disk.FILTERED: _nbdkit("file", _random, filters=3),
            Disk.TLS: _tls(_nbdkit_tls),
            Disk.SPARSE: _nbdkit("file", _sparse),
            Disk.MEMORY: _nbdkit("memory", lambda _: str(MEMORY_BYTES)),
            Disk.PYTHON: _nbdkit("python", lambda _: PYTHON_DISKS / "for_nbdkit.py"),
        },
    ),
    Server(
        "qemu-nbd",
        "qemu-nbd",
        {
            Disk.RANDOM: _qemu_nbd(_random),
            Disk.TLS: _tls(_qemu_nbd_tls),
            Disk.SPARSE: _qemu_nbd(_sparse),
            Disk.IMAGE: _qemu_nbd(lambda setup: setup.disks.image, "qcow2"),
            Disk.EMPTY_IMAGE: _qemu_nbd(lambda setup: setup.disks.empty_image, "qcow2"),
            Disk.CHAIN: _qemu_nbd(lambda setup: setup.disks.chain[-1], "qcow2"),
            Disk.ZLIB_IMAGE: _qemu_nbd(lambda setup: setup.files.text_image("zlib"), "qcow2"),
            Disk.ZSTD_IMAGE: _qemu_nbd(lambda setup: setup.files.text_image("zstd"), "qcow2"),
        },
    ),
    Server("nbd-server", "nbd-server", {Disk.RANDOM: _nbd_server(_random), Disk.SPARSE: _nbd_server(_sparse)}),
    Server("qemu-img", "qemu-img", tool=lambda _: Tool(["qemu-img"], {})),
)

DEFAULT_PEERS = ("nbdkit", "qemu-nbd", "qemu-img")
"""Whom pynbd is measured against unless the command line says otherwise, as far as they take part in a cell."""
