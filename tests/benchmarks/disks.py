"""The disks that are served, and whether their data are in the page cache."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.peers import run

CHUNK_BYTES = 1 << 20

RESIDENT_ENOUGH = 0.999
"""The part of a file that must be in the page cache for a cell to count as cached."""

SPARSE_BYTES = 1 << 40
"""The size of the disk of nothing, whose serving must not cost memory."""

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
