"""Long reads that are sent from a file's pages, and the one descriptor they take."""

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest

from nbd_protocol.constants import Command, Errno, ReplyMode
from tests.server.clients import LIMIT_S, MODES, no_descriptors_left, open_descriptors, serving, the_connection

MIB = 1 << 20


@pytest.mark.parametrize("mode", MODES)
async def test_large_reads_without_a_descriptor_left(mode: ReplyMode, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    data = random.Random(8).randbytes(4 * MIB)
    path.write_bytes(data)
    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(mode=mode)
        with no_descriptors_left():
            assert await client.read(0, 4 * MIB) == data
        assert await client.read(MIB, MIB) == data[MIB : 2 * MIB]


async def test_many_large_reads_take_one_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4 * MIB)
    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(receive_bytes=1)
        await client.read(0, 4 * MIB)
        before = open_descriptors()
        cookies = [await client.send(Command.READ, 0, 2 * MIB) for _ in range(100)]
        async with asyncio.timeout(LIMIT_S):
            while the_connection(served).in_flight < 20:
                await asyncio.sleep(0)
        assert open_descriptors() <= before + 1
        for cookie in cookies:
            assert (await client.reply(cookie)).data == b"x" * 2 * MIB
        assert open_descriptors() == before


@pytest.mark.parametrize("mode", MODES)
async def test_a_reply_is_sent_from_the_file(mode: ReplyMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(9).randbytes(4 * MIB))
    sent, sendfile = list[int](), os.sendfile

    def counting(out: int, fd: int, offset: int, count: int) -> int:
        sent.append(sendfile(out, fd, offset, count))
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", counting)
    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(mode=mode)
        assert await client.read(MIB, 256 << 10) == path.read_bytes()[MIB:][: 256 << 10]
        assert sum(sent) == 256 << 10


@pytest.mark.parametrize("mode", MODES)
async def test_a_file_that_fails(mode: ReplyMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header is gone when that is found out: a simple reply can't tell it any more, and ends the connection."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4 * MIB)

    def sendfile(out: int, fd: int, offset: int, count: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with serving({"driver": "file", "filename": str(path)}) as served:
        client = await served.connect(mode=mode)
        with monkeypatch.context() as broken:
            broken.setattr(os, "sendfile", sendfile)
            if mode is ReplyMode.SIMPLE:
                with pytest.raises((EOFError, ConnectionError)):
                    await client.read(0, MIB)
                await served.until_gone()
            else:
                assert (await client.ask(Command.READ, 0, MIB)).error == Errno.EIO
        client = await served.connect(mode=mode)
        assert await client.read(0, MIB) == b"x" * MIB
