"""`BlockBackend`: what it refuses, what it parks, what its error policy does, and what it counts."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pynbd.block.backend import BlockBackend, ErrorPolicy, IoStatus
from pynbd.block.drain import drained
from pynbd.block.extents import ChainExtent, Status
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestFlag
from pynbd.block.statistics import Operation
from tests.block.drivers import Call, Model, attach, driver, is_paused, model

SIZE = 1 << 16

Request = Callable[[BlockBackend], Awaitable[Any]]

REQUESTS: dict[Operation, Request] = {
    Operation.READ: lambda backend: backend.read(512, memoryview(bytearray(1024))),
    Operation.WRITE: lambda backend: backend.write(512, memoryview(bytes(1024))),
    Operation.WRITE_ZEROES: lambda backend: backend.write_zeroes(512, 1024),
    Operation.DISCARD: lambda backend: backend.discard(512, 1024),
    Operation.FLUSH: lambda backend: backend.flush(),
    Operation.CACHE: lambda backend: backend.cache(512, 1024),
    Operation.BLOCK_STATUS: lambda backend: backend.block_status(512, 1024),
}
WRITING = (Operation.WRITE, Operation.WRITE_ZEROES, Operation.DISCARD)
FAILABLE = [kind for kind in Operation if kind is not Operation.BLOCK_STATUS]


async def disk(graph: Graph, **policy: Any) -> tuple[BlockBackend, Model]:
    """A user of a model disk, and the disk."""
    node = await graph.open({"driver": "model", "size": SIZE, "discard": "unmap"})
    return attach(graph, node, **policy), driver(node)


async def turns(count: int = 20) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


def status(backend: BlockBackend) -> IoStatus:
    """The I/O status, for tests that ask several times."""
    return backend.io_status


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 70, 1)])
async def test_outside_the_disk(graph: Graph, offset: int, length: int) -> None:
    backend, storage = await disk(graph)
    data = memoryview(bytearray(length))
    for request in (
        backend.read(offset, data),
        backend.write(offset, data),
        backend.write_zeroes(offset, length),
        backend.discard(offset, length),
        backend.cache(offset, length),
        backend.block_status(offset, length),
    ):
        with pytest.raises(OSError, match=f"user: [a-z ]* at {offset} for {length} bytes is outside") as caught:
            await request
        assert caught.value.errno == errno.EINVAL
    assert not storage.calls
    assert not backend.in_flight


async def test_up_to_the_last_byte(graph: Graph) -> None:
    backend, _ = await disk(graph)
    await backend.write(0, memoryview(b"x" * SIZE))
    into = memoryview(bytearray(1))
    await backend.read(SIZE - 1, into)
    assert bytes(into) == b"x"
    await backend.read(SIZE, memoryview(bytearray()))


@pytest.mark.parametrize("kind", WRITING)
async def test_without_the_permission_to_write(graph: Graph, kind: Operation) -> None:
    node = await graph.open({"driver": "model", "size": SIZE, "discard": "unmap"})
    backend = attach(graph, node, "reader", Permission.CONSISTENT_READ)
    assert not backend.writable
    with pytest.raises(OSError, match=r"reader: .* through a read-only user") as caught:
        await REQUESTS[kind](backend)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError, match="resize without the permission") as caught:
        await backend.truncate(0)
    assert caught.value.errno == errno.EPERM
    assert not model(node).calls


@pytest.mark.parametrize("kind", Operation)
async def test_without_a_medium(kind: Operation) -> None:
    with pytest.raises(OSError, match="tray: no medium") as caught:
        await REQUESTS[kind](BlockBackend("tray"))
    assert caught.value.errno == errno.ENOMEDIUM


async def test_a_medium_is_taken_out_and_put_in(graph: Graph) -> None:
    backend, _ = await disk(graph)
    other = await graph.open({"driver": "model", "size": 512})
    graph.detach(backend)
    assert backend.locate(0, 1) is None
    with pytest.raises(OSError, match="no medium"):
        await backend.flush()
    graph.attach(backend, other)
    assert backend.size == 512


# --- what is counted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Operation)
async def test_statistics(graph: Graph, kind: Operation) -> None:
    backend, storage = await disk(graph)
    statistics = backend.statistics
    for _ in range(3):
        await REQUESTS[kind](backend)
    assert statistics.operations == [3 if k == kind else 0 for k in Operation]
    assert statistics.bytes[kind] == (0 if kind is Operation.FLUSH else 3 * 1024)
    assert statistics.time_ns[kind] > 0
    if kind in FAILABLE:
        storage.fails = 100
        if kind is Operation.FLUSH:
            backend.node.touch()
        for _ in range(2):
            with pytest.raises(OSError, match="model"):
                await REQUESTS[kind](backend)
        storage.fails = 0
        assert statistics.failed == [2 if k == kind else 0 for k in Operation]
    assert statistics.operations[kind] == 3
    told = statistics.as_dict()[kind.name.lower().replace("_", "-")]
    assert (told["operations"], told["failed"]) == (3, 2 if kind in FAILABLE else 0)
    assert not backend.in_flight


async def test_a_mistake_in_a_driver_is_reported_and_counted(graph: Graph) -> None:
    """Whatever the policy says: nobody can tell whether trying again would help."""
    for policy in ErrorPolicy:
        backend, storage = await disk(graph, on_read_error=policy, on_write_error=policy)

        def broken(call: Call) -> bool:
            raise ZeroDivisionError(call)

        storage.failing = broken
        for kind in (Operation.READ, Operation.WRITE, Operation.CACHE):
            with pytest.raises(ZeroDivisionError):
                await REQUESTS[kind](backend)
            assert backend.statistics.failed[kind] == 1
        storage.failing = None
        assert not backend.in_flight
        assert not is_paused(backend)


# --- the error policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAILABLE)
async def test_report(graph: Graph, kind: Operation) -> None:
    backend, storage = await disk(graph)
    told: list[tuple[Operation, ErrorPolicy]] = []
    backend.on_error.append(lambda problem, kind, policy: told.append((kind, policy)))
    storage.fails = 100
    with pytest.raises(OSError, match="model"):
        await REQUESTS[kind](backend)
    storage.fails = 0
    assert told == [(kind, ErrorPolicy.REPORT)]
    assert backend.io_status is IoStatus.OK
    assert not is_paused(backend)


@pytest.mark.parametrize("kind", FAILABLE)
async def test_ignore(graph: Graph, kind: Operation) -> None:
    backend, storage = await disk(graph, on_read_error=ErrorPolicy.IGNORE, on_write_error=ErrorPolicy.IGNORE)
    storage.fails = 100
    await REQUESTS[kind](backend)
    storage.fails = 0
    assert backend.statistics.failed[kind] == 1
    assert backend.statistics.operations[kind] == 0


@pytest.mark.parametrize("parked", [False, True])
async def test_an_ignored_read_shows_nothing_of_what_memory_held(graph: Graph, parked: bool) -> None:
    backend, storage = await disk(graph, on_read_error=ErrorPolicy.IGNORE)
    storage.fails = 100
    into = memoryview(bytearray(b"secret!!"))
    if parked:
        async with drained(backend.node):
            read = asyncio.create_task(backend.read(0, into))
            await turns()
        await read
    else:
        await backend.read(0, into)
    storage.fails = 0
    assert bytes(into) == bytes(8)


async def test_what_could_not_be_told_is_data(graph: Graph) -> None:
    node = await graph.open({"driver": "layer", "size": SIZE, "steps": 0})
    backend = attach(graph, node, on_read_error=ErrorPolicy.IGNORE)
    assert await backend.block_status(16, 100) == [ChainExtent(100, Status.DATA | Status.ALLOCATED, 1)]
    node = await graph.open({"driver": "layer", "size": SIZE, "steps": 0, "node-name": "mute"})
    with pytest.raises(OSError, match="mute: driver layer: block_status told nothing of 16"):
        await attach(graph, node).block_status(16, 100)


@pytest.mark.parametrize("kind", FAILABLE)
async def test_stop_and_resume(graph: Graph, kind: Operation) -> None:
    """A stopped request, and all that come later, wait; resumed they are tried whole, and nobody has noticed."""
    backend, storage = await disk(graph, on_read_error=ErrorPolicy.STOP, on_write_error=ErrorPolicy.STOP)
    storage.fails = 100
    request = asyncio.ensure_future(REQUESTS[kind](backend))
    await turns()
    later = [asyncio.ensure_future(REQUESTS[other](backend)) for other in Operation]
    await turns()
    assert is_paused(backend)
    assert status(backend) is IoStatus.FAILED
    assert not request.done()
    assert not any(task.done() for task in later)
    assert (backend.in_flight, backend.parked) == (0, 1 + len(later))
    assert len(storage.calls) == 1
    backend.resume()  # it still fails: stopped again
    await turns()
    assert is_paused(backend)
    assert not request.done()
    storage.fails = 0
    backend.resume()
    await asyncio.gather(request, *later)
    assert status(backend) is IoStatus.OK
    assert not is_paused(backend)
    assert backend.statistics.operations[kind] == 2
    assert not backend.parked


async def test_a_write_is_retried_whole(graph: Graph) -> None:
    backend, storage = await disk(graph, on_write_error=ErrorPolicy.STOP)
    storage.fails = 100
    write = asyncio.create_task(backend.write(100, memoryview(b"payload"), RequestFlag.FUA))
    await turns()
    storage.fails = 0
    backend.resume()
    await write
    assert bytes(storage.data[100:107]) == storage.durable[100:107] == b"payload"


@pytest.mark.parametrize(("code", "stops"), [(errno.ENOSPC, True), (errno.EIO, False)])
async def test_enospc(graph: Graph, code: int, stops: bool) -> None:
    backend, storage = await disk(graph, on_write_error=ErrorPolicy.ENOSPC)
    storage.fails, storage.errno = 100, code
    write = asyncio.ensure_future(REQUESTS[Operation.WRITE](backend))
    await turns()
    assert backend.paused == stops
    assert backend.io_status is (IoStatus.NOSPACE if stops else IoStatus.OK)
    storage.fails = 0
    if stops:
        backend.resume()
        await write
    else:
        with pytest.raises(OSError, match="model"):
            await write


async def test_reads_and_writes_have_policies_of_their_own(graph: Graph) -> None:
    backend, storage = await disk(graph, on_read_error=ErrorPolicy.IGNORE, on_write_error=ErrorPolicy.REPORT)
    storage.fails = 100
    await REQUESTS[Operation.READ](backend)
    await REQUESTS[Operation.CACHE](backend)
    for kind in (*WRITING, Operation.FLUSH):
        with pytest.raises(OSError, match="model"):
            await REQUESTS[kind](backend)
    storage.fails = 0


@pytest.mark.parametrize("policy", [ErrorPolicy.STOP, ErrorPolicy.IGNORE])
async def test_a_refusal_is_no_failure(graph: Graph, policy: ErrorPolicy) -> None:
    """A fast zero that can't be fast, a write through a reader: nothing to stop for, nothing to ignore."""
    node = await graph.open({"driver": "model", "size": SIZE, "zeroes": False})
    backend = attach(graph, node, on_write_error=policy)
    with pytest.raises(OSError, match="write_zeroes") as caught:
        await backend.write_zeroes(0, 512, RequestFlag.NO_FALLBACK)
    assert caught.value.errno == errno.ENOTSUP
    assert not is_paused(backend)


@pytest.mark.parametrize("policy", ErrorPolicy)
async def test_a_failed_resize_is_always_reported(graph: Graph, policy: ErrorPolicy) -> None:
    backend, storage = await disk(graph, on_write_error=policy)
    storage.fails = 100
    with pytest.raises(OSError, match="model truncate"):
        await backend.truncate(0)
    storage.fails = 0
    assert backend.size == SIZE
    assert not is_paused(backend)
    assert not backend.in_flight


async def test_whoever_is_told_of_an_error_may_resume_at_once(graph: Graph) -> None:
    backend, storage = await disk(graph, on_read_error=ErrorPolicy.STOP)

    def tell(problem: OSError, kind: Operation, policy: ErrorPolicy) -> None:
        storage.fails = 0
        backend.resume()

    backend.on_error.append(tell)
    storage.fails = 100
    await REQUESTS[Operation.READ](backend)
    assert backend.statistics.failed[Operation.READ] == 1


# --- parking --------------------------------------------------------------------------------------------------


async def test_parked_requests_look_at_the_disk_anew(graph: Graph) -> None:
    backend, storage = await disk(graph)
    async with drained(backend.node):
        outside = asyncio.create_task(backend.write(SIZE - 512, memoryview(bytes(512))))
        inside = asyncio.create_task(backend.write(0, memoryview(b"x")))
        await turns()
        await backend.node.truncate(512)
        assert backend.size == 512
    await inside
    with pytest.raises(OSError, match="outside the disk of 512"):
        await outside
    assert len(storage.data) == 512


async def test_a_medium_that_is_taken_out_of_parked_requests(graph: Graph) -> None:
    backend, _ = await disk(graph)
    async with drained(backend.node):
        read = asyncio.create_task(backend.read(0, memoryview(bytearray(1))))
        await turns()
        graph.detach(backend)
    with pytest.raises(OSError, match="no medium"):
        await read


async def test_shutdown_ends_what_is_parked(graph: Graph) -> None:
    backend, storage = await disk(graph, on_write_error=ErrorPolicy.STOP)
    storage.failing = lambda call: call.what == "write"
    gate = storage.gates["read"] = asyncio.Event()
    reading = asyncio.ensure_future(REQUESTS[Operation.READ](backend))
    requests = [asyncio.ensure_future(REQUESTS[Operation.WRITE](backend))]
    await turns()
    requests += [asyncio.ensure_future(REQUESTS[kind](backend)) for kind in Operation]
    resize = asyncio.create_task(backend.truncate(0))
    await turns()
    parked = [*requests, resize]
    assert backend.parked == len(parked)
    assert backend.in_flight == 1
    backend.shutdown()
    for result in await asyncio.gather(*parked, return_exceptions=True):
        assert isinstance(result, OSError)
        assert result.errno == errno.ESHUTDOWN
    assert backend.locate(0, 1) is None
    for kind in Operation:
        with pytest.raises(OSError, match="shutting down") as caught:
            await REQUESTS[kind](backend)
        assert caught.value.errno == errno.ESHUTDOWN
    # What was in flight runs to its end all the same.
    gate.set()
    await reading
    assert backend.statistics.operations[Operation.READ] == 1
    storage.failing = None


async def test_where_bytes_lie_is_told_only_while_requests_may_start(graph: Graph) -> None:
    node = await graph.open({"driver": "model", "size": SIZE, "locates": True})
    backend = attach(graph, node, on_read_error=ErrorPolicy.STOP)
    assert backend.locate(0, 1) is not None
    async with drained(node):
        assert backend.locate(0, 1) is None
    assert backend.locate(0, 1) is not None
    model(node).fails = 100
    read = asyncio.ensure_future(REQUESTS[Operation.READ](backend))
    await turns()
    assert backend.locate(0, 1) is None
    model(node).fails = 0
    backend.resume()
    await read
    assert backend.locate(0, 1) is not None
    backend.shutdown()
    assert backend.locate(0, 1) is None


@pytest.mark.parametrize("kind", [Operation.WRITE, Operation.WRITE_ZEROES])
async def test_without_a_write_cache_every_write_is_durable(graph: Graph, kind: Operation) -> None:
    backend, storage = await disk(graph)
    backend.write_cache = False
    await REQUESTS[kind](backend)
    assert storage.calls[-1].what == "flush"


async def test_no_driver_gets_a_request_for_nothing(graph: Graph) -> None:
    """At any place, the end included; it is counted all the same."""
    for tree in ({"driver": "model", "size": SIZE}, {"driver": "watcher", "file": {"driver": "model", "size": SIZE}}):
        backend = attach(graph, await graph.open(tree))
        for offset in (0, 5, SIZE):
            await backend.read(offset, memoryview(bytearray()))
            await backend.write(offset, memoryview(b""), RequestFlag.FUA)
            await backend.write_zeroes(offset, 0)
            await backend.discard(offset, 0)
        assert not [call for call in model(backend.node).calls if call.what != "flush"]
        assert backend.statistics.operations[Operation.READ] == 3
