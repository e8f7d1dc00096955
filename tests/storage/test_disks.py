"""The law of every disk that keeps bytes: it behaves as a row of bytes, whatever is done to it in whatever order."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend
from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.driver import Preallocation
from pynbd.block.holding import hold_nothing
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.storage.in_place import SLOW_S
from tests.storage.conftest import OpenDisk, opened

SIZE = 1 << 18

offsets = st.integers(0, SIZE) | st.sampled_from([0, 511, 512, 4095, 4096, 65536, SIZE - 1, SIZE])
lengths = st.integers(0, 1 << 17) | st.sampled_from([0, 1, 512, 4096, 65536, 65537])
flags = st.sampled_from([RequestFlag.NONE, RequestFlag.FUA, RequestFlag.MAY_UNMAP])
operations = st.lists(
    st.tuples(st.sampled_from(["write", "zeroes", "discard", "read", "status", "flush"]), offsets, lengths, flags),
    max_size=12,
)

DISKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "memory": lambda file: {"driver": "memory", "size": SIZE},
    "file": lambda file: {"driver": "file", "filename": str(file)},
    "file-direct": lambda file: {"driver": "file", "filename": str(file), "cache": {"direct": True}},
    "raw": lambda file: {"driver": "raw", "file": {"driver": "file", "filename": str(file)}},
    "raw-window": lambda file: {
        "driver": "raw",
        "offset": 1000,
        "size": SIZE,
        "file": {"driver": "file", "filename": str(file)},
    },
    "raw-window-direct": lambda file: {
        "driver": "raw",
        "offset": 1000,
        "size": SIZE,
        "cache": {"direct": True},
        "file": {"driver": "file", "filename": str(file)},
    },
    "raw-in-memory": lambda file: {"driver": "raw", "offset": 77, "file": {"driver": "memory", "size": SIZE + 77}},
}


def make_file(folder: Path) -> Path:
    file = folder / "disk.raw"
    with file.open("wb") as disk:
        disk.truncate(SIZE + 4096)
    return file


class Model:
    """A disk, and the bytes that it must have. Discarded bytes may be anything until they are written again."""

    def __init__(self, backend: BlockBackend, seed: int) -> None:
        self.backend = backend
        self.bytes = bytearray(backend.size)
        self.known = bytearray(b"\1") * backend.size
        self.random = random.Random(seed)

    async def step(self, what: str, offset: int, length: int, flag: RequestFlag) -> None:
        length = min(length, len(self.bytes) - offset)
        if what == "write":
            data = self.random.randbytes(length)
            await self.backend.write(offset, memoryview(data), flag & RequestFlag.FUA)
            self.set(offset, data)
        elif what == "zeroes":
            await self.backend.write_zeroes(offset, length, flag)
            self.set(offset, bytes(length))
        elif what == "discard":
            await self.backend.discard(offset, length)
            self.known[offset : offset + length] = bytes(length)
        elif what == "flush":
            await self.backend.flush()
        elif what == "read":
            await self.check(offset, length)
        elif length:
            await self.check_status(offset, length)

    def set(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data
        self.known[offset : offset + len(data)] = b"\1" * len(data)

    async def check(self, offset: int, length: int) -> None:
        found = bytearray(b"?") * length
        await self.backend.read(offset, memoryview(found))
        for index in [i for i, known in enumerate(self.known[offset : offset + length]) if not known]:
            found[index] = self.bytes[offset + index]
        assert found == self.bytes[offset : offset + length]

    async def check_status(self, offset: int, length: int) -> None:
        """What is said to read as zeroes does."""
        for extent in await self.backend.block_status(offset, length):
            assert extent.length > 0
            if extent.zero:
                found = memoryview(bytearray(b"?") * extent.length)
                await self.backend.read(offset, found)
                assert found == bytes(extent.length)
            offset += extent.length


async def follow(backend: BlockBackend, steps: list[tuple[str, int, int, RequestFlag]], seed: int) -> None:
    model = Model(backend, seed)
    for step in steps:
        await model.step(*step)
    await model.check(0, len(model.bytes))


@pytest.mark.parametrize("kind", DISKS)
@given(steps=operations, seed=st.integers(0, 1 << 32), discard=st.sampled_from(["unmap", "ignore"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_disk_is_a_row_of_bytes(
    kind: str, steps: list[tuple[str, int, int, RequestFlag]], seed: int, discard: str, tmp_path: Path
) -> None:
    async def run() -> None:
        description = DISKS[kind](make_file(tmp_path)) | {"discard": discard}
        async with opened(description) as backend:
            await follow(backend, steps, seed)

    asyncio.run(run())


async def test_a_device_is_a_row_of_bytes(device: Path) -> None:
    source = random.Random(5)
    for direct in (False, True):
        for discard in ("unmap", "ignore"):
            description = {
                "driver": "host_device",
                "filename": str(device),
                "cache": {"direct": direct},
                "discard": discard,
            }
            async with opened(description) as backend:
                await backend.write_zeroes(0, backend.size)
                kinds = ["write", "zeroes", "discard", "read", "status", "flush"]
                steps = [
                    (source.choice(kinds), source.randrange(SIZE), source.randrange(1 << 17), RequestFlag.NONE)
                    for _ in range(20)
                ]
                await follow(backend, steps, seed=7)


@pytest.mark.parametrize("kind", DISKS)
async def test_requests_that_overlap_in_time(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """Many at once, on neighbouring ranges of all sizes: each lands where it belongs."""
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        source = random.Random(1)
        cuts = sorted({0, SIZE, *(source.randrange(SIZE) for _ in range(200))})
        whole = source.randbytes(SIZE)
        ranges = list(itertools.pairwise(cuts))
        source.shuffle(ranges)
        await asyncio.gather(*(backend.write(a, memoryview(whole)[a:b], source.choice([0, 1])) for a, b in ranges))
        buffers = [memoryview(bytearray(b - a)) for a, b in ranges]
        await asyncio.gather(*(backend.read(a, into) for (a, _), into in zip(ranges, buffers, strict=True)))
        assert all(into == whole[a:b] for (a, b), into in zip(ranges, buffers, strict=True))


@pytest.mark.parametrize("kind", ["memory", "file", "file-direct", "raw"])
async def test_resize(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """What is cut off is gone, and comes back as zeroes."""
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        seen: list[int] = []
        backend.on_resize.append(seen.append)
        size = backend.size
        await backend.write(0, memoryview(b"x" * size))
        await backend.truncate(8192)
        assert backend.size == 8192
        await backend.truncate(size)
        found = memoryview(bytearray(b"?") * size)
        await backend.read(0, found)
        assert found == b"x" * 8192 + bytes(size - 8192)
        assert seen[0] == 8192
        assert seen[-1] == size


@pytest.mark.parametrize("kind", ["memory", "file", "file-direct"])
@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL])
async def test_resize_with_space_reserved(
    kind: str, preallocation: Preallocation, tmp_path: Path, open_disk: OpenDisk
) -> None:
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        before, size = await backend.node.allocated_size(), backend.size
        await backend.truncate(size + (3 << 20) + 512, preallocation)
        assert backend.size == size + (3 << 20) + 512
        after = await backend.node.allocated_size()
        assert after is not None
        assert before is not None
        assert after >= before + (3 << 20)
        found = memoryview(bytearray(b"?") * 4096)
        await backend.read(size, found)
        assert found == bytes(4096)


@pytest.mark.parametrize("kind", ["memory", "file", "raw"])
async def test_located_bytes_are_the_disk(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """What `locate` names is what a read returns, and it ends where the disk ends."""
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        await backend.write(5000, memoryview(b"here"))
        found = backend.locate(5000, 4)
        if found is None:
            pytest.skip("this file system can't be read without waiting")
        into = bytearray(found.length)
        assert os.preadv(found.fd, [into], found.host_offset, found.flags) == 4
        assert into == b"here"
        last = backend.locate(backend.size - 10, 100)
        assert last is not None
        assert last.length == 10
        assert backend.node.driver.located_for_good()
        assert backend.node.driver.hold_located(hold_nothing) is hold_nothing


@pytest.mark.parametrize("kind", DISKS)
async def test_small_writes_in_place(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """What `write_now` says it has written is written; no user goes beyond the disk so, and nobody with O_DIRECT.

    Nodes above may: that is how images grow.
    """
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        taken = backend.write_now(5000, memoryview(b"here"))
        assert taken == ("direct" not in kind)
        assert not backend.write_now(backend.size - 2, memoryview(b"over"))
        assert not backend.write_now(backend.size, memoryview(b"over"))
        into = memoryview(bytearray(6))
        await backend.read(4999, into)
        assert into.tobytes() == (b"\0here\0" if taken else bytes(6))
        await backend.read(backend.size - 6, into)
        assert into.tobytes() == bytes(6)
        size = backend.size
        if backend.node.path.write_now(size, memoryview(b"more")):
            assert backend.size == size + 4
            await backend.read(size - 2, into)
            assert into.tobytes() == b"\0\0more"


def place_of(backend: BlockBackend) -> tuple[int, int, int]:
    """File, shift and size of the place for writes."""
    place = backend.place_writes()
    assert place is not None
    return place[:3]


@pytest.mark.parametrize("kind", DISKS)
async def test_writes_that_others_make(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """A place for them is where a read finds them; the node learns of them, and whoever must see each gives none."""
    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        place, node = backend.place_writes(), backend.node
        if node.driver.passes("place_writes"):
            node = node.children["file"].node
        assert (place is None) == ("direct" in kind)
        if place is None:
            return
        assert place.size == backend.size
        assert place_of(backend) == place[:3]
        assert os.pwrite(place.fd, b"here", place.shift + 5000) == 4
        generation = node._generation
        place.made(5004, 1000)
        assert node._generation > generation, "or the next flush would have nothing to do"
        assert node.write_highest_offset == 5004
        into = memoryview(bytearray(6))
        await backend.read(4999, into)
        assert into.tobytes() == b"\0here\0"
        node.bitmaps["seen"] = DirtyBitmap("seen", backend.size, 512)
        assert backend.place_writes() is None
        del node.bitmaps["seen"]
        assert place_of(backend) == place[:3]
        backend.begin_drain()
        assert backend.place_writes() is None
        backend.end_drain()
        assert backend.root is not None
        backend.root.held &= ~Permission.WRITE
        assert backend.place_writes() is None
        backend.root.held |= Permission.WRITE
        if "window" not in kind:
            await backend.truncate(backend.size * 2)
            assert place_of(backend) == (place.fd, place.shift, backend.size)


async def test_writes_that_others_make_slowly(tmp_path: Path, open_disk: OpenDisk) -> None:
    """Then threads make the next ones, so that nobody else has to wait for them."""
    async with open_disk(DISKS["file"](make_file(tmp_path))) as backend:
        place = backend.place_writes()
        assert place is not None
        place.made(1, int(SLOW_S * 1e9))
        assert backend.place_writes() is place
        place.made(1, int(SLOW_S * 1e9) + 1)
        assert backend.place_writes() is None


@pytest.mark.parametrize("kind", DISKS)
async def test_memory_is_filled_in_place(kind: str, tmp_path: Path, open_disk: OpenDisk) -> None:
    """Within the disk, and through users who may write; files are no memory."""

    def fill(memory: memoryview) -> int:
        memory[:4] = b"here"
        return 4

    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        filled = backend.fill_now(5000, 10, fill)
        assert filled == (4 if "memory" in kind else None)
        assert backend.fill_now(backend.size - 2, 4, fill) is None
        assert backend.fill_now(backend.size, 4, fill) is None
        into = memoryview(bytearray(6))
        await backend.read(4999, into)
        assert into.tobytes() == (b"\0here\0" if filled else bytes(6))
        assert backend.root is not None
        backend.root.held &= ~Permission.WRITE
        assert backend.fill_now(5000, 10, fill) is None


async def test_memory_is_mapped_as_far_as_it_goes(open_disk: OpenDisk) -> None:
    """After each new size of the disk; and not at all if it is longer than addresses are, or empty."""

    def one(memory: memoryview) -> int:
        memory[:1] = b"x"
        return len(memory)

    async with open_disk({"driver": "memory", "size": 0}) as backend:
        for size in (5000, 3, 1 << 20, 0, 1 << 62, 10):
            await backend.truncate(size)
            last = max(size - 5, 0)
            filled = backend.fill_now(last, min(size, 5), one) if size else None
            assert filled == (min(size, 5) if 0 < size < 1 << 62 else None)
            located = backend.locate(last, 5)
            if filled:
                assert located is not None
                assert located.memory is not None
                assert len(located.memory) == size
                assert bytes(located.memory[last : last + 1]) == b"x"
            else:
                assert located is None or located.memory is None
        await backend.node.path.write(10, memoryview(b"grown"), 0)
        located = backend.locate(0, 15)
        assert located is not None
        assert (located.length, located.memory) == (15, None)


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_a_write_in_place_that_fails_is_left_to_write(
    kind: str, tmp_path: Path, open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises nothing; `write` meets the same and names node, place and length."""

    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with open_disk(DISKS[kind](make_file(tmp_path))) as backend:
        monkeypatch.setattr(os, "pwrite", full)
        assert not backend.write_now(0, memoryview(b"x"))
        with pytest.raises(OSError, match=r"write at 0 for 1 bytes: No space left on device") as caught:
            await backend.write(0, memoryview(b"x"))
        assert caught.value.errno == errno.ENOSPC


async def test_direct_disks_are_not_located(tmp_path: Path, open_disk: OpenDisk) -> None:
    """A read with O_DIRECT always waits."""
    async with open_disk(DISKS["file-direct"](make_file(tmp_path))) as backend:
        assert backend.locate(0, 4096) is None


async def test_terabytes_of_nothing_cost_nothing(open_disk: OpenDisk) -> None:
    async with open_disk({"driver": "memory", "size": "64T"}) as backend:
        assert backend.size == 64 << 40
        (extent,) = await backend.block_status(0, backend.size)
        assert extent.zero
        await backend.write((40 << 40) + 1, memoryview(b"x"))
        assert await backend.node.allocated_size() == 4096
        statuses = await backend.block_status(0, backend.size)
        assert [(extent.length, extent.zero) for extent in statuses] == [
            (40 << 40, True),
            (4096, False),
            ((24 << 40) - 4096, True),
        ]
        into = memoryview(bytearray(3))
        await backend.read(40 << 40, into)
        assert into.tobytes() == b"\0x\0"


async def test_memory_is_given_back(open_disk: OpenDisk) -> None:
    async with open_disk({"driver": "memory", "size": "16M", "discard": "unmap"}) as backend:
        await backend.write(0, memoryview(b"x" * (1 << 20)))
        assert await backend.node.allocated_size() == 1 << 20
        await backend.discard(0, 1 << 19)
        assert await backend.node.allocated_size() == 1 << 19
        await backend.write_zeroes(0, 16 << 20, RequestFlag.NO_FALLBACK)
        assert await backend.node.allocated_size() == 0


async def test_the_largest_disk_in_memory(open_disk: OpenDisk) -> None:
    size = (1 << 63) - 1
    async with open_disk({"driver": "memory", "size": size}) as backend:
        await backend.write(size - 1, memoryview(b"x"))
        into = memoryview(bytearray(2))
        await backend.read(size - 2, into)
        assert into.tobytes() == b"\0x"


@pytest.mark.parametrize("name", ["null", "null-co", "null-aio"])
@pytest.mark.parametrize("latency_ns", [0, 1000])
async def test_null(name: str, latency_ns: int, open_disk: OpenDisk) -> None:
    """It takes everything and keeps nothing."""
    async with open_disk({"driver": name, "latency-ns": latency_ns}) as backend:
        assert backend.size == 1 << 30
        await backend.write(0, memoryview(b"x" * 4096), RequestFlag.FUA)
        await backend.write_zeroes(0, 4096, RequestFlag.FUA)
        await backend.discard(0, 4096)
        await backend.flush()
        into = memoryview(bytearray(b"secret"))
        await backend.read(0, into)
        assert into == bytes(6)
        assert (backend.locate(0, 6) is None) == bool(latency_ns)
        (extent,) = await backend.block_status(0, 4096)
        assert extent.data
        assert not extent.zero
        await backend.truncate(1 << 20)
        assert backend.size == 1 << 20
        with pytest.raises(OSError) as caught:
            await backend.read(1 << 20, into)
        assert caught.value.errno == errno.EINVAL


async def test_null_that_promises_zeroes(open_disk: OpenDisk) -> None:
    async with open_disk("driver=null,size=1M,read-zeroes=on") as backend:
        (extent,) = await backend.block_status(0, 1 << 20)
        assert extent.zero
        found = backend.locate(100, 50)
        assert found is not None
        assert os.pread(found.fd, found.length, found.host_offset) == bytes(50)
