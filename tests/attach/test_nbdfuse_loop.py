"""This machine's own kernel on top of the export: nbdfuse makes it a file, a loop device a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.attach.disks import allocated_bytes, sparse_disk
from tests.attach.filesystems import FILESYSTEMS, Filesystem
from tests.attach.nbdfuse import loop_device, mounted, nbdfuse_file, why_no_nbdfuse_stack
from tests.peers import pynbd_serve, require_tool, run

DISK_BYTES = 512 << 20
"""mkfs.xfs makes nothing below 300 MiB."""
DELETED_BYTES = 32 << 20

pytestmark = pytest.mark.timeout(300)


def verify_with_fio(folder: Path) -> None:
    """Random writes of mixed sizes, then every block read again and its checksum compared."""
    run(
        require_tool("fio", package="fio"),
        *("--name=verify", f"--directory={folder}", "--size=64M", "--rw=randwrite", "--bsrange=4k-64k"),
        *("--blockalign=4k", "--ioengine=libaio", "--iodepth=16", "--direct=1", "--fallocate=none", "--end_fsync=1"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--thread"),
    )


# xfs gives the blocks of a deleted file back some time later, and at the latest when it is unmounted: fstrim has a
# mount of its own.
@pytest.mark.parametrize("filesystem", FILESYSTEMS, ids=lambda filesystem: filesystem.kind)
def test_filesystem_of_this_kernel_over_nbdfuse(filesystem: Filesystem, tmp_path: Path) -> None:
    reason = why_no_nbdfuse_stack(filesystem.kind)
    if reason is not None:
        pytest.skip(reason)
    image = sparse_disk(tmp_path / "disk.raw", DISK_BYTES)
    kept = os.urandom(1 << 20)
    with (
        pynbd_serve("--discard", "unmap", image) as server,
        nbdfuse_file(server.uri(), DISK_BYTES, tmp_path / "fuse") as file,
        loop_device(file) as device,
    ):
        run(require_tool(f"mkfs.{filesystem.kind}", package=filesystem.package), "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            (folder / "kept").write_bytes(kept)
            (folder / "deleted").write_bytes(os.urandom(DELETED_BYTES))
            verify_with_fio(folder)
        before_bytes = allocated_bytes(image)
        with mounted(device, tmp_path / "mnt") as folder:
            (folder / "deleted").unlink()
        with mounted(device, tmp_path / "mnt") as folder:
            run("fstrim", folder)
            freed_bytes = before_bytes - allocated_bytes(image)
            assert freed_bytes >= DELETED_BYTES * 9 // 10, "fstrim did not reach the image"
            assert (folder / "kept").read_bytes() == kept
        filesystem.check_image(device)
    filesystem.check_image(image)
