"""The life of an ext4 filesystem on a disk of the guest, whatever way the disk is attached."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.attach.disks import allocated_bytes, check_ext4
from tests.attach.guest import Guest
from tests.peers import require_tool

MOUNT_POINT = "/mnt/ext4"
KEPT_BYTES = 8 << 20
DELETED_BYTES = 3 * KEPT_BYTES
SMALL_FILES = 40


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that must be on the disk at the end."""

    name: str
    sha256: str


def live_through_ext4(guest: Guest, device: str, image: Path) -> KeptFile:
    """Make, fill, trim, mount again, verify and check an ext4 filesystem on the guest's `device`.

    `image` is the file behind the export, on this machine: after fstrim it must take less room. Returns a file that
    is still on the filesystem, which is unmounted at the end. Raises `GuestError` or AssertionError.
    """
    # ext4 may initialise its tables later, and what that writes would count against what fstrim gives back.
    at_once = "-E lazy_itable_init=0,lazy_journal_init=0"
    guest.run(f"mkfs.ext4 -q {at_once} {device} && mkdir -p {MOUNT_POINT} && mount -t ext4 {device} {MOUNT_POINT}")
    _fill(guest)
    _delete_and_trim(guest, image)
    guest.run(f"umount {MOUNT_POINT} && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 {device} {MOUNT_POINT}")
    verified = guest.run(f"cd {MOUNT_POINT} && sha256sum -c /tmp/sums; status=$?; cd /; (exit $status)")
    assert verified.count(": OK\n") == SMALL_FILES + 1
    kept = guest.run(f"sha256sum {MOUNT_POINT}/kept").split()[0]
    guest.run(f"umount {MOUNT_POINT} && e2fsck -f -n {device}")
    assert "I/O error" not in guest.kernel_log()
    return KeptFile("/kept", kept)


def _fill(guest: Guest) -> None:
    guest.run(
        f"cd {MOUNT_POINT} && mkdir small"
        f" && dd if=/dev/urandom of=kept bs=1M count={KEPT_BYTES >> 20} 2>/tmp/dd && cat kept kept kept >deleted"
        f" && for n in $(seq {SMALL_FILES}); do head -c $((n * 997)) /dev/urandom >small/$n || exit; done"
        " && sync && sha256sum kept small/* >/tmp/sums; status=$?; cd /; (exit $status)"
    )


def _delete_and_trim(guest: Guest, image: Path) -> None:
    before_bytes = allocated_bytes(image)
    assert before_bytes >= KEPT_BYTES + DELETED_BYTES, "sync returned, yet the data is not in the image"
    trimmed = guest.run(f"rm {MOUNT_POINT}/deleted && sync && fstrim -v {MOUNT_POINT}")
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
