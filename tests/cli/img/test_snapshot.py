"""`pynbd img snapshot` beside qemu-img's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pynbd.cli.img.info import snapshot_lines
from tests.cli.img.chains import qemu
from tests.cli.img.side_by_side import same


@pytest.mark.parametrize(
    "words",
    [
        ("-l", "disk.raw"),
        ("-l", "-U", "disk.raw"),
        ("-c", "name", "disk.raw"),
        ("-a", "name", "disk.raw"),
        ("-d", "name", "disk.raw"),
        ("-l", "-c", "name", "disk.raw"),
        ("-l", "missing.raw"),
        (),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    """Nothing to list, and nothing that could be done."""
    same("snapshot", *words)


def test_the_table_is_that_of_qemu(folder: Path) -> None:
    """Columns, dates and sizes, of names that fit and of one that does not."""
    qemu("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    for name in ("first", "a name that is longer than its column", "3"):
        qemu("snapshot", "-c", name, "a.qcow2")
    snapshots = json.loads(qemu("info", "--output=json", "a.qcow2"))["snapshots"]
    expected = qemu("snapshot", "-l", "a.qcow2")
    assert "Snapshot list:\n" + "\n".join(snapshot_lines(snapshots)) + "\n" == expected
