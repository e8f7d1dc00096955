"""TLS at the server: required or allowed, who may come in, plain text that somebody put before it, and all requests."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from nbd_protocol import messages as m
from nbd_protocol.constants import Command, Option, OptionReplyType, ReplyMode
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation_events import Established, Refused, TlsWanted
from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto.tls_credentials import TlsCredsX509
from pynbd.crypto.tls_socket import TlsSocket
from pynbd.server.config import ListenOptions
from pynbd.server.limits import ClientLimits
from pynbd.server.tls import ServerTls, server_tls
from pynbd.server.tls_wire import TlsWire
from tests.crypto.tls_ends import credentials
from tests.server.clients import (
    LIMIT_S,
    MODES,
    Client,
    Served,
    negotiate,
    negotiation_for,
    serving,
)
from tests.server.workload import Workload

KIB, MIB = 1 << 10, 1 << 20
DISK = {"driver": "memory", "size": 4 * MIB}


def tls_of(pki: Path, **options: Any) -> ServerTls:
    objects = Objects()
    objects.make({"qom-type": "authz-simple", "id": "alice", "identity": "CN=alice"})
    return server_tls(ListenOptions(tls_certificates=str(pki), **options), objects)


@asynccontextmanager
async def secure_server(pki: Path, tree: Mapping[str, Any] = DISK, **options: Any) -> AsyncIterator[Served]:
    async with serving(tree, server_options={"tls": tls_of(pki, **options)}) as served:
        yield served


async def secured(served: Served, client: TlsCredsX509, mode: ReplyMode = ReplyMode.STRUCTURED) -> Client:
    """A client in the transmission phase, through TLS."""
    sock = await served.open_socket()
    negotiation = negotiation_for(mode, tls="require")
    negotiation.connect("", contexts=("base:allocation",))
    assert isinstance(await negotiate(sock, negotiation), TlsWanted)
    secure = client.begin(sock, "localhost")
    async with asyncio.timeout(LIMIT_S):
        await secure.handshake()
    negotiation.tls_established()
    event = await negotiate(secure, negotiation)
    assert isinstance(event, Established)
    assert event.secure
    return Client(cast(socket.socket, secure), event)  # it is one in all that a client does with it


@pytest.mark.parametrize("mode", MODES)
async def test_every_request_through_tls(mode: ReplyMode, pki: Path) -> None:
    async with secure_server(pki) as served:
        client = await secured(served, credentials("client", pki), mode)
        (connection,) = served.server.connections
        assert isinstance(connection.wire, TlsWire)
        await Workload(client, 0, 4 * MIB, seed=5).run(400)
        assert await client.disconnect()


async def test_large_payloads_of_many_requests_at_once(pki: Path) -> None:
    """More than any buffer between the ends holds, both ways, with requests behind them in the same record."""
    source = random.Random(7)
    contents = [source.randbytes(MIB) for _ in range(4)]
    async with secure_server(pki) as served:
        client = await secured(served, credentials("client", pki))
        parts: list[bytes] = []
        cookies = []
        for number, content in enumerate(contents):
            cookie, buffers = client.prepared(Command.WRITE, number * MIB, payload=content)
            cookies.append(cookie)
            parts += [bytes(buffer) for buffer in buffers]
        await client.send_bytes(b"".join(parts))
        for cookie in cookies:
            assert not (await client.reply(cookie)).error
        asked = [client.prepared(Command.READ, number * MIB, MIB) for number in range(4) for _ in range(3)]
        asked += [client.prepared(Command.READ, 5 * number, 1000) for number in range(200)]
        await client.send_bytes(b"".join(bytes(buffer) for _, buffers in asked for buffer in buffers))
        whole = b"".join(contents)
        for cookie, _ in asked:
            start = client.replies[cookie].offset
            reply = await client.reply(cookie)
            assert reply.data == whole[start : start + len(reply.data)]
        assert await client.disconnect()


async def test_a_long_read_of_a_file(pki: Path, tmp_path: Path) -> None:
    """What goes straight from the page cache to a plain socket is encrypted here; also where the file ends early."""
    path = tmp_path / "disk"
    content = random.Random(3).randbytes(2 * MIB)
    path.write_bytes(content)
    tree = {"driver": "raw", "read-only": True, "file": {"driver": "file", "filename": str(path)}}
    async with secure_server(pki, tree) as served:
        client = await secured(served, credentials("client", pki))
        (connection,) = served.server.connections
        for number in range(20):
            assert await client.read(number * KIB, 2 * MIB - number * KIB) == content[number * KIB :]
        assert connection._spans._file is not None
        cookie = await client.send(Command.READ, 0, 2 * MIB)
        os.truncate(path, MIB)
        reply = await client.reply(cookie)
        assert reply.error or reply.data in (content, content[:MIB] + bytes(MIB))
        assert await client.disconnect()


async def test_nothing_without_tls_where_it_is_required(pki: Path) -> None:
    async with secure_server(pki) as served:
        refused = await served.refused("")
        assert refused.reply_type == OptionReplyType.ERR_TLS_REQD


async def test_with_and_without_where_it_is_allowed(pki: Path) -> None:
    async with secure_server(pki, tls="allowed") as served:
        plain = await served.connect()
        secure = await secured(served, credentials("client", pki))
        await plain.write(0, b"plain")
        assert await secure.read(0, 5) == b"plain"
        assert await plain.disconnect()
        assert await secure.disconnect()


async def test_where_there_is_none(pki: Path) -> None:
    async with serving(DISK) as served:
        sock = await served.open_socket()
        negotiation = negotiation_for(ReplyMode.STRUCTURED, tls="require")
        negotiation.connect("")
        event = await negotiate(sock, negotiation)
        assert isinstance(event, Refused)
        assert (event.option, event.reply_type) == (Option.STARTTLS, OptionReplyType.ERR_POLICY)


async def receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    async with asyncio.timeout(LIMIT_S):
        while len(data) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
            assert piece, data
            data += piece
    return data


@pytest.mark.parametrize("together", [True, False], ids=["in one segment", "a segment later"])
async def test_plain_text_behind_starttls_is_never_taken_for_what_came_through_tls(together: bool, pki: Path) -> None:
    """Whoever sits between the ends may add options in plain text (CVE-2021-3716 of another server)."""
    async with secure_server(pki) as served:
        sock = await served.open_socket()
        loop = asyncio.get_running_loop()
        await receive_exactly(sock, 18)
        injected = m.OPTION_HEADER.build(m.OptionHeader(Option.STRUCTURED_REPLY, 0))
        starttls = (3).to_bytes(4, "big") + m.OPTION_HEADER.build(m.OptionHeader(Option.STARTTLS, 0))
        await loop.sock_sendall(sock, starttls + (injected if together else b""))
        reply = m.OPTION_REPLY_HEADER.parse(await receive_exactly(sock, 20))
        assert (reply.option, reply.type) == (Option.STARTTLS, OptionReplyType.ACK)
        secure = credentials("client", pki).begin(sock, "localhost")
        if not together:
            # It lies where the handshake should be, and there can be none.
            await loop.sock_sendall(sock, injected)
            with pytest.raises(OSError):
                await secure.handshake()
            return
        await secure.handshake()
        # Nothing was negotiated before: neither by the client nor by anybody else.
        context = m.META_CONTEXT_REQUEST.build(m.MetaContextRequest("", ("base:allocation",)))
        header = m.OPTION_HEADER.build(m.OptionHeader(Option.SET_META_CONTEXT, len(context)))
        await secure.send_all(header + context)
        first = m.OPTION_REPLY_HEADER.parse((await secure.receive(1000))[:20])
        assert (first.option, first.type) == (Option.SET_META_CONTEXT, OptionReplyType.ERR_INVALID)
        secure.close()


async def test_a_client_who_is_not_believed(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with secure_server(pki, tls_verify_peer=True) as served:
            stranger = credentials("client", pki / "stranger", ca_file=str(pki / "ca-cert.pem"))
            for client, says in (
                (stranger, "the certificate is not accepted: unable to get local issuer certificate"),
                (credentials("client", ca_file=str(pki / "ca-cert.pem")), "peer did not return a certificate"),
            ):
                with pytest.raises(OSError):
                    await secured(served, client)
                assert says in caplog.text
            assert not served.server.connections


async def test_who_may_come_in(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with secure_server(pki, tls_verify_peer=True, tls_authz="alice") as served:
            client = await secured(served, credentials("client", pki))
            assert "uses export '' (structured, TLSv1.3, 'CN=alice')" in caplog.text
            with pytest.raises(RemoteProtocolError, match="the server closed the connection"):
                await secured(served, credentials("client", pki / "bob"))
            assert "refused: 'CN=bob' is not authorized" in caplog.text
            assert await client.read(0, 10) == bytes(10)
            assert await client.disconnect()


async def test_a_client_that_never_shakes_hands(pki: Path) -> None:
    tls = tls_of(pki)
    async with serving(DISK, server_options={"tls": tls, "limits": ClientLimits(handshake_timeout=0.05)}) as served:
        sock = await served.open_socket()
        negotiation = negotiation_for(ReplyMode.STRUCTURED, tls="require")
        negotiation.connect("")
        assert isinstance(await negotiate(sock, negotiation), TlsWanted)
        async with asyncio.timeout(LIMIT_S):
            assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""


async def test_a_client_that_vanishes_in_the_middle_of_everything(pki: Path) -> None:
    async with secure_server(pki) as served:
        for unread in range(4):
            client = await secured(served, credentials("client", pki))
            for _ in range(20):
                await client.send(Command.READ, 0, 4 * MIB if unread % 2 else 100)
            secure = cast(TlsSocket, client.sock)
            (secure._socket if unread < 2 else secure).close()
            await served.until_gone()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tls_creds": "tls0", "tls_certificates": ""}, "there is no tls-creds-x509 'tls0'"),
        ({"tls_creds": "alice", "tls_certificates": ""}, "object 'alice' is a authz-simple"),
        ({"tls_authz": "nobody", "tls_verify_peer": True}, "there is no authz-simple 'nobody'"),
        ({"tls_authz": "alice"}, "nobody can be told by name"),
    ],
)
def test_what_is_wrong(options: dict[str, Any], says: str, pki: Path) -> None:
    objects = Objects()
    objects.make({"qom-type": "authz-simple", "id": "alice", "identity": "CN=alice"})
    with pytest.raises(OptionError, match=says):
        server_tls(ListenOptions(**{"tls_certificates": str(pki), **options}), objects)


def test_credentials_of_a_client_are_not_a_servers(pki: Path) -> None:
    objects = Objects()
    objects.make({"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(pki)})
    with pytest.raises(OptionError, match="is of a client: a server needs endpoint=server"):
        server_tls(ListenOptions(tls_creds="tls0"), objects)
