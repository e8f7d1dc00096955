"""An export that grows while a guest has it attached: the server first, then the kernel, then the filesystem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.disks import check_ext4, sparse_disk
from tests.attach.guest import Guest
from tests.attach.nbd_client import attached, size_bytes
from tests.attach.server import ServerUnderTest
from tests.cli.pynbd_command import pynbd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL_BYTES = 24 << 20
LARGE_BYTES = 64 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """An export whose clients may resize it."""
    disk = sparse_disk(tmp_path / "disk.raw", SMALL_BYTES)
    config = tmp_path / "pynbd.toml"
    config.write_text(f'[export.disk]\ndisk = "{disk}"\nformat = "raw"\ndiscard = "unmap"\nresize = true\n')
    with ServerUnderTest(disk, tmp_path / "server.log", options=(), words=("--config", str(config))) as running:
        yield running


def test_filesystem_grows_while_it_is_mounted(guest: Guest, server: ServerUnderTest) -> None:
    """Over two connections, each of which the server tells nothing and lets use what is new."""
    with attached(guest, server, "-C 2") as device:
        guest.run(f"mkfs.ext4 -q {device} && mkdir -p /mnt/disk && mount -t ext4 {device} /mnt/disk")
        guest.run("echo before >/mnt/disk/before && sync")
        pynbd("img", "resize", "-f", "raw", server.uri, str(LARGE_BYTES))
        assert server.disk.stat().st_size == LARGE_BYTES
        assert size_bytes(guest) == SMALL_BYTES, "the kernel asks for the size once"
        guest.run(f"python3 /usr/sbin/nbd_set_size.py {device} {LARGE_BYTES}")
        assert size_bytes(guest) == LARGE_BYTES
        guest.run(f"resize2fs {device}")
        free_kib = int(guest.run("df -k /mnt/disk | tail -n 1").split()[3])
        assert free_kib << 10 > SMALL_BYTES
        guest.run(f"dd if=/dev/zero of=/mnt/disk/large bs=1M count={(SMALL_BYTES >> 20) + 4} conv=fsync 2>/tmp/dd")
        assert guest.run("cat /mnt/disk/before") == "before\n"
        guest.run(f"umount /mnt/disk && e2fsck -f -n {device}")
        assert "I/O error" not in guest.kernel_log()
    server.stop()
    check_ext4(server.disk)


def test_device_that_is_attached_anew_has_the_new_size(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server):
        pynbd("img", "resize", "-f", "raw", server.uri, str(LARGE_BYTES))
    with attached(guest, server, "-L"):
        assert size_bytes(guest) == LARGE_BYTES


def test_size_of_a_device_that_is_not_attached_is_not_set(guest: Guest, server: ServerUnderTest) -> None:
    status, output = guest.status_of(f"python3 /usr/sbin/nbd_set_size.py /dev/nbd1 {LARGE_BYTES}")
    assert (status, output) == (1, "nbd_set_size.py: /dev/nbd1: Invalid argument\n")
    assert guest.status_of("python3 /usr/sbin/nbd_set_size.py /dev/sda 1")[0] == 2
