"""Images may have any names: none of them is run because of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.img.chains import qemu
from tests.cli.img.side_by_side import ok, same
from tests.storage.conftest import loop_device

CODE = """from pathlib import Path
Path("was-run").touch()

from pynbd import Driver

class Disk(Driver):
    size = 65536

    async def read(self, offset, into):
        into[:] = b"x" * len(into)
"""


@pytest.mark.parametrize(
    "words",
    [
        ("info", "disk.py"),
        ("info", "-f", "raw", "disk.py"),
        ("info", "./disk.py"),
        ("check", "-f", "raw", "disk.py"),
        ("map", "disk.py"),
        ("compare", "-f", "raw", "-F", "raw", "disk.py", "disk.py"),
        ("convert", "-f", "raw", "-O", "raw", "disk.py", "copy.py"),
        ("create", "-f", "raw", "new.py", "1M"),
        ("create", "-f", "qcow2", "-b", "disk.py", "-F", "raw", "over.qcow2"),
        ("resize", "-f", "raw", "disk.py", "1M"),
        ("info", "--image-opts", "driver=raw,file.filename=disk.py"),
        ("snapshot", "-l", "disk.py"),
    ],
)
def test_python_in_a_file_is_not_run(words: tuple[str, ...], folder: Path) -> None:
    Path("disk.py").write_text(CODE)
    os.truncate("disk.py", 65536)
    same(*words)
    assert not Path("was-run").exists()


def test_who_wants_it_run_says_so(folder: Path) -> None:
    Path("disk.py").write_text(CODE)
    ok("convert", "--image-opts", "driver=./disk.py", "-O", "raw", "copy.raw")
    assert Path("copy.raw").read_bytes() == b"x" * 65536


@pytest.mark.parametrize(
    "words",
    [
        ("info", "null-co://"),
        ("info", 'json:{"driver": "raw", "file": {"driver": "null-co"}}'),
        ("info", "null-co:"),
        ("info", "null-co:///disk.raw"),
        ("info", "--backing-chain", "over.qcow2"),
        ("compare", "null-co://", "null-aio://"),
        ("convert", "-n", "disk.raw", "null-co://"),
        ("convert", "disk.raw", "null-co://"),
        ("create", "-q", "-f", "raw", "null-co://", "1M"),
        ("create", "-q", "-f", "qcow2", "null-co://", "1M"),
    ],
)
def test_null_disks(words: tuple[str, ...], disk: Path) -> None:
    """They have a name of their own."""
    qemu("create", "-q", "-f", "qcow2", "-b", "null-co://", "-F", "raw", "over.qcow2")
    same(*words)


def test_devices_by_the_name_of_their_driver(disk: Path) -> None:
    """A file is none."""
    same("info", "host_device:disk.raw")
    same("create", "-q", "host_device:disk.raw", "1M")
    Path("device.raw").write_bytes(bytes(4 << 20))
    with loop_device(Path("device.raw")) as device:
        name = f"host_device:{device}"
        ok("create", "-q", "-f", "qcow2", name, "1M")
        ok("create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", "over.qcow2")
        assert same("compare", "over.qcow2", name) == "Images are identical.\n"
        for told in (ok("info", name), qemu("info", name)):
            assert told.startswith(f"image: {device}\nfile format: qcow2\n")
        ok("create", "-q", "-f", "raw", name, "1M")
        assert "file format: raw" in qemu("info", name)
