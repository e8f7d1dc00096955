"""`pynbd img snapshot` beside qemu-img's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pynbd.cli.img.info import snapshot_lines
from tests.cli.img.chains import make_chain, qemu, qemu_io, shown
from tests.cli.img.side_by_side import failure, ok, qemu_img, same


@pytest.mark.parametrize(
    "words",
    [
        ("-l", "disk.raw"),
        ("-l", "-U", "disk.raw"),
        ("-c", "name", "disk.raw"),
        ("-a", "name", "disk.raw"),
        ("-d", "name", "disk.raw"),
        ("-l", "-c", "name", "disk.raw"),
        ("-c", "one", "-c", "two", "disk.raw"),
        ("-d", "one", "-d", "one", "disk.raw"),
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


def test_qcow2(folder: Path) -> None:
    """Made, listed, applied and deleted; qemu-img sees what we do."""
    content = make_chain()
    ok("snapshot", "-c", "first", "top.qcow2")
    qemu_io("top.qcow2", "write -P 7 0 2M")
    ok("snapshot", "-c", "second", "top.qcow2")
    same("snapshot", "-l", "top.qcow2")
    same("info", "top.qcow2")
    same("info", "--output=json", "top.qcow2")
    ok("snapshot", "-a", "first", "top.qcow2")
    assert shown("top.qcow2") == content
    assert "'2'" in failure("snapshot", "-d", "2", "top.qcow2")  # that is an id
    assert qemu_img("snapshot", "-d", "2", "top.qcow2").status == 1
    ok("snapshot", "-d", "second", "top.qcow2")
    assert "second" not in same("snapshot", "-l", "top.qcow2")
    same("snapshot", "-d", "missing", "top.qcow2")
    same("snapshot", "-a", "missing", "top.qcow2")
    qemu("check", "-q", "top.qcow2")


def test_one_is_converted_and_measured(folder: Path) -> None:
    """The same bytes as from qemu-img, whichever way the snapshot is named."""
    make_chain()
    ok("snapshot", "-c", "first", "top.qcow2")
    qemu_io("top.qcow2", "write -P 7 0 2M")
    ok("snapshot", "-c", "second", "top.qcow2")
    for snapshot in ("first", "snapshot.id=1", "snapshot.name=second"):
        same("measure", "-O", "qcow2", "-l", snapshot, "top.qcow2")
        ok("convert", "-O", "raw", "-l", snapshot, "top.qcow2", "ours.raw")
        qemu("convert", "-O", "raw", "-l", snapshot, "top.qcow2", "theirs.raw")
        assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()
    same("convert", "-O", "raw", "-l", "missing", "top.qcow2", "copy.raw")
