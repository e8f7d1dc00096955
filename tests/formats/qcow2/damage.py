"""Images that hold some of everything, where their structures lie, and checks of them by pynbd and by QEMU."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from pynbd.block.families import Checkable, CheckResult, Repair
from pynbd.block.graph import Graph
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.driver import Qcow2
from pynbd.formats.qcow2.header import Header, parse_header
from tests.formats.qcow2.workload import in_file, made
from tests.peers import require_tool, run

COUNTS = (
    "corruptions",
    "leaks",
    "check_errors",
    "image_end_offset",
    "total_clusters",
    "allocated_clusters",
    "fragmented_clusters",
    "compressed_clusters",
)


def filled(tmp_path: Path, options: str, size: int, *, snapshots: bool = True, bitmaps: bool = True) -> Path:
    """An image of QEMU's with data, zero clusters, compressed clusters, snapshots and bitmaps."""
    path = made(tmp_path, options, size)
    cluster = read_header(path).cluster_size
    random_ = random.Random(options)
    clusters = size // cluster
    snapshots = snapshots and read_header(path).refcount_bits > 2  # their clusters have up to three references
    # QEMU writes compressed clusters only where there is none: the last quarter of the disk is for them.
    packed = [] if "prealloc" in options or "data_file" in options else list(range(clusters * 3 // 4, clusters))
    random_.shuffle(packed)
    commands = []
    for number in range(24):
        at = random_.randrange(clusters * 3 // 4 - 1) * cluster
        if number % 6 == 3 and packed:
            commands.append(f"write -c -P {number + 1} {packed.pop() * cluster} {cluster}")
        elif number % 6 == 5:
            commands.append(f"write -z {at} {cluster}")
        else:
            commands.append(f"write -P {number + 1} {at} {random_.randint(1, 2) * cluster}")
    image = require_tool("qemu-img")
    qemu_io(path, commands[:16])
    if bitmaps and "0.10" not in options:
        granularity = max(512, cluster // 64)
        run(image, "bitmap", "--add", "-g", str(granularity), path, "one")
        run(image, "bitmap", "--add", path, "two")
    if snapshots:
        run(image, "snapshot", "-c", "first", path)
    qemu_io(path, commands[16:])
    if snapshots:
        run(image, "snapshot", "-c", "second", path)
        qemu_io(path, commands[4:6])
    return path


def qemu_io(path: Path, commands: list[str]) -> None:
    """Let QEMU write to an image."""
    run(require_tool("qemu-io"), "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path)


def read_header(path: Path) -> Header:
    """The header of an image."""
    with path.open("rb") as file:
        return parse_header(file.read(2 << 20), str(path))


class Word(NamedTuple):
    """One number of an image's structures: which structure, its offset in the file, its length in bytes."""

    kind: str
    offset: int
    length: int = 8


class Image:
    """The bytes of an image, to be damaged.

    Args:
        path: the image, which is changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.data = bytearray(path.read_bytes())

    def get(self, offset: int, length: int = 8) -> int:
        """A number."""
        return int.from_bytes(self.data[offset : offset + length])

    def put(self, offset: int, value: int, length: int = 8) -> None:
        """Change a number, in the file as well."""
        self.data[offset : offset + length] = value.to_bytes(length)
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(value.to_bytes(length))

    def l2_tables(self) -> list[int]:
        """Where the active L2 tables lie."""
        offset, header = self.header.l1_table_offset, self.header
        entries = [self.get(offset + 8 * index) & layout.OFFSET_MASK for index in range(header.l1_size)]
        return [entry for entry in entries if entry]

    def l2_words(self) -> Iterator[int]:
        """Where the entries in use of the active L2 tables lie."""
        step = 8 * self.header.l2_entry_words
        for table in self.l2_tables():
            for at in range(table, table + self.header.cluster_size, step):
                if self.get(at):
                    yield at

    def refcount_blocks(self) -> list[int]:
        """Where the refcount blocks lie."""
        offset = self.header.refcount_table_offset
        entries = [self.get(offset + 8 * index) for index in range(self.header.cluster_size // 8)]
        return [entry for entry in entries if entry]

    def words(self) -> dict[str, list[Word]]:
        """The numbers of every structure."""
        header, found = self.header, dict[str, list[Word]]()
        found["l1"] = [Word("l1", header.l1_table_offset + 8 * index) for index in range(header.l1_size)]
        found["l2"] = [Word("l2", at) for at in self.l2_words()]
        if header.extended_l2:
            found["bitmap"] = [Word("bitmap", at + 8) for at in self.l2_words()]
        found["reftable"] = [Word("reftable", header.refcount_table_offset + 8 * index) for index in range(2)]
        used = len(self.data) // header.cluster_size * header.refcount_bits // 8
        found["refblock"] = [
            Word("refblock", block + at)
            for block in self.refcount_blocks()
            for at in range(0, min(used, header.cluster_size - 8), 8)
        ]
        if header.nb_snapshots:
            found["snapshot l1"] = [
                Word("snapshot l1", self.get(header.snapshots_offset) + 8 * index) for index in range(header.l1_size)
            ]
            at = header.snapshots_offset
            found["snapshot table"] = [Word("snapshot table", at), Word("snapshot table", at + 8, 4)]
            found["snapshot table"].append(Word("snapshot table", at + 36, 4))
        if header.bitmaps is not None:
            at = header.bitmaps.directory_offset
            found["bitmap directory"] = [Word("bitmap directory", at), Word("bitmap directory", at + 8, 4)]
            found["bitmap table"] = [Word("bitmap table", self.get(at))]
        return found


def checked_by_qemu(*arguments: str | Path) -> dict[str, Any] | None:
    """What `qemu-img check` finds, given these arguments; None if it can't tell."""
    command = [require_tool("qemu-img"), "check", "--output=json", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None  # it counts beyond all bounds where a hostile image lets it
    if not done.stdout.startswith("{"):
        return None
    found = {key.replace("-", "_"): value for key, value in json.loads(done.stdout).items()}
    return {name: found.get(name, 0) for name in COUNTS}


async def checked(path: Path, repair: Repair = Repair.NOTHING) -> CheckResult:
    """What pynbd finds, and mends."""
    graph = Graph()
    description = in_file(path, backing=None)
    node = await graph.open(description, for_check=True, read_only=repair is Repair.NOTHING)
    try:
        driver = cast(Qcow2, node.driver)
        assert isinstance(driver, Checkable)
        return await driver.check(repair)
    finally:
        await graph.close_all()


def counts(result: CheckResult) -> dict[str, int]:
    """What can be compared with QEMU's."""
    return {name: getattr(result, name) for name in COUNTS}


def copied(path: Path) -> Path:
    """A copy of an image."""
    other = path.with_suffix(".copy")
    shutil.copyfile(path, other)
    return other
