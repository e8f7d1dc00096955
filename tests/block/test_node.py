"""A node over any driver is a row of bytes: whatever the driver's limits, schedules and failures."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.alignment import BOUNCE_BYTES, round_up
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.requests import RequestFlag
from tests.block.drivers import GARBAGE, Call, Model, attach, driver, model, opened

SIZE = 3 << 13

ALIGNMENTS = st.sampled_from([1, 2, 16, 512, 1024, 4096])


@st.composite
def limits(draw: st.DrawFn) -> dict[str, int]:
    """The fields of any `Limits` that matter for a disk of `SIZE` bytes."""
    alignment = draw(ALIGNMENTS)
    zeroes = draw(st.sampled_from([1, 3, 96, 512, 4096, 6000]))
    discard = draw(st.sampled_from([1, 3, 96, 512, 4096, 6000]))
    largest = st.integers(0, 9000)
    return {
        "request_alignment": alignment,
        "memory_alignment": draw(st.sampled_from([1, 512, 4096])),
        "max_transfer": draw(st.just(0) | largest.map(lambda n: n + alignment)),
        "write_zeroes_alignment": zeroes,
        "max_write_zeroes": draw(st.just(0) | largest.map(lambda n: n + alignment * zeroes)),
        "discard_alignment": discard,
        "max_discard": draw(st.just(0) | largest.map(lambda n: n + alignment * discard)),
    }


class Step(NamedTuple):
    """One request."""

    what: str
    offset: int
    length: int
    flags: int
    fill: int

    def data(self) -> bytes:
        """What a write writes: for `fill` 0 all zeroes."""
        return random.Random(self.fill).randbytes(self.length) if self.fill else bytes(self.length)


@st.composite
def steps(draw: st.DrawFn, first: int = 0, last: int = SIZE) -> Step:
    """A request in [first, last)."""
    what = draw(st.sampled_from(["read", "write", "write", "write_zeroes", "discard", "flush", "cache"]))
    offset = draw(st.integers(first, last - 1))
    length = draw(st.integers(1, last - offset) | st.integers(1, min(600, last - offset)))
    flags = 0
    if what in ("write", "write_zeroes") and draw(st.booleans()):
        flags |= RequestFlag.FUA
    if what == "write_zeroes":
        flags |= draw(st.sampled_from([0, RequestFlag.MAY_UNMAP]))
        flags |= draw(st.sampled_from([0, 0, RequestFlag.NO_FALLBACK]))
    return Step(what, offset, length, int(flags), draw(st.integers(0, 3)))


class Expected:
    """The row of bytes that a disk is, and which of them nobody can know (discarded, or half written)."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.known = bytearray(b"\1" * size)

    def put(self, offset: int, data: bytes) -> None:
        """Bytes were written."""
        self.data[offset : offset + len(data)] = data
        self.known[offset : offset + len(data)] = b"\1" * len(data)

    def lose(self, offset: int, length: int) -> None:
        """Nobody knows what these bytes are."""
        self.known[offset : offset + length] = bytes(length)

    def check(self, offset: int, found: bytes) -> None:
        """What was read must be what is there."""
        for at, (byte, known) in enumerate(zip(found, self.known[offset : offset + len(found)], strict=True), offset):
            assert not known or byte == self.data[at], f"byte {at} is {byte}, expected {self.data[at]}"


async def carry_out(node: Any, expected: Expected, step: Step, *, discards: bool) -> None:
    """Send one request to a backend, and keep the books; a failed one leaves its range unknown."""
    flags = step.flags
    try:
        match step.what:
            case "read":
                into = memoryview(bytearray(step.length))
                await node.read(step.offset, into)
                expected.check(step.offset, bytes(into))
            case "write":
                await node.write(step.offset, memoryview(step.data()), flags)
                expected.put(step.offset, step.data())
            case "write_zeroes":
                await node.write_zeroes(step.offset, step.length, flags)
                expected.put(step.offset, bytes(step.length))
            case "discard":
                await node.discard(step.offset, step.length)
                if discards:
                    expected.lose(step.offset, step.length)
            case "flush":
                await node.flush()
            case "cache":
                await node.cache(step.offset, step.length)
    except OSError as problem:
        quick = flags & RequestFlag.NO_FALLBACK and problem.errno == errno.ENOTSUP
        if problem.errno != errno.EIO and not quick:
            raise
        if step.what not in ("read", "flush", "cache") and not quick:
            expected.lose(step.offset, step.length)


async def contents(backend: Any) -> bytes:
    """All bytes of a disk."""
    into = memoryview(bytearray(backend.size))
    await backend.read(0, into)
    return bytes(into)


def described(layers: Sequence[str], top: dict[str, Any], **bottom: Any) -> dict[str, Any]:
    """A model disk under some filters; `top` are options of the top node, and of the disk."""
    tree: dict[str, Any] = {"driver": "model", "size": SIZE, **bottom, **(top if not layers else {})}
    for number, layer in enumerate(layers):
        tree = {"driver": layer, "file": tree, **(top if number == len(layers) - 1 else {})}
        if layer == "twin":
            tree["other"] = {"driver": "model", "size": 16}
    return tree


@settings(max_examples=150, deadline=None)
@given(
    limits=limits(),
    steps=st.lists(steps(), max_size=25),
    layers=st.lists(st.sampled_from(["through", "watcher", "wallet", "twin"]), max_size=3),
    abilities=st.fixed_dictionaries(
        {name: st.booleans() for name in ("zeroes", "discards", "fua", "zero_fua", "grows")}
    ),
    detect=st.sampled_from(["off", "on", "unmap"]),
    discard=st.sampled_from(["unmap", "ignore"]),
    size=st.sampled_from([SIZE, SIZE - 1, SIZE - 511]),
)
def test_any_sequence_of_requests(
    limits: dict[str, int],
    steps: list[Step],
    layers: list[str],
    abilities: dict[str, bool],
    detect: str,
    discard: str,
    size: int,
) -> None:
    """The disk is a row of bytes; the driver (which checks) never sees a request outside its limits."""

    async def law() -> None:
        options = {"discard": discard, "detect-zeroes": detect}
        bottom = {"limits": limits, "size": size, **{name.replace("_", "-"): on for name, on in abilities.items()}}
        async with opened(described(layers, options, **bottom)) as (graph, node):
            # A wallet keeps a header at the front and drops discards.
            first = 8 if "wallet" in layers else 0
            node_discards = discard == "unmap" and "wallet" not in layers
            expected = Expected(size)
            backend = attach(graph, node)
            for step in steps:
                offset = max(step.offset, first)
                cut = step._replace(offset=offset, length=max(0, min(step.length, size - offset)))
                if cut.length:
                    await carry_out(backend, expected, cut, discards=node_discards)
            expected.lose(0, first)
            # A driver that grows may do so by the last block, which is written whole.
            assert backend.size == size or abilities["grows"]
            expected.check(0, (await contents(backend))[:size])
            for step, call in [(s, c) for s in steps for c in model(node).told("write_zeroes")]:
                # Zeroes may unmap only where the policy says so.
                assert step is None or not call.flags & RequestFlag.MAY_UNMAP or discard == "unmap"

    asyncio.run(law())


@settings(max_examples=100, deadline=None)
@given(
    limits=limits(),
    scripts=st.lists(st.integers(1, 400), min_size=2, max_size=6).flatmap(
        lambda cuts: st.tuples(
            *[
                st.lists(steps(first, first + width), min_size=1, max_size=5)
                for first, width in zip([sum(cuts[:n]) for n in range(len(cuts))], cuts, strict=True)
            ]
        )
    ),
    seed=st.integers(0, 999),
    fails=st.sampled_from([0, 0, 10]),
    layers=st.sampled_from([[], ["through"], ["watcher"]]),
    zeroes=st.booleans(),
)
def test_concurrent_requests_in_ranges_of_their_own(
    limits: dict[str, int],
    scripts: Sequence[list[Step]],
    seed: int,
    fails: int,
    layers: list[str],
    zeroes: bool,
) -> None:
    """Users of disjoint ranges never see one another, however narrow the ranges, and whatever fails or waits."""

    async def law() -> None:
        bottom = {"limits": limits, "seed": seed, "suspends": 60, "fails": fails, "zeroes": zeroes}
        # Discards leave bytes unknown, and may hit whole blocks only; both are held above.
        async with opened(described(layers, {"discard": "ignore"}, **bottom, discard="ignore")) as (graph, node):
            expected = Expected(SIZE)
            backend = attach(graph, node)

            async def run(script: list[Step]) -> None:
                for step in script:
                    await carry_out(backend, expected, step, discards=False)

            await asyncio.gather(*(run(script) for script in scripts))
            model(node).fails = 0
            expected.check(0, await contents(backend))

    asyncio.run(law())


@settings(max_examples=60, deadline=None)
@given(
    limits=limits(),
    sizes=st.lists(st.integers(0, SIZE), min_size=1, max_size=5),
    writes=st.lists(steps(), max_size=6),
    seed=st.integers(0, 99),
)
def test_resizes_among_writes(limits: dict[str, int], sizes: list[int], writes: list[Step], seed: int) -> None:
    """After any resizes the disk has the last size; what was cut off does not come back, what is new is zero."""

    async def law() -> None:
        async with opened(described([], {}, limits=limits, seed=seed, suspends=50)) as (graph, node):
            backend = attach(graph, node)
            expected = Expected(SIZE)
            for size, write in zip(sizes, [*writes, None], strict=False):
                if write is not None and write.what == "write" and write.offset + write.length <= backend.size:
                    await carry_out(backend, expected, write, discards=False)
                await backend.truncate(size)
                expected.data = (expected.data[:size]).ljust(size, b"\0")
                expected.known = (expected.known[:size]).ljust(size, b"\1")
                assert backend.size == size == len(model(node).data)
                # Writes that end at the new end, where a block may be in the middle.
                if size:
                    await backend.write(size - 1, memoryview(b"z"))
                    expected.put(size - 1, b"z")
            expected.check(0, await contents(backend))

    asyncio.run(law())


async def test_a_resize_and_a_block_that_is_being_modified_do_not_meet(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 8192, "limits": {"request_alignment": 4096}})
    backend = attach(graph, node)
    gate = model(node).gates["read"] = asyncio.Event()
    write = asyncio.create_task(backend.write(5000, memoryview(b"x")))
    await asyncio.sleep(0)
    resize = asyncio.create_task(backend.truncate(4096))
    late = asyncio.create_task(backend.write(6000, memoryview(b"y")))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(write, resize)
    with pytest.raises(OSError, match="size 4096") as caught:
        await late
    assert caught.value.errno == errno.ENOSPC
    assert node.size == len(model(node).data) == 4096


@pytest.mark.parametrize("size", [-1, 1 << 63])
async def test_no_disk_has_such_a_size(graph: Graph, size: int) -> None:
    node = await graph.open({"driver": "model", "size": 512})
    with pytest.raises(OSError, match="resize to") as caught:
        await node.truncate(size)
    assert caught.value.errno == errno.EFBIG
    assert not model(node).told("truncate")


async def test_reads_past_the_end_are_zeroes(graph: Graph) -> None:
    for alignment in (1, 16):
        node = await graph.open({"driver": "model", "size": 40, "limits": {"request_alignment": alignment}})
        await node.path.write(0, memoryview(b"x" * 40), 0)
        into = memoryview(bytearray(b"?" * 60))
        await node.path.read(20, into, 0)
        assert bytes(into) == b"x" * 20 + bytes(40)
        into = memoryview(bytearray(b"?" * 5))
        await node.path.read(70, into, 0)
        assert bytes(into) == bytes(5)


# --- growing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 512])
@pytest.mark.parametrize("layers", [[], ["through"], ["watcher"], ["watcher", "through"]])
async def test_a_node_that_grows_tells_everybody_above(graph: Graph, alignment: int, layers: list[str]) -> None:
    node = await graph.open(described(layers, {}, size=512, grows=True, limits={"request_alignment": alignment}))
    backend = attach(graph, node)
    told: list[int] = []
    backend.on_resize.append(told.append)
    await node.path.write(700, memoryview(b"x" * 400), 0)
    size = round_up(1100, alignment)
    assert (node.size, backend.size, told) == (size, size, [size])
    assert await contents(backend) == bytes(700) + b"x" * 400 + bytes(size - 1100)
    await node.path.write_zeroes(2000, 96, 0)
    assert node.size == round_up(2096, alignment)
    await backend.truncate(512)
    await node.path.write(512, memoryview(b"x"), 0)
    assert backend.size == node.size == told[-1] == 512 + alignment, "it grows again, below where it once ended"


async def test_others_do_not_grow(graph: Graph) -> None:
    node = await graph.open(described(["watcher"], {}, size=512))
    for request in (node.path.write(500, memoryview(bytes(13)), 0), node.path.write_zeroes(512, 1, 0)):
        with pytest.raises(OSError, match="size 512") as caught:
            await request
        assert caught.value.errno == errno.ENOSPC
    assert not model(node).calls


async def test_a_read_only_node_changes_nothing(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 512, "read-only": True, "discard": "unmap"})
    for request in (
        node.path.write(0, memoryview(b"x"), 0),
        node.path.write_zeroes(0, 1, 0),
        node.path.discard(0, 1),
        node.truncate(100),
    ):
        with pytest.raises(OSError, match="read-only") as caught:
            await request
        assert caught.value.errno == errno.EROFS
    assert not model(node).calls


# --- durability -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize("zero_fua", [False, True])
@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("alignment", [1, 512])
@pytest.mark.parametrize("layers", [[], ["through"], ["watcher"], ["wallet"]])
async def test_fua_is_durable_when_it_is_answered(
    graph: Graph, fua: bool, zero_fua: bool, zeroes: bool, alignment: int, layers: list[str]
) -> None:
    """By the driver's own means where it has them, by a flush after the write where it has not."""
    disk: dict[str, Any] = {"fua": fua, "zero-fua": zero_fua, "zeroes": zeroes}
    node = await graph.open(described(layers, {}, **disk, limits={"request_alignment": alignment}))
    backend, disk_driver = attach(graph, node), model(node)
    await backend.write(1000, memoryview(b"x" * 100), RequestFlag.FUA)
    assert disk_driver.durable[1000:1100] == b"x" * 100
    if fua and "wallet" not in layers and "watcher" not in layers:
        assert not disk_driver.told("flush")
    elif not layers:
        assert [call.what for call in disk_driver.calls][-2:] == ["write", "flush"]
        assert len(disk_driver.told("flush")) == 1
    await backend.write_zeroes(1050, 1000, RequestFlag.FUA)
    assert disk_driver.durable[1000:2100] == b"x" * 50 + bytes(1050)


async def test_a_write_without_fua_is_not_flushed(graph: Graph) -> None:
    node = await graph.open(described([], {}))
    await node.path.write(0, memoryview(b"x"), 0)
    await node.path.write_zeroes(0, 10, 0)
    assert not model(node).told("flush")


class Write(NamedTuple):
    """A write that was answered."""

    number: int
    offset: int


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 9999),
    fails=st.sampled_from([0, 20, 60]),
    layers=st.sampled_from([[], ["through"], ["watcher"], ["wallet"], ["twin"], ["wallet", "watcher"]]),
    alignment=st.sampled_from([1, 64]),
    clients=st.integers(1, 6),
)
def test_a_flush_covers_every_write_answered_before(
    seed: int, fails: int, layers: list[str], alignment: int, clients: int
) -> None:
    """Whoever's writes they are, and however flushes are merged. A flush that fails leaves them to the next."""

    async def law() -> None:
        limits = {"request_alignment": alignment}
        async with opened(described(layers, {}, seed=seed, suspends=70, limits=limits)) as (graph, node):
            disk = model(node)
            disk.failing = lambda call: call.what == "flush" and disk.random.randrange(100) < fails
            backend, chance = attach(graph, node), random.Random(seed)
            answered: dict[int, bytes] = {}

            async def client(number: int) -> None:
                for turn in range(8):
                    if chance.random() < 0.6:
                        # Each write has a place of its own, so that the newest byte there is the only one.
                        offset, data = 1024 + (number * 8 + turn) * 40, bytes([number * 8 + turn + 1]) * 40
                        await backend.write(offset, memoryview(data))
                        answered[offset] = data
                        continue
                    before = dict(answered)
                    try:
                        await backend.flush()
                    except OSError as problem:
                        if problem.errno != errno.EIO:
                            raise
                        continue
                    for offset, data in before.items():
                        assert disk.durable[offset : offset + 40] == data, f"the write at {offset} was not flushed"

            await asyncio.gather(*(client(number) for number in range(clients)))
            disk.failing = None

    asyncio.run(law())


async def test_flushes_that_wait_are_content_with_one(graph: Graph) -> None:
    """However many ask: one was under way, one more begins after they asked."""
    for layers in ([], ["watcher"]):
        node = await graph.open(described(layers, {}))
        disk = model(node)
        gate = disk.gates["flush"] = asyncio.Event()
        await node.path.write(0, memoryview(b"x"), 0)
        flushes = [asyncio.create_task(node.path.flush())]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await node.path.write(1, memoryview(b"y"), 0)
        flushes += [asyncio.create_task(node.path.flush()) for _ in range(20)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*flushes)
        assert len(disk.told("flush")) == 2
        assert disk.durable[:2] == b"xy"


async def test_nothing_written_nothing_flushed(graph: Graph) -> None:
    node = await graph.open(described([], {}))
    await node.path.write(0, memoryview(b"x"), 0)
    for _ in range(3):
        await node.path.flush()
    assert len(model(node).told("flush")) == 1
    node.touch()
    await node.path.flush()
    assert len(model(node).told("flush")) == 2


async def test_a_failed_flush_stays_failed_until_one_succeeds(graph: Graph) -> None:
    for layers in ([], ["watcher"], ["wallet"], ["through"]):
        node = await graph.open(described(layers, {}))
        await node.path.write(100, memoryview(b"x"), 0)
        model(node).failing = lambda call: call.what == "flush"
        for _ in range(3):
            with pytest.raises(OSError, match="model flush"):
                await node.path.flush()
        assert model(node).durable[100] == 0
        model(node).failing = None
        await node.path.flush()
        assert model(node).durable[100] == ord("x")


async def test_both_steps_of_a_flush_go_down_the_chain_in_order(graph: Graph) -> None:
    """First what is held back is handed down, then each layer makes its own durable, top first."""
    node = await graph.open(described(["wallet", "watcher"], {}))
    await node.path.write(64, memoryview(b"guest"), 0)
    model(node).calls.clear()
    watcher = driver(node)
    await node.path.flush()
    assert watcher.calls[-2:] == ["flush_to_os", "flush_to_disk"]
    assert [call.what for call in model(node).calls] == ["write", "flush"]
    assert model(node).durable[:8] == b"header!!"


async def test_a_filter_with_two_children_flushes_both(graph: Graph) -> None:
    node = await graph.open(described(["twin"], {}))
    await node.path.flush()
    for name in ("file", "other"):
        assert driver(node.children[name].node).told("flush"), name


async def test_no_flush_hands_down_but_not_to_disk(graph: Graph) -> None:
    node = await graph.open(described(["wallet"], {"cache": {"no-flush": True}}))
    await node.path.write(64, memoryview(b"guest"), 0)
    await node.path.flush()
    assert model(node).data[:8] == b"header!!"
    assert not model(node).told("flush")


# --- zeroes and discards --------------------------------------------------------------------------------------


async def test_no_fallback_is_quick_or_changes_nothing(graph: Graph) -> None:
    for name, disk, offset, length, quick in (
        ("none", {"zeroes": False}, 0, 1024, False),
        ("unaligned", {"limits": {"request_alignment": 512}}, 100, 1024, False),
        ("aligned", {"limits": {"request_alignment": 512}}, 512, 1024, True),
        ("below", {"limits": {"write_zeroes_alignment": 4096}}, 0, 1024, False),
    ):
        node = await graph.open({"driver": "model", "size": SIZE, "node-name": name, **disk})
        await node.path.write(0, memoryview(b"x" * SIZE), 0)
        if quick:
            await node.path.write_zeroes(offset, length, RequestFlag.NO_FALLBACK)
            assert bytes(model(node).data[offset : offset + length]) == bytes(length)
            continue
        with pytest.raises(OSError, match=name) as caught:
            await node.path.write_zeroes(offset, length, RequestFlag.NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
        assert bytes(model(node).data) == b"x" * SIZE


async def test_zeroes_fall_back_to_data_in_bounded_pieces(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": 5 << 20, "zeroes": False})
    await node.path.write(0, memoryview(b"x" * (5 << 20)), 0)
    model(node).calls.clear()
    await node.path.write_zeroes(7, (5 << 20) - 9, 0)
    assert bytes(model(node).data) == b"x" * 7 + bytes((5 << 20) - 9) + b"xx"
    assert max(call.length for call in model(node).told("write")) <= BOUNCE_BYTES


async def test_other_failures_of_write_zeroes_are_reported(graph: Graph) -> None:
    node = await graph.open(described([], {}))
    model(node).failing = lambda call: call.what == "write_zeroes"
    with pytest.raises(OSError, match="model write_zeroes"):
        await node.path.write_zeroes(0, 512, 0)
    assert not model(node).told("write")


@pytest.mark.parametrize(
    ("detect", "discard", "expected"),
    [
        ("off", "unmap", Call("write", 512, 1024)),
        ("on", "unmap", Call("write_zeroes", 512, 1024)),
        ("unmap", "unmap", Call("write_zeroes", 512, 1024, int(RequestFlag.MAY_UNMAP))),
        ("unmap", "ignore", Call("write_zeroes", 512, 1024)),
    ],
)
async def test_detect_zeroes(graph: Graph, detect: str, discard: str, expected: Call) -> None:
    node = await graph.open(described([], {"detect-zeroes": detect, "discard": discard}))
    await node.path.write(512, memoryview(bytes(1024)), 0)
    assert model(node).calls == [expected]
    for at in (0, 1, 700, 1023):
        data = bytearray(1024)
        data[at] = 1
        model(node).calls.clear()
        await node.path.write(512, memoryview(data), 0)
        assert model(node).calls == [Call("write", 512, 1024)]


async def test_detect_zeroes_of_a_filter_that_is_left_out_otherwise(graph: Graph) -> None:
    node = await graph.open(described(["through"], {"detect-zeroes": "on"}))
    await node.path.write(0, memoryview(bytes(600_0)), 0)
    assert [call.what for call in model(node).calls] == ["write_zeroes"]


@pytest.mark.parametrize("layers", [[], ["through"], ["watcher"]])
@pytest.mark.parametrize("discard", ["ignore", "off", "unmap", "on"])
async def test_discard_policies(graph: Graph, layers: list[str], discard: str) -> None:
    node = await graph.open(described(layers, {"discard": discard}))
    await node.path.write(0, memoryview(b"x" * 1024), 0)
    await node.path.discard(0, 1024)
    passed = discard in ("unmap", "on")
    assert bytes(model(node).data[:1024]) == (bytes([GARBAGE]) if passed else b"x") * 1024


async def test_a_discard_spares_blocks_that_are_needed_in_part(graph: Graph) -> None:
    limits = {"discard_alignment": 4096, "request_alignment": 512}
    node = await graph.open(described([], {"discard": "unmap"}, limits=limits, size=3 * 4096 + 512))
    for offset, length, expected in (
        (1, 8190, []),
        (1, 8191, [(4096, 4096)]),
        (4096, 4095, []),
        (0, 3 * 4096 + 512, [(0, 3 * 4096 + 512)]),
        (9000, 4096 * 2, [(12288, 512)]),
        (12800, 0, []),
    ):
        model(node).calls.clear()
        await node.path.discard(offset, length)
        assert [(call.offset, call.length) for call in model(node).calls] == expected


async def test_a_driver_without_discard_is_no_failure(graph: Graph) -> None:
    node = await graph.open(described([], {"discard": "unmap"}, discards=False))
    await node.path.discard(0, 4096)
    model(node).options = model(node).options.__class__(discards=True)
    model(node).failing = lambda call: call.what == "discard"
    with pytest.raises(OSError, match="model discard"):
        await node.path.discard(0, 4096)


# --- who is on the way ----------------------------------------------------------------------------------------


def bound(node: Node) -> dict[str, Any]:
    """Whose functions requests to a node call: those of which object, under which name."""
    return {
        name: (function.__self__, function.__name__) if hasattr(function, "__self__") else function
        for name, function in node.path._asdict().items()
    }


async def test_a_filter_that_adds_nothing_is_left_out(graph: Graph) -> None:
    below = await graph.open({"driver": "model", "size": 512, "discard": "unmap", "node-name": "disk"})
    through = await graph.open({"driver": "through", "file": "disk", "discard": "unmap"})
    above = await graph.open({"driver": "through", "file": through, "discard": "unmap"})
    assert bound(above) == bound(through) == bound(below)
    assert through.path == below.path


async def test_a_filter_is_on_the_way_of_what_it_overrides(graph: Graph) -> None:
    below = await graph.open({"driver": "model", "size": 512, "node-name": "disk"})
    watcher = await graph.open({"driver": "watcher", "file": "disk", "discard": "unmap"})
    for name in ("read", "write", "write_zeroes", "discard", "flush"):
        assert getattr(watcher.path, name) != getattr(below.path, name), name
    assert watcher.path.cache == below.path.cache
    assert watcher.path.locate(0, 1) is None


async def test_policies_and_bitmaps_put_a_filter_on_the_way(graph: Graph) -> None:
    below = await graph.open({"driver": "model", "size": 512, "node-name": "disk"})
    policy = await graph.open({"driver": "through", "file": "disk"})
    assert policy.path.discard != below.path.discard, "a filter that drops discards"
    assert policy.path.write == below.path.write
    bitmap = await graph.open({"driver": "through", "file": "disk", "discard": "unmap"})
    await graph.add_bitmap(bitmap, "b")
    for name in ("write", "write_zeroes", "discard"):
        assert getattr(bitmap.path, name) != getattr(below.path, name)
    assert bitmap.path.read == below.path.read
    await graph.remove_bitmap(bitmap, "b")
    assert bitmap.path == below.path


async def test_where_bytes_lie_is_told_through_filters_that_add_nothing(graph: Graph) -> None:
    below = await graph.open({"driver": "model", "size": 512, "locates": True, "node-name": "disk"})
    through = await graph.open({"driver": "through", "file": "disk"})
    watcher = await graph.open({"driver": "watcher", "file": "disk"})
    assert below.path.locate(3, 4) == through.path.locate(3, 4) == (-1, 3, 4, 8, None)
    assert watcher.path.locate(3, 4) is None


async def test_tracking_keeps_reads_on_the_way(graph: Graph) -> None:
    node = await graph.open(described(["through"], {}))
    direct = node.path.read
    node.needs_tracking(on=True)
    assert node.path.read != direct
    backend = attach(graph, node)
    gate = model(node).gates["write"] = asyncio.Event()
    write = asyncio.create_task(backend.write(0, memoryview(b"x" * 100), RequestFlag.SERIALISING))
    read = asyncio.create_task(backend.read(50, memoryview(bytearray(10))))
    other = asyncio.create_task(backend.read(100, memoryview(bytearray(10))))
    await other
    assert sorted(node.tracked_requests) == [(0, 100, True), (50, 10, False)]
    assert [call.offset for call in model(node).told("read")] == [100]
    gate.set()
    await asyncio.gather(write, read)
    assert node.tracked_requests == []
    node.needs_tracking(on=False)
    assert node.path.read == direct


async def test_the_highest_offset_written(graph: Graph) -> None:
    node = await graph.open(described([], {}))
    for offset, length in ((100, 50), (0, 10), (700, 1)):
        await node.path.write(offset, memoryview(bytes(length)), 0)
    assert node.write_highest_offset == 701
    assert isinstance(node.driver, Model)
