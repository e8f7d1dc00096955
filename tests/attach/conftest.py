"""What the scenarios share: a kernel, an initramfs and a saved guest per run; a server and a guest per test."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.disks import sparse_disk
from tests.attach.guest import Guest
from tests.attach.initramfs import build_initramfs
from tests.attach.kernel import Kernel, debian_kernel
from tests.attach.saved_guest import SavedGuest
from tests.attach.server import ServerUnderTest
from tests.attach.watching import announce
from tests.peers import require_tool

DISK_BYTES = 512 << 20
"""Sparse; mkfs.xfs makes nothing below 300 MiB."""


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    if platform.machine() != "x86_64":
        pytest.skip(f"the guest is made of this machine's programs and runs x86_64; this is {platform.machine()}")
    require_tool("apt-get")
    require_tool("busybox", package="busybox-static")
    return debian_kernel()


@pytest.fixture(scope="session")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_initramfs(kernel, tmp_path_factory.mktemp("initramfs") / "initramfs.cpio")


@pytest.fixture(scope="session")
def saved_guest(kernel: Kernel, initramfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedGuest]:
    """A guest that was booted once, and saved with its kernel modules loaded."""
    saved = SavedGuest.boot(kernel, initramfs, tmp_path_factory.mktemp("saved-guest"))
    yield saved
    saved.state.unlink()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """`pynbd serve` of an empty sparse disk; the scenario's clients are gone before it is stopped."""
    disk = sparse_disk(tmp_path / "disk.raw", DISK_BYTES)
    with ServerUnderTest(disk, tmp_path / "server.log") as running:
        yield running


@pytest.fixture
def guest(
    saved_guest: SavedGuest, server: ServerUnderTest, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Guest]:
    """A guest with nothing attached, and nbd, ext4, xfs and btrfs in its kernel.

    Asks for `server` only so that the guest is gone before the server is stopped.
    """
    announce(request.node.name)
    with saved_guest.restored(tmp_path) as guest:
        yield guest
