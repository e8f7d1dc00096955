"""What goes from file to file without the event loop: every byte, and no zeroes where they are not wanted."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.driver import Copied, Location, Room
from pynbd.cli.pump import STROKE_BYTES, Pump
from pynbd.cli.zero_runs import BLOCK_BYTES

CLUSTER = 64 << 10
LENGTH = 3 * STROKE_BYTES


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(source, target): open files, both empty."""
    opened = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("source", "target")]
    yield opened[0], opened[1]
    for fd in opened:
        os.close(fd)


def filled(fd: int, *zeroes: tuple[int, int]) -> bytes:
    """Fill a file with data and, where it is said, zeroes; gives its bytes."""
    data = bytearray(random.Random(1).randbytes(LENGTH))
    for start, length in zeroes:
        data[start : start + length] = bytes(length)
    os.pwrite(fd, data, 0)
    return bytes(data)


def pump(*, block: int = BLOCK_BYTES, cluster: int = 0, is_zero: bool = True) -> Pump:
    return Pump(lambda offset, length: None, block_bytes=block, cluster_bytes=cluster, skips_zeroes=is_zero)


def content(fd: int) -> bytes:
    return os.pread(fd, 2 * LENGTH, 0)


def holes(fd: int) -> list[tuple[int, int]]:
    """Where a file has holes before its end."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while (begin := os.lseek(fd, at, os.SEEK_HOLE)) < size:
        at = os.lseek(fd, begin, os.SEEK_DATA)
        found.append((begin, at - begin))
    return found


@pytest.mark.parametrize("length", [0, 1, STROKE_BYTES - 1, STROKE_BYTES, LENGTH - 512, LENGTH])
def test_all_bytes_go_to_their_place(files: tuple[int, int], length: int) -> None:
    source, target = files
    data = filled(source)
    assert pump().copy([Location(source, 0, LENGTH)], Room(target, [(4096, length)], True)).bytes == length
    assert content(target) == (bytes(4096) + data[:length] if length else b"")


def test_zeroes_are_left_out_of_a_file_of_zeroes(files: tuple[int, int]) -> None:
    """As holes; and pumping ends before them if the file may hold something else."""
    source, target = files
    zeroes = [(8192, 8192), (STROKE_BYTES + CLUSTER, CLUSTER)]
    data = filled(source, *zeroes)
    assert pump(is_zero=False).copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], False)).bytes == 8192
    assert content(target) == data[:8192]
    assert pump().copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], False)).bytes == LENGTH
    assert content(target) == data
    assert holes(target) == zeroes


def test_short_zeroes_are_data(files: tuple[int, int]) -> None:
    """What is not a whole block, and everything where nobody asks for zeroes."""
    source, target = files
    data = filled(source, (100, BLOCK_BYTES), (STROKE_BYTES, STROKE_BYTES))
    assert (
        pump(block=0, is_zero=False).copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], False)).bytes
        == LENGTH
    )
    assert content(target) == data
    assert holes(target) == []
    assert (
        pump(is_zero=False).copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], False)).bytes
        == STROKE_BYTES
    )


@pytest.mark.parametrize("begin", [0, CLUSTER, CLUSTER - BLOCK_BYTES])
def test_a_cluster_of_zeroes_ends_it(files: tuple[int, int], begin: int) -> None:
    """And is not written, nor are the zeroes before it."""
    source, target = files
    zeroes = STROKE_BYTES + begin
    data = filled(source, (zeroes, CLUSTER + (BLOCK_BYTES if begin % CLUSTER else 0)))
    assert pump(cluster=CLUSTER).copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], True)).bytes == zeroes
    assert content(target) == data[:zeroes]


@pytest.mark.parametrize("fresh", [True, False])
def test_zeroes_inside_a_cluster_are_left_out_where_the_place_is_zero(files: tuple[int, int], fresh: bool) -> None:
    """Also over the edge between two clusters; elsewhere they are written."""
    source, target = files
    zeroes = (CLUSTER - BLOCK_BYTES, CLUSTER)
    data = filled(source, zeroes)
    if not fresh:
        os.pwrite(target, b"\xff" * LENGTH, 0)
    assert pump(cluster=CLUSTER).copy([Location(source, 0, LENGTH)], Room(target, [(0, LENGTH)], fresh)).bytes == LENGTH
    assert content(target) == data
    assert holes(target) == ([zeroes] if fresh else [])


def test_several_places_on_both_sides(files: tuple[int, int]) -> None:
    """They need not be alike."""
    source, target = files
    data = filled(source)
    sources = [Location(source, STROKE_BYTES, 700), Location(source, 0, STROKE_BYTES), Location(source, 5000, 300)]
    places = [(4096, 100), (STROKE_BYTES, STROKE_BYTES + 900)]
    assert pump().copy(sources, Room(target, places, True)) == Copied(STROKE_BYTES + 1000, [])
    expected = data[STROKE_BYTES:][:700] + data[:STROKE_BYTES] + data[5000:5300]
    assert content(target)[4096:4196] == expected[:100]
    assert content(target)[STROKE_BYTES:] == expected[100:]


def test_clusters_of_zeroes_are_left_out_where_they_need_no_place(files: tuple[int, int]) -> None:
    """What comes behind them moves up; zeroes that are no whole cluster are holes."""
    source, target = files
    first, second = 2 * CLUSTER, STROKE_BYTES - CLUSTER + BLOCK_BYTES
    data = filled(source, (first, 2 * CLUSTER), (second, 3 * CLUSTER))
    room = Room(target, [(CLUSTER, LENGTH)], True, CLUSTER)
    left_out = [(first, 2 * CLUSTER), (STROKE_BYTES, 2 * CLUSTER)]
    assert pump(cluster=CLUSTER).copy([Location(source, 0, LENGTH)], room) == Copied(LENGTH, left_out)
    assert (
        content(target)
        == bytes(CLUSTER)
        + data[:first]
        + data[first + 2 * CLUSTER : STROKE_BYTES]
        + (data[STROKE_BYTES + 2 * CLUSTER :])
    )
    assert holes(target)[1:] == [(second - CLUSTER, CLUSTER)]


@pytest.mark.parametrize(
    ("places", "unit", "is_zero"),
    [
        ([(0, LENGTH // 2), (LENGTH // 2, LENGTH // 2)], CLUSTER, True),
        ([(0, LENGTH)], 3 * CLUSTER, True),
        ([(0, LENGTH)], 0, True),
        ([(0, LENGTH)], CLUSTER, False),
    ],
)
def test_pumping_ends_before_zeroes_that_must_not_be_left_out(
    files: tuple[int, int], places: list[tuple[int, int]], unit: int, is_zero: bool
) -> None:
    """More than one place, units that strokes are not made of, none, and targets that hold something else."""
    source, target = files
    filled(source, (2 * CLUSTER, CLUSTER))
    room = Room(target, places, True, unit)
    copied = pump(cluster=CLUSTER, is_zero=is_zero).copy([Location(source, 0, LENGTH)], room)
    assert copied == Copied(2 * CLUSTER, [])


def test_it_ends_where_the_source_ends(files: tuple[int, int], tmp_path: Path) -> None:
    """Before it, where a stroke can't be read whole; and at once where nothing can be read."""
    source, target = files
    data = filled(source)
    assert (
        pump().copy([Location(source, STROKE_BYTES, LENGTH)], Room(target, [(0, LENGTH)], True)).bytes
        == 2 * STROKE_BYTES
    )
    assert content(target) == data[STROKE_BYTES:]
    folder = os.open(tmp_path, os.O_RDONLY)
    assert pump().copy([Location(folder, 0, LENGTH)], Room(target, [(0, LENGTH)], True)).bytes == 0
    os.close(folder)


def test_a_write_that_fails_is_an_error(files: tuple[int, int]) -> None:
    source, _ = files
    filled(source)
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space") as caught:
        pump().copy([Location(source, 0, LENGTH)], Room(full, [(0, LENGTH)], True))
    os.close(full)
    assert caught.value.errno == errno.ENOSPC


def test_blocks_must_fit_into_strokes() -> None:
    assert all(Pump.takes(length) for length in (0, 512, 4096, STROKE_BYTES))
    assert not any(Pump.takes(length) for length in (1536, 3 * 4096, 2 * STROKE_BYTES))
