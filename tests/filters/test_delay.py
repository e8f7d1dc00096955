"""`delay`: who waits, how long, and who is left alone."""

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.requests import RequestFlag
from pynbd.filters.delay import MAX_DELAY_S, parse_duration

MEMORY = {"driver": "memory", "size": "1M", "discard": "unmap"}


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await graph.close_all()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits asked for, in seconds. Nobody waits for real."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def note(delay_s: float) -> None:
        asked.append(delay_s)
        await sleep(0)

    monkeypatch.setattr("pynbd.filters.delay.asyncio.sleep", note)
    return asked


async def delayed(graph: Graph, **options: object) -> Node:
    return await graph.open({"driver": "delay", "file": MEMORY, "discard": "unmap", **options})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("1", 1), ("1.5", 1.5), ("2s", 2), ("50ms", 0.05), ("20us", 20e-6), ("20μs", 20e-6), ("300ns", 3e-7)],
        *[("1m", 60), (" 5MS ", 0.005), ("0", 0), (0.25, 0.25), (3, 3)],
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text, "read") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1", "-5ms", "5h", "1e9", "inf", "nan", "5 ms s", "ms", "1..5", 1e300])
def test_wrong_durations_name_the_option(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"^read: "):
        parse_duration(text, "read")


@given(st.text())
def test_any_text_is_a_duration_in_range_or_an_error(text: str) -> None:
    try:
        seconds = parse_duration(text, "read")
    except ValueError:
        return
    assert 0 <= seconds <= MAX_DELAY_S


async def test_a_wrong_duration_is_an_option_error(graph: Graph) -> None:
    with pytest.raises(OptionError, match=r"driver 'delay': write: '50parsecs' is no duration"):
        await delayed(graph, write="50parsecs")
    assert not graph.nodes


async def test_each_kind_waits_its_own_time(graph: Graph, waits: list[float]) -> None:
    node = await delayed(graph, read="1ms", write="2ms", zero="3ms", trim="4ms", flush="5ms", prefetch="6ms")
    path = node.path
    for request, expected in (
        (path.read(0, memoryview(bytearray(512)), 0), 1e-3),
        (path.write(0, memoryview(bytes(512)), 0), 2e-3),
        (path.write_zeroes(0, 512, 0), 3e-3),
        (path.discard(0, 512), 4e-3),
        (path.flush(), 5e-3),
        (path.cache(0, 512), 6e-3),
    ):
        waits.clear()
        await request
        assert waits == [pytest.approx(expected)]


async def test_extents_open_and_close(graph: Graph, waits: list[float]) -> None:
    node = await delayed(graph, extents="1ms", open="2ms", close="3ms")
    await node.block_status(0, 1 << 20)
    await graph.close(node)
    assert waits == pytest.approx([2e-3, 1e-3, 3e-3])


async def test_jitter_adds_up_to_itself(graph: Graph, waits: list[float]) -> None:
    node = await delayed(graph, read="10ms", jitter="5ms")
    for _ in range(100):
        await node.path.read(0, memoryview(bytearray(1)), 0)
    assert 0.010 <= min(waits) < max(waits) <= 0.015


async def test_jitter_alone_delays_nothing(graph: Graph, waits: list[float]) -> None:
    node = await delayed(graph, jitter="5ms")
    assert node.path == node.children["file"].node.path
    assert not waits


async def test_what_does_not_wait_is_left_out_of_the_path(graph: Graph) -> None:
    node = await delayed(graph, write="1ms")
    below = node.children["file"].node.path
    assert node.path.write != below.write
    assert not node.path.write_now(0, memoryview(b"x"))
    assert node.path.fill_now(0, 1, lambda _: pytest.fail("it does not wait")) is None
    assert node.path.place_writes() is None
    apart = {name: getattr(below, name) for name in ("write", "write_now", "place_writes", "fill_now")}
    assert node.path._replace(**apart) == below
    reader = await delayed(graph, read="1ms")
    assert reader.path.locate(0, 512) is None
    assert not reader.driver.located_for_good()
    assert reader.driver.hold_located(lambda: None) is None


async def test_zeroes_that_must_be_quick(graph: Graph, waits: list[float]) -> None:
    quick = int(RequestFlag.NO_FALLBACK)
    for options in ({"zero": "1ms", "fast-zero": "off"}, {"fast-zero": "off"}):
        node = await delayed(graph, **options)
        waits.clear()
        with pytest.raises(OSError, match="not quick") as failure:
            await node.path.write_zeroes(0, 4096, quick)
        assert failure.value.errno == errno.ENOTSUP
        assert not waits
        await node.path.write_zeroes(0, 4096, 0)
    node = await delayed(graph, zero="1ms")
    waits.clear()
    await node.path.write_zeroes(0, 4096, quick)
    assert waits == [pytest.approx(1e-3)]


async def test_requests_wait_beside_one_another(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await delayed(graph, read="1ms")
    gate = asyncio.Event()
    waiting = 0

    async def wait_for_gate(delay_s: float) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 10:
            gate.set()
        await gate.wait()

    monkeypatch.setattr("pynbd.filters.delay.asyncio.sleep", wait_for_gate)
    await asyncio.gather(*(node.path.read(i * 512, memoryview(bytearray(512)), 0) for i in range(10)))
    assert waiting == 10
