"""Disks under test, and what of the host they need."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block import pool
from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from tests.conftest import DiskMaker
from tests.peers import SYSTEM_PATH, require_tool

SIZE = 1 << 20

OpenDisk = Callable[..., AbstractAsyncContextManager[BlockBackend]]
"""open_disk(description, held=Permission.ALL, shared=Permission.ALL) -> a backend while the block lasts"""


@contextlib.asynccontextmanager
async def opened(
    description: str | dict[str, Any], held: Permission = Permission.ALL, shared: Permission = Permission.ALL
) -> AsyncIterator[BlockBackend]:
    """A user of a disk; all is closed at the end."""
    graph = Graph()
    try:
        backend = BlockBackend("test")
        graph.attach(backend, await graph.open(description), held, shared)
        try:
            yield backend
        finally:
            graph.detach(backend)
    finally:
        await graph.close_all()


@pytest.fixture
def open_disk() -> OpenDisk:
    """Opens a disk by its description."""
    return opened


def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """A file system mounted on `folder` until the test is over; skips where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for 1 MiB."""
    yield from mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=1M", "none")


@pytest.fixture
def overlayfs(tmp_path: Path) -> Iterator[Path]:
    """An overlay file system, as containers have: it has no RWF_NOWAIT."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    yield from mounted(tmp_path / "overlay", "-t", "overlay", "-o", options, "none")


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    """A block device whose disk is a file; skips where there are none."""
    losetup = require_tool("losetup", package="mount")
    done = subprocess.run(
        [losetup, "--find", "--show", *options, str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": SYSTEM_PATH},
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", str(device)], check=True)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 MiB of zeroes."""
    backing = tmp_path / "device.raw"
    with backing.open("wb") as disk:
        disk.truncate(16 << 20)
    with loop_device(backing) as path:
        yield path


@pytest.fixture
def disk(make_disk: DiskMaker) -> Path:
    """A mebibyte of random data, all of it on the disk."""
    path = make_disk(SIZE)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was given to threads."""
    given: list[object] = []

    def counting(executor: object, submit: Callable[..., object]) -> None:
        def counted(*arguments: object) -> object:
            given.append(arguments[0])
            return submit(*arguments)

        monkeypatch.setattr(executor, "submit", counted)

    counting(pool.transfers, pool.transfers.submit)
    counting(pool.syncs, pool.syncs.submit)
    return given


def description(path: Path, **options: object) -> dict[str, object]:
    return {"driver": "file", "filename": str(path), **options}


def evict(path: Path) -> None:
    """Drop a file, which is on the disk, from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
