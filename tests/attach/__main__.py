"""`make attach`: shows a guest that attaches to pynbd, scenario by scenario, or gives a shell in it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.attach.disks import sparse_disk
from tests.attach.guest import HOST_ADDRESS, Guest
from tests.attach.initramfs import build_initramfs
from tests.attach.kernel import debian_kernel
from tests.attach.server import ServerUnderTest
from tests.attach.terminal import interact
from tests.attach.watching import WATCH_VARIABLE

FOLDER = Path(__file__).parent
DISK_BYTES = 1 << 30

DESCRIPTION = """\
Boots a Debian kernel in QEMU, attaches it to pynbd, and shows what is done in the guest. SCENARIO is a part of the
names of those to run; without one all are. `list` lists their names, `shell` gives a shell in a guest, beside a server.
"""

HINTS = """\
pynbd serves {disk}. In the guest:

    nbd-client {host} {port} /dev/nbd0 -N disk     attach (-L: by ioctl, -C 4: four connections, -t 5: time-out)
    mkfs.ext4 /dev/nbd0 && mount /dev/nbd0 /mnt    use; mkfs.xfs, mkfs.btrfs, sfdisk, fstrim, e2fsck are there too
    nbd-client -d /dev/nbd0                        detach

`exit` or Ctrl-] ends the guest and the server.
"""


def main() -> int:
    """Run what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.attach", description=DESCRIPTION)
    parser.add_argument("scenario", nargs="?", default="", help="a part of a name, or `list`, or `shell`")
    parser.add_argument("--disk", type=Path, help="with `shell`: the disk to serve, instead of an empty one")
    arguments, for_pytest = parser.parse_known_args()
    match arguments.scenario:
        case "shell":
            return shell(arguments.disk)
        case "list":
            return pytest.main(["-q", "--collect-only", str(FOLDER), *for_pytest])
        case name:
            os.environ[WATCH_VARIABLE] = "1"
            return pytest.main(["-v", "--capture=no", *(["-k", name] if name else []), str(FOLDER), *for_pytest])


def shell(disk: Path | None) -> int:
    """Serve `disk`, boot a guest, and let a person at its shell; the exit status."""
    with tempfile.TemporaryDirectory(prefix="attach-") as scratch:
        folder = Path(scratch)
        if disk is None:
            disk = sparse_disk(folder / "disk.raw", DISK_BYTES)
        say("booting …")
        kernel = debian_kernel()
        initramfs = build_initramfs(kernel, folder / "initramfs.cpio")
        with ServerUnderTest(disk, folder / "server.log") as server, Guest(kernel, initramfs, folder) as guest:
            guest.run("modprobe nbd nbds_max=2")
            say(HINTS.format(disk=disk, host=HOST_ADDRESS, port=server.port))
            interact(guest.console)
    return 0


def say(text: str) -> None:
    """Tell the person at the terminal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
