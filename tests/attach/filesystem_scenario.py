"""The life of a filesystem on a disk of the guest, whatever way the disk is attached."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.attach.disks import allocated_bytes, check_ext4
from tests.attach.filesystems import EXT4, Filesystem
from tests.attach.guest import Guest
from tests.peers import require_tool

MOUNT_POINT = "/mnt/disk"
KEPT_BYTES = 1 << 20
DELETED_BYTES = 5 * KEPT_BYTES
SMALL_FILES = 12


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that must be on the disk at the end."""

    name: str
    sha256: str


def live_through(guest: Guest, device: str, image: Path, filesystem: Filesystem = EXT4) -> KeptFile:
    """Make, fill, trim, mount again, verify and check a filesystem on the guest's `device`.

    `image` is the file behind the export, on this machine: after fstrim it must take less room. Returns a file that
    is still on the filesystem, which is unmounted at the end. Raises `GuestError` or AssertionError.
    """
    mount = f"mount -t {filesystem.kind} {device} {MOUNT_POINT}"
    guest.run(f"{filesystem.make} {device} && mkdir -p {MOUNT_POINT} && {mount}")
    _fill(guest)
    before_bytes = allocated_bytes(image)
    assert before_bytes >= KEPT_BYTES + DELETED_BYTES, "sync returned, yet the data is not in the image"
    # xfs gives the blocks of a deleted file back some time later, and at the latest when it is unmounted.
    guest.run(f"rm {MOUNT_POINT}/deleted && umount {MOUNT_POINT} && echo 3 >/proc/sys/vm/drop_caches && {mount}")
    _trim(guest, image, before_bytes)
    verified = guest.run(f"cd {MOUNT_POINT} && sha256sum -c /tmp/sums; status=$?; cd /; (exit $status)")
    assert verified.count(": OK\n") == SMALL_FILES + 1
    kept = guest.run(f"grep kept /tmp/sums && umount {MOUNT_POINT}").split()[0]
    guest.run(f"{filesystem.check} {device}")
    assert "I/O error" not in guest.kernel_log()
    return KeptFile("/kept", kept)


def _fill(guest: Guest) -> None:
    copies = " ".join(["kept"] * (DELETED_BYTES // KEPT_BYTES))
    guest.run(
        f"cd {MOUNT_POINT} && mkdir small"
        f" && dd if=/dev/urandom of=kept bs=1M count={KEPT_BYTES >> 20} 2>/tmp/dd && cat {copies} >deleted"
        f" && for n in $(seq {SMALL_FILES}); do head -c $((n * 997)) /dev/urandom >small/$n || exit; done"
        " && sync && sha256sum kept small/* >/tmp/sums; status=$?; cd /; (exit $status)"
    )


def _trim(guest: Guest, image: Path, before_bytes: int) -> None:
    trimmed = guest.run(f"fstrim -v {MOUNT_POINT}")
    trimmed_bytes = re.search(r"\((\d+) bytes\)", trimmed)
    assert trimmed_bytes, trimmed
    assert int(trimmed_bytes[1]) >= DELETED_BYTES, trimmed
    assert before_bytes - allocated_bytes(image) >= DELETED_BYTES * 9 // 10, "fstrim did not reach the image"


def check_image(image: Path, kept: KeptFile) -> None:
    """Check on this machine, with the server gone, that `image` is a clean ext4 that holds `kept`."""
    check_ext4(image)
    content = subprocess.run(
        [require_tool("debugfs", package="e2fsprogs"), "-R", f"cat {kept.name}", image], capture_output=True, check=True
    ).stdout
    assert hashlib.sha256(content).hexdigest() == kept.sha256
