"""A guest with all programs of this machine: its file system, read-only, over virtio's 9p."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.attach.guest import Guest
from tests.attach.kernel import Kernel

MOUNT_TAG = "host"
ROOT = "/mnt/host"
REPOSITORY = Path(__file__).resolve().parents[2]

SHARED_ROOT = (
    *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
    *("-device", f"virtio-9p-pci,fsdev=host,mount_tag={MOUNT_TAG}"),
)
"""Options of QEMU. Other file systems below `/` are seen too."""

SETUP = f"""
mkdir -p {ROOT}
modprobe 9pnet_virtio
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro {MOUNT_TAG} {ROOT}
mount -o bind /dev {ROOT}/dev
mount -t proc proc {ROOT}/proc
mount -t tmpfs run {ROOT}/run
"""

ENVIRONMENT: Mapping[str, str] = {
    "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'protocol'}",
    "TMPDIR": "/run",
}


@contextmanager
def borrowing_guest(kernel: Kernel, initramfs: Path, run_dir: Path) -> Iterator[Guest]:
    """Within the context the guest runs; `there` says its commands."""
    with Guest(kernel, initramfs, run_dir, SHARED_ROOT) as guest:
        guest.run(SETUP)
        yield guest


def there(*words: str | os.PathLike[str]) -> str:
    """A command of this machine as one for the guest's shell."""
    settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    return shlex.join(["chroot", ROOT, "/usr/bin/env", "-i", *settings, *map(str, words)])


def pynbd_there(*words: str | os.PathLike[str]) -> str:
    """`there` for a command of pynbd."""
    return there(sys.executable, "-m", "pynbd", *words)
