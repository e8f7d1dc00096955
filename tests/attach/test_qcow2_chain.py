"""A guest's disk in a chain of qcow2 images under filters: a filesystem, a snapshot, a server killed under load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.conftest import DISK_BYTES
from tests.attach.filesystem_scenario import KeptFile, check_image, live_through
from tests.attach.guest import HOST_ADDRESS, Guest
from tests.attach.server import ServerUnderTest
from tests.formats.qcow2.workload import is_sound
from tests.peers import require_tool, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MOUNT_POINT = "/mnt/chain"

FILTERS = ("blkdebug", "delay,write=1ms", "nofilter")
OPTIONS = ("-f", "qcow2", "--discard", "unmap", *(word for name in FILTERS for word in ("--filter", name)))

UNDER_LOAD = f"""
mkdir -p {MOUNT_POINT} && mount -t ext4 /dev/nbd0 {MOUNT_POINT} && cd {MOUNT_POINT} &&
head -c 2000000 /dev/urandom >synced && sync && sha256sum synced >/tmp/synced.sum && cd / &&
(while head -c 300000 /dev/urandom >{MOUNT_POINT}/load 2>/dev/null && sync; do :; done) >/dev/null 2>&1 &
while ! test -s {MOUNT_POINT}/load; do :; done
"""
"""What is synced must survive; what is written when the server dies may be lost."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerUnderTest]:
    """`pynbd serve` of the top of three images, the lowest of which holds data, below three filters."""
    qemu_img = require_tool("qemu-img")
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    run(qemu_img, "create", "-q", "-f", "qcow2", base, str(DISK_BYTES))
    run(require_tool("qemu-io"), "-c", "write -P 90 0 16M", base)
    run(qemu_img, "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", base, "-F", "qcow2", middle)
    run(qemu_img, "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    with ServerUnderTest(top, tmp_path / "server.log", options=OPTIONS) as running:
        yield running


def attach(guest: Guest, server: ServerUnderTest) -> None:
    guest.run(f"nbd-client {HOST_ADDRESS} {server.port} /dev/nbd0 -N {server.export_name}")


def detach(guest: Guest) -> None:
    guest.run("nbd-client -d /dev/nbd0")


def as_raw(image: Path) -> Path:
    """What QEMU finds on the disk, which it must find sound."""
    assert is_sound(image, leaks=True)
    raw = image.with_suffix(".read")
    run(require_tool("qemu-img"), "convert", "-O", "raw", image, raw)
    return raw


def test_nothing_is_lost_when_the_server_is_killed(guest: Guest, server: ServerUnderTest) -> None:
    attach(guest, server)
    kept = live_through(guest, "/dev/nbd0", server.disk)
    detach(guest)
    server.stop()
    assert is_sound(server.disk)
    run(require_tool("qemu-img"), "snapshot", "-c", "before", server.disk)
    server.start()
    attach(guest, server)
    guest.run(UNDER_LOAD)
    synced = guest.run("cut -c 1-64 /tmp/synced.sum").strip()
    server.kill()
    guest.close()  # what it still had to write went with its machine
    server.start()
    after = server.disk.with_suffix(".raw")
    run(require_tool("qemu-img"), "convert", "-f", "raw", "-O", "raw", server.uri, after)
    server.stop()
    assert is_sound(server.disk, leaks=True)
    assert as_raw(server.disk).read_bytes() == after.read_bytes()
    subprocess.run([require_tool("e2fsck", package="e2fsprogs"), "-p", after], check=False)  # the journal is replayed
    check_image(after, KeptFile("/synced", synced))
    run(require_tool("qemu-img"), "snapshot", "-a", "before", server.disk)
    check_image(as_raw(server.disk), kept)
