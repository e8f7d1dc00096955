"""What requests ask for, and the replies that come of it."""

import errno
import logging
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_protocol.constants import Command, CommandFlag, ReplyMode
from nbd_protocol.transmission import Request, replies_for
from pynbd.block.extents import ChainExtent, Status
from pynbd.server.execution import HOLE_READ_BYTES, SMALLEST_HOLE_BYTES, Execution, describe, runs
from tests.restless import RESTLESS, restless
from tests.server.clients import CHUNKED, MODES, Served, serving

KIB = 1 << 10


@given(st.lists(st.tuples(st.integers(1, 20_000), st.booleans()), min_size=1, max_size=30))
def test_law_of_runs(pieces: list[tuple[int, bool]]) -> None:
    extents = [ChainExtent(length, Status.ZERO if zero else Status.DATA, 1) for length, zero in pieces]
    found = runs(extents)
    assert sum(length for length, _ in found) == sum(length for length, _ in pieces)
    assert all(one[1] != other[1] for one, other in pairwise(found))
    assert all(length >= SMALLEST_HOLE_BYTES for length, zero in found if zero)
    holes = [zero for length, zero in pieces for _ in range(length)]
    told = [zero for length, zero in found for _ in range(length)]
    assert all(hole for hole, zero in zip(holes, told, strict=True) if zero)


def request(kind: int, offset: int = 0, length: int = 0, flags: int = 0) -> Request:
    return Request(kind, flags, 7, offset, length)


def test_requests_are_described_for_the_log() -> None:
    assert describe(request(Command.WRITE, 5, 3)) == "WRITE of 3 bytes at 5"
    assert describe(request(200, 5, 7)) == "command 200 of 7 bytes at 5"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving({"driver": RESTLESS, "holes": True, "fill": "zero", "discard": "unmap"}) as served:
        yield served


def execution_for(served: Served, mode: ReplyMode) -> Execution:
    return Execution(
        served.server.exports[""], replies_for(mode), {5: "base:allocation"}, logging.getLogger("pynbd").warning
    )


def length_of(items: list[Any]) -> int:
    return sum(len(item) for item in items)


@pytest.mark.parametrize("mode", MODES)
async def test_each_command_reaches_the_driver(served: Served, mode: ReplyMode) -> None:
    execution, driver = execution_for(served, mode), restless(served.node())
    done = replies_for(mode).done(request(Command.FLUSH))
    expected = {Command.FLUSH: "flush", Command.TRIM: "discard", Command.WRITE_ZEROES: "write_zeroes"}
    for command, call in expected.items():
        driver.calls.clear()
        driver.data[0] = 1
        await execution.backend.write(512, memoryview(b"x"))
        asked = request(command, 0, 0 if command is Command.FLUSH else 4096)
        (answer,) = await execution.execute(asked)
        assert len(answer) == len(done)
        assert call in [name for name, _, _ in driver.calls]
    driver.calls.clear()
    for command in (Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
        await execution.execute(request(command))
    assert driver.calls == []  # nothing was to be done


@pytest.mark.parametrize("mode", CHUNKED)
async def test_only_large_reads_tell_holes(served: Served, mode: ReplyMode) -> None:
    execution = execution_for(served, mode)
    for length in (1, HOLE_READ_BYTES - 1):
        assert length_of(await execution.read(request(Command.READ, 0, length))) > length
    assert length_of(await execution.read(request(Command.READ, 0, HOLE_READ_BYTES))) < 100
    with_df = request(Command.READ, 0, HOLE_READ_BYTES, CommandFlag.DF)
    assert length_of(await execution.read(with_df)) > HOLE_READ_BYTES
    # A hole that is too small, and some data, make one chunk.
    restless(served.node()).data[: 64 * KIB] = b"x" * 64 * KIB
    restless(served.node()).data[512:1024] = bytes(512)
    items = await execution.read(request(Command.READ, 0, HOLE_READ_BYTES))
    assert len(items) == 2
    assert length_of(items) > HOLE_READ_BYTES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [None, 0, errno.EIO, errno.ENOTSUP, 12345])
async def test_any_error_becomes_a_reply(served: Served, mode: ReplyMode, code: int | None) -> None:
    execution = execution_for(served, mode)
    problem = OSError("only words") if code is None else OSError(code, b"no text")
    answer = execution.error(request(Command.READ, 0, 512), problem)
    assert isinstance(answer, bytes)
    zeroes = request(Command.WRITE_ZEROES, 0, 512, CommandFlag.FAST_ZERO)
    assert isinstance(execution.error(zeroes, problem), bytes)


@pytest.mark.parametrize("mode", CHUNKED)
async def test_block_status_has_a_chunk_for_each_context(served: Served, mode: ReplyMode) -> None:
    (chunk,) = await execution_for(served, mode).execute(request(Command.BLOCK_STATUS, 0, 4096))
    assert isinstance(chunk, bytes)
    assert (5).to_bytes(4, "big") in chunk


async def test_what_the_rules_should_have_refused_is_a_mistake(served: Served) -> None:
    with pytest.raises(AssertionError, match="was let through"):
        await execution_for(served, ReplyMode.SIMPLE).execute(request(99))
