"""What the scenarios share: one kernel and one initramfs per run, one booted guest per module, a server per test."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.disks import sparse_disk
from tests.attach.guest import Guest
from tests.attach.initramfs import build_initramfs
from tests.attach.kernel import Kernel, debian_kernel
from tests.attach.server import ServerUnderTest
from tests.peers import require_tool

DISK_BYTES = 128 << 20


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


class GuestOfModule:
    """Boots a guest when one is asked for, and again when a scenario has left it unusable."""

    def __init__(self, kernel: Kernel, initramfs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._kernel = kernel
        self._initramfs = initramfs
        self._tmp_path_factory = tmp_path_factory
        self._guest: Guest | None = None

    def booted(self) -> Guest:
        if self._guest is None or not self._guest.usable:
            self.close()
            run_dir = self._tmp_path_factory.mktemp("guest")
            self._guest = Guest(self._kernel, self._initramfs, run_dir).__enter__()
        return self._guest

    def close(self) -> None:
        if self._guest is not None:
            self._guest.close()


@pytest.fixture(scope="module")
def guest_of_module(
    kernel: Kernel, initramfs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestOfModule]:
    holder = GuestOfModule(kernel, initramfs, tmp_path_factory)
    try:
        yield holder
    finally:
        holder.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """`pynbd serve` of an empty sparse disk; the scenario's clients are gone before it is stopped."""
    disk = sparse_disk(tmp_path / "disk.raw", DISK_BYTES)
    with ServerUnderTest(disk, tmp_path / "server.log") as running:
        yield running


RELEASE_ALL = """
for folder in $(awk '$2 ~ "^/mnt" { print $2 }' /proc/mounts); do umount "$folder"; done
for device in nbd0 nbd1; do test ! -e /sys/block/$device/pid || nbd-client -d /dev/$device; done
! grep -q /mnt /proc/mounts && test ! -e /sys/block/nbd0/pid && test ! -e /sys/block/nbd1/pid
"""


@pytest.fixture
def guest(guest_of_module: GuestOfModule, server: ServerUnderTest) -> Iterator[Guest]:
    """The module's guest, with the nbd module loaded; afterwards nothing is mounted or attached in it any more.

    Asks for `server` only so that the guest lets go of the export before the server is stopped.
    """
    guest = guest_of_module.booted()
    guest.run("modprobe nbd nbds_max=2")
    yield guest
    if guest.usable:
        guest.run(RELEASE_ALL)
