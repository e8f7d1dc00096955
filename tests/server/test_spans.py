"""Where a file has holes. How spans are sent is in test_wire.py."""

import os
from pathlib import Path

import pytest

from pynbd.server.spans import has_hole, is_whole

MIB = 1 << 20


def test_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("w+b") as opened:
        opened.truncate(8 * MIB)
        os.pwrite(opened.fileno(), b"x" * MIB, 2 * MIB)
        status = os.fstat(opened.fileno())
        assert has_hole(opened.fileno(), 0, MIB, status)
        assert not has_hole(opened.fileno(), 2 * MIB, MIB, status)
        assert has_hole(opened.fileno(), 2 * MIB, MIB + 4096, status)
        with pytest.raises(OSError):
            has_hole(opened.fileno(), 9 * MIB, MIB, status)
        assert is_whole(opened.fileno(), 2 * MIB, MIB)
        assert not is_whole(opened.fileno(), 0, MIB)
        assert not is_whole(opened.fileno(), 9 * MIB, MIB), "behind the end"
