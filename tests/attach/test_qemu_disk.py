"""A QEMU guest whose disk is the export: QEMU itself is the NBD client."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.attach.filesystem_scenario import MOUNT_POINT, check_image, live_through
from tests.attach.filesystems import EXT4
from tests.attach.guest import Guest
from tests.attach.kernel import Kernel
from tests.attach.server import ADDRESS, ServerUnderTest
from tests.attach.watching import announce

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WRITE_IN_FLIGHT = "awk '{ exit $9 == 0 }' /sys/block/vda/stat"

NUMBERED_FILES = f"""
(n=1; while test ! -e /tmp/enough; do
    yes $n | head -c 20000 | dd of={MOUNT_POINT}/$n bs=32k iflag=fullblock conv=fsync 2>/tmp/dd || break
    echo $n >>/tmp/durable
    n=$((n + 1))
done) >/tmp/load 2>&1 &
echo $! >/tmp/load.pid
until test -s /tmp/durable; do :; done
"""
VERIFY_NUMBERED = f"for n in $(cat /tmp/durable); do yes $n | head -c 20000 | cmp - {MOUNT_POINT}/$n || exit; done"


def blockdev(server: ServerUnderTest, device: str) -> list[str]:
    """QEMU's options for the export as a node with its cache and discards as a user of `-blockdev` writes them."""
    node = {
        "driver": "nbd",
        "node-name": "disk0",
        "server": {"type": "inet", "host": ADDRESS, "port": str(server.port)},
        "export": server.export_name,
        "discard": "unmap",
        "cache": {"direct": True},
        "reconnect-delay": 60,
    }
    return ["-blockdev", json.dumps(node), "-device", device]


def test_filesystem_on_vda_lives_until_power_off(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    announce("-drive, virtio-blk")
    drive = f"file=nbd:{ADDRESS}:{server.port}:exportname={server.export_name},format=raw,if=virtio,discard=unmap"
    with Guest(kernel, initramfs, tmp_path, ["-drive", drive]) as guest:
        assert int(guest.run("blockdev --getsize64 /dev/vda")) == server.disk.stat().st_size
        kept = live_through(guest, "/dev/vda", server.disk)
        guest.power_off()
    server.stop()
    check_image(server.disk, kept)


def test_filesystem_on_a_scsi_disk_outlives_a_reboot(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    announce("-blockdev, virtio-scsi, reboot")
    scsi = ["-device", "virtio-scsi-pci", *blockdev(server, "scsi-hd,drive=disk0")]
    with Guest(kernel, initramfs, tmp_path, scsi) as guest:
        kept = live_through(guest, "/dev/sda", server.disk)
        guest.reboot()
        guest.run(f"mkdir -p {MOUNT_POINT} && mount -t ext4 /dev/sda {MOUNT_POINT}")
        assert guest.run(f"sha256sum {MOUNT_POINT}/kept").split()[0] == kept.sha256
        guest.run(f"echo second >{MOUNT_POINT}/second && umount {MOUNT_POINT}")
        guest.power_off()
    server.stop()
    check_image(server.disk, kept)


def test_guest_that_writes_outlives_a_move_to_another_qemu_and_a_server_that_is_killed(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    """Both QEMUs have the export open; the second one waits for the server. All that was ever durable is there."""
    announce("migration, reconnect-delay")
    options = blockdev(server, "virtio-blk-pci,drive=disk0")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with (
        Guest(kernel, initramfs, tmp_path / "here", options) as here,
        Guest(kernel, initramfs, tmp_path / "there", options, arriving=True) as there,
    ):
        here.run(f"{EXT4.make} /dev/vda && mkdir -p {MOUNT_POINT} && mount -t ext4 /dev/vda {MOUNT_POINT}")
        here.run(NUMBERED_FILES)
        here.move_to(there)
        assert not here.usable
        here.close()
        server.kill()
        server.start()
        before = int(there.run("wc -l </tmp/durable"))
        there.run(f"until test $(wc -l </tmp/durable) -gt {before + 2}; do :; done; touch /tmp/enough; wait")
        there.run(f"umount {MOUNT_POINT} && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 /dev/vda {MOUNT_POINT}")
        there.run(VERIFY_NUMBERED)
        assert "I/O error" not in here.kernel_log() + there.kernel_log()
        there.run(f"umount {MOUNT_POINT} && e2fsck -f -n /dev/vda")
        there.power_off()


def test_guest_that_dies_under_write_leaves_what_it_synced(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    announce("QEMU is killed")
    drive = f"file={server.uri},format=raw,if=virtio,cache=none"
    with Guest(kernel, initramfs, tmp_path, ["-drive", drive]) as guest:
        synced = guest.run(
            "head -c 1048576 /dev/urandom >/tmp/data && dd if=/tmp/data of=/dev/vda bs=256k conv=fsync 2>/tmp/dd"
            " && sha256sum </tmp/data"
        )
        guest.run(
            "dd if=/dev/zero of=/dev/vda bs=64k seek=256 count=1024 oflag=direct 2>/tmp/dd &\n"
            f"until {WRITE_IN_FLIGHT} || ! kill -0 $!; do :; done"
        )
    server.stop()
    with server.disk.open("rb") as disk:
        assert hashlib.sha256(disk.read(1 << 20)).hexdigest() == synced.split()[0]
