"""Another length of the disk, and what lies on it taken away."""

from typing import TYPE_CHECKING

from pynbd.block.alignment import round_down, round_up
from pynbd.block.driver import Preallocation
from pynbd.block.errors import OptionError, unsupported
from pynbd.block.options import MAX_SIZE_BYTES
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.active_l1 import grow_l1
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.header import build_fixed
from pynbd.formats.qcow2.layout import COPIED, OFFSET_MASK, SUBCLUSTERS_ALL_ALLOCATED
from pynbd.formats.qcow2.mapping import DATA, PACKED

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2

FILL_BYTES = 1 << 20


async def truncate(driver: "Qcow2", size: int, preallocation: Preallocation) -> None:
    """Change the length of the disk; see `Driver.truncate`."""
    if size % 512:
        raise OptionError(f"size: {size} is no multiple of 512, as a qcow2 image's must be")
    image = driver.image
    image.check_fence()
    if driver.header.nb_snapshots and driver.header.version < 3:
        raise unsupported(driver.node.name, "resize of an image of compat 0.10 that has snapshots")
    async with driver.writer.track(min(size, driver.size), MAX_SIZE_BYTES, exclusive=True):
        # It begins where the L1 entries of the disk end, and would become part of a larger one.
        await driver.snapshots.forget_vm_state()
        if size < driver.size:
            if preallocation is not Preallocation.OFF:
                raise unsupported(driver.node.name, "preallocation for a disk that is made shorter")
            await _shrink(driver, size)
        elif size > driver.size:
            await _grow(driver, size, preallocation)


async def _shrink(driver: "Qcow2", size: int) -> None:
    image, reach, cluster = driver.image, driver.map.reach, driver.map.cluster
    old, driver.size, driver.header.size = driver.size, size, size
    # The header first: what lies behind the new end may go only when nothing says it is part of the disk.
    await _write_size(driver)
    for start in range(round_down(size, reach), old, reach):
        l1_index = start // reach
        if not image.l1[l1_index] & OFFSET_MASK:
            continue
        await driver.writer.zeroing.forget(
            round_up(max(start, size), cluster), min(start + reach, round_up(old, cluster)), Cause.CUT_OFF
        )
        if start >= size:
            image.drop_l2(l1_index)
    await image.commit()
    if driver.header.has_data_file:
        await driver.guest_file.node.truncate(size, Preallocation.OFF, exact=False)


async def _grow(driver: "Qcow2", size: int, preallocation: Preallocation) -> None:
    image, header, old = driver.image, driver.header, driver.size
    entries = header.l1_entries_for(size)
    if entries * 8 > layout.MAX_L1_BYTES:
        most = layout.MAX_L1_BYTES // 8 * driver.map.reach
        raise OptionError(f"size: {size} bytes are too many for clusters of {image.cluster_size}: at most {most}")
    if header.data_file_raw and preallocation is Preallocation.OFF:
        preallocation = Preallocation.METADATA  # whoever writes to the data file alone is to be read here
    await grow_l1(image, entries)
    if header.has_data_file and driver.guest_file.size < size:
        reserved = Preallocation.OFF if preallocation is Preallocation.METADATA else preallocation
        await driver.guest_file.node.truncate(size, reserved, exact=False)
    # What the last cluster holds behind the old end, and what the backing file has there, was never the guest's.
    driver.size = size
    try:
        await _clear(driver, old, size)
        if preallocation is not Preallocation.OFF:
            await _preallocate(driver, old, size, preallocation)
        header.size = size
        await image.commit()
        await _write_size(driver)
    except BaseException:
        driver.size = header.size = old
        raise


async def _clear(driver: "Qcow2", old: int, size: int) -> None:
    """Let all between the old end and the new one read as zeroes."""
    backing = driver.node.children.get("backing")
    if backing is not None and backing.size > old:
        boundary = min(round_up(old, driver.map.unit), size)
        await driver.writer.zeroing.zeroes_as_data(old, boundary)
        if boundary < size:
            await driver.writer.zeroing.zero_alone(boundary, size)
        return
    at, boundary = old, min(round_up(old, driver.map.cluster), size)
    while at < boundary:
        piece = await driver.map.piece(at, boundary)
        if piece.kind in (DATA, PACKED):
            await driver.writer.zeroing.zeroes_as_data(at, piece.stop)
        at = piece.stop


async def _write_size(driver: "Qcow2") -> None:
    fields = build_fixed(driver.header)[24:32]
    await driver.file.write(24, memoryview(fields), 0)
    await driver.file.flush()


async def _preallocate(driver: "Qcow2", old: int, size: int, preallocation: Preallocation) -> None:
    """Take clusters for all that was added."""
    image, cluster = driver.image, driver.map.cluster
    start = round_up(old, cluster)
    end = round_up(size, cluster)
    while start < end:
        within = min(end, round_down(start, driver.map.slice_reach) + driver.map.slice_reach)
        count = (within - start) // cluster
        if driver.header.has_data_file:
            host = start
        else:
            run, fresh = await image.allocate(count)
            host, count = run.first << image.cluster_bits, run.clusters
            try:
                await _fill(driver, host, count * cluster, preallocation, fresh=fresh)
            except BaseException:
                await image.release(run)
                raise
        table, at = await driver.map.writable(start)
        for number in range(count):
            place = (host + number * cluster) | COPIED
            driver.map.put(table.words, at + number * driver.map.words, place, SUBCLUSTERS_ALL_ALLOCATED)
        driver.map.mark(start, at, at + count * driver.map.words)
        start += count * cluster


async def _fill(driver: "Qcow2", host: int, length: int, preallocation: Preallocation, *, fresh: bool) -> None:
    """Let new clusters read as zeroes, and have their space as far as that is wanted.

    Args:
        driver: whose.
        host: where in the file they lie.
        length: of all of them, in bytes.
        preallocation: what is done with their space.
        fresh: whether nothing has ever been written there.
    """
    if preallocation is Preallocation.FULL:
        zeroes = memoryview(bytes(FILL_BYTES))
        for at in range(0, length, FILL_BYTES):
            await driver.file.write(host + at, zeroes[: min(FILL_BYTES, length - at)], 0)
    elif preallocation is Preallocation.FALLOC or not fresh:
        await driver.file.write_zeroes(host, length, 0)
    elif driver.file.size < host + length:
        await driver.file.node.truncate(host + length, Preallocation.OFF, exact=False)


async def make_empty(driver: "Qcow2") -> None:
    """Drop all that the image holds; see `Emptiable.make_empty`."""
    image = driver.image
    image.check_fence()
    async with driver.writer.track(0, MAX_SIZE_BYTES, exclusive=True):
        reach, cluster = driver.map.reach, driver.map.cluster
        for l1_index, entry in enumerate(image.l1):
            start = l1_index * reach
            if not entry & OFFSET_MASK or start >= driver.size:
                continue
            await driver.writer.zeroing.forget(
                start, min(start + reach, round_up(driver.size, cluster)), Cause.SNAPSHOT
            )
            image.drop_l2(l1_index)
        await image.commit_all()


async def change_backing_file(driver: "Qcow2", filename: str, format: str) -> None:
    """Write another backing file's name into the image; see `Backed.change_backing_file`."""
    image, header = driver.image, driver.header
    image.check_fence()
    if filename and header.data_file_raw:
        raise OptionError("a backing file and a raw data file exclude each other")
    old = header.backing_file, header.backing_format
    header.backing_file, header.backing_format = filename or None, (format or None) if filename else None
    try:
        await image.write_header()
    except BaseException:
        header.backing_file, header.backing_format = old
        raise
