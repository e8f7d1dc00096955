"""Disks that are block devices of the host, on loop devices."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.cli import main
from pynbd.storage import linux
from pynbd.storage.file import FileOptions, HostDevice
from tests.cli.pynbd_command import PYNBD
from tests.peers import CommandError, require_tool, run
from tests.storage.conftest import OpenDisk, loop_device

SIZE = 16 << 20


def description(device: Path, **options: object) -> dict[str, object]:
    return {"driver": "host_device", "filename": str(device), **options}


def allocated(backing: Path) -> int:
    return backing.stat().st_blocks * 512


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """The file that the fixture `device` is a device of."""
    return tmp_path / "device.raw"


async def test_a_device_is_found_by_its_name(device: Path, open_disk: OpenDisk) -> None:
    assert Graph().storage_tree(str(device)) == {"driver": "host_device", "filename": str(device)}
    assert HostDevice.probe_device("/nowhere") == 0
    assert HostDevice.probe_device("/dev/null") == 0
    async with open_disk({"driver": "raw", "file": {"filename": str(device)}}) as backend:
        assert backend.size == SIZE
        assert await backend.node.allocated_size() is None
        assert not backend.node.driver.has_zero_init()


async def test_a_device_is_no_file(device: Path, open_disk: OpenDisk) -> None:
    with pytest.raises(BlockError, match=r"it is a block device, and the driver file needs .*; use the driver host"):
        async with open_disk({"driver": "file", "filename": str(device)}):
            pass


async def test_all_of_a_device_is_data(device: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(device)) as backend:
        (extent,) = await backend.block_status(0, SIZE)
        assert (extent.length, extent.data, extent.zero) == (SIZE, True, False)


async def test_zeroes_and_discards_reach_the_device(device: Path, backing: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(device, discard="unmap")) as backend:
        await backend.write(0, memoryview(b"x" * (1 << 20)))
        await backend.flush()
        assert allocated(backing) >= 1 << 20
        await backend.write_zeroes(0, 1 << 19, RequestFlag.MAY_UNMAP | RequestFlag.NO_FALLBACK)
        await backend.flush()
        assert allocated(backing) <= 1 << 19
        await backend.discard(1 << 19, 1 << 19)
        assert allocated(backing) == 0
        await backend.write(0, memoryview(b"x" * 8192))
        await backend.write_zeroes(100, 5000)
        into = memoryview(bytearray(8192))
        await backend.read(0, into)
        assert into == b"x" * 100 + bytes(5000) + b"x" * 3092


async def test_zeroes_that_keep_their_space_are_not_quick(device: Path, open_disk: OpenDisk) -> None:
    """BLKZEROOUT may write them, and nobody can tell beforehand."""
    async with open_disk(description(device)) as backend:
        await backend.write(0, memoryview(b"x" * 65536))
        with pytest.raises(OSError) as caught:
            await backend.write_zeroes(0, 65536, RequestFlag.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        into = memoryview(bytearray(65536))
        await backend.read(0, into)
        assert into == b"x" * 65536


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_direct_io_by_sectors(sector_size: int, tmp_path: Path, open_disk: OpenDisk) -> None:
    """The request alignment of direct I/O is the device's; what does not fit it is read, changed and written."""
    backing = tmp_path / "sectors.raw"
    backing.write_bytes(b"x" * (1 << 20))
    with loop_device(backing, "--sector-size", str(sector_size)) as device:
        async with open_disk(description(device, cache={"direct": True})) as backend:
            assert backend.node.driver.limits.request_alignment == sector_size
            await backend.write(5000, memoryview(b"y" * 5001), RequestFlag.FUA)
            into = memoryview(bytearray(20000))
            await backend.read(1, into)
            assert into == b"x" * 4999 + b"y" * 5001 + b"x" * 10000
    assert backing.read_bytes() == b"x" * 5000 + b"y" * 5001 + b"x" * ((1 << 20) - 10001)


async def test_a_device_keeps_its_size(device: Path, backing: Path, open_disk: OpenDisk) -> None:
    async with open_disk(description(device)) as backend:
        await backend.truncate(SIZE)
        await backend.truncate(4096, exact=False)
        assert backend.size == SIZE
        for size in (4096, SIZE + 512):
            with pytest.raises(OSError, match=f"resize of the device {device} from {SIZE} to {size}") as caught:
                await backend.truncate(size)
            assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(OSError) as caught:
            await backend.node.path.write(SIZE - 512, memoryview(bytes(1024)), 0)
        assert caught.value.errno == errno.ENOSPC
        # When somebody else has resized it, that is how it is told.
        os.truncate(backing, SIZE + (1 << 20))
        run("losetup", "--set-capacity", device)
        seen: list[int] = []
        backend.on_resize.append(seen.append)
        await backend.truncate(SIZE + (1 << 20))
        assert seen == [SIZE + (1 << 20)]


async def test_an_image_on_a_device(device: Path) -> None:
    options = FileOptions(filename=str(device))
    await HostDevice.create(options, SIZE, Preallocation.OFF)
    with pytest.raises(BlockError, match=f"the device has {SIZE} bytes, and {SIZE + 1} are needed"):
        await HostDevice.create(options, SIZE + 1, Preallocation.OFF)
    with pytest.raises(OptionError, match="preallocation 'metadata' means nothing on a device"):
        await HostDevice.create(options, SIZE, Preallocation.METADATA)


async def test_a_read_only_device(tmp_path: Path, open_disk: OpenDisk) -> None:
    backing = tmp_path / "disk.raw"
    backing.write_bytes(bytes(1 << 20))
    with loop_device(backing, "--read-only") as device:
        with pytest.raises(BlockError, match=r"Could not open '.*': (Read-only|Permission denied|Operation)"):
            async with open_disk(description(device)):
                pass
        reading = Permission.CONSISTENT_READ
        async with open_disk(description(device, **{"auto-read-only": True}), reading) as backend:
            assert backend.node.read_only


async def test_devices_are_locked_too(device: Path, open_disk: OpenDisk) -> None:
    require_tool("qemu-io", package="qemu-utils")
    writing = Permission.ALL & ~Permission.RESIZE
    async with open_disk(description(device), writing, Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED):
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            run("qemu-io", "-f", "raw", "-c", "write 0 512", str(device))
        with pytest.raises(PermissionConflict, match='"write" lock'):
            async with open_disk(description(device), writing):
                pass


async def test_a_real_disk_error_is_told_and_kept(small_tmpfs: Path) -> None:
    """A device whose own storage is full: the write is taken, the flush fails, and so does every later one."""
    backing = small_tmpfs / "thin.raw"
    with backing.open("wb") as disk:
        disk.truncate(SIZE)
    with loop_device(backing) as device:
        graph = Graph()
        node = await graph.open(description(device))
        await node.path.write(0, memoryview(b"x" * (4 << 20)), 0)  # into the page cache
        codes = []
        for _ in range(3):
            with pytest.raises(OSError, match="flush") as caught:
                await node.flush()
            codes.append(caught.value.errno)
        assert codes in ([errno.EIO] * 3, [errno.ENOSPC] * 3)
        with pytest.raises(OSError, match="flush"):
            await graph.close(node)
        assert node.name not in graph.nodes


async def test_unreadable_sectors_are_errors(tmp_path: Path, open_disk: OpenDisk) -> None:
    """Behind the end of its file a loop device has nothing: a real EIO, with where it happened."""
    backing = tmp_path / "short.raw"
    backing.write_bytes(b"x" * (2 << 20))
    with loop_device(backing) as device:
        async with open_disk(description(device, cache={"direct": True})) as backend:
            os.truncate(backing, 1 << 20)
            into = memoryview(bytearray(4096))
            await backend.read(0, into)
            assert into == b"x" * 4096
            with pytest.raises(OSError, match=f"{device}.: read at 1572864 for 4096 bytes") as caught:
                await backend.read(3 << 19, into)
            assert caught.value.errno == errno.EIO
    assert linux.PAGE_BYTES >= 4096


def test_a_raw_disk_on_a_device_shows_nothing_of_what_was_there(device: Path) -> None:
    """An old image's header would be taken for the new disk's."""
    with device.open("r+b") as disk:
        disk.write(b"QFI\xfb" + b"x" * 1020)
    assert main(["img", "create", "-q", "-f", "raw", str(device), "1M"]) == 0
    with device.open("rb") as disk:
        assert disk.read(1024) == bytes(512) + b"x" * 512


def test_a_data_file_may_be_a_device(device: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", "-o", f"data_file={device}", image, "1M")
    run(require_tool("qemu-io"), "-f", "qcow2", "-c", "write -P 3 0 64k", image)
    copy = tmp_path / "copy.raw"
    assert main(["img", "convert", "-O", "raw", str(image), str(copy)]) == 0
    assert copy.read_bytes() == b"\3" * 65536 + bytes((1 << 20) - 65536)


def test_a_data_file_on_a_device_shows_nothing_of_what_was_there(device: Path, tmp_path: Path) -> None:
    """It would be taken for the old image else, where it is opened without the new one."""
    for number, program in enumerate(([require_tool("qemu-img")], [*PYNBD, "img"])):
        with device.open("r+b") as disk:
            disk.write(b"QFI\xfb" + b"x" * 1020)
        image = tmp_path / f"disk{number}.qcow2"
        run(*program, "create", "-q", "-f", "qcow2", "-o", f"data_file={device}", image, "1M")
        with device.open("rb") as disk:
            assert disk.read(1024) == bytes(512) + b"x" * 512
