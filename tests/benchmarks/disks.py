"""The disks that are served, and whether their data are in the page cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.peers import require_tool, run

CHUNK_BYTES = 1 << 20

RESIDENT_ENOUGH = 0.999
"""The part of a file that must be in the page cache for a cell to count as cached."""

SPARSE_BYTES = 1 << 40
"""The size of the disk of nothing, whose serving must not cost memory."""

EMPTY_IMAGE_BYTES = 4 << 30
"""So large that clusters are taken in every measurement to its end."""

CHAIN_LAYERS = 3

PYTHON_DISKS = Path(__file__).parent / "python_disks"
"""A user's driver in Python, once for pynbd and once for nbdkit."""


@dataclass(frozen=True)
class Disks:
    """The files of one run, in a folder of their own."""

    folder: Path
    size_bytes: int

    @property
    def random(self) -> Path:
        """Random data without a hole."""
        return self.folder / "random.raw"

    @property
    def sparse(self) -> Path:
        """One TiB of nothing."""
        return self.folder / "sparse.raw"

    @property
    def image(self) -> Path:
        """The same random data in a qcow2 image."""
        return self.folder / "random.qcow2"

    @property
    def chain(self) -> list[Path]:
        """That image and three more on top of it, each with an eighth of the disk of its own; the top one is last."""
        return [self.image, *(self.folder / f"layer{number}.qcow2" for number in range(CHAIN_LAYERS))]

    @property
    def empty_image(self) -> Path:
        """A qcow2 image in which nothing is allocated."""
        return self.folder / "empty.qcow2"

    @property
    def home(self) -> Path:
        """What fio is told to be its home: where libnbd looks for certificates, and another user may look as well."""
        return Path(tempfile.gettempdir()) / f"pynbd-benchmarks-{os.getpid()}"

    @property
    def certificates(self) -> Path:
        """Certificates of a server and a client, and of the authority for both."""
        return self.home / ".pki" / "libnbd"

    def make_certificates(self) -> None:
        """Write them, if they are not there yet."""
        if self.certificates.exists():
            return
        run(sys.executable, "-m", "pynbd", "certs", self.certificates)
        for path in (self.home, *self.home.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)

    def make_images(self) -> None:
        """Write the qcow2 images, if they are not there yet."""
        if self.chain[-1].exists():
            return
        qemu_img, qemu_io = require_tool("qemu-img"), require_tool("qemu-io")
        run(qemu_img, "convert", "-O", "qcow2", self.random, self.image)
        below = self.image
        for number, layer in enumerate(self.chain[1:]):
            run(qemu_img, "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", layer)
            places = range(number * CHUNK_BYTES, self.size_bytes, 8 * CHUNK_BYTES)
            run(qemu_io, "-f", "qcow2", layer, stdin="".join(f"write -q {at} 1M\n" for at in places).encode())
            below = layer
        for path in self.chain:
            settle(path)

    def make_empty_image(self) -> None:
        """Write the empty image, anew."""
        self.empty_image.unlink(missing_ok=True)
        run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", self.empty_image, str(EMPTY_IMAGE_BYTES))

    def make(self) -> None:
        """Write the files. Raises OSError when the file system has no room for twice the data."""
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < 2 * self.size_bytes:
            raise OSError(f"{self.folder}: {free_bytes} bytes are free, the benchmark wants {2 * self.size_bytes}")
        source = random.Random(0)
        with self.random.open("wb") as disk:
            for begin in range(0, self.size_bytes, CHUNK_BYTES):
                disk.write(source.randbytes(min(CHUNK_BYTES, self.size_bytes - begin)))
        settle(self.random)
        with self.sparse.open("wb") as disk:
            disk.truncate(SPARSE_BYTES)

    def remove(self) -> None:
        """Delete the folder with all files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)


def settle(path: Path) -> None:
    """Have all that was written to a file on the disk, so that the next measurement doesn't pay for it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def residency(path: Path, fincore: str) -> float:
    """The part of a file that is in the page cache, 0 to 1, as fincore says."""
    told = json.loads(run(fincore, "--json", "--bytes", path))["fincore"][0]
    return int(told["res"]) / int(told["size"])


def warm(path: Path, fincore: str) -> float:
    """Read a file, all of it, and return the part that is in the page cache then.

    Also where all is there already: what nobody has read for a while is what the kernel drops first.
    """
    chunk = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as disk:
        while disk.readinto(chunk):
            pass
    return residency(path, fincore)


def cool(path: Path, offset: int, fincore: str) -> float:
    """Drop a file from the page cache from `offset` on; return the part of the whole that is still there."""
    settle(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, offset, 0, os.POSIX_FADV_DONTNEED)
        # Reading ahead would bring back more than is asked for.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    finally:
        os.close(descriptor)
    return residency(path, fincore)
