"""Requests that are carried out as coroutines."""

import pytest

from nbd_protocol.constants import Command, CommandFlag, ReplyMode
from tests.server.clients import MODES, PAYLOAD_LEN, serving
from tests.server.held import HELD, held


@pytest.mark.parametrize("mode", MODES)
async def test_fua_and_other_flags_reach_the_backend(mode: ReplyMode) -> None:
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        driver.release()
        client = await served.connect(mode=mode)
        flags = CommandFlag.FUA | (PAYLOAD_LEN if mode is ReplyMode.EXTENDED else 0)
        assert not (await client.ask_raw(Command.WRITE, 0, 4, flags, b"abcd")).error
        assert [call[0] for call in driver.calls] == ["write", "flush"]
        driver.calls.clear()
        await client.write(0, b"efgh")
        assert [call[0] for call in driver.calls] == ["write"]
