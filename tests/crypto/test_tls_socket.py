"""TLS on a socket: every byte in order whatever the sizes, and a clear word where there is no agreement."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import ssl
import warnings
from pathlib import Path

import pytest

from pynbd.crypto.tls_socket import CHUNK_BYTES, MAX_BYTES_A_CALL, TlsFailure, TlsSocket, chunks
from tests.crypto.tls_ends import LIMIT_S, credentials, secured, socket_pair

KIB, MIB = 1 << 10, 1 << 20


async def send_patiently(end: TlsSocket, buffers: list[bytes]) -> None:
    """As a data path sends: what did not count as sent is sent again, from its beginning."""
    loop = asyncio.get_running_loop()
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        try:
            sent = end.sendmsg(left)
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(end.fileno(), writable.set)
            await writable.wait()
            loop.remove_writer(end.fileno())
            continue
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]


async def receive_exactly(end: TlsSocket, count: int, source: random.Random) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = await end.receive(source.choice([1, 100, 16 * KIB, 64 * KIB, MIB]))
        assert piece, f"the end after {len(received)} of {count} bytes"
        received += piece
    return bytes(received)


@pytest.mark.parametrize("seed", range(6))
async def test_all_bytes_arrive_in_order(seed: int, pki: Path) -> None:
    source = random.Random(seed)
    sizes = [0, 1, 28, 4096, 16 * KIB, 16 * KIB + 1, CHUNK_BYTES, CHUNK_BYTES + 5, MAX_BYTES_A_CALL + 77]
    batches = [[source.randbytes(source.choice(sizes)) for _ in range(source.randint(1, 6))] for _ in range(8)]
    sent = b"".join(b"".join(batch) for batch in batches)

    async def send_all_batches(end: TlsSocket) -> None:
        for batch in batches:
            await send_patiently(end, batch)

    async with (
        secured(credentials("server", pki), credentials("client", pki), buffer_bytes=source.choice([0, 1])) as ends,
        asyncio.timeout(LIMIT_S),
    ):
        for sender, receiver in (ends, ends[::-1]):
            task = asyncio.create_task(send_all_batches(sender))
            assert await receive_exactly(receiver, len(sent), source) == sent
            await task


async def test_what_has_not_left_does_not_count_as_sent(pki: Path) -> None:
    """A full socket must not make the caller believe that its buffer is free."""
    async with secured(credentials("server", pki), credentials("client", pki), buffer_bytes=1) as (server, client):
        data = random.Random(1).randbytes(MIB)
        received = bytearray()
        position = 0
        while len(received) < MIB:
            with contextlib.suppress(BlockingIOError):
                position += server.sendmsg([memoryview(data)[position:]]) if position < MIB else 0
            try:
                view = memoryview(bytearray(256 * KIB))
                received += view[: client.recv_into(view)]
            except BlockingIOError:
                assert position <= MIB
            assert position <= len(received) + 256 * KIB
        assert received == data
        assert position + server.sendmsg([memoryview(data)[position:]]) == MIB


async def test_an_end_that_is_told_and_one_that_is_not(pki: Path) -> None:
    for told in (True, False):
        async with secured(credentials("server", pki), credentials("client", pki)) as (server, client):
            assert client.sendmsg([b"last words"]) == 10
            if told:
                client.close()
            else:
                client._socket.close()
            view = memoryview(bytearray(100))
            assert server.recv_into(view) == 10
            assert await server.receive(100) == b""
            assert server.recv_into(view) == 0


async def test_nothing_there_is_no_end(pki: Path) -> None:
    async with secured(credentials("server", pki), credentials("client", pki)) as (server, client):
        with pytest.raises(BlockingIOError):
            server.recv_into(memoryview(bytearray(10)))
        client.sendmsg([b"0123456789abcdef"])
        view = memoryview(bytearray(10))
        assert server.recv_into(view) == 10
        assert server.more  # the socket knows nothing of the rest
        assert server.recv_into(view) == 6
        assert not server.more


async def test_version_and_names(pki: Path) -> None:
    async with secured(
        credentials("server", pki), credentials("client", pki / "bob", ca_file=str(pki / "ca-cert.pem"))
    ) as (
        server,
        client,
    ):
        assert server.version == client.version == "TLSv1.3"
        assert server.identity == "CN=bob"
        assert client.identity == "CN=localhost"


async def test_a_peer_that_knows_only_tls_1_2(pki: Path) -> None:
    server, client = credentials("server", pki), credentials("client", pki)
    client._context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with secured(server, client) as (end, other):
        assert end.version == "TLSv1.2"
        assert end.identity == "CN=alice"
        assert other.sendmsg([b"data"]) == 4
        assert await end.receive(10) == b"data"


async def both_fail(server: TlsSocket, client: TlsSocket) -> list[str]:
    """What each end says; both must fail, a client at the latest when it receives."""

    async def whole(end: TlsSocket) -> None:
        await end.handshake()
        await end.receive(1)

    async with asyncio.timeout(LIMIT_S):
        problems = await asyncio.gather(whole(server), whole(client), return_exceptions=True)
    texts = []
    for problem in problems:
        assert isinstance(problem, OSError), problem
        assert problem.errno in (errno.EACCES, errno.EPROTO, errno.ECONNRESET)
        texts.append(str(problem.strerror))
    return texts


@pytest.mark.parametrize(
    ("case", "server_says", "client_says"),
    [
        ("a stranger as the server", "unknown ca", "unable to get local issuer"),
        ("a stranger as the client", "unable to get local issuer", "unknown ca"),
        ("a client without a certificate", "peer did not return a certificate", "certificate required"),
        ("another host's certificate", "bad certificate", "Hostname mismatch"),
        ("an old version", "unsupported protocol", "protocol version"),
    ],
)
async def test_no_agreement(case: str, server_says: str, client_says: str, pki: Path) -> None:
    ours, hostname = str(pki / "ca-cert.pem"), "localhost"
    server, client = credentials("server", pki), credentials("client", pki)
    match case:
        case "a stranger as the server":
            server = credentials("server", pki / "stranger", ca_file=ours)
        case "a stranger as the client":
            client = credentials("client", pki / "stranger", ca_file=ours)
        case "a client without a certificate":
            client = credentials("client", ca_file=ours)
        case "another host's certificate":
            hostname = "elsewhere.example"
        case "an old version":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                client._context.minimum_version = ssl.TLSVersion.TLSv1
                client._context.maximum_version = ssl.TLSVersion.TLSv1_1
            client._context.set_ciphers("ALL:@SECLEVEL=0")
    with socket_pair() as (one, other):
        texts = await both_fail(server.begin(one), client.begin(other, hostname))
    assert server_says in texts[0]
    assert client_says in texts[1]


async def test_plain_text_instead_of_a_handshake(pki: Path) -> None:
    with socket_pair() as (one, other):
        other.send(b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00")
        with pytest.raises(TlsFailure, match="the TLS handshake failed: wrong version number"):
            await credentials("server", pki).begin(one).handshake()


async def test_a_record_that_was_changed_on_its_way(pki: Path) -> None:
    async with secured(credentials("server", pki), credentials("client", pki)) as (server, client):
        client.sendmsg([b"pay 10"])
        record = bytearray(server._socket.recv(1000))
        record[-1] ^= 1
        client._socket.send(record)
        with pytest.raises(TlsFailure, match="receiving failed: decryption failed or bad record mac"):
            server.recv_into(memoryview(bytearray(100)))


@pytest.mark.parametrize("skip", [0, 1, 10, 100_000, 299_999, 300_000])
def test_chunks_are_everything_once(skip: int) -> None:
    source = random.Random(2)
    buffers = [source.randbytes(size) for size in (0, 5, 65_536, 1, 0, 134_458, 100_000)]
    found = list(chunks(buffers, skip))
    assert b"".join(b"".join(chunk) for chunk in found) == b"".join(buffers)[skip:]
    assert all(sum(map(len, chunk)) == CHUNK_BYTES for chunk in found[:-1])
