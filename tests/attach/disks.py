"""The disk that is served, seen from the host: made, measured, and its filesystem checked."""

from __future__ import annotations

import json
from pathlib import Path

from tests.peers import require_tool, run

STAT_BLOCK_BYTES = 512


def sparse_disk(path: Path, size_bytes: int) -> Path:
    """Make `path` a file of `size_bytes` zero bytes that takes no room, and return it."""
    with path.open("wb") as disk:
        disk.truncate(size_bytes)
    return path


def allocated_bytes(path: Path) -> int:
    """Return how many bytes of the file system the file `path` takes."""
    return path.stat().st_blocks * STAT_BLOCK_BYTES


def copy_of_partition(image: Path, start_bytes: int, length_bytes: int) -> Path:
    """Copy a part of the raw `image` to a sparse file beside it, by QEMU, and return that."""
    copy = image.with_suffix(".partition")
    part = {
        "driver": "raw",
        "offset": start_bytes,
        "size": length_bytes,
        "file": {"driver": "file", "filename": str(image)},
    }
    run(require_tool("qemu-img"), "convert", "-O", "raw", f"json:{json.dumps(part)}", copy)
    return copy


def check_ext4(disk: Path) -> None:
    """Raise CommandError unless `e2fsck` finds nothing to complain of in the image or device `disk`."""
    run(require_tool("e2fsck", package="e2fsprogs"), "-f", "-n", disk)


def check_xfs(disk: Path) -> None:
    """Raise CommandError unless `xfs_repair` finds nothing to complain of in the image or device `disk`."""
    file_flag = [] if disk.is_block_device() else ["-f"]
    run(require_tool("xfs_repair", package="xfsprogs"), "-n", *file_flag, disk)


def check_btrfs(disk: Path) -> None:
    """Raise CommandError unless `btrfs check` finds nothing amiss in the image or device `disk`, data included."""
    run(require_tool("btrfs", package="btrfs-progs"), "check", "--check-data-csum", disk)
