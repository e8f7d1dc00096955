"""Lines 13 to 23: transmission, and how errors are told."""

import asyncio
import errno
import os
import random
import socket
import struct
from pathlib import Path

import pytest

from nbd_protocol.constants import (
    MAX_PAYLOAD_BYTES,
    MAX_SWALLOWED_PAYLOAD_BYTES,
    Command,
    CommandFlag,
    Errno,
    Option,
    OptionReplyType,
    ReplyMode,
    TransmissionFlag,
)
from pynbd.server.export import Export
from tests.restless import RESTLESS, restless
from tests.server.clients import CHUNKED, LIMIT_S, MODES, PAYLOAD_LEN, Served, Tree, serving
from tests.server.conformance.haggler import MEMORY, Haggler, still_serves
from tests.server.held import HELD, held, pattern

KIB, MIB = 1 << 10, 1 << 20

EXTENDED = ReplyMode.EXTENDED


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_13_reads_cover_all_in_every_framing(mode: ReplyMode) -> None:
    """The library's client refuses overlaps, gaps, a DONE too early, and simple replies to structured reads."""
    async with serving({"driver": RESTLESS, "size": 2 * MIB, "suspends": 0.5, "holes": True}) as served:
        client = await served.connect(mode=mode)
        data = restless(served.node()).data
        data[MIB // 2 : MIB] = bytes(MIB // 2)
        for offset, length in [(0, 1), (511, 2), (0, 64 * KIB), (100, 2 * MIB - 100), (0, 2 * MIB), (MIB - 1, 70000)]:
            assert await client.read(offset, length) == data[offset : offset + length]


@pytest.mark.parametrize("mode", CHUNKED)
async def test_conformance_13_an_early_error_is_structured_and_has_a_text(served: Served, mode: ReplyMode) -> None:
    client = await served.connect(mode=mode)
    reply = await client.ask(Command.READ, 4 * MIB, 512)
    assert reply.error == Errno.EINVAL
    assert str(4 * MIB) in reply.text


@pytest.mark.parametrize("mode", CHUNKED)
async def test_conformance_13_a_drivers_error_has_its_text(mode: ReplyMode) -> None:
    async with serving({"driver": RESTLESS, "fails": 1.0}) as served:
        client = await served.connect(mode=mode)
        for command, length in ((Command.READ, 512), (Command.READ, MIB // 2), (Command.WRITE_ZEROES, 512)):
            reply = await client.ask(command, 0, length)
            assert reply.error == Errno.EIO
            assert "restless" in reply.text
        restless(served.node()).fails = 0.0


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("disk", ["memory", "restless", "file"])
async def test_conformance_13_with_df_there_is_one_chunk(mode: ReplyMode, disk: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(MIB)
    trees: dict[str, Tree] = {
        "memory": {"driver": "memory", "size": MIB},
        "restless": {"driver": RESTLESS, "fill": "zero", "holes": True},
        "file": {"driver": "file", "filename": str(path)},
    }
    async with serving(trees[disk]) as served:
        client = await served.connect(mode=mode)
        await client.write(8192, b"x" * 4096)
        for length in (64 * KIB, 64 * KIB - 1, 20000, 1, MIB):
            reply = await client.ask(Command.READ, 0, length, CommandFlag.DF)
            assert reply.chunks == [("data", 0, length)]
            assert reply.data.count(b"x") == max(0, min(4096, length - 8192))


@pytest.mark.parametrize("mode", CHUNKED)
@pytest.mark.parametrize("disk", ["memory", "restless", "file"])
async def test_conformance_13_holes_are_told(mode: ReplyMode, disk: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        os.pwrite(file.fileno(), b"x" * 64 * KIB, MIB)
    trees: dict[str, Tree] = {
        "memory": MEMORY,
        "restless": {"driver": RESTLESS, "size": 4 * MIB, "fill": "zero", "holes": True},
        "file": {"driver": "file", "filename": str(path)},
    }
    async with serving(trees[disk]) as served:
        client = await served.connect(mode=mode)
        await client.write(MIB, b"x" * 64 * KIB)
        for _ in range(3):  # what was read once is in the page cache: that makes no difference
            reply = await client.ask(Command.READ, 0, 2 * MIB)
            assert bytes(reply.data) == bytes(MIB) + b"x" * 64 * KIB + bytes(MIB - 64 * KIB)
            told = sum(length for kind, _, length in reply.chunks if kind == "hole")
            assert told == 2 * MIB - 64 * KIB
            for offset in range(0, 2 * MIB, 32 * KIB):
                await client.read(offset, 32 * KIB)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_14_bounds(served: Served, mode: ReplyMode) -> None:
    size = 4 * MIB
    client = await served.connect(mode=mode)
    expected = {
        Command.READ: Errno.EINVAL,
        Command.TRIM: Errno.EINVAL,
        Command.CACHE: Errno.EINVAL,
        Command.BLOCK_STATUS: Errno.EINVAL,
        Command.WRITE: Errno.ENOSPC,
        Command.WRITE_ZEROES: Errno.ENOSPC,
    }
    for command, error in expected.items():
        if command is Command.BLOCK_STATUS and mode is ReplyMode.SIMPLE:
            continue
        for offset in (size - 511, size, size + 1, (1 << 63) - 1, (1 << 64) - 512, (1 << 64) - 1):
            payload = bytes(512) if command is Command.WRITE else b""
            flags = PAYLOAD_LEN if payload and mode is EXTENDED else 0
            assert (await client.ask_raw(command, offset, 512, flags, payload)).error == error
    assert await client.read(size - 512, 512) == bytes(512)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_14_a_read_only_export_is_not_written(mode: ReplyMode) -> None:
    async with serving({"driver": RESTLESS}, read_only=True) as served:
        client = await served.connect(mode=mode)
        before = bytes(restless(served.node()).data)
        for length in (512, 64 * KIB, 300 * KIB):
            assert (await client.ask(Command.WRITE, 0, payload=b"x" * length)).error == Errno.EPERM
        assert (await client.ask(Command.WRITE_ZEROES, 0, 512)).error == Errno.EPERM
        assert (await client.ask(Command.TRIM, 0, 512)).error == Errno.EPERM
        assert await client.read(0, MIB) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [512, 64 * KIB, 300 * KIB, 5 * MIB])
async def test_conformance_15_a_refused_write_swallows_its_payload(
    served: Served, mode: ReplyMode, length: int
) -> None:
    """The payload looks like requests: who took it for such would answer them."""
    client = await served.connect(mode=mode)
    request = client.raw(Command.WRITE, 0, 4096, PAYLOAD_LEN if mode is EXTENDED else 0)
    del client.replies[client.last_raw], client.transmission._outstanding[client.last_raw]
    payload = (request * (length // len(request) + 1))[:length]
    cookies = [
        await client.send(Command.WRITE, 4 * MIB - 1, payload=payload),
        await client.send(Command.READ, 0, 4096),
        await client.send(Command.WRITE, 0, payload=b"x" * 70000),
    ]
    replies = [await client.reply(cookie) for cookie in cookies]
    assert [reply.error for reply in replies] == [Errno.ENOSPC, 0, 0]
    assert await client.read(0, 70000) == b"x" * 70000


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_15_32_mib_are_served(mode: ReplyMode) -> None:
    async with serving({"driver": "memory", "size": 40 * MIB}) as served:
        client = await served.connect(mode=mode)
        assert client.info.max_payload >= MAX_PAYLOAD_BYTES
        data = random.Random(1).randbytes(MAX_PAYLOAD_BYTES)
        await client.write(4096, data)
        assert await client.read(4096, MAX_PAYLOAD_BYTES) == data


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_15_longer_ones_are_refused_and_the_stream_is_kept(mode: ReplyMode) -> None:
    async with serving({"driver": "memory", "size": 80 * MIB}) as served:
        client = await served.connect(mode=mode)
        too_long = MAX_PAYLOAD_BYTES + 512
        assert (await client.ask_raw(Command.READ, 0, too_long)).error == Errno.EINVAL
        if mode is not EXTENDED:
            assert (await client.ask_raw(Command.WRITE, 0, too_long, 0, bytes(too_long))).error == Errno.EINVAL
        assert await client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_15_a_payload_too_long_to_skip_closes(mode: ReplyMode) -> None:
    async with serving({"driver": "memory", "size": 80 * MIB}) as served:
        client = await served.connect(mode=mode)
        first = await client.send(Command.READ, 0, 512)
        flags = PAYLOAD_LEN if mode is EXTENDED else 0
        await client.send_bytes(client.raw(Command.WRITE, 0, MAX_SWALLOWED_PAYLOAD_BYTES + 1, flags))
        assert not (await client.reply(first)).error
        assert not await client.at_end()
        await still_serves(served)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_15_trim_and_zeroes_may_be_longer_than_a_payload(mode: ReplyMode) -> None:
    size = 3 << 30
    async with serving({"driver": "memory", "size": size, "discard": "unmap"}) as served:
        client = await served.connect(mode=mode)
        marks = (0, MAX_PAYLOAD_BYTES + 5, size - 10)
        for command in (Command.TRIM, Command.WRITE_ZEROES):
            for offset in marks:
                await client.write(offset, b"0123456789")
            assert not (await client.ask(command, 0, size)).error
            assert [await client.read(offset, 10) for offset in marks] == [bytes(10)] * 3


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_16_unknown_commands_and_flags(served: Served, mode: ReplyMode) -> None:
    client = await served.connect(mode=mode)
    for command in (9, 100, 0xFFFF):
        assert (await client.ask_raw(command, 0, 512)).error == Errno.EINVAL
    for flag in (1 << 6, 1 << 15, CommandFlag.FAST_ZERO, CommandFlag.REQ_ONE, CommandFlag.NO_HOLE):
        assert (await client.ask_raw(Command.READ, 0, 512, flag)).error == Errno.EINVAL
    assert (await client.ask_raw(Command.READ, 0, 512, CommandFlag.DF)).error == (
        Errno.EINVAL if mode is ReplyMode.SIMPLE else 0
    )
    assert await client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_16_fua_is_accepted_on_every_command(served: Served, mode: ReplyMode) -> None:
    client = await served.connect(mode=mode)
    for command in (Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
        length = 0 if command is Command.FLUSH else 4096
        assert not (await client.ask(command, 0, length, CommandFlag.FUA)).error
    assert not (await client.ask(Command.WRITE, 0, payload=b"x" * 512, flags=CommandFlag.FUA)).error
    if mode is not ReplyMode.SIMPLE:
        assert not (await client.ask(Command.BLOCK_STATUS, 0, 4096, CommandFlag.FUA)).error


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_17_zero_length_never_disconnects(served: Served, mode: ReplyMode) -> None:
    client = await served.connect(mode=mode)
    for offset in (0, 100, 4 * MIB):
        for command in (Command.READ, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
            await client.ask_raw(command, offset, 0)
        await client.ask_raw(Command.WRITE, offset, 0, PAYLOAD_LEN if mode is EXTENDED else 0)
        if mode is not ReplyMode.SIMPLE:
            assert (await client.ask_raw(Command.BLOCK_STATUS, offset, 0)).error == Errno.EINVAL
    assert await client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_17_misaligned_requests_are_refused(mode: ReplyMode) -> None:
    async with serving({"driver": RESTLESS, "size": MIB + 100}, min_block=4096) as served:
        client = await served.connect(mode=mode)
        assert client.info.min_block == 4096
        for offset, length in ((1, 4096), (0, 4095), (2048, 2048)):
            for command in (Command.READ, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES):
                assert (await client.ask(command, offset, length)).error == Errno.EINVAL
            assert (await client.ask(Command.WRITE, offset, payload=bytes(length))).error == Errno.EINVAL
        assert len(await client.read(4096, 8192)) == 8192


@pytest.mark.parametrize("size", [1, 511, 513, 4097, MIB + 1])
async def test_conformance_17_odd_sizes_are_told_exactly(size: int) -> None:
    async with serving({"driver": "memory", "size": size}) as served:
        for mode in MODES:
            client = await served.connect(mode=mode)
            assert client.info.size == size
            await client.write(size - 1, b"!")
            assert await client.read(size - 1, 1) == b"!"
            assert (await client.ask(Command.READ, size, 1)).error == Errno.EINVAL


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_18_fast_zero_is_quick_or_changes_nothing(mode: ReplyMode) -> None:
    slow = {"driver": RESTLESS, "zeroes": False}
    async with serving(slow, {"driver": "memory", "size": MIB}) as served:
        client = await served.connect(mode=mode)
        before = bytes(restless(served.node()).data)
        reply = await client.ask(Command.WRITE_ZEROES, 0, 4096, CommandFlag.FAST_ZERO)
        assert reply.error == Errno.ENOTSUP
        assert bytes(restless(served.node()).data) == before
        # Without FAST_ZERO the same is done, and never answered with ENOTSUP.
        assert not (await client.ask(Command.WRITE_ZEROES, 0, 4096)).error
        assert await client.read(0, 4097) == bytes(4096) + before[4096:4097]
        quick = await served.connect("disk1", mode)
        await quick.write(0, b"x" * 8192)
        assert not (await quick.ask(Command.WRITE_ZEROES, 0, 4096, CommandFlag.FAST_ZERO)).error
        assert await quick.read(0, 8192) == bytes(4096) + b"x" * 4096


async def test_conformance_18_no_hole_allocates(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MIB)
    async with serving({"driver": "file", "filename": str(path), "discard": "unmap"}) as served:
        client = await served.connect()
        context = client.contexts["base:allocation"]
        assert not (await client.ask(Command.WRITE_ZEROES, 0, 512 * KIB, CommandFlag.NO_HOLE)).error
        assert path.stat().st_blocks * 512 >= MIB
        assert await client.read(0, 512 * KIB) == bytes(512 * KIB)
        assert not (await client.ask(Command.WRITE_ZEROES, 512 * KIB, 512 * KIB)).error
        assert path.stat().st_blocks * 512 < MIB
        status = await client.ask(Command.BLOCK_STATUS, 512 * KIB, 512 * KIB)
        assert status.extents[context] == ((512 * KIB, 3),)


@pytest.mark.parametrize("mode", CHUNKED)
async def test_conformance_19_one_chunk_for_each_context(mode: ReplyMode) -> None:
    async with serving(MEMORY) as served:
        node = served.node()
        await served.graph.add_bitmap(node, "changes", 64 * KIB)
        backend = served.server.exports[""].backend
        served.server.exports[""] = Export("", backend, allocation_depth=True, bitmaps=["changes"])
        names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:changes"]
        client = await served.connect(mode=mode, contexts=names)
        assert sorted(client.contexts) == sorted(names)
        await client.write(MIB, b"x" * 64 * KIB)
        for flags in (0, CommandFlag.REQ_ONE):
            reply = await client.ask(Command.BLOCK_STATUS, 0, 2 * MIB, flags)
            assert len(reply.extents) == 3
            for extents in reply.extents.values():
                assert all(length for length, _ in extents)
                assert sum(length for length, _ in extents[:-1]) < 2 * MIB
                if flags:
                    assert len(extents) == 1
                    assert extents[0][0] <= 2 * MIB
        told = {
            name: (await client.ask(Command.BLOCK_STATUS, 0, 2 * MIB)).extents[client.contexts[name]] for name in names
        }
        assert told["base:allocation"] == ((MIB, 3), (64 * KIB, 0), (MIB - 64 * KIB, 3))
        assert told["qemu:dirty-bitmap:changes"] == ((MIB, 0), (64 * KIB, 1), (MIB - 64 * KIB, 0))
        assert sum(length for length, _ in told["qemu:allocation-depth"]) == 2 * MIB


@pytest.mark.parametrize("mode", CHUNKED)
async def test_conformance_19_extents_are_multiples_of_the_minimum_block(mode: ReplyMode) -> None:
    async with serving(
        {"driver": RESTLESS, "size": MIB + 512, "fill": "zero", "holes": True}, min_block=4096
    ) as served:
        driver = restless(served.node())
        source = random.Random(7)
        for sector in source.sample(range(2048), 700):
            driver.data[sector * 512] = 1
        client = await served.connect(mode=mode)
        offset = 0
        while offset < MIB + 512:
            reply = await client.ask(Command.BLOCK_STATUS, offset, MIB + 512 - offset)
            for length, flags in reply.extents[client.contexts["base:allocation"]]:
                assert length % 4096 == 0 or offset + length == MIB + 512
                assert not flags or not any(driver.data[offset : offset + length])
                offset += length


@pytest.mark.parametrize("mode", CHUNKED)
async def test_conformance_19_a_length_of_four_gigabytes_less_one_works(mode: ReplyMode) -> None:
    async with serving({"driver": "memory", "size": 1 << 40}) as served:
        client = await served.connect(mode=mode)
        reply = await client.ask(Command.BLOCK_STATUS, 512, 0xFFFFFFFF)
        ((length, flags),) = reply.extents[client.contexts["base:allocation"]]
        assert flags == 3
        assert 0 < length <= 0xFFFFFFFF


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_20_a_flush_covers_what_was_answered_on_any_connection(mode: ReplyMode) -> None:
    async with serving({"driver": RESTLESS, "suspends": 0.5}) as served:
        driver = restless(served.node())
        writer, flusher = await served.connect(mode=mode), await served.connect(mode=mode)
        assert writer.info.flags & TransmissionFlag.CAN_MULTI_CONN
        for round_ in range(20):
            await writer.write(512 * round_, bytes([round_]) * 512)
            flushes = driver.flushes
            assert not (await flusher.ask(Command.FLUSH)).error
            assert driver.flushes > flushes  # it was begun after the write was answered, and has ended
        assert driver.data[: 512 * 20] == b"".join(bytes([n]) * 512 for n in range(20))


async def test_conformance_20_a_flush_does_not_join_one_that_began_before_the_write() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.hold = frozenset({"flush"})
        one, other = await served.connect(), await served.connect()
        await one.write(0, b"first")
        early = await one.send(Command.FLUSH)
        await driver.until(1)
        await one.write(4096, b"second")
        late = await other.send(Command.FLUSH)
        driver.release(1)
        assert not (await one.reply(early)).error
        await driver.until(1)
        assert not other.replies[late].done
        driver.release(1)
        assert not (await other.reply(late)).error
        assert [call[0] for call in driver.calls] == ["write", "flush", "write", "flush"]
        driver.release()


async def test_conformance_20_fua_is_answered_after_it_is_durable() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.hold = frozenset({"flush"})
        client = await served.connect()
        cookies = [await client.send(Command.WRITE, 0, payload=b"x" * 512, flags=CommandFlag.FUA)]
        await driver.until(1)
        assert [call[0] for call in driver.calls] == ["write", "flush"]
        plain = await client.ask(Command.WRITE, 512, payload=b"y" * 512)
        assert not plain.error
        assert not client.replies[cookies[0]].done
        driver.release()
        assert not (await client.reply(cookies[0])).error


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_21_disc_finishes_what_is_outstanding(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        reads = [await client.send(Command.READ, 8 * n, 100) for n in range(10)]
        await client.send(Command.WRITE, 0, payload=b"x" * 512)
        await driver.until(11)
        await client.send_bytes(b"".join(client.transmission.request(Command.DISC)[1]))
        await client.send_bytes(b"what follows DISC is nobody's business")
        driver.release()
        assert await client.at_end()
        assert [bytes(client.replies[cookie].data) for cookie in reads] == [pattern(8 * n, 100) for n in range(10)]


async def test_conformance_21_disc_on_an_idle_connection_closes_without_a_reply(served: Served) -> None:
    client = await served.connect()
    await client.send_bytes(b"".join(client.transmission.request(Command.DISC)[1]))
    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.get_running_loop().sock_recv(client.sock, 1) == b""


@pytest.mark.parametrize("mode", MODES)
async def test_conformance_22_replies_in_any_order_and_any_cookie(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        cookies = []
        for number, cookie in enumerate((0, 1, (1 << 64) - 1, 0xDEADBEEF, 1 << 63)):
            client._cookie = cookie - 1
            await client.send_bytes(client.raw(Command.READ, number * 64, 64))
            cookies.append(cookie)
        await driver.until(5)
        order = [3, 0, 4, 1, 2]
        waiting = list(driver.waiting)
        for count, number in enumerate(order, 1):
            waiting[number].go.set_result(None)
            driver.waiting.remove(waiting[number])
            reply = await client.reply(cookies[number])
            assert bytes(reply.data) == pattern(number * 64, 64)
            assert sum(other.done for other in client.replies.values()) == 0
            assert len(client.replies) == 5 - count


async def test_conformance_22_tcp_does_not_delay() -> None:
    async with serving(MEMORY, tcp=True) as served:
        client = await served.connect()
        (connection,) = served.server.connections
        sock = connection.wire._sock  # type: ignore[attr-defined]  # a plain wire has one
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert await client.disconnect()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("disk", ["memory", "held"])
async def test_conformance_22_a_client_that_vanishes_hurts_nobody(mode: ReplyMode, disk: str) -> None:
    tree = {"driver": HELD, "size": 4 * MIB} if disk == "held" else MEMORY
    async with serving(tree) as served:
        other = await served.connect(mode=mode)
        if disk == "memory":
            await other.write(0, random.Random(3).randbytes(2 * MIB))
        for received in (0, 1, 20, 5000):
            client = await served.connect(mode=mode, receive_bytes=4096)
            await client.send(Command.READ, 0, 2 * MIB)
            await client.send(Command.READ, 0, 64)
            if disk == "held":
                await held(served.node()).until(2)
            else:
                async with asyncio.timeout(LIMIT_S):
                    while received:
                        received -= len(await asyncio.get_running_loop().sock_recv(client.sock, received))
            client.sock.close()
            if disk == "held":
                held(served.node()).release(2)
            assert not (await other.ask(Command.CACHE, 0, 512)).error
            await served.until_gone(1)


async def test_conformance_22_on_shutdown_old_requests_finish_and_new_ones_get_eshutdown() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client, idle = await served.connect(), await served.connect()
        old = [await client.send(Command.READ, 0, 512), await client.send(Command.WRITE, 0, payload=b"x" * 512)]
        await driver.until(2)
        closing = asyncio.create_task(served.server.close(LIMIT_S))
        await idle.at_end()
        new = [
            await client.send(Command.READ, 0, 512),
            await client.send(Command.WRITE, 0, payload=b"y" * 512),
            await client.send(Command.WRITE, 0, payload=b"z" * 300 * KIB),
            await client.send(Command.FLUSH),
        ]
        assert [(await client.reply(cookie)).error for cookie in new] == [Errno.ESHUTDOWN] * 4
        driver.release()
        assert [(await client.reply(cookie)).error for cookie in old] == [0, 0]
        async with asyncio.timeout(LIMIT_S):
            await closing
        assert await client.at_end()
        assert driver.written == {0: b"x" * 512}


async def test_conformance_23_extended_headers_take_64_bit_lengths() -> None:
    size = 1 << 40
    async with serving({"driver": "memory", "size": size, "discard": "unmap"}) as served:
        client = await served.connect(mode=EXTENDED)
        await client.write(size - 8, b"the end!")
        status = await client.ask(Command.BLOCK_STATUS, 0, size)
        extents = status.extents[client.contexts["base:allocation"]]
        assert sum(length for length, _ in extents) == size
        assert extents[0][0] > 1 << 32
        assert not (await client.ask(Command.WRITE_ZEROES, 1 << 33, size - (1 << 33))).error
        assert await client.read(size - 8, 8) == bytes(8)
        assert not (await client.ask(Command.TRIM, 0, size)).error


async def test_conformance_23_every_write_says_that_a_payload_follows(served: Served) -> None:
    client = await served.connect(mode=EXTENDED)
    assert (await client.ask_raw(Command.WRITE, 0, 512, 0, b"x" * 512)).error in (0, Errno.EINVAL)
    assert await client.read(4096, 512) == bytes(512)


async def test_conformance_23_an_unexpected_payload_is_swallowed(served: Served) -> None:
    client = await served.connect(mode=EXTENDED)
    for command in (Command.READ, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, 77):
        for length in (1, 512, 100 * KIB):
            assert (await client.ask_raw(command, 0, length, PAYLOAD_LEN, bytes(length))).error == Errno.EINVAL
    assert await client.read(0, 512) == bytes(512)


async def test_conformance_23_block_status_of_some_contexts() -> None:
    async with serving(MEMORY, allocation_depth=True) as served:
        names = ["base:allocation", "qemu:allocation-depth"]
        client = await served.connect(mode=EXTENDED, contexts=names)
        for name in names:
            reply = await client.ask(Command.BLOCK_STATUS, 0, MIB, context_ids=[client.contexts[name]])
            assert list(reply.extents) == [client.contexts[name]]
        for payload in (struct.pack(">QL", 4096, 99), struct.pack(">Q", 4096), b"abc", struct.pack(">QLL", 4096, 1, 1)):
            reply = await client.ask_raw(Command.BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN, payload)
            assert reply.error == Errno.EINVAL
        assert await client.read(0, 512) == bytes(512)


async def test_conformance_23_what_extended_headers_exclude(served: Served) -> None:
    haggler = await Haggler.meet(served)
    assert await haggler.verdict(Option.EXTENDED_HEADERS) == OptionReplyType.ACK
    assert await haggler.verdict(Option.STRUCTURED_REPLY) == OptionReplyType.ERR_EXT_HEADER_REQD
    await haggler.option(Option.EXPORT_NAME, b"disk1")
    assert await haggler.is_closed()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EDQUOT, Errno.ENOSPC),
        (errno.EFBIG, Errno.ENOSPC),
        (errno.EROFS, Errno.EPERM),
        (errno.EACCES, Errno.EPERM),
        (errno.ENOTSUP, Errno.EINVAL),
        (errno.ENOMEM, Errno.ENOMEM),
        (errno.ENXIO, Errno.EIO),
        (0, Errno.EIO),
    ],
)
async def test_conformance_errors_are_mapped_and_never_sent_raw(mode: ReplyMode, code: int, expected: Errno) -> None:
    """The list of errors at its top."""
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect(mode=mode)
        cookies = [await client.send(Command.READ, 0, 512), await client.send(Command.WRITE, 0, payload=b"x")]
        await driver.until(2)
        for request in driver.waiting:
            request.go.set_exception(OSError(code, "a driver's words"))
        driver.waiting.clear()
        assert [(await client.reply(cookie)).error for cookie in cookies] == [expected] * 2
        driver.release()


async def test_conformance_an_exception_that_is_no_oserror_is_answered_too() -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect()
        cookies = [await client.send(Command.READ, 0, 512), await client.send(Command.FLUSH)]
        await driver.until(1)
        driver.waiting[0].go.set_exception(LookupError("a mistake"))
        driver.waiting.pop(0)
        reply = await client.reply(cookies[0])
        assert reply.error == Errno.EIO
        assert "a mistake" in reply.text
        driver.release()
        assert not (await client.reply(cookies[1])).error
