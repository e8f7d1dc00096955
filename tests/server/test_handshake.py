"""The handshake: what a client asks is answered from the list of exports, as that is when it asks."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Self

import pytest

from nbd_protocol.constants import Option, ReplyMode
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation_events import (
    Ended,
    Established,
    ExportDescribed,
    ExportsListed,
    MetaContextsListed,
    Refused,
)
from nbd_protocol.server_negotiation import ServerNegotiation
from pynbd.server.export import Export
from pynbd.server.handshake import Negotiated, negotiate
from pynbd.server.offer import Offer
from tests.server.clients import LIMIT_S, MODES, Served, add_export, negotiation_for, serving
from tests.server.clients import negotiate as ask

MEMORY = {"driver": "memory", "size": 1 << 20}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(MEMORY, {"driver": "memory", "size": 12345}, description="a disk") as served:
        yield served


class Shaking:
    """The server's side of one handshake, running, and the client's socket."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.client, self.server = socket.socketpair()
        self.client.setblocking(False)
        self.server.setblocking(False)
        self.task = asyncio.create_task(negotiate(self.server, Offer(exports), ServerNegotiation()))

    async def result(self) -> Negotiated | None:
        async with asyncio.timeout(LIMIT_S):
            return await self.task

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.client.close()
        self.server.close()


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_comes_to_its_export(served: Served, mode: ReplyMode) -> None:
    async with Shaking(served.server.exports) as shaking:
        negotiation = negotiation_for(mode)
        negotiation.connect("disk1")
        event = await ask(shaking.client, negotiation)
        assert isinstance(event, Established)
        assert event.info.size == 12345
        result = await shaking.result()
        assert result is not None
        assert result.export is served.server.exports["disk1"]
        assert result.ready.mode is mode
        assert result.trailing == b""


async def test_what_comes_behind_is_kept(served: Served) -> None:
    async with Shaking(served.server.exports) as shaking:
        await asyncio.get_running_loop().sock_sendall(
            shaking.client, b"\0\0\0\3" + b"IHAVEOPT" + (1).to_bytes(4, "big") + b"\0\0\0\5disk1" + b"first requests"
        )
        result = await shaking.result()
        assert result is not None
        assert result.ready.option == Option.EXPORT_NAME
        assert result.trailing == b"first requests"


async def test_questions_are_answered(served: Served) -> None:
    async with Shaking(served.server.exports) as shaking:
        negotiation = negotiation_for(ReplyMode.STRUCTURED)
        negotiation.list_exports()
        listed = await ask(shaking.client, negotiation)
        assert isinstance(listed, ExportsListed)
        assert [(export.name, export.details) for export in listed.exports] == [("", "a disk"), ("disk1", "a disk")]
        negotiation.describe("disk1")
        described = await ask(shaking.client, negotiation)
        assert isinstance(described, ExportDescribed)
        assert (described.info.size, described.info.description) == (12345, "a disk")
        negotiation.list_meta_contexts("disk1")
        assert await ask(shaking.client, negotiation) == MetaContextsListed("disk1", ("base:allocation",))
        for refused in (negotiation.describe, negotiation.list_meta_contexts):
            refused("nowhere")
            event = await ask(shaking.client, negotiation)
            assert isinstance(event, Refused)
            assert "'nowhere' is not present" in event.text
        negotiation.abort()
        assert isinstance(await ask(shaking.client, negotiation), Ended)
        assert await shaking.result() is None


async def test_no_default_export(served: Served) -> None:
    async with Shaking({"disk1": served.server.exports["disk1"]}) as shaking:
        negotiation = negotiation_for(ReplyMode.STRUCTURED)
        negotiation.describe("")
        event = await ask(shaking.client, negotiation)
        assert isinstance(event, Refused)
        assert "no default export" in event.text


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVE", b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\x20abc"])
async def test_a_client_that_hangs_up(served: Served, sent: bytes) -> None:
    async with Shaking(served.server.exports) as shaking:
        await asyncio.get_running_loop().sock_sendall(shaking.client, sent)
        shaking.client.shutdown(socket.SHUT_WR)
        assert await shaking.result() is None


@pytest.mark.parametrize("sent", [b"\0\0\0\x7f", b"\0\0\0\3" + b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_client_that_speaks_something_else(served: Served, sent: bytes) -> None:
    async with Shaking(served.server.exports) as shaking:
        await asyncio.get_running_loop().sock_sendall(shaking.client, sent)
        with pytest.raises(RemoteProtocolError):
            await shaking.result()


async def test_the_export_that_was_told_is_the_one_that_is_used(served: Served) -> None:
    """Its name goes to another disk while the answer is on its way."""

    class Moving(dict[str, Export]):
        """A list of exports that changes as soon as somebody has looked."""

        def __getitem__(self, name: str) -> Export:
            export = super().__getitem__(name)
            self[name] = served.server.exports[""]
            return export

    exports = Moving(served.server.exports)
    async with Shaking(exports) as shaking:
        negotiation = negotiation_for(ReplyMode.SIMPLE)
        negotiation.connect("disk1")
        event = await ask(shaking.client, negotiation)
        assert isinstance(event, Established)
        assert event.info.size == 12345
        result = await shaking.result()
        assert result is not None
        assert result.export is served.server.exports["disk1"]


async def test_exports_come_and_go_while_clients_ask(served: Served) -> None:
    await add_export(served.graph, served.server, "new", MEMORY)
    client = await served.connect("new")
    assert client.info.size == 1 << 20
    assert await client.disconnect()
    await served.until_gone()
    export = await served.server.remove_export("new")
    served.graph.detach(export.backend)
    assert "not present" in (await served.refused("new")).text
