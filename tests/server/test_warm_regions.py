"""What was in the page cache a moment ago is believed to be there, in whole regions, and for a while."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.server import warm_regions
from pynbd.server.warm_regions import BELIEVED_NS, REGION_BYTES, WarmRegions
from pynbd.storage import linux


class Asked:
    """Stands for the kernel: which regions were asked for, which are not there, and what time it is."""

    def __init__(self) -> None:
        self.regions: list[int] = []
        self.cold: set[int] = set()
        self.now = 5

    def readable_at_once(self, fd: int, offset: int, length: int) -> bool:
        assert length == REGION_BYTES
        self.regions.append(offset // REGION_BYTES)
        return offset // REGION_BYTES not in self.cold


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(linux, "readable_at_once", asked.readable_at_once)
    monkeypatch.setattr(warm_regions, "monotonic_ns", lambda: asked.now)
    return asked


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of four regions, and a little more."""
    (tmp_path / "file").write_bytes(b"x" * (4 * REGION_BYTES + 5000))
    with (tmp_path / "file").open("rb") as file:
        yield file.fileno()


def test_an_answer_is_believed_for_a_while(asked: Asked, fd: int) -> None:
    warm = WarmRegions()
    for offset in (0, 4096, REGION_BYTES - 1):
        assert warm.hold(fd, offset, 1)
    assert asked.regions == [0]
    asked.cold.add(0)
    asked.now += BELIEVED_NS
    assert warm.hold(fd, 0, 1)
    asked.now += 1
    assert not warm.hold(fd, 0, 1)
    asked.cold.clear()
    assert not warm.hold(fd, 0, 1), "a no is believed as long"
    assert asked.regions == [0, 0]
    asked.now += BELIEVED_NS + 1
    assert warm.hold(fd, 0, 1)


def test_every_region_of_a_range_counts(asked: Asked, fd: int) -> None:
    warm = WarmRegions()
    asked.cold.add(2)
    assert warm.hold(fd, REGION_BYTES - 1, 2)
    assert warm.hold(fd, 0, 2 * REGION_BYTES)
    assert not warm.hold(fd, 0, 2 * REGION_BYTES + 1)
    assert not warm.hold(fd, 5, 4 * REGION_BYTES - 5)
    assert asked.regions == [0, 1, 2]


def test_files_are_told_apart(asked: Asked, fd: int) -> None:
    warm = WarmRegions()
    assert warm.hold(fd, 0, 1)
    other = os.dup(fd)
    try:
        asked.cold.add(0)
        assert not warm.hold(other, 0, 1)
    finally:
        os.close(other)


def test_what_is_remembered_has_a_limit(asked: Asked, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_regions, "MAX_REGIONS", 2)
    warm = WarmRegions()
    for region in (0, 1, 0, 2, 0):
        assert warm.hold(fd, region * REGION_BYTES, 1)
        assert len(warm._known) <= 2
    assert asked.regions == [0, 1, 2, 0]


@pytest.mark.parametrize("what", ["a hole", "the end", "a closed file"])
def test_what_can_not_be_sent_whole_is_not_warm(what: str, tmp_path: Path) -> None:
    """Of a real file: holes are to be told, and sendfile would stop at the end."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * REGION_BYTES + 5000)
        file.write(b"x" * (REGION_BYTES - 4096 if what == "a hole" else REGION_BYTES))
    with path.open("rb") as file:
        file.read()
        fd = file.fileno()
        warm = WarmRegions()
        if what == "a closed file":
            fd = os.dup(fd)
            os.close(fd)
            assert not warm.hold(fd, 0, 1)
        elif what == "the end":
            assert not warm.hold(fd, 2 * REGION_BYTES, 1)
        else:
            assert not warm.hold(fd, 0, 1)


def test_a_file_that_was_read_is_warm(fd: int) -> None:
    assert os.pread(fd, REGION_BYTES, 0) == b"x" * REGION_BYTES
    if linux.resident_bytes(fd, 0, REGION_BYTES) is None:
        pytest.skip("this kernel, or file system, can't tell what is in the page cache (cachestat, Linux 6.5)")
    if linux.nowait_flags(fd) is None:
        pytest.skip("this file system can't be read without waiting")
    assert WarmRegions().hold(fd, 4096, 65536)
