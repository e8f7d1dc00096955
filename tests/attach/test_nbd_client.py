"""The real nbd-client in a real kernel: /dev/nbd0 of a Debian guest is the export."""

from __future__ import annotations

import pytest

from tests.attach.filesystem_scenario import check_image, live_through_ext4
from tests.attach.guest import HOST_ADDRESS, CommandFailedError, Guest
from tests.attach.server import ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def attach(guest: Guest, server: ServerUnderTest, options: str = "") -> None:
    guest.run(f"nbd-client {HOST_ADDRESS} {server.port} /dev/nbd0 -N {server.export_name} {options}")


def detach(guest: Guest) -> None:
    guest.run("nbd-client -d /dev/nbd0")
    assert guest.status_of("nbd-client -c /dev/nbd0")[0] == 1


@pytest.mark.parametrize(
    "options", ["", "-L", "-C 4", "-b 4096"], ids=["netlink", "ioctl", "4-connections", "4k-blocks"]
)
def test_filesystem_lives_from_attach_to_detach(guest: Guest, server: ServerUnderTest, options: str) -> None:
    attach(guest, server, options)
    kept = live_through_ext4(guest, "/dev/nbd0", server.disk)
    detach(guest)
    server.stop()
    check_image(server.disk, kept)


def test_kernel_knows_the_size_and_that_trim_and_flush_work(guest: Guest, server: ServerUnderTest) -> None:
    attach(guest, server)
    assert int(guest.run("blockdev --getsize64 /dev/nbd0")) == server.disk.stat().st_size
    assert int(guest.run("cat /sys/block/nbd0/queue/discard_max_bytes")) > 0
    assert guest.run("cat /sys/block/nbd0/queue/write_cache").strip() == "write back"
    assert guest.run("cat /sys/block/nbd0/ro").strip() == "0"


def test_detached_disk_can_be_attached_again_and_holds_the_data(guest: Guest, server: ServerUnderTest) -> None:
    attach(guest, server)
    written = guest.run(
        "head -c 1048576 /dev/urandom >/tmp/block && dd if=/tmp/block of=/dev/nbd0 bs=64k seek=3 conv=fsync 2>/tmp/dd"
        " && sha256sum </tmp/block"
    )
    detach(guest)
    attach(guest, server, "-L")
    assert guest.run("dd if=/dev/nbd0 bs=64k skip=3 count=16 2>/tmp/dd | sha256sum") == written


def test_unknown_export_is_refused_and_nothing_is_attached(guest: Guest, server: ServerUnderTest) -> None:
    with pytest.raises(CommandFailedError):
        guest.run(f"nbd-client {HOST_ADDRESS} {server.port} /dev/nbd0 -N no-such-export")
    assert guest.status_of("nbd-client -c /dev/nbd0")[0] == 1


def test_exports_are_listed(guest: Guest, server: ServerUnderTest) -> None:
    assert server.export_name in guest.run(f"nbd-client -l {HOST_ADDRESS} {server.port}").split()
