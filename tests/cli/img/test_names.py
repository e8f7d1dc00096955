"""Images may have any names: none of them is run because of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.img.side_by_side import ok, same

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
