"""Images for the tests of `pynbd img`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import DiskMaker

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, so that names can be as short as people write them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def disk(make_disk: DiskMaker) -> Path:
    """`disk.raw`: 10 MiB with data in two places."""
    make_disk(10 * MIB, extents=[(MIB, 196 << 10), (5 * MIB, 64 << 10)])
    return Path("disk.raw")


@pytest.fixture
def odd(make_disk: DiskMaker) -> Path:
    """`odd.raw`: 1000 bytes, no whole number of sectors."""
    make_disk(1000, name="odd.raw")
    return Path("odd.raw")
