"""The cells of the benchmark: what is measured, on which disk, and what pynbd must reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from tests.benchmarks.commands import ImgCommand
from tests.benchmarks.disks import EMPTY_IMAGE_BYTES
from tests.benchmarks.loads import CachedBesideUncached, Fio, Load, Memory, NbdCopy, QemuImgBench, Start, Uncached
from tests.benchmarks.servers import Disk

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Args:
        name: how it is chosen on the command line.
        load: what is done.
        disk: to what.
        targets: the least median ratio to each peer.
        bound: the most (or least) that pynbd's own figure may be, in the load's unit, where a ratio says nothing.
    """

    name: str
    load: Load
    disk: Disk = Disk.RANDOM
    targets: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None


def _against(nbdkit: float, qemu_nbd: float | None = None) -> dict[str, float]:
    return {"nbdkit": nbdkit} | ({} if qemu_nbd is None else {"qemu-nbd": qemu_nbd})


_LOADS: dict[str, tuple[Load, dict[str, float]]] = {
    "read-4k-d1": (Fio("randread", 4 * KIB, 1), _against(1.0, 1.2)),
    "read-4k-d32": (Fio("randread", 4 * KIB, 32), _against(1.2, 3)),
    "write-4k-d32": (Fio("randwrite", 4 * KIB, 32), _against(2, 2)),
    "mixed-4k-d32-c4": (Fio("randrw", 4 * KIB, 32, connections=4), _against(1.2, 2)),
    "read-64k-d16": (Fio("randread", 64 * KIB, 16), _against(1.2, 1.5)),
    "read-1m-d8": (Fio("randread", MIB, 8), _against(1.3, 1.5)),
    "write-1m-d8": (Fio("randwrite", MIB, 8), _against(1.0, 1.0)),
    "write-4k-fua": (QemuImgBench(4 * KIB, 32, writes=True, durable=True), _against(1.0, 1.0)),
    "write-4k-flush32": (Fio("randwrite", 4 * KIB, 32, flush_every=32), _against(1.0, 1.0)),
    "read-4k-d4-c64": (Fio("randread", 4 * KIB, 4, connections=64), _against(1.0, 2)),
}

CELLS: Sequence[Cell] = (
    *(Cell(name, load, targets=targets) for name, (load, targets) in _LOADS.items()),
    # The same by other clients: no targets of their own, but nobody shall wonder whether the figures are fio's alone.
    Cell("qemu-img-read-4k-d32", QemuImgBench(4 * KIB, 32)),
    Cell("qemu-img-read-64k-d16", QemuImgBench(64 * KIB, 16)),
    Cell("nbdcopy-read", NbdCopy()),
    Cell("write-64k-d16", Fio("randwrite", 64 * KIB, 16)),
    Cell("uncached-4k-d32", Uncached("randread", 4 * KIB, 32)),
    Cell("uncached-64k-d4", Uncached("randread", 64 * KIB, 4)),
    Cell("filters3-read-4k-d32", Fio("randread", 4 * KIB, 32), Disk.FILTERED, _against(1.2)),
    *(
        # Memory has nothing to make durable: the cells of FUA and flush are the same as those without.
        Cell(f"memory-{name}", load, Disk.MEMORY, _against(1.0))
        for name, (load, _) in _LOADS.items()
        if name not in ("write-4k-fua", "write-4k-flush32")
    ),
    Cell("python-read-4k-d32", Fio("randread", 4 * KIB, 32), Disk.PYTHON, _against(4)),
    Cell("tls-read-1m-d8", Fio("read", MIB, 8, tls=True), Disk.TLS, _against(1.0, 1.0)),
    Cell("tls-write-1m-d8", Fio("write", MIB, 8, tls=True), Disk.TLS, _against(1.0, 1.0)),
    Cell("tls-read-4k-d32", Fio("randread", 4 * KIB, 32, tls=True), Disk.TLS, _against(1.0, 1.0)),
    Cell("qcow2-read-4k-d32", Fio("randread", 4 * KIB, 32), Disk.IMAGE, {"qemu-nbd": 3}),
    Cell("qcow2-write-4k-d32", Fio("randwrite", 4 * KIB, 32), Disk.IMAGE, {"qemu-nbd": 2}),
    Cell("qcow2-read-1m-d8", Fio("randread", MIB, 8), Disk.IMAGE, {"qemu-nbd": 1.5}),
    Cell(
        "qcow2-allocate-4k-d32",
        Fio("randwrite", 4 * KIB, 32, area_bytes=EMPTY_IMAGE_BYTES),
        Disk.EMPTY_IMAGE,
        {"qemu-nbd": 1},
    ),
    Cell("qcow2-chain4-read-4k-d32", Fio("randread", 4 * KIB, 32), Disk.CHAIN, {"qemu-nbd": 3}),
    *(
        Cell(f"qcow2-c-{kind}-{name}", load, disk)
        for kind, disk in (("zlib", Disk.ZLIB_IMAGE), ("zstd", Disk.ZSTD_IMAGE))
        for name, load in (("read-4k-d32", Fio("randread", 4 * KIB, 32)), ("read-1m-d8", Fio("randread", MIB, 8)))
    ),
    Cell("rss-1t-idle", Memory(under_load=False), Disk.SPARSE, bound=40),
    Cell("rss-1t-load", Memory(under_load=True), Disk.SPARSE, bound=120),
    Cell("start", Start(), bound=250),
    Cell("cached-beside-uncached", CachedBesideUncached()),
)


_IMG: Sequence[tuple[str, ImgCommand, dict[str, float], float | None]] = (
    (
        "convert-raw-qcow2",
        ImgCommand(("convert", "-f", "raw", "-O", "qcow2", "HALF_SPARSE", "OUTPUT"), of_data=True),
        {"qemu-img": 1},
        None,
    ),
    (
        "convert-qcow2-raw",
        ImgCommand(("convert", "-f", "qcow2", "-O", "raw", "HALF_SPARSE_IMAGE", "OUTPUT"), of_data=True),
        {"qemu-img": 1},
        None,
    ),
    (
        "convert-c-zlib",
        ImgCommand(("convert", "-c", "-f", "raw", "-O", "qcow2", "TEXT", "OUTPUT"), of_data=True),
        {"qemu-img": 2},
        None,
    ),
    (
        "convert-c-zstd",
        ImgCommand(
            ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", "TEXT", "OUTPUT"), of_data=True
        ),
        {"qemu-img": 1},
        None,
    ),
    *(
        (
            f"convert-{kind}-raw",
            ImgCommand(("convert", "-f", "qcow2", "-O", "raw", f"{kind.upper()}_IMAGE", "OUTPUT"), of_data=True),
            {},
            None,
        )
        for kind in ("zlib", "zstd")
    ),
    ("check-100g", ImgCommand(("check", "-f", "qcow2", "ALLOCATED_IMAGE")), {"qemu-img": 0.1}, None),
    ("create", ImgCommand(("create", "-q", "-f", "qcow2", "OUTPUT", "10G")), {}, 150),
    ("info", ImgCommand(("info", "-f", "qcow2", "HALF_SPARSE_IMAGE")), {}, 150),
)

IMG_CELLS: Sequence[Cell] = tuple(
    Cell(f"img-{name}", load, Disk.FILES, targets, bound) for name, load, targets, bound in _IMG
)
"""Commands about image files. They are part of a run only if they are asked for by name."""


def chosen(patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match any of the shell patterns, in the order of the table; all `CELLS` for no pattern.

    Raises ValueError, with the names there are, for a pattern that matches nothing.
    """
    every = [*CELLS, *IMG_CELLS]
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in every):
            raise ValueError(f"no cell is named {pattern!r}; there are: {', '.join(cell.name for cell in every)}")
    return [cell for cell in every if any(fnmatch(cell.name, pattern) for pattern in patterns)] or list(CELLS)
