"""The files that the commands about images are given."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.disks import CHUNK_BYTES, settle
from tests.peers import require_tool, run

BLOCK_BYTES = 64 << 10

LONGEST_RUN_BLOCKS = 64
"""Data and holes take turns, each of up to so many blocks."""

ALLOCATED_BYTES = 100 << 30
"""The disk of the image whose metadata are checked. Its file has as many bytes, of which nearly all are a hole."""

VOCABULARY = 4096
PATTERN_BYTES = 16 << 20
"""The text of the disk that can be compressed is repeated after so much, which no compressor of clusters can notice."""

ROOM = 14
"""Times `size_bytes`: so much room the files take together, at the most."""


@dataclass(frozen=True)
class ImageFiles:
    """Files of one run, in a folder of their own, each made when it is asked for first.

    Args:
        folder: where.
        size_bytes: of the disks that are served; these have more, as far as copying them is quick.
    """

    folder: Path
    size_bytes: int

    @property
    def half_sparse_bytes(self) -> int:
        """The length of the half-sparse disk: so long that starting a program is a small part of copying it."""
        return self.size_bytes * 8

    @property
    def text_bytes(self) -> int:
        """The length of the disk of text."""
        return self.size_bytes // 4

    @property
    def output(self) -> Path:
        """What a command writes."""
        return self.folder / "output"

    def half_sparse(self) -> Path:
        """A raw disk, one half of which is random data and the other half holes."""

        def make(path: Path) -> None:
            self._check_room()
            source = random.Random(1)
            with path.open("wb") as disk:
                for offset, length in data_runs(source, self.half_sparse_bytes):
                    disk.seek(offset)
                    disk.write(source.randbytes(length))
                disk.truncate(self.half_sparse_bytes)

        return self._made("half-sparse.raw", make)

    def half_sparse_image(self) -> Path:
        """The same in a qcow2 image."""
        source = self.half_sparse()
        words = ("convert", "-f", "raw", "-O", "qcow2", source)
        return self._made("half-sparse.qcow2", lambda path: run(require_tool("qemu-img"), *words, path))

    def text(self) -> Path:
        """A raw disk of text, which gets a third as long when it is compressed, with random data in between."""

        def make(path: Path) -> None:
            self._check_room()
            source = random.Random(2)
            pattern = _text(source)
            with path.open("wb") as disk:
                for begin in range(0, self.text_bytes, CHUNK_BYTES):
                    at = begin % PATTERN_BYTES
                    random_chunk = begin // CHUNK_BYTES % 8 == 0
                    disk.write(source.randbytes(CHUNK_BYTES) if random_chunk else pattern[at : at + CHUNK_BYTES])
                disk.truncate(self.text_bytes)

        return self._made("text.raw", make)

    def text_image(self, compression_type: str) -> Path:
        """The same in a qcow2 image, its clusters compressed by zlib or zstd."""
        source = self.text()
        words = ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression_type}", source)
        return self._made(f"text-{compression_type}.qcow2", lambda path: run(require_tool("qemu-img"), *words, path))

    def allocated_image(self) -> Path:
        """A qcow2 image with all clusters allocated, and nothing written into them."""
        words = ("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata")
        qemu_img = require_tool("qemu-img")
        return self._made("allocated.qcow2", lambda path: run(qemu_img, *words, path, str(ALLOCATED_BYTES)))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file that is made once; what was broken off while it was made does not pass for it."""
        path = self.folder / name
        if not path.exists():
            unfinished = path.with_name(f"{name}.part")
            make(unfinished)
            unfinished.rename(path)
            settle(path)
        return path

    def _check_room(self) -> None:
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < ROOM * self.size_bytes:
            raise OSError(f"{self.folder}: {free_bytes} bytes are free, the benchmark wants {ROOM * self.size_bytes}")


def data_runs(source: random.Random, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is data on a disk of which one half is."""
    offset = 0
    while offset < size_bytes:
        # As much hole as data, one behind the other, and at the end of the disk as well.
        length = min(source.randint(1, LONGEST_RUN_BLOCKS) * BLOCK_BYTES, (size_bytes - offset) // 2)
        if not length:
            return
        yield offset, length
        offset += 2 * length


def _text(source: random.Random) -> bytes:
    words = [bytes(source.choices(b"abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 10))) for _ in range(VOCABULARY)]
    weights = [1 / rank for rank in range(1, VOCABULARY + 1)]
    pattern = bytearray()
    while len(pattern) < PATTERN_BYTES:
        pattern += b" ".join(source.choices(words, weights, k=VOCABULARY)) + b"\n"
    return bytes(pattern[:PATTERN_BYTES])
