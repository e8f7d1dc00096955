"""A server that is killed under a mounted filesystem: errors, no hang, and nothing lost that was fsynced.

What a kernel does with requests that are on their way when its server goes depends on how it was attached. By ioctl
they fail at once. By netlink they fail when the time-out that nbd-client was given (`-t`) has passed; without one they
wait until the device is detached.
"""

from __future__ import annotations

import pytest

from tests.attach.filesystems import EXT4
from tests.attach.guest import Guest
from tests.attach.nbd_client import DEVICE, attach, detach, is_attached
from tests.attach.server import ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MOUNT_POINT = "/mnt/disk"
FILES_BEFORE = 12
FILE_BYTES = 40_000

LOAD = f"""
mkdir -p {MOUNT_POINT} && {EXT4.make} {DEVICE} && mount -t ext4 {DEVICE} {MOUNT_POINT} && : >/tmp/durable
(n=1; while yes $n | head -c {FILE_BYTES} | dd of={MOUNT_POINT}/$n bs=64k iflag=fullblock conv=fsync; do
    echo $n >>/tmp/durable
    n=$((n + 1))
done) >/tmp/load 2>&1 &
echo $! >/tmp/load.pid
until test $(wc -l </tmp/durable) -ge {FILES_BEFORE}; do :; done
"""
"""Files that are written and fsynced one by one; which of them are durable is told in the guest's memory."""

VERIFY = f"for n in $(cat /tmp/durable); do yes $n | head -c {FILE_BYTES} | cmp - {MOUNT_POINT}/$n || exit; done"

READERS = f"""
for n in 1 2 3; do
    (while dd if={DEVICE} of=/tmp/out bs=64k count=64 skip=$((n * 100)) iflag=direct; do :; done) 2>/tmp/reader$n &
done
until grep -q records /tmp/reader1 && grep -q records /tmp/reader2 && grep -q records /tmp/reader3; do :; done
"""


@pytest.mark.parametrize(
    ("options", "detached_first"),
    [("-t 2", False), ("-t 2 -C 4", False), ("-L", False), ("", True)],
    ids=["time-out", "time-out of 4 connections", "ioctl", "detached"],
)
def test_killed_under_load_and_attached_again(
    guest: Guest, server: ServerUnderTest, options: str, detached_first: bool
) -> None:
    attach(guest, server, options)
    guest.run(LOAD)
    server.kill()
    if detached_first:
        guest.run(f"nbd-client -d {DEVICE}")
    guest.run("wait $(cat /tmp/load.pid) || true")
    load = guest.run("tail -n 5 /tmp/load")
    assert "Input/output error" in load or "Read-only file system" in load
    assert guest.status_of(f"dd if={DEVICE} of=/dev/null bs=4k count=1 skip=5000 iflag=direct")[0] != 0
    guest.status_of(f"umount {MOUNT_POINT}")  # it can't write what is left, and says so or not
    assert MOUNT_POINT not in guest.run("cat /proc/mounts")
    if is_attached(guest):
        detach(guest)
    server.start()
    attach(guest, server, options)
    repaired, story = guest.status_of(f"e2fsck -p {DEVICE}")
    assert repaired in (0, 1), story
    guest.run(f"e2fsck -f -n {DEVICE} && mount -t ext4 {DEVICE} {MOUNT_POINT}")
    assert int(guest.run("wc -l </tmp/durable")) >= FILES_BEFORE
    guest.run(VERIFY)
    guest.run(f"umount {MOUNT_POINT}")
    detach(guest)


def test_readers_are_told_that_the_server_is_gone(guest: Guest, server: ServerUnderTest) -> None:
    attach(guest, server, "-t 2")
    guest.run(READERS)
    server.kill()
    guest.run("wait")
    for reader in (1, 2, 3):
        assert "Input/output error" in guest.run(f"cat /tmp/reader{reader}")
    detach(guest)
    server.start()
    attach(guest, server)
    guest.run(f"dd if={DEVICE} of=/tmp/out bs=64k count=16 iflag=direct 2>/tmp/dd")
    detach(guest)
