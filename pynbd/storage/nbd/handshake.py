"""The negotiation with a server: one socket, and `ClientNegotiation` on it.

Everything that can go wrong is an `OSError` whose text names the server.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from nbd_protocol.client_negotiation import ClientNegotiation, State
from nbd_protocol.constants import META_BASE_ALLOCATION, NEGOTIATION_TIMEOUT_S, Option, OptionReplyType
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.negotiation import NEED_DATA
from nbd_protocol.negotiation_events import ClientEvent, Established, Refused, TlsWanted
from pynbd.crypto.tls_socket import TlsSocket, receive, send_all
from pynbd.storage.nbd.address import ServerAddress, connect_socket
from pynbd.storage.nbd.tls import ClientTls

RECEIVE_BYTES = 64 * 1024

REFUSALS: Final = {
    OptionReplyType.ERR_UNKNOWN: errno.ENOENT,
    OptionReplyType.ERR_POLICY: errno.EACCES,
    OptionReplyType.ERR_TLS_REQD: errno.EACCES,
    OptionReplyType.ERR_UNSUP: errno.ENOTSUP,
    OptionReplyType.ERR_SHUTDOWN: errno.ESHUTDOWN,
}
"""The errno of what a server refuses; EINVAL for all else."""


class Handshake:
    """One conversation with a server, up to its end or to the transmission phase.

    `async with` it: on leaving, the socket is closed unless `connect` has handed it over.

    Args:
        address: the server.
        tls: how, if nothing may be said without it.
    """

    def __init__(self, address: ServerAddress, *, tls: ClientTls | None = None) -> None:
        self.address = address
        self.negotiation = ClientNegotiation(tls="off" if tls is None else "require")
        self._tls = tls
        self._socket: socket.socket | TlsSocket | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(NEGOTIATION_TIMEOUT_S):
                self._socket = await connect_socket(self.address)
        except TimeoutError:
            raise self._error(errno.ETIMEDOUT, f"no connection within {NEGOTIATION_TIMEOUT_S:g} s") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    def _error(self, code: int, problem: str) -> OSError:
        return OSError(code, f"Failed to connect to '{self.address}': {problem}")

    async def answer(self) -> ClientEvent:
        """The answer to the command that was given to `negotiation`.

        Raises:
            OSError: EPROTO if the server broke the protocol, ETIMEDOUT if it took too long; or the socket's own. The
                conversation is over then.
        """
        try:
            async with asyncio.timeout(NEGOTIATION_TIMEOUT_S):
                return await self._answer()
        except TimeoutError:
            raise self._error(errno.ETIMEDOUT, f"no answer within {NEGOTIATION_TIMEOUT_S:g} s") from None
        except RemoteProtocolError as problem:
            raise self._error(errno.EPROTO, str(problem)) from problem
        except OSError as problem:
            raise self._error(problem.errno or errno.EIO, problem.strerror or str(problem)) from None

    async def _answer(self) -> ClientEvent:
        assert self._socket is not None
        while True:
            event = self.negotiation.next_event()
            if outgoing := self.negotiation.data_to_send():
                await send_all(self._socket, outgoing)
            if event is NEED_DATA:
                self.negotiation.receive_data(await receive(self._socket, RECEIVE_BYTES))
            elif isinstance(event, TlsWanted):
                assert self._tls is not None
                assert isinstance(self._socket, socket.socket)
                self._socket = await self._tls.begin(self._socket)
                self.negotiation.tls_established()
            else:
                return event

    async def connect(
        self, export: str, contexts: Sequence[str] = (META_BASE_ALLOCATION,)
    ) -> tuple[socket.socket | TlsSocket, Established]:
        """Use an export: the socket, which now is the caller's to close, and what was negotiated.

        What the server sent behind it is in `negotiation.trailing_data`.

        Raises:
            OSError: as `answer`; and ENOENT, EACCES … if the server refuses.
        """
        assert self._socket is not None
        self.negotiation.connect(export, contexts=contexts)
        event = await self.answer()
        if isinstance(event, Refused):
            raise self.refusal(event, export)
        assert isinstance(event, Established), event
        connected, self._socket = self._socket, None
        return connected, event

    async def end(self) -> None:
        """End the conversation politely, if it has not led to an export."""
        if self._socket is not None and self.negotiation.state is not State.ENDED:
            self.negotiation.abort()
            # Some servers hang up without a word; what they had to say has been said.
            with contextlib.suppress(OSError):
                await self.answer()

    def refusal(self, refused: Refused, export: str) -> OSError:
        """The error for what the server refused."""
        if refused.option == Option.STARTTLS:
            return self._error(errno.EACCES, f"the server does not begin TLS: {refused.text or refused.exception()}")
        if refused.reply_type == OptionReplyType.ERR_TLS_REQD:
            how = "use a URI with nbds, or tls-creds"
            return self._error(errno.EACCES, f"the server demands TLS for export {export!r}: {how}")
        code = next((code for kind, code in REFUSALS.items() if kind == refused.reply_type), errno.EINVAL)
        reason = refused.text or os.strerror(code)
        return self._error(code, f"the server refuses export {export!r}: {reason} ({refused.exception()})")
