"""The machine's own limit for a cell: its system calls alone, without a protocol, an event loop or a block layer.

`python -m tests.benchmarks.limits JSON` is a process that forks: the child asks over a pair of sockets for what the
cell's client would ask, the parent answers with one system call for each piece of data and one for each batch. What it
reaches is what one thread of any server can hope for here; a server that does the work in two threads can go beyond.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.loads import (
    WARM_UP_S,
    WRITE_AREA_BYTES,
    Fio,
    Load,
    NbdCopy,
    QemuImgBench,
    Sample,
    Start,
    Uncached,
)
from tests.peers import ROOT, run

REQUEST_BYTES = 28
REPLY_BYTES = 16
"""The headers on the wire: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Transmission phase"."""

LARGE_BYTES = 64 << 10
"""From here on data goes by itself: sendfile for reads, one receive and one write each for writes."""

MOST_A_TIME = 32
"""Requests of a batch. More would not make the calls cheaper, and their data would leave the processor's cache."""

MOST_BOTH_WAYS = 16
"""The same where payloads go both ways: what is under way in either direction has to fit into the sockets' buffers."""

SOCKET_BUFFER_BYTES = 4 << 20
KNOWN_OFFSETS = 4096
COPY_BLOCK_BYTES = 256 << 10
"""What nbdcopy asks for at a time."""

LIMIT_S = 30.0
"""What takes longer than this beside its own time has hung."""


@dataclass(frozen=True)
class Exchange:
    """What goes over the sockets each time, and how many times it is under way at once."""

    block_bytes: int
    reads: int
    writes: int
    under_way: int
    flush_every: int = 0

    @property
    def requests(self) -> int:
        """Of each time."""
        return self.reads + self.writes

    @property
    def asked_bytes(self) -> int:
        """What the client sends each time."""
        return self.requests * REQUEST_BYTES + self.writes * self.block_bytes

    @property
    def answered_bytes(self) -> int:
        """What it gets for that."""
        return self.requests * REPLY_BYTES + self.reads * self.block_bytes


def exchange_of(load: Load) -> Exchange | None:
    """The exchange that a load comes to; None where no limit can be had in this way."""
    match load:
        case Uncached():
            return None
        case Fio():
            read_percent = {"randread": 100, "read": 100, "randrw": load.read_percent}.get(load.rw, 0)
            return _exchange(load.block_bytes, load.depth * load.connections, read_percent, load.flush_every)
        case QemuImgBench():
            every = 1 if load.durable else 0
            return _exchange(load.block_bytes, load.depth, 0 if load.writes else 100, every)
        case NbdCopy():
            return _exchange(COPY_BLOCK_BYTES, MOST_BOTH_WAYS, 100, 0)
    return None


def _exchange(block_bytes: int, depth: int, read_percent: int, flush_every: int) -> Exchange:
    # Two halves: while one is answered, the other is asked for.
    most = MOST_A_TIME if read_percent in (0, 100) else MOST_BOTH_WAYS
    requests = min(most, max(1, depth // 2))
    reads = round(requests * read_percent / 100)
    return Exchange(block_bytes, reads, requests - reads, min(2, depth), flush_every)


def limit(load: Load, *, path: Path | None, size_bytes: int, tcp: bool, seconds: float, pin: bool) -> Sample | None:
    """Measure the limit of a load, in the load's unit; None where there is none.

    Args:
        load: what a server would be asked for.
        path: the file that it would serve, None for memory. Writes go to its beginning, as the loads' do.
        size_bytes: how large that is.
        tcp: loopback TCP instead of a pair of Unix sockets.
        seconds: how long.
        pin: the side of the server on processor 0, that of the client on processor 1.

    Raises CommandError when it fails.
    """
    if isinstance(load, Start):
        return Sample(_interpreter_start_s() * 1e3)
    exchange = exchange_of(load)
    if exchange is None:
        return None
    what = {"exchange": asdict(exchange), "path": str(path) if path else None, "size_bytes": size_bytes}
    how = {"tcp": tcp, "seconds": seconds, "pin": pin}
    command = [sys.executable, "-m", "tests.benchmarks.limits", json.dumps(what | how)]
    told = json.loads(run(*command, timeout_s=seconds + LIMIT_S, env={"PYTHONPATH": str(ROOT)}))
    requests, elapsed_s = int(told["requests"]), float(told["elapsed_s"])
    moved_bytes = requests * exchange.block_bytes
    value = moved_bytes / elapsed_s / 1e6 if load.unit == "MB/s" else requests / elapsed_s / 1e3
    return Sample(value, requests, moved_bytes)


def _interpreter_start_s() -> float:
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
    return time.perf_counter() - begun_s


def _main(told: str) -> None:
    what = json.loads(told)
    exchange = Exchange(**what["exchange"])
    descriptor = _disk(what["path"], what["size_bytes"], writable=exchange.writes > 0)
    here, there = _tcp_pair() if what["tcp"] else socket.socketpair()
    for end in (here, there):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    child = os.fork()
    if not child:
        here.close()
        if what["pin"]:
            os.sched_setaffinity(0, {1})
        ask(there, exchange)
        os._exit(0)
    there.close()
    if what["pin"]:
        os.sched_setaffinity(0, {0})
    area_bytes = min(what["size_bytes"], WRITE_AREA_BYTES) if exchange.writes else what["size_bytes"]
    requests, elapsed_s = answer(here, exchange, descriptor, area_bytes, what["seconds"])
    here.close()
    os.waitpid(child, 0)
    sys.stdout.write(json.dumps({"requests": requests, "elapsed_s": elapsed_s}))


def _disk(path: str | None, size_bytes: int, *, writable: bool) -> int:
    if path is not None:
        return os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    descriptor = os.memfd_create("disk")
    block = random.Random(0).randbytes(1 << 20)
    for begin in range(0, size_bytes, len(block)):
        os.pwrite(descriptor, block, begin)
    return descriptor


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = socket.create_connection(listener.getsockname())
        here, _ = listener.accept()
    for end in (here, there):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


def ask(connection: socket.socket, exchange: Exchange) -> None:
    """The client's side: keeps so many exchanges under way until the other side hangs up."""
    request, answers = bytes(exchange.asked_bytes), memoryview(bytearray(exchange.answered_bytes))
    try:
        for _ in range(exchange.under_way):
            connection.sendall(request)
        while _receive(connection, answers):
            connection.sendall(request)
    except ConnectionError:
        return  # hung up while it was sent to


def answer(
    connection: socket.socket, exchange: Exchange, descriptor: int, area_bytes: int, seconds: float
) -> tuple[int, float]:
    """The server's side, for so many seconds; returns how many requests it has answered, and the time they took."""
    blocks = area_bytes // exchange.block_bytes
    source = random.Random(0)
    offsets = itertools.cycle([source.randrange(blocks) * exchange.block_bytes for _ in range(KNOWN_OFFSETS)])
    serve = _large if exchange.block_bytes >= LARGE_BYTES else _small
    since_flush = requests = 0
    begun_s = time.perf_counter()
    warm_s = begun_s + WARM_UP_S
    end_s = warm_s + seconds
    for _ in serve(connection, exchange, descriptor, offsets):
        since_flush += exchange.requests
        if exchange.flush_every and since_flush >= exchange.flush_every:
            os.fdatasync(descriptor)
            since_flush = 0
        requests += exchange.requests
        now_s = time.perf_counter()
        if now_s < warm_s:
            begun_s, requests = now_s, 0
        elif now_s > end_s:
            break
    return requests, time.perf_counter() - begun_s


def _small(connection: socket.socket, exchange: Exchange, descriptor: int, offsets: Iterator[int]) -> Iterator[None]:
    """One receive, one call for each piece of data, one send. Yields when the data is there, before the answer."""
    asked = memoryview(bytearray(exchange.asked_bytes))
    answers = memoryview(bytearray(exchange.answered_bytes))
    block_bytes = exchange.block_bytes
    payloads = [asked[-(number + 1) * block_bytes :][:block_bytes] for number in range(exchange.writes)]
    data = [[answers[-(number + 1) * block_bytes :][:block_bytes]] for number in range(exchange.reads)]
    while _receive(connection, asked):
        for payload in payloads:
            os.pwrite(descriptor, payload, next(offsets))
        for into in data:
            os.preadv(descriptor, into, next(offsets))
        yield
        connection.sendall(answers)


def _large(connection: socket.socket, exchange: Exchange, descriptor: int, offsets: Iterator[int]) -> Iterator[None]:
    """A receive and a write for each block that is written, a sendfile for each one that is read."""
    request = memoryview(bytearray(REQUEST_BYTES))
    asked = memoryview(bytearray(REQUEST_BYTES + exchange.block_bytes))
    header = bytes(REPLY_BYTES)
    out = connection.fileno()
    while True:
        for _ in range(exchange.writes):
            if not _receive(connection, asked):
                return
            os.pwrite(descriptor, asked[REQUEST_BYTES:], next(offsets))
        for _ in range(exchange.reads):
            if not _receive(connection, request):
                return
        yield
        for _ in range(exchange.reads):
            connection.sendall(header, socket.MSG_MORE)
            offset, left_bytes = next(offsets), exchange.block_bytes
            while left_bytes:
                sent_bytes = os.sendfile(out, descriptor, offset, left_bytes)
                offset, left_bytes = offset + sent_bytes, left_bytes - sent_bytes
        if exchange.writes:
            connection.sendall(header * exchange.writes)


def _receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False when the other side has hung up."""
    try:
        got_bytes = 0
        while got_bytes < len(into):
            more_bytes = connection.recv_into(into[got_bytes:], 0, socket.MSG_WAITALL)
            if not more_bytes:
                return False
            got_bytes += more_bytes
    except ConnectionError:
        return False
    return True


if __name__ == "__main__":
    _main(sys.argv[1])
