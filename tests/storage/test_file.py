"""Disks that are files: opening them, growing, resizing, making them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.storage import linux, transfers
from pynbd.storage.file import File, FileCreationOptions, FileOptions
from tests.conftest import DiskMaker
from tests.peers import require_tool, run
from tests.storage.conftest import SIZE, OpenDisk, description, evict, mounted

# --- opening ------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_files(tmp_path: Path) -> Iterator[Path]:
    """One of each kind of file that is no disk."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        yield tmp_path


@pytest.mark.parametrize("driver", ["file", "host_device"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "it is a directory, and the driver {driver} needs {kind}"),
        ("fifo", "it is a named pipe, and the driver {driver} needs {kind}"),
        ("socket", "it is a socket, and the driver {driver} needs {kind}"),
        ("/dev/null", "it is a character device, and the driver {driver} needs {kind}"),
        ("nowhere", "No such file or directory"),
        ("nowhere/else", "No such file or directory"),
        ("fifo/below", "Not a directory"),
    ],
)
async def test_what_can_not_be_opened(driver: str, name: str, said: str, odd_files: Path, open_disk: OpenDisk) -> None:
    path = odd_files / name
    kind = "a regular file" if driver == "file" else "a block device"
    with pytest.raises(BlockError) as caught:
        async with open_disk({"driver": driver, "filename": str(path)}):
            pass
    assert str(caught.value) == f"Could not open '{path}': {said.format(driver=driver, kind=kind)}"


async def test_the_driver_for_a_file(disk: Path, open_disk: OpenDisk) -> None:
    with pytest.raises(BlockError, match=r"it is a regular file, and .* needs a block device; use the driver file$"):
        async with open_disk({"driver": "host_device", "filename": str(disk)}):
            pass


async def test_a_name_with_a_nul(open_disk: OpenDisk) -> None:
    with pytest.raises(OptionError, match=r"Could not open 'a.x00b': .*embedded null"):
        async with open_disk({"driver": "file", "filename": "a\0b"}):
            pass


async def test_direct_where_there_is_none(open_disk: OpenDisk) -> None:
    with pytest.raises(BlockError, match="'/proc/self/status': the file system does not support O_DIRECT"):
        async with open_disk(description(Path("/proc/self/status"), **{"cache": {"direct": True}, "read-only": True})):
            pass


@pytest.mark.parametrize(
    ("name", "filename"),
    [
        ("file:disk.raw", "disk.raw"),
        ("file:a:b", "a:b"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file://localhost/tmp/x", "/tmp/x"),
    ],
)
def test_names_with_a_scheme(name: str, filename: str) -> None:
    assert Graph().storage_tree(name) == {"driver": "file", "filename": filename}


def test_a_file_on_another_host() -> None:
    with pytest.raises(OptionError, match="file://elsewhere/x: expected file:///PATH"):
        Graph().storage_tree("file://elsewhere/x")


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
async def test_qemus_options_are_taken(aio: str, disk: Path, open_disk: OpenDisk) -> None:
    text = f"driver=file,filename={disk},aio={aio},locking=auto,cache.direct=off,cache.no-flush=off,read-only=on"
    async with open_disk(text, Permission.CONSISTENT_READ) as backend:
        assert backend.size == SIZE
        assert backend.node.filename() == str(disk)


@pytest.fixture
def sealed(small_tmpfs: Path) -> Path:
    """A file on a file system that is mounted read-only."""
    path = small_tmpfs / "disk.raw"
    path.write_bytes(b"x" * 4096)
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    return path


async def test_read_only_by_itself(sealed: Path, open_disk: OpenDisk) -> None:
    """auto-read-only falls back, and then nobody may write."""
    with pytest.raises(BlockError, match=r"Could not open '.*': Read-only file system"):
        async with open_disk(description(sealed)):
            pass
    options = {"auto-read-only": True}
    async with open_disk(description(sealed, **options), Permission.CONSISTENT_READ) as backend:
        assert backend.node.read_only
    with pytest.raises(PermissionConflict, match="read-only"):
        async with open_disk(description(sealed, **options), Permission.WRITE):
            pass
    raw = {"driver": "raw", "auto-read-only": True, "file": description(sealed)}
    async with open_disk(raw, Permission.CONSISTENT_READ) as backend:
        assert backend.node.read_only


async def test_a_writable_format_on_a_read_only_file(disk: Path, open_disk: OpenDisk) -> None:
    raw = {"driver": "raw", "file": description(disk, **{"read-only": True})}
    with pytest.raises(PermissionConflict, match="which is read-only"):
        async with open_disk(raw, Permission.WRITE):
            pass


# --- growing, direct I/O ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4096, 128 << 10])
@pytest.mark.parametrize("flag", [0, 1])
async def test_a_file_grows_with_what_is_written(length: int, flag: int, disk: Path, open_disk: OpenDisk) -> None:
    """Who may resize it writes past its end; everybody above is told."""
    async with open_disk({"driver": "raw", "file": description(disk)}) as backend:
        sizes: list[int] = []
        backend.on_resize.append(sizes.append)
        below = backend.node.children["file"]
        await below.write(SIZE + 100, memoryview(b"x" * length), flag)
        await below.write_zeroes(SIZE + 100 + length, 5000, 0)
        await below.write_zeroes(SIZE + 5100 + length, 5000, RequestFlag.MAY_UNMAP)
        assert sizes == [SIZE + 100 + length, SIZE + 5100 + length, SIZE + 10100 + length]
        assert backend.size == sizes[-1]
        into = memoryview(bytearray(b"?" * (length + 10100)))
        await backend.read(SIZE, into)
        assert into == bytes(100) + b"x" * length + bytes(10000)
        past = memoryview(bytearray(b"?" * 100))
        await below.read(backend.size - 50, past, 0)
        assert past == bytes(100)
    assert disk.stat().st_size == SIZE + 10100 + length


@pytest.mark.parametrize("size", [1, 511, 513, 1000, 4095, 5000, (1 << 20) + 7])
async def test_direct_reads_up_to_an_odd_end(size: int, make_disk: DiskMaker, open_disk: OpenDisk) -> None:
    path = make_disk(size)
    async with open_disk(description(path, cache={"direct": True})) as backend:
        into = memoryview(bytearray(b"?" * size))
        await backend.read(0, into)
        assert into == path.read_bytes()
        if size > 600:
            part = memoryview(bytearray(b"?" * 600))
            await backend.read(size - 600, part)
            assert part == path.read_bytes()[-600:]


# --- size, making -------------------------------------------------------------------------------------------


async def test_no_space_is_reserved_for_less(disk: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(disk)) as backend:
        for size, preallocation in ((4096, Preallocation.FULL), (2 * SIZE, Preallocation.METADATA)):
            with pytest.raises(OSError) as caught:
                await backend.truncate(size, preallocation)
            assert caught.value.errno == errno.ENOTSUP
        assert backend.size == SIZE


@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL])
async def test_growing_without_room(preallocation: Preallocation, small_tmpfs: Path, open_disk: OpenDisk) -> None:
    """It fails with its old length."""
    path = small_tmpfs / "disk.raw"
    path.write_bytes(b"x" * 4096)
    async with open_disk(description(path)) as backend:
        with pytest.raises(OSError, match="resize to 8388608") as caught:
            await backend.truncate(8 << 20, preallocation)
        assert caught.value.errno == errno.ENOSPC
        assert backend.size == path.stat().st_size == 4096
    assert path.read_bytes() == b"x" * 4096


async def test_growing_that_is_cancelled(disk: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends soon, with its old length, and nothing is at work any more."""
    begun, may_go_on = threading.Event(), threading.Event()
    write_at, written = transfers.write_at, list[int]()

    def slow_write_at(fd: int, data: memoryview, offset: int) -> None:
        begun.set()
        may_go_on.wait()
        write_at(fd, data, offset)
        written.append(offset)

    monkeypatch.setattr(transfers, "write_at", slow_write_at)
    async with open_disk(description(disk)) as backend:
        growing = asyncio.create_task(backend.truncate(1 << 30, Preallocation.FULL))
        await asyncio.to_thread(begun.wait)
        growing.cancel()
        await asyncio.sleep(0.01)
        assert not growing.done()
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await growing
        assert backend.size == disk.stat().st_size == SIZE
    assert written == [SIZE]


@pytest.mark.parametrize("preallocation", [Preallocation.OFF, Preallocation.FALLOC, Preallocation.FULL])
async def test_making_a_file(preallocation: Preallocation, tmp_path: Path) -> None:
    path = tmp_path / "new.raw"
    for size in (3 << 20, 5 << 19):  # the second time it is there already
        await File.create(FileOptions(filename=str(path)), size, preallocation)
        assert path.read_bytes() == bytes(size)
        assert (path.stat().st_blocks * 512 >= size) == (preallocation is not Preallocation.OFF)
        path.write_bytes(b"old")


@contextlib.contextmanager
def file_system(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A new file system in a file."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    run(require_tool(f"mkfs.{kind}", package={"xfs": "xfsprogs", "btrfs": "btrfs-progs"}[kind]), "-q", image)
    yield from mounted(folder / "mounted", "-t", kind, "-o", "loop", str(image))


async def make_with(path: Path, **options: Any) -> Sequence[str]:
    made = FileCreationOptions(**options)
    return await File.create(FileOptions(filename=str(path)), 1 << 20, Preallocation.OFF, made)


async def test_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    """On btrfs, and also one that was there before; nowhere else anything is said."""
    listing = require_tool("lsattr", package="e2fsprogs")
    assert await make_with(tmp_path / "elsewhere", nocow=True) == ()
    with file_system(tmp_path, "btrfs", 128 << 20) as folder:
        path = folder / "new.raw"
        path.write_bytes(b"old" * 5000)
        for nocow in (False, True):
            assert await make_with(path, nocow=nocow) == ()
            assert ("C" in run(listing, path).split()[0]) == nocow
        (said,) = await make_with(path, extent_size_hint=65536)
        assert said == "the extent size hint of 65536 bytes could not be set: Operation not supported"
        assert await make_with(path, extent_size_hint=0) == ()
        assert path.stat().st_size == 1 << 20


async def test_an_extent_size_hint(tmp_path: Path) -> None:
    """On XFS: 1 MiB if nobody says another one."""
    asking = require_tool("xfs_io", package="xfsprogs")
    with file_system(tmp_path, "xfs", 320 << 20) as folder:
        path = folder / "new.raw"
        for given, found in (({}, 1 << 20), ({"extent_size_hint": 8192}, 8192), ({"extent_size_hint": 0}, 8192)):
            assert await make_with(path, **given) == ()
            assert run(asking, "-c", "extsize", path) == f"[{found}] {path}\n"
            path.write_bytes(b"old")
        (said,) = await make_with(path, extent_size_hint=1000)
        assert said == "the extent size hint of 1000 bytes could not be set: Invalid argument"
        assert await make_with(folder / "other.raw", extent_size_hint=0) == ()
        assert run(asking, "-c", "extsize", folder / "other.raw").startswith("[0] ")


@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL, Preallocation.METADATA])
async def test_nothing_half_made_is_left(preallocation: Preallocation, small_tmpfs: Path) -> None:
    path = small_tmpfs / "new.raw"
    with pytest.raises(BlockError, match=f"Could not create '{path}': (No space left|Operation not supp)"):
        await File.create(FileOptions(filename=str(path)), 8 << 20, preallocation)
    assert list(small_tmpfs.iterdir()) == []


async def test_what_can_not_be_made(odd_files: Path) -> None:
    for name, said in (("folder", "it is a directory"), ("fifo", "it is a named pipe"), ("no/where", "No such file")):
        with pytest.raises(BlockError, match=f"'{odd_files / name}': {said}"):
            await File.create(FileOptions(filename=str(odd_files / name)), 4096, Preallocation.OFF)


async def test_a_file_in_use_is_not_made_again(disk: Path, open_disk: OpenDisk) -> None:
    content = disk.read_bytes()
    async with open_disk(description(disk), Permission.ALL, Permission.CONSISTENT_READ):
        with pytest.raises(PermissionConflict, match='"write" lock'):
            await File.create(FileOptions(filename=str(disk)), 4096, Preallocation.OFF)
        assert disk.read_bytes() == content
    await File.create(FileOptions(filename=str(disk)), 4096, Preallocation.OFF)
    assert disk.read_bytes() == bytes(4096)


async def test_a_file_has_zeroes_when_it_is_new(disk: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(disk)) as backend:
        assert backend.node.driver.has_zero_init()
        assert await backend.node.allocated_size() == disk.stat().st_blocks * 512


async def test_the_direct_option_reads_from_the_disk(disk: Path, open_disk: OpenDisk) -> None:
    """With cache.direct nothing stays in the page cache."""
    evict(disk)
    fd = os.open(disk, os.O_RDONLY)
    try:
        if linux.resident_bytes(fd, 0, SIZE) != 0:
            pytest.skip("the page cache can't be looked at, or this file system keeps its pages")
        async with open_disk(description(disk, cache={"direct": True})) as backend:
            into = memoryview(bytearray(SIZE + 1))[1:]  # and its address is odd
            await backend.read(0, into)
            assert linux.resident_bytes(fd, 0, SIZE) == 0
    finally:
        os.close(fd)
    assert into == disk.read_bytes()
