"""Locks on image files: what QEMU's own programs and pynbd let each other do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.storage import linux, locks
from tests.conftest import DiskMaker
from tests.peers import CommandError, qemu_nbd, require_tool, run
from tests.storage.conftest import OpenDisk

READING = Permission.CONSISTENT_READ
WRITING = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
LETTING_READ = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED


@pytest.fixture
def disk(make_disk: DiskMaker) -> Path:
    return make_disk(1 << 20)


@contextlib.contextmanager
def qemu_system(disk: Path) -> Iterator[None]:
    """A QEMU whose machine, which stands still, has the file as its hard disk."""
    program = require_tool("qemu-system-x86_64", package="qemu-system-x86")
    words = [program, "-nodefaults", "-display", "none", "-S", "-m", "32", "-qmp", "stdio"]
    words += ["-drive", f"file={disk},format=raw,if=virtio"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # It answers commands only when the machine with its disks is there.
            process.stdin.write(b'{"execute": "qmp_capabilities"}\n')
            process.stdin.flush()
            assert "QMP" in json.loads(process.stdout.readline())
            assert "return" in json.loads(process.stdout.readline())
            yield
        finally:
            process.terminate()


def description(disk: Path, **options: object) -> dict[str, object]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(disk), **options}}


async def test_a_writer_keeps_qemu_off(disk: Path, open_disk: OpenDisk) -> None:
    require_tool("qemu-io", package="qemu-utils")
    async with open_disk(description(disk), WRITING, LETTING_READ):
        for command in (
            ("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk)),
            ("qemu-img", "resize", "-f", "raw", str(disk), "2M"),
        ):
            with pytest.raises(CommandError, match='Failed to get "write" lock'):
                run(*command)
        with pytest.raises(CommandError, match='Failed to get "write" lock'), qemu_nbd(disk, "--format=raw"):
            pass
        # Reading is shared, and -U looks at no lock.
        run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(disk))
        run("qemu-img", "info", "-U", str(disk))
    run("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk))


async def test_a_writer_keeps_readers_of_a_format_off(tmp_path: Path, open_disk: OpenDisk) -> None:
    """QEMU reads a qcow2 image only while nobody writes to it."""
    require_tool("qemu-img", package="qemu-utils")
    image = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    async with open_disk(description(image), WRITING, Permission.ALL):
        with pytest.raises(CommandError, match='Failed to get shared "write" lock'):
            run("qemu-img", "info", image)
        run("qemu-img", "info", "-U", image)
    run("qemu-img", "info", image)


async def test_a_reader_may_keep_writers_off(disk: Path, open_disk: OpenDisk) -> None:
    require_tool("qemu-io", package="qemu-utils")
    async with open_disk(description(disk), READING, LETTING_READ):
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            run("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk))
    async with open_disk(description(disk), READING, Permission.ALL):
        run("qemu-io", "-f", "raw", "-c", "write 0 512", str(disk))


async def test_a_running_qemu_keeps_us_off(disk: Path, open_disk: OpenDisk) -> None:
    with qemu_system(disk):
        with pytest.raises(PermissionConflict) as caught:
            async with open_disk(description(disk), WRITING, LETTING_READ):
                pass
        text = str(caught.value)
        assert 'Failed to get "write" lock' in text
        for part in (str(disk), "another process", "locking=off", "force-share=on"):
            assert part in text
        # A reader that bears changes may, one that does not may not.
        async with open_disk(description(disk), READING, Permission.ALL):
            pass
        with pytest.raises(PermissionConflict, match='Failed to get shared "write" lock'):
            async with open_disk(description(disk), READING, LETTING_READ):
                pass
        async with open_disk(description(disk, **{"force-share": True, "read-only": True}), READING, LETTING_READ):
            pass
        async with open_disk(description(disk, locking="off"), WRITING, LETTING_READ):
            pass
    async with open_disk(description(disk), WRITING, LETTING_READ):
        pass


async def test_we_keep_a_qemu_off(disk: Path, open_disk: OpenDisk) -> None:
    program = require_tool("qemu-system-x86_64", package="qemu-system-x86")
    async with open_disk(description(disk), WRITING, LETTING_READ):
        words = (program, "-nodefaults", "-display", "none", "-S", "-m", "32")
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            run(*words, "-drive", f"file={disk},format=raw,if=virtio")


async def test_two_of_us(disk: Path, open_disk: OpenDisk) -> None:
    """Two graphs stand for two processes: the locks belong to the open file, not to the process."""
    async with open_disk(description(disk), WRITING, LETTING_READ):
        with pytest.raises(PermissionConflict, match='"write" lock'):
            async with open_disk(description(disk), WRITING, Permission.ALL):
                pass
        async with open_disk(description(disk), READING, Permission.ALL):
            pass
    async with (
        open_disk(description(disk), WRITING, Permission.ALL),
        open_disk(description(disk), WRITING, Permission.ALL),
    ):
        pass


async def test_a_refused_user_changes_nothing(disk: Path) -> None:
    """Locks that were taken for a user who is then refused are given back, and those of others stay."""
    graph = Graph()
    node = await graph.open(description(disk))
    reader, writer = BlockBackend("reader"), BlockBackend("writer")
    other = os.open(disk, os.O_RDWR)
    try:
        graph.attach(reader, node, READING, Permission.ALL)
        linux.lock_shared(other, locks.UNSHARED_BASE + 1)  # somebody does not share "write"
        with pytest.raises(PermissionConflict, match='"write" lock'):
            graph.attach(writer, node, WRITING, LETTING_READ)
        held = {byte for byte in range(90, 220) if linux.locked_by_others(other, byte)}
        assert held == locks.lock_bytes(READING, Permission.ALL)
        linux.unlock(other, locks.UNSHARED_BASE + 1)
        graph.attach(writer, node, WRITING, LETTING_READ | Permission.WRITE)
        held = {byte for byte in range(90, 220) if linux.locked_by_others(other, byte)}
        assert held == locks.lock_bytes(WRITING, LETTING_READ | Permission.WRITE)
        graph.detach(writer)
        held = {byte for byte in range(90, 220) if linux.locked_by_others(other, byte)}
        assert held == locks.lock_bytes(READING, Permission.ALL)
        graph.detach(reader)
    finally:
        os.close(other)
        await graph.close_all()


def test_lock_bytes_are_qemus() -> None:
    """100 + the bit of what is held, 200 + the bit of what is not shared."""
    assert locks.lock_bytes(Permission.ALL, Permission.ALL) == {100, 101, 102, 103}
    assert locks.lock_bytes(Permission.NONE, Permission.NONE) == {200, 201, 202, 203}
    assert locks.lock_bytes(Permission.WRITE, Permission.ALL & ~Permission.RESIZE) == {101, 203}


async def test_force_share_is_for_readers(disk: Path, open_disk: OpenDisk) -> None:
    with pytest.raises(OptionError, match="force-share=on can only be used with read-only=on"):
        async with open_disk(description(disk, **{"force-share": True})):
            pass


@pytest.mark.parametrize("locking", ["auto", "on"])
async def test_a_file_system_without_locks(
    locking: str, disk: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`auto` goes without, and says so; `on` refuses."""

    def refuse(fd: int, offset: int, length: int = 1) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(linux, "lock_shared", refuse)
    if locking == "on":
        with pytest.raises(PermissionConflict, match="Failed to lock the image: No locks available"):
            async with open_disk(description(disk, locking=locking), WRITING, LETTING_READ):
                pass
        return
    async with open_disk(description(disk, locking=locking), WRITING, LETTING_READ) as backend:
        await backend.write(0, memoryview(b"x"))
    assert "this file system has no locks" in caplog.text
