"""A QEMU guest whose /dev/vda is the export: QEMU itself is the NBD client."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attach.filesystem_scenario import check_image, live_through
from tests.attach.guest import Guest
from tests.attach.kernel import Kernel
from tests.attach.server import ADDRESS, ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WRITE_IN_FLIGHT = "awk '{ exit $9 == 0 }' /sys/block/vda/stat"


def test_filesystem_on_vda_lives_until_power_off(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    drive = f"file=nbd:{ADDRESS}:{server.port}:exportname={server.export_name},format=raw,if=virtio,discard=unmap"
    with Guest(kernel, initramfs, tmp_path, ["-drive", drive]) as guest:
        assert int(guest.run("blockdev --getsize64 /dev/vda")) == server.disk.stat().st_size
        kept = live_through(guest, "/dev/vda", server.disk)
        guest.power_off()
    server.stop()
    check_image(server.disk, kept)


def test_guest_that_dies_under_write_leaves_what_it_synced(
    kernel: Kernel, initramfs: Path, server: ServerUnderTest, tmp_path: Path
) -> None:
    drive = f"file={server.uri},format=raw,if=virtio,cache=none"
    with Guest(kernel, initramfs, tmp_path, ["-drive", drive]) as guest:
        synced = guest.run(
            "head -c 4194304 /dev/urandom >/tmp/data && dd if=/tmp/data of=/dev/vda bs=256k conv=fsync 2>/tmp/dd"
            " && sha256sum </tmp/data"
        )
        guest.run(
            "dd if=/dev/zero of=/dev/vda bs=64k seek=256 count=1024 oflag=direct 2>/tmp/dd &\n"
            f"until {WRITE_IN_FLIGHT} || ! kill -0 $!; do :; done"
        )
    with Guest(kernel, initramfs, tmp_path, ["-drive", drive]) as guest:
        assert guest.run("dd if=/dev/vda bs=256k count=16 2>/tmp/dd | sha256sum") == synced
