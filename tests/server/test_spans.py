"""Where a file has holes. How spans are sent is in test_wire.py."""

import os
from pathlib import Path

import pytest

from pynbd.block.driver import Location
from pynbd.server.spans import has_hole, is_whole
from pynbd.storage import linux

MIB = 1 << 20


def test_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("w+b") as opened:
        opened.truncate(8 * MIB)
        os.pwrite(opened.fileno(), b"x" * MIB, 2 * MIB)
        status = os.fstat(opened.fileno())
        assert has_hole(opened.fileno(), 0, MIB, status, in_memory=False)
        assert not has_hole(opened.fileno(), 2 * MIB, MIB, status, in_memory=False)
        assert has_hole(opened.fileno(), 2 * MIB, MIB + 4096, status, in_memory=False)
        with pytest.raises(OSError):
            has_hole(opened.fileno(), 9 * MIB, MIB, status, in_memory=False)
        assert is_whole(Location(opened.fileno(), 2 * MIB, MIB, os.RWF_NOWAIT))
        assert not is_whole(Location(opened.fileno(), 0, MIB, os.RWF_NOWAIT))
        assert not is_whole(Location(opened.fileno(), 9 * MIB, MIB, os.RWF_NOWAIT)), "behind the end"


def test_holes_in_memory() -> None:
    """Wherever the next hole is, only the range is looked at; one that has a hole is told from one that has none."""
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, 8 * MIB)
        os.pwrite(fd, b"x" * 3 * MIB, 2 * MIB)
        assert is_whole(Location(fd, 2 * MIB, 3 * MIB, 0))
        assert is_whole(Location(fd, 2 * MIB + 100, MIB, 0))
        assert not is_whole(Location(fd, 0, MIB, 0))
        assert not is_whole(Location(fd, 2 * MIB - 1, MIB, 0))
        assert not is_whole(Location(fd, 4 * MIB, MIB + 1, 0))
        assert not is_whole(Location(fd, 9 * MIB, MIB, 0)), "behind the end"
    finally:
        os.close(fd)


def test_memory_is_not_searched_for_the_next_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, 8 * MIB)
        os.pwrite(fd, b"x" * MIB, 0)
        if linux.resident_bytes(fd, 0, MIB) is None:
            pytest.skip("this kernel has no cachestat (Linux 6.5)")
        monkeypatch.setattr(os, "lseek", None)
        assert is_whole(Location(fd, 0, MIB, 0))
    finally:
        os.close(fd)
