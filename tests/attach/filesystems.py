"""The filesystems that scenarios live through: how each is made, mounted and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.attach.disks import check_btrfs, check_ext4, check_xfs


@dataclass(frozen=True, slots=True)
class Filesystem:
    """`make` and `check` are commands in the guest, to which the device is added; `check_image` is for this machine."""

    kind: str
    package: str
    make: str
    check: str
    check_image: Callable[[Path], None]


EXT4 = Filesystem(
    "ext4",
    "e2fsprogs",
    # ext4 may initialise its tables later, and what that writes would count against what fstrim gives back. They are
    # small, for the guest is slow at writing them.
    make="mkfs.ext4 -q -N 1024 -J size=4 -E lazy_itable_init=0,lazy_journal_init=0",
    check="e2fsck -f -n",
    check_image=check_ext4,
)
XFS = Filesystem(
    "xfs", "xfsprogs", make="mkfs.xfs -q --unsupported -l size=12m", check="xfs_repair -n", check_image=check_xfs
)

BTRFS = Filesystem("btrfs", "btrfs-progs", make="mkfs.btrfs -q", check="btrfs check -q", check_image=check_btrfs)

FILESYSTEMS = (EXT4, XFS, BTRFS)
