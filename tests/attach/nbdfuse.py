"""This machine's own kernel as the client: a stack of nbdfuse, loop device and mount that always comes down again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.peers import CommandError, require_tool, run

READY_TIMEOUT_S = 30
RETRY_S = 0.02


def why_no_nbdfuse_stack(filesystem: str) -> str | None:
    """Return why this machine cannot mount a `filesystem` over nbdfuse and a loop device, or None where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"this machine has no {device}"
    if f"\t{filesystem}\n" not in Path("/proc/filesystems").read_text():
        return f"this machine's kernel has no {filesystem}"
    return None


@contextmanager
def nbdfuse_file(uri: str, size_bytes: int, folder: Path) -> Iterator[Path]:
    """Mount nbdfuse in `folder`; within the context the path given is a file that is the export `uri`.

    The file is there once it has `size_bytes`. Leaving unmounts it and waits for nbdfuse to disconnect.
    """
    folder.mkdir()
    file = folder / "disk"
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", require_tool("nbdfuse", package="libnbd-bin"), file, uri],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_for_size(file, size_bytes, process, Path(log.name))
            yield file
            run("umount", folder)
            status = process.wait(READY_TIMEOUT_S)
        finally:
            if _is_mounted(folder):
                run("umount", "--lazy", folder)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(READY_TIMEOUT_S)
            process.kill()
            process.wait()
    if status != 0:
        raise CommandError(f"nbdfuse ended with status {status}\n{Path(log.name).read_text()}")


def _wait_for_size(file: Path, size_bytes: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (file.exists() and file.stat().st_size == size_bytes):
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(RETRY_S)
            raise CommandError(f"nbdfuse ended with status {status}\n{log.read_text()}")
        if time.monotonic() > deadline:
            raise CommandError(f"{file}: not {size_bytes} bytes after {READY_TIMEOUT_S} s\n{log.read_text()}")


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """Within the context the path given is a loop device over `file`, with direct I/O.

    A buffered one would answer nearly all reads out of the host's page cache.
    """
    device = Path(run("losetup", "--find", "--show", "--direct-io=on", file).strip())
    try:
        # losetup only warns where the file allows no direct I/O.
        if Path("/sys/block", device.name, "loop", "dio").read_text().strip() != "1":
            raise CommandError(f"{device} over {file} does no direct I/O")
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(device: Path, folder: Path) -> Iterator[Path]:
    """Within the context the filesystem on `device` is mounted on `folder`, which is made where it is not there."""
    folder.mkdir(exist_ok=True)
    run("mount", device, folder)
    try:
        yield folder
        run("umount", folder)
    finally:
        # After a failure something may still hold the filesystem for a moment: it goes when that lets go.
        if _is_mounted(folder):
            run("umount", "--lazy", folder)


def _is_mounted(folder: Path) -> bool:
    """Ask the kernel's table: looking at the folder itself fails when nbdfuse is dead."""
    return any(line.split()[1] == str(folder) for line in Path("/proc/self/mounts").read_text().splitlines())
