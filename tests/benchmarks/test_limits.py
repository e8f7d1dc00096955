"""The machine's limit is measured with the system calls that it is said to be measured with."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.benchmarks.cells import CELLS
from tests.benchmarks.limits import MOST_BOTH_WAYS, REPLY_BYTES, Exchange, answer, ask, exchange_of, limit
from tests.benchmarks.loads import Fio, Load, Memory, QemuImgBench, Start

SIZE_BYTES = 1 << 20
BYTE = 0xAB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes([BYTE]) * SIZE_BYTES)
    return path


def test_exchange_is_what_the_client_asks_for() -> None:
    """Half of what is under way each time, one request where there is only one."""
    assert exchange_of(Fio("randread", 4096, 1)) == Exchange(4096, 1, 0, 1)
    assert exchange_of(Fio("randread", 4096, 32)) == Exchange(4096, 16, 0, 2)
    assert exchange_of(Fio("randwrite", 1 << 20, 8, flush_every=32)) == Exchange(1 << 20, 0, 4, 2, 32)
    assert exchange_of(QemuImgBench(4096, 32, writes=True, durable=True)) == Exchange(4096, 0, 16, 2, 1)
    assert exchange_of(Memory(under_load=True)) is None


def test_both_sides_never_wait_for_each_other() -> None:
    """What is under way both ways is far less than the sockets' buffers hold (212,992 bytes by default)."""
    exchanges = [exchange for cell in CELLS if (exchange := exchange_of(cell.load))]
    mixed = [exchange for exchange in exchanges if exchange.reads and exchange.writes]
    assert mixed
    for exchange in mixed:
        assert exchange.requests == MOST_BOTH_WAYS
        assert exchange.under_way * max(exchange.asked_bytes, exchange.answered_bytes) < 212_992


@pytest.mark.parametrize("block_bytes", [4096, 64 << 10])
def test_answers_are_the_disk(disk: Path, block_bytes: int) -> None:
    """Every read brings its block, small ones with preadv, large ones with sendfile."""
    exchange = Exchange(block_bytes, reads=2, writes=0, under_way=1)
    here, there = socket.socketpair()
    with here, disk.open("rb") as file:
        server = threading.Thread(target=answer, args=(here, exchange, file.fileno(), SIZE_BYTES, 60))
        server.start()
        with there:
            there.sendall(bytes(exchange.asked_bytes))
            got = there.recv(exchange.answered_bytes, socket.MSG_WAITALL)
        server.join()
    assert len(got) == 2 * (REPLY_BYTES + block_bytes)
    assert got.count(BYTE) == 2 * block_bytes


@pytest.mark.parametrize("block_bytes", [4096, 64 << 10])
def test_writes_reach_the_disk(disk: Path, block_bytes: int) -> None:
    """The client sends zeroes, which is not what was there."""
    exchange = Exchange(block_bytes, reads=0, writes=2, under_way=2, flush_every=2)
    here, there = socket.socketpair()
    client = threading.Thread(target=ask, args=(there, exchange))
    client.start()
    with disk.open("r+b") as file, here:
        requests, elapsed_s = answer(here, exchange, file.fileno(), SIZE_BYTES, 0)
    client.join()
    there.close()
    assert requests > 0
    assert elapsed_s > 0
    zeroes = disk.read_bytes().count(0)
    assert zeroes > 0
    assert zeroes % block_bytes == 0


@pytest.mark.parametrize(
    ("load", "tcp", "in_memory"),
    [
        (Fio("randread", 4096, 32), False, False),
        (Fio("randrw", 4096, 32, connections=4), False, True),
        (Fio("randread", 64 << 10, 16), True, True),
        (Start(), False, False),
    ],
)
def test_limit_can_be_measured(disk: Path, load: Load, *, tcp: bool, in_memory: bool) -> None:
    """As a process of its own, on both kinds of sockets, with a file and with memory."""
    path = None if in_memory else disk
    sample = limit(load, path=path, size_bytes=SIZE_BYTES, tcp=tcp, seconds=0.01, pin=False)
    assert sample
    assert sample.value > 0


def test_what_has_no_limit_has_none(disk: Path) -> None:
    """Memory is not a matter of system calls."""
    load = Memory(under_load=False)
    assert limit(load, path=disk, size_bytes=SIZE_BYTES, tcp=False, seconds=0.01, pin=False) is None
