"""A wire through TLS: the same bytes in the same order as through a plain one, whatever the socket takes at a time."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pynbd.crypto.tls_socket import TlsSocket
from pynbd.server.spans import FileSpan, SpanFile
from pynbd.server.tls_wire import TlsWire
from pynbd.server.wire import PIECE_BYTES, Item
from tests.crypto.tls_ends import credentials, secured
from tests.server.clients import LIMIT_S, open_descriptors

KIB, MIB = 1 << 10, 1 << 20

PASSING = memoryview(bytearray(PIECE_BYTES))


class End:
    """One wire, and what it told."""

    def __init__(self, sock: TlsSocket) -> None:
        self.received = bytearray()
        self.sent = 0
        self.lost: list[OSError] = []
        self.size = 1000
        self.wire = TlsWire(
            asyncio.get_running_loop(), sock, self._on_readable, self._on_sent, self.lost.append, PASSING
        )

    def _on_readable(self) -> None:
        view = memoryview(bytearray(self.size))
        count = self.wire.receive_into(view)
        self.received += view[: max(count, 0)]
        if count == 0:
            self.wire.pause_reading()

    def _on_sent(self) -> None:
        self.sent += 1


@asynccontextmanager
async def wired(pki: Path, buffer_bytes: int = 0) -> AsyncIterator[tuple[End, TlsSocket]]:
    before = open_descriptors()
    async with secured(credentials("server", pki), credentials("client", pki), buffer_bytes=buffer_bytes) as ends:
        end = End(ends[0])
        try:
            yield end, ends[1]
        finally:
            end.wire.close()
    assert open_descriptors() == before


async def receive_exactly(sock: TlsSocket, count: int) -> bytes:
    data = bytearray()
    async with asyncio.timeout(LIMIT_S):
        while len(data) < count:
            piece = await sock.receive(MIB)
            assert piece, f"the end after {len(data)} of {count} bytes"
            data += piece
    return bytes(data)


@pytest.mark.parametrize("seed", range(8))
async def test_all_bytes_arrive_in_order(seed: int, pki: Path, tmp_path: Path) -> None:
    """Buffers, borrowed buffers and spans of files of all sizes, through a socket that takes little at a time."""
    source = random.Random(seed)
    content = source.randbytes(3 * MIB)
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = bytearray()
    problems: list[OSError | None] = []

    def finish(problem: OSError | None) -> bytes:
        problems.append(problem)
        return b"end of span"

    async with wired(pki, source.choice([0, 1, 20000])) as (end, peer):
        with path.open("rb") as opened:
            file = SpanFile(opened.fileno(), os.fstat(opened.fileno()))
            borrowed = bytearray(100 * KIB)
            file.spans += 1
            for _ in range(30):
                items: list[Item] = []
                for _ in range(source.randint(1, 4)):
                    size = source.choice([0, 1, 16, 4096, source.randint(1, 300 * KIB)])
                    if source.random() < 0.3 and size:
                        offset = source.randrange(len(content) - size)
                        items.append(FileSpan(file, offset, size, finish))
                        expected += content[offset : offset + size] + b"end of span"
                    else:
                        items.append(data := source.randbytes(size))
                        expected += data
                end.wire.send(items)
                size = source.randint(1, len(borrowed))
                borrowed[:size] = source.randbytes(size)
                expected += borrowed[:size]
                if source.random() < 0.5:
                    end.wire.send_borrowed(memoryview(borrowed)[:size])
                else:
                    cuts = sorted(source.randrange(size) for _ in range(source.randrange(4)))
                    parts = zip([0, *cuts], [*cuts, size], strict=True)
                    end.wire.send_borrowed_parts([memoryview(borrowed)[start:stop] for start, stop in parts])
                borrowed[:] = bytes(len(borrowed))  # it is used for something else at once
                await asyncio.sleep(0)
            assert await receive_exactly(peer, len(expected)) == expected
            async with asyncio.timeout(LIMIT_S):
                while end.wire.queued:
                    await asyncio.sleep(0)
            file.release()
        assert end.wire.unsent == 0
        assert end.wire.moved == len(expected)
        assert problems == [None] * len(problems)
        assert not end.lost


async def test_a_file_that_ends_too_early_is_made_up_and_told(pki: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    problems: list[OSError | None] = []

    def finish(problem: OSError | None) -> bytes:
        problems.append(problem)
        return b"after"

    async with wired(pki) as (end, peer):
        with path.open("rb") as opened:
            file = SpanFile(opened.fileno(), os.fstat(opened.fileno()))
            end.wire.send([b"before", FileSpan(file, 0, MIB, finish), b"next"])
            received = await receive_exactly(peer, 6 + MIB + 9)
        assert received == b"before" + b"x" * 100_000 + bytes(MIB - 100_000) + b"after" + b"next"
        (problem,) = problems
        assert "ends at offset 100000" in str(problem)


@pytest.mark.parametrize("size", [1, 100, 70_000])
async def test_what_was_taken_from_the_socket_is_told_of(size: int, pki: Path) -> None:
    """The receiver takes less than a record holds: nothing will be readable at the socket, and yet there is more."""
    async with wired(pki) as (end, peer):
        end.size = size
        data = random.Random(1).randbytes(300 * size)
        sender = asyncio.create_task(peer.send_all(data))
        end.wire.resume_reading()
        async with asyncio.timeout(LIMIT_S):
            while len(end.received) < len(data) // 2:
                await asyncio.sleep(0)
            end.wire.pause_reading()
            await asyncio.sleep(0)
            count = len(end.received)
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(end.received) == count
            end.wire.resume_reading()
            while len(end.received) < len(data):
                await asyncio.sleep(0)
            await sender
        assert end.received == data


async def test_the_end(pki: Path) -> None:
    async with wired(pki) as (end, peer):
        end.wire.resume_reading()
        await peer.send_all(b"last")
        peer.close()
        async with asyncio.timeout(LIMIT_S):
            while end.wire._reading:
                await asyncio.sleep(0)
        assert end.received == b"last"
