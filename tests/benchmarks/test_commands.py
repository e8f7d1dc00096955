"""Commands about image files are run on files that are what they are said to be, and what they write is looked at."""

from __future__ import annotations

import random
import sys
import zlib
from pathlib import Path

import pytest

from tests.benchmarks.cells import IMG_CELLS, Cell
from tests.benchmarks.commands import ImgCommand, Tool
from tests.benchmarks.disks import Disks
from tests.benchmarks.image_files import BLOCK_BYTES, ImageFiles, data_runs
from tests.benchmarks.rounds import Plan, Row, Run
from tests.benchmarks.servers import PEERS, PYNBD, Disk, Server, Setup
from tests.peers import CommandError, require_tool

MIB = 1 << 20
QEMU_IMG = next(peer for peer in PEERS if peer.name == "qemu-img")


SMALL = [cell for cell in IMG_CELLS if cell.name != "img-check-100g"]


def _run(tmp_path: Path, *servers: Server) -> Run:
    return Run(servers, Setup(Disks(tmp_path, 4 * MIB), tcp=False), Plan(1, 0.0, 0.0), lambda _: None)


@pytest.mark.parametrize("size_bytes", [0, BLOCK_BYTES, 64 * MIB, 64 * MIB + 512])
def test_half_of_a_half_sparse_disk_is_data(size_bytes: int) -> None:
    """And the runs are in order, with holes in between."""
    end = data_bytes = 0
    for offset, length in data_runs(random.Random(1), size_bytes):
        assert offset > end or end == 0
        assert length > 0
        end, data_bytes = offset + length, data_bytes + length
    assert end <= size_bytes
    assert data_bytes == size_bytes // 2


def test_half_sparse_file_has_holes(tmp_path: Path) -> None:
    """Half of it takes no space."""
    path = ImageFiles(tmp_path, 2 * MIB).half_sparse()
    assert path.stat().st_size == 16 * MIB
    # A file system may count a block of its own.
    assert 8 * MIB <= path.stat().st_blocks * 512 < 9 * MIB


def test_text_can_be_compressed_in_part(tmp_path: Path) -> None:
    """Clusters of text become a good deal shorter, one in eight does not."""
    data = ImageFiles(tmp_path, 32 * MIB).text().read_bytes()
    assert len(data) == 8 * MIB
    parts = [len(zlib.compress(data[at : at + MIB])) / MIB for at in range(0, 8 * MIB, MIB)]
    assert parts[0] > 0.99
    assert all(0.2 < part < 0.5 for part in parts[1:])


@pytest.mark.parametrize(
    "cell", [cell for cell in IMG_CELLS if cell.name != "img-check-100g"], ids=lambda cell: cell.name
)
def test_both_can_do_it(cell: Cell, tmp_path: Path) -> None:
    """And what they write is what it should be; nothing is left of it."""
    require_tool("qemu-img")
    row = Row(cell)
    Run([PYNBD, QEMU_IMG], Setup(Disks(tmp_path, 4 * MIB), tcp=False), Plan(1, 0.0, 0.0), lambda _: None).measure_round(
        row, 0
    )
    assert not row.failed, row.remarks
    for server in (PYNBD, QEMU_IMG):
        (sample,) = row.samples[server.name]
        assert sample is not None
        assert sample.value > 0
        assert sample.cpu_s
    assert not (tmp_path / "output").exists()


def test_wrong_output_is_noticed(tmp_path: Path) -> None:
    """A copy that is none makes whoever wrote it fail."""
    require_tool("qemu-img")
    word = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_bytes(bytes(32 << 20))"
    liar = Server("liar", sys.executable, tool=lambda _: Tool([sys.executable, "-c", word], {}))
    load = ImgCommand(("convert", "-f", "qcow2", "-O", "raw", "HALF_SPARSE_IMAGE", "OUTPUT"), of_data=True)
    row = Row(Cell("lie", load, Disk.FILES))
    _run(tmp_path, liar).measure_round(row, 0)
    assert row.failed == {"liar"}
    assert "compare" in row.remarks[0]


def test_disks_are_written_into_memory_that_was_in_use(tmp_path: Path) -> None:
    """The second run is what counts, and finds no output, so that the first one's memory is free."""
    runs = tmp_path / "runs"
    word = f"""if 1:
        import pathlib, shutil, sys
        source, output = map(pathlib.Path, sys.argv[-2:])
        with open({str(runs)!r}, "a") as told:
            told.write(f"{{output.exists()}} ")
        shutil.copyfile(source, output)"""
    copier = Server("copier", sys.executable, tool=lambda _: Tool([sys.executable, "-c", word], {}))
    load = ImgCommand(("convert", "-f", "raw", "-O", "raw", "HALF_SPARSE", "OUTPUT"), of_data=True)
    row = Row(Cell("copy", load, Disk.FILES))
    _run(tmp_path, copier).measure_round(row, 0)
    assert not row.failed, row.remarks
    assert runs.read_text().split() == ["False", "False"]


def test_failure_is_told(tmp_path: Path) -> None:
    """With what the program said."""
    word = "import sys; sys.exit('no such luck')"
    with pytest.raises(CommandError, match="no such luck"):
        ImgCommand(("info", "OUTPUT")).run(Tool([sys.executable, "-c", word], {}), ImageFiles(tmp_path, MIB))
