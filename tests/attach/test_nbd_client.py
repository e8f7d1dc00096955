"""The real nbd-client in a real kernel: all the ways to attach an export to a Debian guest, and to let go."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.attach.disks import sparse_disk
from tests.attach.guest import HOST_ADDRESS, CommandFailedError, Guest
from tests.attach.nbd_client import DEVICE, attach, attached, detach, is_attached, queue_value, size_bytes
from tests.attach.server import ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECOND_BYTES = 48 << 20

WRITE = f"""
head -c 300000 /dev/urandom >/tmp/block && dd if=/tmp/block of={DEVICE} bs=64k seek=3 conv=fsync 2>/tmp/dd &&
sha256sum </tmp/block
"""
READ = f"echo 3 >/proc/sys/vm/drop_caches; dd if={DEVICE} bs=64k skip=3 2>/tmp/dd | head -c 300000 | sha256sum"


@pytest.mark.parametrize("options", ["", "-L"], ids=["netlink", "ioctl"])
def test_kernel_knows_the_size_and_that_trim_and_flush_work(
    guest: Guest, server: ServerUnderTest, options: str
) -> None:
    with attached(guest, server, options):
        assert size_bytes(guest) == server.disk.stat().st_size
        assert int(queue_value(guest, "discard_max_bytes")) > 0
        assert queue_value(guest, "write_cache") == "write back"
        assert guest.run("cat /sys/block/nbd0/ro").strip() == "0"


def test_what_is_written_is_read_again(guest: Guest, server: ServerUnderTest) -> None:
    """By netlink, by ioctl, over four connections, in small and large blocks, without NBD_OPT_GO; detached between."""
    written = f"{hashlib.sha256(bytes(300_000)).hexdigest()}  -\n"
    for options in ("", "-L", "-C 4", "-b 512", "-b 4096", "-g"):
        with attached(guest, server, options):
            assert guest.run(READ) == written, options
            written = guest.run(WRITE)
            assert guest.run(READ) == written, options


def test_block_size_is_the_kernels(guest: Guest, server: ServerUnderTest) -> None:
    for block_bytes in (512, 1024, 4096):
        with attached(guest, server, f"-b {block_bytes}"):
            assert queue_value(guest, "logical_block_size") == str(block_bytes)


def test_four_connections_are_made(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server, "-C 4"):
        established = guest.run(f"netstat -tn | grep -c ':{server.port} *ESTABLISHED'")
        assert int(established) == 4


def test_read_only_export_can_not_be_written(guest: Guest, tmp_path: Path) -> None:
    disk = tmp_path / "golden.raw"
    disk.write_bytes(b"golden" * (1 << 20))
    with ServerUnderTest(disk, tmp_path / "golden.log", options=("-r", "-f", "raw")) as golden, attached(guest, golden):
        assert guest.run(f"cat /sys/block/nbd0/ro; head -c 6 {DEVICE}") == "1\ngolden"
        assert guest.status_of(f"dd if=/dev/zero of={DEVICE} bs=4k count=1 conv=fsync")[0] != 0
        assert guest.run(f"head -c 6 {DEVICE}") == "golden"


def test_kernel_is_told_to_treat_the_disk_as_read_only(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server, "-R"):
        assert guest.run("cat /sys/block/nbd0/ro").strip() == "1"
        assert guest.status_of(f"dd if=/dev/zero of={DEVICE} bs=4k count=1 conv=fsync")[0] != 0


def test_two_disks_of_two_exports_at_once(guest: Guest, tmp_path: Path) -> None:
    """One server, two exports, two devices; each keeps to itself."""
    disks = {name: sparse_disk(tmp_path / f"{name}.raw", size) for name, size in (("a", 64 << 20), ("b", SECOND_BYTES))}
    exports = [f"{name}={path}" for name, path in disks.items()]
    with ServerUnderTest(disks["a"], tmp_path / "two.log", "a", ("--discard", "unmap"), words=exports) as first:
        second = first.other_export("b")
        with attached(guest, first, device="/dev/nbd0"), attached(guest, second, "-L", device="/dev/nbd1"):
            assert (size_bytes(guest, "/dev/nbd0"), size_bytes(guest, "/dev/nbd1")) == (64 << 20, SECOND_BYTES)
            guest.run(
                "(yes a | head -c 1048576 | dd of=/dev/nbd0 bs=64k conv=fsync 2>/tmp/dd0) &\n"
                "(yes b | head -c 1048576 | dd of=/dev/nbd1 bs=64k conv=fsync 2>/tmp/dd1) &\nwait"
            )
    assert {name: path.read_bytes()[: 1 << 20] for name, path in disks.items()} == {
        "a": b"a\n" * (1 << 19),
        "b": b"b\n" * (1 << 19),
    }


def test_device_of_nbdtab(guest: Guest, server: ServerUnderTest) -> None:
    """nbd-client 3.24 takes no port from nbdtab: a relay in the guest listens on the one that it uses."""
    guest.run(
        f"nc -ll -p 10809 -e nc {HOST_ADDRESS} {server.port} >/tmp/relay 2>&1 &\n"
        "until netstat -tln | grep -q :10809; do :; done"
    )
    guest.put_file("/etc/nbdtab", f"nbd0 127.0.0.1 {server.export_name} conns=2,bs=4096,timeout=30\n".encode())
    guest.run("nbd-client nbd0")
    assert is_attached(guest)
    assert queue_value(guest, "logical_block_size") == "4096"
    assert size_bytes(guest) == server.disk.stat().st_size
    detach(guest)


def test_check_tells_what_is_attached(guest: Guest, server: ServerUnderTest) -> None:
    assert not is_attached(guest)
    with attached(guest, server):
        assert is_attached(guest)
        assert not is_attached(guest, "/dev/nbd1")


def test_device_in_use_is_not_attached_again(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server):
        with pytest.raises(CommandFailedError):
            attach(guest, server)
        assert size_bytes(guest) == server.disk.stat().st_size


def test_unknown_export_is_refused_and_nothing_is_attached(guest: Guest, server: ServerUnderTest) -> None:
    with pytest.raises(CommandFailedError):
        guest.run(f"nbd-client {HOST_ADDRESS} {server.port} {DEVICE} -N no-such-export")
    assert not is_attached(guest)


def test_exports_are_listed(guest: Guest, server: ServerUnderTest) -> None:
    assert server.export_name in guest.run(f"nbd-client -l {HOST_ADDRESS} {server.port}").split()
