"""Long reads that are sent from a file's pages, and the one descriptor they take."""

import asyncio
import random
from pathlib import Path

import pytest

from nbd_protocol.constants import Command, ReplyMode
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
