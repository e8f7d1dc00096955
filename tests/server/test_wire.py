"""A plain wire: every byte in order whatever the sizes, nothing used again too early, nothing left open."""

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.server import wire as wire_module
from pynbd.server.spans import FileSpan, SpanFile
from pynbd.server.wire import BEHIND_BYTES, PIECE_BYTES, Item, PlainWire, together, tune
from tests.server.clients import LIMIT_S, open_descriptors

KIB, MIB = 1 << 10, 1 << 20

PASSING = memoryview(bytearray(PIECE_BYTES))


class End:
    """One wire, its peer's socket, and what it told."""

    def __init__(self, *, buffer_bytes: int = 0) -> None:
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setblocking(False)
            if buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.readable = self.sent = 0
        self.lost: list[OSError] = []
        self.wire = PlainWire(
            asyncio.get_running_loop(), ours, self._on_readable, self._on_sent, self.lost.append, PASSING
        )

    def _on_readable(self) -> None:
        self.readable += 1

    def _on_sent(self) -> None:
        self.sent += 1

    async def receive(self, count: int) -> bytes:
        data = bytearray()
        async with asyncio.timeout(LIMIT_S):
            while len(data) < count:
                piece = await asyncio.get_running_loop().sock_recv(self.peer, min(count - len(data), MIB))
                assert piece, f"the end after {len(data)} of {count} bytes"
                data += piece
        return bytes(data)


@contextlib.contextmanager
def wired(*, buffer_bytes: int = 0) -> Iterator[End]:
    """Afterwards no descriptor may be left open."""
    before = open_descriptors()
    end = End(buffer_bytes=buffer_bytes)
    try:
        yield end
    finally:
        end.wire.close()
        end.peer.close()
    assert open_descriptors() == before


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(4).randbytes(3 * MIB))
    return path


def span(fd: int, offset: int, length: int, end: bytes, problems: list[OSError | None]) -> FileSpan:
    def finish(problem: OSError | None) -> bytes:
        problems.append(problem)
        return end

    return FileSpan(SpanFile(fd, os.fstat(fd)), offset, length, finish)


@pytest.mark.parametrize("seed", range(10))
async def test_all_bytes_arrive_in_order(seed: int, file: Path) -> None:
    """Buffers, borrowed buffers and spans of all sizes, through a socket that takes little at a time."""
    source = random.Random(seed)
    content = file.read_bytes()
    expected = bytearray()
    problems: list[OSError | None] = []
    with wired(buffer_bytes=source.choice([0, 1, 20000])) as end, file.open("rb") as opened:
        borrowed = bytearray(100 * KIB)
        for _ in range(30):
            items: list[Item] = []
            for _ in range(source.randint(1, 4)):
                size = source.choice([0, 1, 16, 4096, source.randint(1, 300 * KIB)])
                data = source.randbytes(size)
                if source.random() < 0.3 and size:
                    offset = source.randrange(len(content) - size)
                    items.append(span(opened.fileno(), offset, size, b"end of span", problems))
                    expected += content[offset : offset + size] + b"end of span"
                else:
                    items.append(source.choice([bytes, bytearray, memoryview])(data))
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
            if source.random() < 0.5:
                length = source.choice([1, 64 * KIB, source.randint(1, 300 * KIB)])
                offset = source.randrange(len(content) - length)
                header = source.randbytes(30)
                end.wire.send_with_file(memoryview(bytearray(header)), opened.fileno(), offset, length)
                expected += header + content[offset : offset + length]
            assert end.wire.unsent >= 0
            await asyncio.sleep(0)
        assert await end.receive(len(expected)) == expected
        await until_sent(end)
        assert end.wire.unsent == 0
        assert end.wire.moved == len(expected)
        assert problems == [None] * len(problems)
        assert not end.lost


@pytest.mark.parametrize("queued", [False, True])
async def test_a_file_that_is_shorter_than_was_promised(queued: bool, file: Path) -> None:
    """The header is out, so that only the end of the connection can tell."""
    with wired(buffer_bytes=4096 if queued else 0) as end, file.open("rb") as opened:
        with pytest.raises(OSError, match=f"the file ends at offset {3 * MIB}") as caught:
            end.wire.send_with_file(memoryview(b"header"), opened.fileno(), 3 * MIB - 100_000, 100_001)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
async def test_a_file_that_can_not_be_sent_is_copied(code: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no sendfile; whether a file can be read at all, only a read tells."""

    def refuse(out: int, fd: int, offset: int, count: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "sendfile", refuse)
    with wired() as end, file.open("rb") as opened:
        end.wire.send_with_file(memoryview(b"header"), opened.fileno(), 5, 64 * KIB)
        assert await end.receive(6 + 64 * KIB) == b"header" + file.read_bytes()[5 : 5 + 64 * KIB]
        await until_sent(end)


async def test_a_client_that_is_lost_while_a_file_is_sent(file: Path) -> None:
    with wired() as end, file.open("rb") as opened:
        end.peer.close()
        with pytest.raises(ConnectionError):
            end.wire.send_with_file(memoryview(b"header"), opened.fileno(), 0, 64 * KIB)


async def test_files_are_copied_for_who_is_behind(file: Path) -> None:
    with wired(buffer_bytes=2 * MIB) as end, file.open("rb") as opened:
        assert not end.wire.copies_files()
        end.wire.send_with_file(memoryview(b"header"), opened.fileno(), 0, BEHIND_BYTES)
        assert end.wire.copies_files()
        await end.receive(6 + BEHIND_BYTES)
        assert not end.wire.copies_files()
        end.wire.send([bytes(8 * MIB)])
        assert end.wire.queued
        assert end.wire.copies_files()


async def until_sent(end: End) -> None:
    async with asyncio.timeout(LIMIT_S):
        while end.wire.queued:
            await asyncio.sleep(0)


@pytest.mark.parametrize("behind", [False, True])
async def test_who_copies_a_file(behind: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does while it keeps up, and we do when it is behind."""
    ways: list[str] = []

    def watch(name: str) -> None:
        function = getattr(os, name)

        def watched(*given: object) -> object:
            ways.append(name)
            return function(*given)

        monkeypatch.setattr(os, name, watched)

    watch("sendfile")
    watch("preadv")
    content = file.read_bytes()
    with wired(buffer_bytes=2 * MIB) as end, file.open("rb") as opened:
        before = bytes(300 * KIB if behind else 10)
        end.wire.send([before, span(opened.fileno(), 4096, 100 * KIB, b"end", [])])
        assert ways == ["preadv" if behind else "sendfile"]
        length = len(before) + 100 * KIB + 3
        assert await end.receive(length) == before + content[4096 : 4096 + 100 * KIB] + b"end"


async def test_unsent_counts_memory_and_not_spans(file: Path) -> None:
    with wired(buffer_bytes=1) as end, file.open("rb") as opened:
        end.wire.send([bytes(MIB)])
        before = end.wire.unsent
        assert before > MIB // 2
        end.wire.send([b"header", span(opened.fileno(), 0, MIB, b"end", [])])
        assert end.wire.unsent == before + len(b"header")
        assert end.wire.queued
        await end.receive(2 * MIB + 9)
        await until_sent(end)
        assert end.wire.unsent == 0
        assert end.sent


@pytest.mark.parametrize("keep", [0, 1, 100 * KIB, 2 * MIB])
async def test_a_file_that_ends_too_early_is_made_up_and_told(keep: int, file: Path) -> None:
    content = file.read_bytes()
    problems: list[OSError | None] = []
    with wired(buffer_bytes=1) as end, file.open("r+b") as opened:
        opened.truncate(keep)
        end.wire.send([b"before", span(opened.fileno(), 0, 3 * MIB, b"after", problems), b"next"])
        received = await end.receive(6 + 3 * MIB + 5 + 4)
        assert received == b"before" + content[:keep] + bytes(3 * MIB - keep) + b"after" + b"next"
        (problem,) = problems
        assert problem is not None
        assert f"ends at offset {keep}" in str(problem)
        assert not end.lost


async def test_a_descriptor_that_can_not_be_sent_from_is_told(tmp_path: Path) -> None:
    problems: list[OSError | None] = []
    with wired() as end:
        folder = os.open(tmp_path, os.O_RDONLY)
        end.wire.send([span(folder, 0, 1000, b"after", problems)])
        os.close(folder)
        assert await end.receive(1005) == bytes(1000) + b"after"
        assert isinstance(problems[0], OSError)


async def test_spans_of_one_file_share_a_descriptor(file: Path) -> None:
    with wired(buffer_bytes=1) as end:
        fd = os.open(file, os.O_RDONLY)
        before = open_descriptors()
        shared = SpanFile(fd, os.fstat(fd))
        spans = [FileSpan(shared, 0, MIB, lambda problem: b"") for _ in range(50)]
        assert open_descriptors() == before + 1
        assert shared.serves(os.fstat(fd))
        assert not shared.serves(os.fstat(0))
        os.close(fd)  # the node is gone: what was promised still leaves
        end.wire.send([*spans])
        for _ in range(50):
            assert await end.receive(MIB) == file.read_bytes()[:MIB]
        await until_sent(end)
        assert open_descriptors() == before - 1
        assert not shared.serves(file.stat())


async def test_closing_drops_what_is_queued(file: Path) -> None:
    with wired(buffer_bytes=1) as end, file.open("rb") as opened:
        items: list[Item] = [span(opened.fileno(), 0, MIB, b"", []) for _ in range(3)]
        end.wire.send([bytes(MIB), *items, b"x"])
        assert end.wire.close() == 3
        assert end.wire.close() == 0
        assert end.wire.unsent == 0
        assert not end.wire.queued
        end.wire.send([b"late"])
        end.wire.send_borrowed(memoryview(b"late"))
        end.wire.resume_reading()
        assert not end.wire.queued


async def test_a_peer_that_is_gone_and_a_borrowed_buffer() -> None:
    with wired() as end:
        end.peer.close()
        with pytest.raises(OSError):
            end.wire.send_borrowed(memoryview(b"x"))


@pytest.mark.parametrize("kind", ["buffer", "span"])
async def test_a_peer_that_is_gone(kind: str, file: Path) -> None:
    with wired(buffer_bytes=1) as end, file.open("rb") as opened:
        item: Item = b"x" if kind == "buffer" else span(opened.fileno(), 0, MIB, b"", [])
        end.peer.close()
        with pytest.raises(OSError):
            end.wire.send([item])


async def test_a_peer_that_goes_while_something_is_queued_is_told_once(file: Path) -> None:
    with wired(buffer_bytes=1) as end, file.open("rb") as opened:
        end.wire.send([bytes(MIB), span(opened.fileno(), 0, MIB, b"", [])])
        end.peer.close()
        async with asyncio.timeout(LIMIT_S):
            while not end.lost:
                await asyncio.sleep(0)
        end.wire.close()
        assert len(end.lost) == 1


async def test_receiving(file: Path) -> None:
    with wired() as end:
        into = memoryview(bytearray(10))
        assert end.wire.receive_into(into) == -1
        end.peer.send(b"abc")
        assert end.wire.receive_into(into) == 3
        assert bytes(into[:3]) == b"abc"
        assert end.wire.moved == 3
        end.peer.shutdown(socket.SHUT_WR)
        assert end.wire.receive_into(into) == 0


async def test_reading_is_paused_and_resumed() -> None:
    with wired() as end:
        end.peer.send(b"abc")

        async def turns() -> int:
            before = end.readable
            for _ in range(5):
                await asyncio.sleep(0)
            return end.readable - before

        assert await turns() == 0
        end.wire.resume_reading()
        end.wire.resume_reading()
        assert await turns()
        end.wire.pause_reading()
        end.wire.pause_reading()
        assert await turns() == 0


async def test_one_turn_sends_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(wire_module, "MAX_BYTES_A_TURN", 10_000)
    content = file.read_bytes()
    with wired() as end, file.open("rb") as opened:
        end.wire.send([bytes(5000), bytes(5000), bytes(5000), span(opened.fileno(), 0, 60_000, b"end", [])])
        for _ in range(3):
            before = end.wire.moved
            assert before < 75_003
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert end.wire.moved - before <= 2 * 25_000
        assert await end.receive(75_003) == bytes(15_000) + content[:60_000] + b"end"


async def test_more_buffers_than_one_call_takes() -> None:
    with wired() as end:
        items: list[Item] = [bytes([n % 256]) * (n % 5) for n in range(3 * wire_module.MAX_VECTORS + 7)]
        end.wire.send(list(items))
        expected = b"".join(bytes([n % 256]) * (n % 5) for n in range(len(items)))
        assert await end.receive(len(expected)) == expected


def test_tcp_does_not_delay_and_notices_dead_peers() -> None:
    with socket.socket() as sock:
        tune(sock)
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_unix_sockets_get_large_buffers() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        tune(sock)
        assert not sock.getblocking()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= before


@given(st.lists(st.binary(max_size=30_000), min_size=1, max_size=5))
def test_together_keeps_the_bytes(items: list[bytes]) -> None:
    joined = together(list(items))
    assert b"".join(item for item in joined if isinstance(item, bytes)) == b"".join(items)
