"""Fixtures and rules for all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from pynbd.crypto import certificates
from tests.peers import TOOL_MISSING

IN_CI = bool(os.environ.get("CI"))

CHUNK_BYTES = 1 << 20

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# How long an example takes says more of the machine than of the code.
settings.register_profile("pynbd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pynbd")

DiskMaker = Callable[..., Path]
"""make_disk(size_bytes, *, seed=0, extents=None, name="disk.raw") -> Path"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where all tools must be there."""
    return _judged(item.nodeid, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole module into an error where all tools must be there."""
    return _judged(collector.nodeid, (yield))


def _judged(nodeid: str, report: Report) -> Report:
    if not IN_CI or not report.skipped or not isinstance(report.longrepr, tuple):
        return report
    reason = report.longrepr[2]
    if TOOL_MISSING in reason or "could not import" in reason:
        report.outcome = "failed"
        report.longrepr = (
            f"{nodeid}: {reason}. In CI every program of tests/packages.txt is there, so this may not skip."
        )
    return report


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, and what it has signed for a server (localhost, 127.0.0.1) and for the client alice.

    Beneath it `bob` is another client's folder, and `stranger` one of another authority.
    """
    folder = tmp_path_factory.mktemp("pki")
    authority = certificates.make_authority(folder, "authority", 2)
    certificates.issue(authority, folder, "server", "localhost", ["localhost", "127.0.0.1"], 2)
    certificates.issue(authority, folder, "client", "alice", [], 2)
    bob, stranger = folder / "bob", folder / "stranger"
    bob.mkdir()
    certificates.issue(authority, bob, "client", "bob", [], 2)
    stranger.mkdir()
    other = certificates.make_authority(stranger, "another authority", 2)
    certificates.issue(other, stranger, "server", "localhost", ["localhost", "127.0.0.1"], 2)
    certificates.issue(other, stranger, "client", "alice", [], 2)
    return folder


@pytest.fixture
def make_disk(tmp_path: Path) -> DiskMaker:
    """Makes raw disk images: random data throughout, or only in `extents` (pairs of offset and length in bytes)."""

    def make(
        size_bytes: int, *, seed: int = 0, extents: list[tuple[int, int]] | None = None, name: str = "disk.raw"
    ) -> Path:
        path = tmp_path / name
        source = random.Random(seed)
        with path.open("wb") as disk:
            disk.truncate(size_bytes)
            for offset, length in [(0, size_bytes)] if extents is None else extents:
                disk.seek(offset)
                for begin in range(0, length, CHUNK_BYTES):
                    disk.write(source.randbytes(min(CHUNK_BYTES, length - begin)))
        return path

    return make


@pytest.fixture
def random_disk(make_disk: DiskMaker) -> Path:
    """8 MiB of random data without a hole; the same data every time."""
    return make_disk(8 << 20, name="random.raw")


@pytest.fixture
def sparse_disk(make_disk: DiskMaker) -> Path:
    """64 MiB with 64 KiB of data at the beginning, 1 MiB at 16 MiB, and the last 64 KiB; holes elsewhere."""
    last = (64 << 20) - (64 << 10)
    return make_disk(64 << 20, extents=[(0, 64 << 10), (16 << 20, 1 << 20), (last, 64 << 10)], name="sparse.raw")


@pytest.fixture
def empty_disk(make_disk: DiskMaker) -> Path:
    """64 MiB without a byte of data."""
    return make_disk(64 << 20, extents=[], name="empty.raw")
