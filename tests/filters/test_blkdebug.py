"""`blkdebug`: rules, states, break points, limits, and QEMU's spellings of them."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError, OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.filters.blkdebug import BlkDebug
from pynbd.filters.blkdebug_rules import EVENTS, Engine, InjectError, IoType, SetState, parse_config
from tests.restless import RESTLESS, restless

SIZE = 1 << 20
MEMORY = {"driver": "memory", "size": SIZE, "discard": "unmap"}

BLKDEBUG_EVENTS_OF_QEMU_10 = 48


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    for node in graph.nodes.values():
        if isinstance(node.driver, BlkDebug):
            node.driver.engine = Engine()  # or the last flush would fail, too
    await graph.close_all()


async def debugged(graph: Graph, **options: object) -> Node:
    return await graph.open({"driver": "blkdebug", "image": MEMORY, "discard": "unmap", **options})


def driver(node: Node) -> BlkDebug:
    return cast(BlkDebug, node.driver)


Request = Callable[[Node], Coroutine[Any, Any, object]]

REQUESTS: dict[IoType, Request] = {
    "read": lambda node: node.path.read(4096, memoryview(bytearray(512)), 0),
    "write": lambda node: node.path.write(4096, memoryview(b"x" * 512), 0),
    "write-zeroes": lambda node: node.path.write_zeroes(4096, 512, 0),
    "discard": lambda node: node.path.discard(4096, 512),
    "flush": lambda node: node.path.flush(),
    "block-status": lambda node: node.block_status(4096, 512),
}


async def failing(node: Node) -> dict[IoType, int]:
    """The errno of each kind of request that fails."""
    failed: dict[IoType, int] = {}
    for kind, request in REQUESTS.items():
        node.touch()  # or a flush would have nothing to do
        try:
            await request(node)
        except OSError as problem:
            failed[kind] = (problem.errno or 0) if f"injected into {kind}" in str(problem) else -1
    return failed


# --- rules -----------------------------------------------------------------------------------------------------


async def test_without_rules_all_passes(graph: Graph) -> None:
    node = await debugged(graph)
    assert await failing(node) == {}
    found = bytearray(512)
    await node.path.read(4096, memoryview(found), 0)
    assert found == bytes(512)  # the discard came last
    assert node.path.locate(0, 512) is None


async def test_event_none_is_in_force_from_the_beginning(graph: Graph) -> None:
    node = await debugged(graph, **{"inject-error": [{"event": "none"}]})
    assert await failing(node) == dict.fromkeys(["read", "write", "write-zeroes", "discard", "flush"], errno.EIO)


@pytest.mark.parametrize("kind", REQUESTS)
async def test_iotype_fails_that_kind_alone(graph: Graph, kind: IoType) -> None:
    node = await debugged(graph, **{"inject-error": [{"event": "none", "iotype": kind, "errno": 28}]})
    assert await failing(node) == {kind: 28}


@pytest.mark.parametrize(
    ("place", "touched"),
    [
        *[({"sector": 8}, True), ({"sector": 7}, False), ({"sector": 9}, False)],
        *[({"offset": 4607}, True), ({"offset": 4608}, False), ({"offset": "4k"}, True)],
    ],
)
async def test_sector_and_offset(graph: Graph, place: dict[str, object], touched: bool) -> None:
    node = await debugged(graph, **{"inject-error": [{"event": "none", "iotype": "read", **place}]})
    assert (await failing(node) == {"read": errno.EIO}) is touched


async def test_a_flush_touches_no_sector(graph: Graph) -> None:
    node = await debugged(graph, **{"inject-error": [{"event": "none", "sector": 0}]})
    node.touch()
    await node.path.flush()


async def test_once(graph: Graph) -> None:
    rule = {"event": "none", "iotype": "write", "once": True}
    node = await debugged(graph, **{"inject-error": [rule]})
    assert await failing(node) == {"write": errno.EIO}
    assert await failing(node) == {}


async def test_immediately_lets_nobody_run_first(graph: Graph) -> None:
    for immediately in (True, False):
        rule = {"event": "none", "iotype": "read", "immediately": immediately}
        node = await debugged(graph, **{"inject-error": [rule]})
        request = REQUESTS["read"](node)
        if immediately:
            with pytest.raises(OSError, match="injected"):
                request.send(None)
        else:
            request.send(None)
            request.close()


async def test_errno_0_shields(graph: Graph) -> None:
    rules = [{"event": "none", "iotype": "read", "errno": 0}, {"event": "none"}]
    node = await debugged(graph, **{"inject-error": rules})
    assert "read" not in await failing(node)
    assert "write" in await failing(node)


async def test_events_without_a_format_above(graph: Graph) -> None:
    """A disk on blkdebug alone: it announces the core events itself."""
    for event, first in (("read_aio", "read"), ("write_aio", "write"), ("flush_to_disk", "flush")):
        node = await debugged(graph, **{"inject-error": [{"event": event, "once": True}]})
        assert await failing(node) == {first: errno.EIO}
    node = await debugged(graph, **{"inject-error": [{"event": "pwritev_zero", "once": True}]})
    assert await failing(node) == {"write-zeroes": errno.EIO}
    node = await debugged(graph, **{"inject-error": [{"event": "flush_to_os", "once": True}]})
    assert await failing(node) == {"flush": errno.EIO}


async def test_a_rule_stays_in_force_until_the_next_event_with_rules(graph: Graph) -> None:
    rules = [{"event": "write_aio", "errno": 5}, {"event": "read_aio", "errno": 0}]
    node = await debugged(graph, **{"inject-error": rules})
    assert await failing(node) == dict.fromkeys(["write", "write-zeroes", "discard", "flush"], errno.EIO)
    await REQUESTS["read"](node)
    await REQUESTS["discard"](node)


async def test_states(graph: Graph) -> None:
    """The second write after the first fails: the example of QEMU's document."""
    node = await debugged(
        graph,
        **{
            "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
            "inject-error": [{"event": "write_aio", "state": 2, "iotype": "write", "once": True}],
        },
    )
    write = REQUESTS["write"]
    await write(node)
    with pytest.raises(OSError, match="injected"):
        await write(node)
    assert driver(node).engine.state == 2
    await write(node)


async def test_a_failed_request_does_not_reach_the_child(graph: Graph) -> None:
    image = await graph.open({"driver": RESTLESS})
    node = await debugged(graph, image=image.name, **{"inject-error": [{"event": "none"}]})
    await failing(node)
    assert restless(image).calls == []


def test_engine_takes_a_bounded_number_of_rules() -> None:
    with pytest.raises(OptionError, match="5000 rules are too many"):
        Engine().add([], [SetState(event="pwritev", new_state=1)] * 5000)


def test_new_state_counts_from_the_next_event() -> None:
    engine = Engine()
    engine.add(
        [InjectError(event="l2_load", state=2)],
        [SetState(event="l2_load", state=1, new_state=2), SetState(event="l2_load", state=2, new_state=3)],
    )
    engine.trigger("l2_load")
    assert (engine.state, engine.in_force) == (2, [])
    engine.trigger("l2_load")
    assert engine.state == 3
    assert [rule.state for rule in engine.in_force] == [2]


def test_all_events_of_qemu_are_known() -> None:
    assert len(EVENTS) == BLKDEBUG_EVENTS_OF_QEMU_10
    assert {"l1_shrink_free_l2_clusters", "refblock_alloc_switch_table", "cluster_alloc_space"} <= EVENTS


# --- the block layer's own events -------------------------------------------------------------------------------


def heard(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The events that blkdebug hears from now on."""
    events: list[str] = []
    trigger = driver(node).engine.trigger

    def note(event: str) -> list[str]:
        events.append(event)
        return trigger(event)

    monkeypatch.setattr(driver(node).engine, "trigger", note)
    return events


async def test_read_modify_write_is_announced(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await debugged(graph, align=4096)
    events = heard(node, monkeypatch)
    await node.path.write(1000, memoryview(b"x" * 8000), 0)
    assert [event for event in events if "rmw" in event] == [
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
    ]


async def test_raw_above_announces_each_event_once(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await debugged(graph)
    raw = await graph.open({"driver": "raw", "file": node.name})
    events = heard(node, monkeypatch)
    for kind, expected in (
        ("read", ["read_aio"]),
        ("write", ["write_aio", "pwritev", "pwritev_done"]),
        ("flush", ["flush_to_os", "flush_to_disk"]),
    ):
        events.clear()
        await REQUESTS[cast(IoType, kind)](raw)
        assert events == expected


async def test_events_pass_through_filters_to_the_next_blkdebug(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = await debugged(graph)
    upper = await graph.open({"driver": "blkdebug", "image": {"driver": "nofilter", "file": lower.name}})
    below, above = heard(lower, monkeypatch), heard(upper, monkeypatch)
    upper.driver.debug_event("l2_load")
    assert below == above == ["l2_load"]


# --- break points -----------------------------------------------------------------------------------------------


async def test_suspend_and_resume(graph: Graph) -> None:
    node = await debugged(graph)
    debug = driver(node)
    debug.breakpoint("write_aio", "A")
    assert not debug.is_suspended("A")
    held = asyncio.create_task(REQUESTS["write"](node))
    await debug.wait_suspended("A")
    assert debug.is_suspended("A")
    await REQUESTS["write"](node)  # a break point is heeded once: this one overtakes
    found = bytearray(4)
    await node.path.read(4096, memoryview(found), 0)
    assert found == b"xxxx"
    assert not held.done()
    debug.resume("A")
    await held
    assert not debug.is_suspended("A")


async def test_wait_suspended_waits(graph: Graph) -> None:
    node = await debugged(graph)
    debug = driver(node)
    waiter = asyncio.create_task(debug.wait_suspended("B"))
    debug.breakpoint("read_aio", "A")
    debug.breakpoint("write_aio", "B")
    first = asyncio.create_task(REQUESTS["read"](node))
    await debug.wait_suspended("A")
    assert not waiter.done()
    second = asyncio.create_task(REQUESTS["write"](node))
    await waiter
    debug.resume("B")
    debug.resume("A")
    await asyncio.gather(first, second)


async def test_requests_of_one_name_go_in_the_order_they_came(graph: Graph) -> None:
    node = await debugged(graph)
    debug = driver(node)
    debug.breakpoint("read_aio", "A")
    first = asyncio.create_task(REQUESTS["read"](node))
    await debug.wait_suspended("A")
    debug.breakpoint("write_aio", "A")
    second = asyncio.create_task(REQUESTS["write"](node))
    await asyncio.sleep(0)
    debug.resume("A")
    await first
    assert not second.done()
    debug.resume("A")
    await second


async def test_a_format_s_event_holds_the_request_that_it_announces(graph: Graph) -> None:
    node = await debugged(graph)
    raw = await graph.open({"driver": "raw", "file": node.name})
    debug = driver(node)
    debug.breakpoint("read_aio", "A")
    held = asyncio.create_task(REQUESTS["read"](raw))
    await debug.wait_suspended("A")
    assert not held.done()
    debug.resume("A")
    await held


async def test_after_a_write_is_a_point_too(graph: Graph) -> None:
    node = await debugged(graph)
    debug = driver(node)
    debug.breakpoint("pwritev_done", "A")
    held = asyncio.create_task(REQUESTS["write"](node))
    await debug.wait_suspended("A")
    found = bytearray(4)
    await node.path.read(4096, memoryview(found), 0)
    assert found == b"xxxx"
    assert not held.done()
    debug.resume("A")
    await held


async def test_remove_breakpoint_forgets_and_lets_go(graph: Graph) -> None:
    node = await debugged(graph)
    debug = driver(node)
    debug.breakpoint("write_aio", "A")
    debug.breakpoint("read_aio", "A")
    held = asyncio.create_task(REQUESTS["write"](node))
    await debug.wait_suspended("A")
    debug.remove_breakpoint("A")
    await held
    await REQUESTS["read"](node)


async def test_wrong_names_of_break_points(graph: Graph) -> None:
    node = await debugged(graph)
    with pytest.raises(BlockError, match="no request is suspended under the name 'A'"):
        driver(node).resume("A")
    with pytest.raises(OptionError, match="event 'read' is none of: cluster_alloc"):
        driver(node).breakpoint(cast(Any, "read"), "A")


# --- limits and permissions --------------------------------------------------------------------------------------


async def test_limits_split_and_align(graph: Graph) -> None:
    image = await graph.open({"driver": RESTLESS, "discard": "unmap"})
    node = await debugged(
        graph,
        image=image.name,
        align=512,
        **{
            "max-transfer": "4k",
            "opt-write-zero": "2k",
            "max-write-zero": "8k",
            "opt-discard": "1k",
            "max-discard": "2k",
        },
    )
    calls = restless(image).calls
    await node.path.read(0, memoryview(bytearray(8192)), 0)
    assert calls == [("read", 0, 4096), ("read", 4096, 4096)]
    calls.clear()
    await node.path.write(512, memoryview(bytes(4608)), 0)
    assert calls == [("write", 512, 4096 - 512 + 512), ("write", 4608, 512)]
    calls.clear()
    await node.path.write_zeroes(1024, 16384, 0)
    assert calls == [
        ("write_zeroes", 2048, 8192),
        ("write_zeroes", 10240, 6144),
        ("write", 1024, 1024),
        ("write", 16384, 1024),
    ]
    calls.clear()
    await node.path.discard(512, 4096)
    assert calls == [("discard", 1024, 2048), ("discard", 3072, 1024)]
    calls.clear()
    await node.path.read(100, memoryview(bytearray(100)), 0)
    assert calls == [("read", 0, 512)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"align": 3000}, "align: 3000 is no power of two"),
        ({"align": "128M"}, "align: 134217728 is no power of two up to 67108864"),
        ({"align": 4096, "max-transfer": 6000}, "max-transfer: 6000 is no multiple of 4096"),
        ({"opt-write-zero": 3000, "max-write-zero": 4000}, "max-write-zero: 4000 is no multiple of 3000"),
        ({"opt-discard": 100, "align": 512}, "opt-discard: 100 is no multiple of 512"),
        ({"max-transfer": "2G"}, "expected `int` <= 2147483647"),
        ({"take-child-perms": ["everything"]}, "take-child-perms.0: 'everything' is not one of"),
        ({"inject-error": [{"event": "read"}]}, r"inject-error.0.event: 'read' is not one of"),
        ({"inject-error": [{"errno": 5}]}, r"inject-error.0.event: driver 'blkdebug' needs this option"),
        ({"inject-error": [{"event": "none", "errno": -5}]}, r"expected `int` >= 0"),
        ({"inject-error": [{"event": "none", "sector": 1, "offset": 1}]}, "sector or offset, not both"),
        ({"set-state": [{"event": "none", "new-state": 1}]}, r"set-state.0.new-state: .*did you mean 'new_state'"),
        ({"file": MEMORY}, "image: driver 'blkdebug' has this node under the name 'file' already"),
    ],
)
async def test_wrong_options(graph: Graph, options: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        await debugged(graph, **options)
    assert not graph.nodes


async def test_permissions_taken_and_not_shared(graph: Graph) -> None:
    image = await graph.open(MEMORY)
    options = {"take-child-perms": ["write"], "unshare-child-perms": ["resize", "write"]}
    await debugged(graph, image=image.name, **options)
    reader, writer = BlockBackend("reader"), BlockBackend("writer")
    graph.attach(reader, image)
    with pytest.raises(PermissionConflict, match="needs write"):
        graph.attach(writer, image, Permission.WRITE)
    with pytest.raises(PermissionConflict, match="needs write"):
        graph.attach(writer, image, Permission.NONE, Permission.ALL & ~Permission.WRITE)
    graph.detach(reader)


# --- spellings ---------------------------------------------------------------------------------------------------

CONFIG = """
# fail the second write
[set-state]
  event = "write_aio"
state = "1"
new_state = "2"

[inject-error "second"]
event = "write_aio"
state = 2
errno = "28"
iotype = "write"
once = "on"
"""


def test_config_file() -> None:
    inject, states = parse_config(CONFIG, "rules.conf")
    assert states == [SetState(event="write_aio", state=1, new_state=2)]
    assert inject == [InjectError(event="write_aio", state=2, errno=28, iotype="write", once=True)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("event = none", r"rules:1: expected \[inject-error\]"),
        ("[inject-error]\nevent none", r"rules:2: expected .*: 'event none'"),
        ("\n[inject]\n", r"rules:2: section 'inject' is neither"),
        ("[inject-error]\nevent = never", r"rules:1: event: 'never' is not one of"),
        ("[inject-error]\nevnt = none", r"rules:1: evnt: .*did you mean 'event'"),
        ("[set-state]\nevent = none", r"rules:1: new_state: .*needs this option"),
    ],
)
def test_wrong_config_names_file_and_line(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_config(text, "rules")


async def test_config_by_option_and_by_name(graph: Graph, tmp_path: Path) -> None:
    config, disk = tmp_path / "rules.conf", tmp_path / "disk.raw"
    config.write_text(CONFIG)
    disk.write_bytes(bytes(SIZE))
    by_option = await debugged(graph, config=str(config))
    by_name = await graph.open(f"blkdebug:{config}:{disk}", format="raw")
    for node in (by_option, by_name):
        await REQUESTS["write"](node)
        with pytest.raises(OSError, match="injected into write") as failure:
            await REQUESTS["write"](node)
        assert failure.value.errno == 28
        await REQUESTS["write"](node)


async def test_name_without_config(graph: Graph, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(SIZE))
    node = await graph.open(f"blkdebug::{disk}")
    assert node.driver.name == "raw"
    assert node.children["file"].node.driver.name == "blkdebug"
    for wrong in ("blkdebug:", "blkdebug:config", "blkdebug:config:"):
        with pytest.raises(OptionError, match="expected blkdebug:CONFIG:IMAGE"):
            await graph.open(wrong)


async def test_missing_config(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no-such-file: No such file or directory"):
        await debugged(graph, config=str(tmp_path / "no-such-file"))
    assert not graph.nodes


async def test_dotted_keys(graph: Graph) -> None:
    node = await graph.open(
        "driver=blkdebug,inject-error.0.event=read_aio,inject-error.0.errno=5,inject-error.0.once=on,"
        "inject-error.1.event=none,inject-error.1.iotype=flush,set-state.0.event=read_aio,set-state.0.new_state=7,"
        "image.driver=memory,image.size=1M"
    )
    assert await failing(node) == {"read": 5}
    assert driver(node).engine.state == 7


def test_an_image_may_not_name_blkdebug() -> None:
    with pytest.raises(OptionError, match="can't be named inside an image"):
        Graph().describe("blkdebug::disk.raw", trusted=False)
