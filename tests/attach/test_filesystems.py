"""Filesystems on /dev/nbd0 of a Debian guest, from mkfs to a check on the host."""

from __future__ import annotations

import pytest

from tests.attach.disks import copy_of_partition
from tests.attach.filesystem_scenario import check_image, live_through
from tests.attach.filesystems import FILESYSTEMS, Filesystem
from tests.attach.guest import Guest
from tests.attach.nbd_client import attached
from tests.attach.server import ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECTOR_BYTES = 512
"""What sysfs counts in, whatever the disk's own sectors are."""

WAYS = {"ext4": "-L", "xfs": "-C 4", "btrfs": "-b 4096"}
"""Each filesystem attached another way."""


@pytest.mark.parametrize("filesystem", FILESYSTEMS, ids=lambda filesystem: filesystem.kind)
def test_filesystem_in_a_partition_lives_from_mkfs_to_fsck(
    guest: Guest, server: ServerUnderTest, filesystem: Filesystem
) -> None:
    with attached(guest, server, WAYS[filesystem.kind]) as device:
        guest.run(f"printf 'label: gpt\\nstart=1MiB, type=L, name=data\\n' | sfdisk -q {device} && sfdisk -V {device}")
        live_through(guest, f"{device}p1", server.disk, filesystem)
        start, length = (int(guest.run(f"cat /sys/block/nbd0/nbd0p1/{name}")) for name in ("start", "size"))
    server.stop()
    filesystem.check_image(copy_of_partition(server.disk, start * SECTOR_BYTES, length * SECTOR_BYTES))


def test_filesystem_on_the_whole_disk(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server) as device:
        kept = live_through(guest, device, server.disk)
    server.stop()
    check_image(server.disk, kept)


def test_partition_is_found_when_the_disk_is_attached_again(guest: Guest, server: ServerUnderTest) -> None:
    """GPT, filesystem and label are on the disk, not in the kernel's memory."""
    with attached(guest, server) as device:
        guest.run(f"printf 'label: gpt\\n,,L\\n' | sfdisk -q {device} && mkfs.ext4 -q -L found {device}p1")
    with attached(guest, server, "-L") as device:
        guest.run(f"until test -b {device}p1; do :; done", timeout_s=20)
        assert guest.run(f"blkid -o value -s LABEL {device}p1").strip() == "found"
