"""Images that were made to do harm: each use of them has a clear end, in bounded time and memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pynbd.formats.qcow2.layout import COMPRESSED, COPIED
from tests.formats.qcow2.damage import Image
from tests.formats.qcow2.workload import made
from tests.peers import require_tool

MEMORY_BYTES = 1 << 30
"""Address space of a process that looks at such an image; what Python itself needs is about half of it."""

TIME_S = 60
"""Nothing takes a tenth of it; it is the end of what would never end."""

CLUSTER = 1 << 16
ENTRIES = CLUSTER // 8


def words(entries: Iterable[int]) -> bytes:
    values = list(entries)
    return struct.pack(f">{len(values)}Q", *values)


class Hostile(Image):
    """An image whose structures are overwritten."""

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes into the file."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def grow(self, size: int) -> None:
        """Make the file longer; what is added is a hole."""
        with self.path.open("r+b") as file:
            file.truncate(size)

    def resize(self, size: int, l1_size: int, l1_offset: int) -> None:
        """Another size of the disk, and another L1 table."""
        self.write(24, words([size]))
        self.write(36, struct.pack(">IQ", l1_size, l1_offset))

    @property
    def l1(self) -> int:
        """Where the active L1 table lies."""
        return self.header.l1_table_offset

    @property
    def table(self) -> int:
        """Where the refcount table lies."""
        return self.header.refcount_table_offset


def l1_in_itself(image: Hostile) -> None:
    image.write(image.l1, words([image.l1 | COPIED]))


def l2_in_itself(image: Hostile) -> None:
    place = 0x40000
    image.grow(0x50000)
    image.write(image.l1, words([place | COPIED]))
    image.write(place, words([place | COPIED] * ENTRIES))


def data_in_everything(image: Hostile) -> None:
    image.grow(0x50000)
    image.write(image.l1, words([0x40000 | COPIED]))
    image.write(0x40000, words([number * CLUSTER | COPIED for number in range(6)] * 2))


def a_giant_l1(image: Hostile) -> None:
    """Four million entries that all point to one table, which points at one cluster."""
    count = 4 << 20
    image.resize(count * ENTRIES * CLUSTER, count, 0x100000)
    image.grow(0x100000 + 8 * count)
    image.write(0x100000, words([0x40000]) * count)
    image.write(0x40000, words([0x50000]) * ENTRIES)


def a_giant_l1_in_a_hole(image: Hostile) -> None:
    count = 4 << 20
    image.resize(count * ENTRIES * CLUSTER, count, 0x100000)
    image.grow(0x100000 + 8 * count)


def a_giant_l1_past_the_end(image: Hostile) -> None:
    image.resize(1 << 50, 4 << 20, 1 << 55)


def tables_in_holes(image: Hostile) -> None:
    """Many tables of zeroes, which take no space in the file."""
    count = 4096
    image.resize(count * ENTRIES * CLUSTER, count, 0x100000)
    image.grow(0x200000 + CLUSTER * count)
    image.write(0x100000, words(0x200000 + CLUSTER * number for number in range(count)))


def unaligned_tables(image: Hostile) -> None:
    """Tables that overlap one another, so that each is a new one."""
    count = 8192
    image.resize(count * ENTRIES * CLUSTER, count, 0x100000)
    image.grow(0x200000 + 512 * count)
    image.write(0x100000, words(0x200000 + 512 * number for number in range(count)))


def scattered_clusters(image: Hostile) -> None:
    """Each entry refers to another end of a huge file."""
    image.grow(8 << 40)
    count = 16
    image.resize(count * ENTRIES * CLUSTER, count, 0x100000)
    image.write(0x100000, words(0x200000 + CLUSTER * number for number in range(count)))
    for number in range(count):
        image.write(
            0x200000 + CLUSTER * number, words((index * 1021 + number << 26) % (8 << 40) for index in range(ENTRIES))
        )


def one_block_for_all(image: Hostile) -> None:
    """A whole refcount table that points to one block, in a huge file."""
    image.grow(128 << 30)
    image.write(0x60000, b"\xff" * CLUSTER)
    image.write(image.table, words([0x60000]) * ENTRIES)


def a_giant_refcount_table(image: Hostile) -> None:
    image.write(56, struct.pack(">I", 128))
    image.grow(image.table + (8 << 20))
    image.write(image.table, words(CLUSTER * number for number in range(1 << 20)))


def refcount_table_past_the_end(image: Hostile) -> None:
    image.write(48, words([1 << 55]))


def refcount_table_in_the_header(image: Hostile) -> None:
    image.write(48, words([0]))


def many_snapshots(image: Hostile) -> None:
    """As many snapshots as there may be, with the largest L1 table, all the same one."""
    place, l1 = 0x10000000, 0x200000
    image.write(60, struct.pack(">IQ", 65536, place))
    entry = struct.pack(">QIHHIIQII", l1, 4 << 20, 1, 1, 0, 0, 0, 0, 16) + bytes(16) + b"aa" + bytes(6)
    image.write(place, entry * 65536)
    image.grow(place + len(entry) * 65536 + CLUSTER)


def snapshots_in_a_hole(image: Hostile) -> None:
    image.write(60, struct.pack(">IQ", 65536, 0x200000))
    image.grow(0x200000 + (64 << 20))


def a_snapshot_with_endless_extra_data(image: Hostile) -> None:
    image.write(60, struct.pack(">IQ", 3, 0x200000))
    image.grow(0x300000)
    image.write(0x200000, struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 0xFFFFFFFF))


def bitmaps(image: Hostile, directory: bytes, count: int, at: int = 0x200000) -> None:
    """A bitmap directory."""
    image.write(88, words([1]))
    extension = struct.pack(">IIIIQQ", 0x23852875, 24, count, 0, len(directory), at)
    image.write(image.header.header_length, extension + bytes(8))
    image.write(at, directory)


def many_bitmaps(image: Hostile) -> None:
    """Bitmaps that share the largest table."""
    entry = struct.pack(">QIIBBHI", 0x10000000, 0x8000000, 0, 1, 16, 1, 0) + b"a" + bytes(7)
    bitmaps(image, entry * 1000, 1000)
    image.grow(0x10000000 + (1 << 30))


def a_bitmap_in_itself(image: Hostile) -> None:
    entry = struct.pack(">QIIBBHI", 0x200000, ENTRIES, 0, 1, 16, 1, 0) + b"a" + bytes(7)
    bitmaps(image, entry, 1)
    image.grow(0x210000)


def a_directory_past_the_end(image: Hostile) -> None:
    bitmaps(image, bytes(32), 1, at=0x200000)
    image.write(image.header.header_length + 24, words([1 << 55]))


def compressed_everywhere(image: Hostile) -> None:
    """Compressed clusters as long as can be told of, one inside the other, and behind the end."""
    image.grow(0x50000)
    image.write(image.l1, words([0x40000 | COPIED]))
    longest = COMPRESSED | 0xFF << 54
    image.write(
        0x40000, words([*(longest | number * 3 for number in range(8)), *(longest | 1 << 53 - n for n in range(8))])
    )


def all_ones(image: Hostile) -> None:
    """L1, L2 and refcounts of nothing but set bits."""
    image.grow(0x50000)
    image.write(image.l1, words([0x40000 | COPIED]))
    image.write(0x40000, b"\xff" * CLUSTER)
    image.write(image.table, b"\xff" * CLUSTER)


CASES: list[Callable[[Hostile], None]] = [
    l1_in_itself,
    l2_in_itself,
    data_in_everything,
    a_giant_l1,
    a_giant_l1_in_a_hole,
    a_giant_l1_past_the_end,
    tables_in_holes,
    unaligned_tables,
    scattered_clusters,
    one_block_for_all,
    a_giant_refcount_table,
    refcount_table_past_the_end,
    refcount_table_in_the_header,
    many_snapshots,
    snapshots_in_a_hole,
    a_snapshot_with_endless_extra_data,
    many_bitmaps,
    a_bitmap_in_itself,
    a_directory_past_the_end,
    compressed_everywhere,
    all_ones,
]


def bounded(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`pynbd img` with little memory and time."""
    limit = [require_tool("prlimit", package="util-linux"), f"--as={MEMORY_BYTES}"]
    command = [*limit, sys.executable, "-m", "pynbd", "img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_S, check=False)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "MemoryError" not in done.stderr, done.stderr[-2000:]
    assert len(done.stderr) < 1 << 20
    return done


SLOW = (
    a_giant_l1,
    a_giant_l1_in_a_hole,
    a_giant_refcount_table,
    many_bitmaps,
    many_snapshots,
    one_block_for_all,
    scattered_clusters,
    snapshots_in_a_hole,
    tables_in_holes,
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.__name__, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES],
)
def test_hostile_images(tmp_path: Path, case: Callable[[Hostile], None]) -> None:
    path = made(tmp_path, "", 1 << 20)
    case(Hostile(path))
    checked = bounded("check", path)
    assert checked.returncode in (0, 1, 2, 3)
    read = bounded("dd", f"if={path}", f"of={tmp_path / 'out.raw'}", "bs=64k", "count=16", "-O", "raw")
    if read.returncode:
        assert str(path) in read.stderr
    bounded("info", path)
    repaired = bounded("check", "-r", "all", path)
    assert repaired.returncode in (0, 1, 2, 3)
    if repaired.returncode == 0:
        assert bounded("check", path).returncode == 0
    if repaired.returncode == 1:
        assert repaired.stderr
