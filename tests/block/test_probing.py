"""Formats are told by their first bytes; a disk that was only found to be raw never begins to look like another."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block import registry
from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.probing import PROBE_BYTES, SIGNATURES, probe_format, signature_of
from tests.block.drivers import attach, model, opened

SIZE = 1 << 14
MARKS = pytest.mark.parametrize(("name", "offset", "mark"), SIGNATURES)
SHARE_OF_MARK = st.sampled_from(SIGNATURES)


def probed(**options: Any) -> dict[str, Any]:
    """A model disk whose format nobody says."""
    return {"file": {"driver": "model", "size": SIZE, **options}, "discard": "unmap"}


@MARKS
def test_every_mark_is_known_where_it_stands(name: str, offset: int, mark: bytes) -> None:
    assert offset + len(mark) <= 512, "within one sector, which is written whole or not at all"
    head = bytearray(PROBE_BYTES)
    head[offset : offset + len(mark)] = mark
    assert signature_of(bytes(head)) == name
    assert signature_of(bytes(head[: offset + len(mark)])) == name
    assert signature_of(bytes(head[: offset + len(mark) - 1])) is None
    for at in range(offset, offset + len(mark)):
        changed = bytearray(head)
        changed[at] ^= 0x80
        assert signature_of(bytes(changed)) is None


@MARKS
def test_an_image_that_can_not_be_opened_is_not_taken_for_raw(name: str, offset: int, mark: bytes) -> None:
    head = bytes(offset) + mark
    if name in registry.BUILT_IN:
        assert probe_format(head, "disk.img") == name
        return
    with pytest.raises(OptionError, match=f"disk.img: this is a {name} image, .* give -f raw"):
        probe_format(head, "disk.img")


@pytest.mark.parametrize("head", [b"", b"x", bytes(PROBE_BYTES), b"QFI\xfb", b"\x7fELF"])
def test_anything_else_is_raw(head: bytes) -> None:
    assert probe_format(head, "disk.img") == "raw"


async def test_a_probed_image_of_another_format_opens_nothing(graph: Graph) -> None:
    storage = await graph.open({"driver": "model", "size": SIZE, "node-name": "disk"})
    await storage.path.write(0, memoryview(b"QED\0"), 0)
    with pytest.raises(OptionError, match="this is a qed image"):
        await graph.open({"file": "disk"})
    assert list(graph.nodes) == ["disk"]
    node = await graph.open({"driver": "raw", "file": "disk"})
    assert node.write_guard is None


# --- the fence ------------------------------------------------------------------------------------------------


async def head_of(node: Node) -> bytes:
    """The first bytes of a disk, as the next start would see them."""
    return bytes(model(node).data[:PROBE_BYTES])


@MARKS
async def test_marks_are_refused(graph: Graph, name: str, offset: int, mark: bytes) -> None:
    """Whole, at the end of a longer write, in pieces from either side, and with zeroes for its zeroes."""
    node = await graph.open(probed())
    backend = attach(graph, node)
    around = random.Random(1).randbytes(PROBE_BYTES)
    longer = around[:offset] + mark + around[offset + len(mark) :]
    for start, data in ((offset, mark), (0, longer), (0, longer * 4)):
        with pytest.raises(OSError, match=f"look like a {name} image.*give -f raw") as caught:
            await backend.write(start, memoryview(data))
        assert caught.value.errno == errno.EPERM
        assert signature_of(await head_of(node)) is None
    for order in (range(len(mark)), reversed(range(len(mark)))):
        await backend.write(offset, memoryview(b"?" * len(mark)))
        refused = 0
        for at in order:
            try:
                await backend.write(offset + at, memoryview(mark[at : at + 1]))
            except OSError as problem:
                if problem.errno != errno.EPERM:
                    raise
                refused += 1
        assert refused == 1, "only the byte that would complete it"
    zeroes = bytes(mark[at] if mark[at] else 1 for at in range(len(mark)))
    if zeroes != mark:
        await backend.write(offset, memoryview(zeroes))
        first, last = mark.index(0), len(mark) - mark[::-1].index(0)
        if not any(mark[first:last]):
            with pytest.raises(OSError, match=f"look like a {name} image"):
                await backend.write_zeroes(offset + first, last - first)
            # A discard is a hint, which is not followed there.
            await backend.discard(0, SIZE)
            assert bytes(model(node).data[:PROBE_BYTES]) == (await head_of(node))
            assert model(node).told("discard")[0].offset == PROBE_BYTES
    assert signature_of(await head_of(node)) is None


@settings(max_examples=100, deadline=None)
@given(
    signature=SHARE_OF_MARK,
    seed=st.integers(0, 9999),
    alignment=st.sampled_from([1, 512]),
    discards=st.booleans(),
)
def test_no_writes_together_make_a_mark(
    signature: tuple[str, int, bytes], seed: int, alignment: int, discards: bool
) -> None:
    """Concurrent, overlapping, in any order, with failures: at no moment does the disk look like another format."""

    async def law() -> None:
        _, offset, mark = signature
        chance = random.Random(seed)
        options = {"seed": seed, "suspends": 60, "limits": {"request_alignment": alignment}, "discards": discards}
        async with opened(probed(**options)) as (graph, node):
            backend, disk, done = attach(graph, node), model(node), False

            async def attack() -> None:
                for _ in range(6):
                    start = chance.randrange(len(mark))
                    stop = chance.randrange(start, len(mark)) + 1
                    try:
                        if chance.random() < 0.2:
                            await backend.write_zeroes(offset + start, stop - start)
                        elif chance.random() < 0.1:
                            await backend.discard(offset + start, stop - start)
                        else:
                            await backend.write(offset + start, memoryview(mark[start:stop]))
                    except OSError as problem:
                        if problem.errno != errno.EPERM:
                            raise

            async def watch() -> None:
                while not done:
                    assert signature_of(bytes(disk.data[:PROBE_BYTES])) is None
                    await asyncio.sleep(0)

            watching = asyncio.create_task(watch())
            await asyncio.gather(*(attack() for _ in range(8)))
            done = True
            await watching

    asyncio.run(law())


async def test_a_small_disk_does_not_grow_into_a_mark(graph: Graph) -> None:
    node = await graph.open({"file": {"driver": "model", "size": 3}})
    backend = attach(graph, node)
    with pytest.raises(OSError, match="look like a qed image"):
        await backend.write(0, memoryview(b"QED"))
    await backend.write(0, memoryview(b"QE"))
    await backend.truncate(4096)
    with pytest.raises(OSError, match="look like a qed image"):
        await backend.write(2, memoryview(b"D"))
    await backend.write(2, memoryview(b"D?"))
    await backend.truncate(3)
    with pytest.raises(OSError, match="look like a qed image"):
        await backend.truncate(4)
    assert backend.size == 3


async def test_what_is_not_fenced(graph: Graph) -> None:
    """A disk that is said to be raw, one that is read-only, and all but the first bytes of one that was probed."""
    said = await graph.open({"driver": "raw", "file": {"driver": "model", "size": SIZE}})
    await attach(graph, said).write(0, memoryview(b"QFI\xfb\0\0\0\3"))
    assert (await graph.open(probed(), read_only=True)).write_guard is None
    node = await graph.open(probed())
    backend = attach(graph, node)
    await backend.write(PROBE_BYTES, memoryview(b"QFI\xfb\0\0\0\3" * 100))
    assert not model(node).told("read")[1:], "the head is not looked at for writes behind it"
    await backend.write(0, memoryview(b"MBR" * 2000))
    await backend.write_zeroes(0, SIZE)


async def test_zeroes_that_are_found_are_fenced_too(graph: Graph) -> None:
    node = await graph.open({**probed(), "detect-zeroes": "unmap"})
    backend = attach(graph, node)
    await backend.write(0, memoryview(b"QED?"))
    with pytest.raises(OSError, match="look like a qed image"):
        await backend.write(3, memoryview(b"\0"))
    await backend.write(0, memoryview(bytes(512)))


async def test_a_backing_file_can_be_forbidden_before_the_format_is_known(graph: Graph) -> None:
    node = await graph.open({**probed(), "backing": None})
    assert (node.driver.name, set(node.children)) == ("raw", {"file"})
    with pytest.raises(OptionError, match="backing"):
        await graph.open({**probed(), "backing": {"driver": "null"}})
