"""The system calls that `os` lacks, against the kernel that is there."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.alignment import aligned_buffer
from pynbd.storage import linux

PAGE = linux.PAGE_BYTES


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 16 pages of data that are on the disk."""
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, b"x" * (16 * PAGE), 0)
    os.fsync(number)
    yield number
    os.close(number)


def test_fallocate_punches_and_zeroes() -> None:
    """Punching frees space and keeps the length; a mode that the file system lacks is EOPNOTSUPP."""
    fd = os.memfd_create("test")
    try:
        os.pwrite(fd, b"x" * (4 * PAGE), 0)
        before = os.fstat(fd).st_blocks
        linux.fallocate(fd, linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE, PAGE, 2 * PAGE)
        assert os.fstat(fd).st_blocks == before - 2 * PAGE // 512
        assert os.pread(fd, 4 * PAGE, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        with pytest.raises(OSError, match="not supported") as caught:
            linux.fallocate(fd, linux.FALLOC_FL_ZERO_RANGE, 0, PAGE)
        assert caught.value.errno == errno.EOPNOTSUPP
    finally:
        os.close(fd)


def test_attributes_of_files(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is what was there, and one thing more."""
    before = {
        linux.FS_IOC_GETFLAGS: struct.pack("i", 0x80000),
        linux.FS_IOC_FSGETXATTR: struct.pack("7I", 0x80, 1, 2, 3, 4, 5, 6),
    }
    made = []

    def ioctl(number: int, request: int, argument: bytes) -> bytes:
        assert number == fd
        made.append((request, argument))
        return before.get(request, argument)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    linux.set_no_copy_on_write(fd)
    linux.set_extent_size_hint(fd, 65536)
    assert made[1] == (0x40086602, struct.pack("i", 0x880000))
    assert made[3] == (0x401C5820, struct.pack("7I", 0x880, 65536, 2, 3, 4, 5, 6))
    assert [(request, len(argument)) for request, argument in made[::2]] == [(0x80086601, 4), (0x801C581F, 28)]


def test_fallocate_reserves(fd: int) -> None:
    linux.fallocate(fd, 0, 16 * PAGE, 16 * PAGE)
    assert os.fstat(fd).st_size == 32 * PAGE
    assert os.fstat(fd).st_blocks * 512 >= 32 * PAGE


def test_fallocate_on_a_closed_file(fd: int) -> None:
    other = os.dup(fd)
    os.close(other)
    with pytest.raises(OSError) as caught:
        linux.fallocate(other, 0, 0, PAGE)
    assert caught.value.errno == errno.EBADF


def test_memory_needs_no_flags_to_be_read_at_once() -> None:
    fd = os.memfd_create("test")
    try:
        assert linux.file_system_magic(fd) == linux.TMPFS_MAGIC
        assert linux.nowait_flags(fd) == 0
    finally:
        os.close(fd)


def test_nowait_flags_are_ones_that_the_file_takes(fd: int) -> None:
    flags = linux.nowait_flags(fd)
    if flags is None:
        pytest.skip("the temporary folder's file system has no RWF_NOWAIT")
    into = bytearray(PAGE)
    assert os.preadv(fd, [into], 0, flags) == PAGE
    assert into == b"x" * PAGE


def test_overlay_has_no_way_to_read_at_once(overlayfs: Path) -> None:
    """What linux.nowait_flags says is what the kernel says."""
    with (overlayfs / "file").open("wb+") as file:
        file.write(b"x" * PAGE)
        file.flush()
        flags = linux.nowait_flags(file.fileno())
        try:
            os.preadv(file.fileno(), [bytearray(PAGE)], 0, os.RWF_NOWAIT)
        except OSError:
            assert flags is None
        else:
            assert flags == os.RWF_NOWAIT


def test_resident_bytes_follows_the_page_cache(fd: int) -> None:
    if linux.resident_bytes(fd, 0, PAGE) is None:
        pytest.skip("this kernel has no cachestat")
    assert linux.resident_bytes(fd, 0, 16 * PAGE) == 16 * PAGE
    assert linux.resident_bytes(fd, 1, PAGE) == PAGE
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert linux.resident_bytes(fd, 0, 16 * PAGE) == 0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 1, 0)
    assert linux.resident_bytes(fd, 0, PAGE) == PAGE
    # Of two pages that a range of one page's length touches, one is there.
    assert linux.resident_bytes(fd, 1, PAGE) == 0
    assert linux.resident_bytes(fd, 1, PAGE - 1) == PAGE - 1
    assert linux.resident_bytes(fd, 0, 2 * PAGE) == PAGE


def test_a_range_is_readable_at_once_when_its_pages_have_come(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if linux.nowait_flags(fd) is None or linux.resident_bytes(fd, 0, PAGE) is None:
        pytest.skip("no RWF_NOWAIT or no cachestat")
    os.ftruncate(fd, 3 * linux.PROBE_BYTES)
    os.pwrite(fd, b"x" * (3 * linux.PROBE_BYTES), 0)
    os.fsync(fd)
    assert linux.readable_at_once(fd, 5, 3 * linux.PROBE_BYTES - 5)
    assert not linux.readable_at_once(fd, 5, 3 * linux.PROBE_BYTES)
    asked: list[int] = []
    preadv = os.preadv

    def read_on_its_way(fd: int, into: tuple[bytearray], offset: int, flags: int) -> int:
        """A page that was asked for, and has not come."""
        asked.append(offset)
        if offset == 2 * linux.PROBE_BYTES:
            raise BlockingIOError
        return preadv(fd, into, offset, flags)

    monkeypatch.setattr(os, "preadv", read_on_its_way)
    assert not linux.readable_at_once(fd, 0, 3 * linux.PROBE_BYTES)
    assert linux.readable_at_once(fd, 0, 2 * linux.PROBE_BYTES)
    assert asked == [0, linux.PROBE_BYTES, 2 * linux.PROBE_BYTES, 0, linux.PROBE_BYTES, 2 * linux.PROBE_BYTES - 1]
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    asked.clear()
    assert not linux.readable_at_once(fd, 0, PAGE)
    assert not asked, "a read would have begun to fetch the pages"


def test_resident_bytes_of_a_closed_file(fd: int) -> None:
    other = os.dup(fd)
    os.close(other)
    assert linux.resident_bytes(other, 0, PAGE) is None
    assert linux.resident_bytes(fd, 0, PAGE) in (None, PAGE)


def test_a_lock_is_seen_by_others_only(fd: int, tmp_path: Path) -> None:
    other = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        linux.lock_shared(fd, 100)
        assert not linux.locked_by_others(fd, 100)
        assert linux.locked_by_others(other, 100)
        assert not linux.locked_by_others(other, 101)
        linux.lock_shared(other, 100)
        linux.unlock(fd, 100)
        assert not linux.locked_by_others(other, 100)
        assert linux.locked_by_others(fd, 100)
    finally:
        os.close(other)


def test_a_lock_belongs_to_the_description(fd: int, tmp_path: Path) -> None:
    """Closing another descriptor of the file keeps it, which is not so for the older POSIX locks."""
    linux.lock_shared(fd, 100)
    os.close(os.open(tmp_path / "file", os.O_RDONLY))
    program = (
        "import os, sys; from pynbd.storage import linux; "
        f"sys.exit(linux.locked_by_others(os.open({str(tmp_path / 'file')!r}, os.O_RDONLY), 100))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 1


def test_direct_alignment_is_enough(fd: int, tmp_path: Path) -> None:
    """What the kernel says of direct I/O is true: a read of that alignment works."""
    alignment = linux.direct_alignment(fd)
    if alignment is None:
        pytest.skip("this kernel or file system does not say")
    direct = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    try:
        assert alignment.memory <= PAGE
        into = aligned_buffer(alignment.offset, alignment.memory)
        assert os.preadv(direct, [into], alignment.offset) == alignment.offset
    finally:
        os.close(direct)


def test_block_device_ioctls(device: Path) -> None:
    fd = os.open(device, os.O_RDWR)
    try:
        assert linux.device_size(fd) == 16 << 20
        block = linux.logical_block_size(fd)
        assert block in (512, 4096)
        assert not linux.device_is_read_only(fd)
        assert linux.discard_granularity(fd) >= 0
        os.pwrite(fd, b"x" * (1 << 20), 0)
        linux.device_zero_out(fd, 0, 1 << 19)
        assert os.pread(fd, 1 << 20, 0) == bytes(1 << 19) + b"x" * (1 << 19)
        with pytest.raises(OSError) as caught:
            linux.device_zero_out(fd, 1, 1)
        assert caught.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_ioctls_of_devices_on_a_file(fd: int) -> None:
    for call in (linux.device_size, linux.logical_block_size, linux.device_is_read_only):
        with pytest.raises(OSError) as caught:
            call(fd)
        assert caught.value.errno == errno.ENOTTY
