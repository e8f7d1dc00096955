"""Both ends of TLS in one process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from pynbd.block.objects import Objects
from pynbd.crypto.tls_credentials import TlsCredentials, TlsCredsX509, TlsCredsX509Options
from pynbd.crypto.tls_socket import TlsSocket

LIMIT_S = 30.0


def credentials(endpoint: str, folder: Path | str = "", **options: Any) -> TlsCredsX509:
    described = TlsCredsX509Options(
        qom_type="tls-creds-x509",
        id="tls0",
        endpoint=endpoint,  # type: ignore[arg-type]  # one of two words
        dir=str(folder),
        **options,
    )
    return TlsCredsX509(described, Objects())


@contextlib.contextmanager
def socket_pair(buffer_bytes: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    try:
        for sock in pair:
            sock.setblocking(False)
            if buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        yield pair
    finally:
        for sock in pair:
            sock.close()


@contextlib.asynccontextmanager
async def secured(
    server: TlsCredentials, client: TlsCredentials, *, hostname: str | None = "localhost", buffer_bytes: int = 0
) -> AsyncIterator[tuple[TlsSocket, TlsSocket]]:
    """A server's and a client's end after their handshake."""
    with socket_pair(buffer_bytes) as (ours, theirs):
        ends = server.begin(ours), client.begin(theirs, hostname)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(end.handshake() for end in ends))
        try:
            yield ends
        finally:
            for end in ends:
                end.close()
