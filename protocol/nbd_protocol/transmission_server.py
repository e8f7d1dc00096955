"""The server's half of the transmission phase, incoming: bytes become requests.

Section "Transmission phase" of ``doc/proto.md``. Requests are found in batches: one pass over all that one
receive brought. Payloads are slices of the received data, never copies.
"""

from typing import Final

import msgspec

from nbd_protocol import messages
from nbd_protocol.codec import derive
from nbd_protocol.constants import (
    LARGE_PAYLOAD_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_SWALLOWED_PAYLOAD_BYTES,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
)
from nbd_protocol.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Batch", "Request", "ServerTransmission"]

REQUEST_CODEC: Final = derive(messages.REQUEST, "request")
EXTENDED_REQUEST_CODEC: Final = derive(messages.EXTENDED_REQUEST, "extended request")

# Plain integers: comparing with members of an IntEnum costs more than the rest of the loop.
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request as it came from the client.

    Attributes:
        type: a Command, or an unknown number.
        flags: CommandFlag bits, and unknown ones.
        cookie: goes into every reply to it; no more is known of it.
        offset: in bytes.
        length: effect length in bytes; for WRITE it is also the length of the payload.
        payload: the data of a WRITE, read-only: a slice of the received data, valid as long as that is.
        context_ids: BLOCK_STATUS in its payload form: the contexts asked for.
        refused: the framing already tells that it must be answered with this error.
        reason: why it is refused.
    """

    type: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: memoryview | None = None
    context_ids: tuple[int, ...] | None = None
    refused: Errno | None = None
    reason: str = ""

    def with_payload(self, payload: memoryview) -> "Request":
        """Give the same request with the payload that the caller collected (see Batch.partial)."""
        return msgspec.structs.replace(self, payload=payload)


class Batch(msgspec.Struct, frozen=True, gc=False):
    """What one pass over received data found.

    Attributes:
        requests: in the order of their arrival.
        consumed: bytes of the data that are done with; the rest is to be given again, followed by more.
        partial: a large WRITE whose header is consumed and whose payload is not all here: the caller collects
            exactly `length` bytes, first those in ``data[consumed:]``, and parses on behind them.
        needs_data: nothing more can be found in ``data[consumed:]`` before more bytes have arrived. When it is
            False, there may be more requests (or a protocol error) in what is left: parse that again.
    """

    requests: list[Request]
    consumed: int
    partial: Request | None = None
    needs_data: bool = True


class ServerTransmission:
    """Finds the requests in what a client sends.

    It holds no data: what is not consumed stays with the caller, and that is never more than one header and
    `large_payload` bytes before the next bytes are needed.

    Args:
        mode: the framing that was negotiated.
        max_payload: the longest WRITE that is served, in bytes; never less than 32 MiB.
        large_payload: a payload from this length up that is incomplete is left to the caller, in bytes.

    Who deals with plain requests without making objects of them finds here how a header is taken apart: `unpack_from`
    gives (magic, flags, type, cookie, offset, length) of the `header_size` bytes at a position, `iter_unpack` those of
    several headers in a row, and `payload_flag` is what a WRITE has among its flags. Only while nothing is being
    skipped (`swallowing` is 0).

    After DISC all further bytes are consumed and ignored. After a RemoteProtocolError every call raises it again.
    """

    def __init__(
        self, mode: ReplyMode, *, max_payload: int = MAX_PAYLOAD_BYTES, large_payload: int = LARGE_PAYLOAD_BYTES
    ) -> None:
        self.mode: Final = mode
        self.max_payload: Final = max(max_payload, MAX_PAYLOAD_BYTES)
        self._large_payload = large_payload
        self._extended = mode is ReplyMode.EXTENDED
        codec = EXTENDED_REQUEST_CODEC if self._extended else REQUEST_CODEC
        self.header_size: Final = codec.size
        self.unpack_from: Final = codec.struct.unpack_from
        self.iter_unpack: Final = codec.struct.iter_unpack
        self.magic: Final[int] = codec.constants[0]
        # The flag that says "a payload follows" exists only with extended headers.
        self.payload_flag: Final = _PAYLOAD_LEN if self._extended else 0
        self.swallowing = 0
        """Bytes that are to be skipped still."""
        self.disconnected = False
        """Whether the client has said DISC."""
        self._failure: RemoteProtocolError | None = None

    def parse(self, data: memoryview, max_requests: int) -> Batch:
        """Find every request that is complete in `data`, in one pass.

        Args:
            data: the bytes not consumed yet, as bytes (format B).
            max_requests: at which number of requests to stop.

        Raises:
            RemoteProtocolError: the stream cannot be understood any more; close the connection. Requests that came
                whole before the fault are returned first, with needs_data False.
        """
        if self._failure is not None:
            raise self._failure
        if self.disconnected:
            return Batch([], len(data))
        if not data.readonly:
            data = data.toreadonly()
        position = self._swallow_some(len(data)) if self.swallowing else 0
        requests: list[Request] = []
        append = requests.append
        unpack_from = self.unpack_from
        expected_magic = self.magic
        payload_flag = self.payload_flag
        header_size = self.header_size
        max_payload = self.max_payload
        size = len(data)
        last = size - header_size
        for _ in range(max_requests):
            if position > last:
                return Batch(requests, position)
            magic, flags, type_, cookie, offset, length = unpack_from(data, position)
            if magic != expected_magic:
                return self._fail(requests, position, f"request magic is {magic:#x}, expected {expected_magic:#x}")
            start = position + header_size
            if type_ == _WRITE:
                end = start + length
                # PAYLOAD_LEN is not asked for: QEMU 10's client never sets it, and sends the data all the same.
                if end <= size and length <= max_payload:
                    append(Request(type_, flags, cookie, offset, length, data[start:end]))
                    position = end
                    continue
            elif not flags & payload_flag and type_ != _DISC:
                append(Request(type_, flags, cookie, offset, length))
                position = start
                continue
            stop = self._parse_rarity(Request(type_, flags, cookie, offset, length), data, start, requests)
            if isinstance(stop, Batch):
                return stop
            position = stop
        return Batch(requests, position, needs_data=False)

    def swallow(self, length: int) -> None:
        """Skip the next `length` bytes: the payload of a partial WRITE that is refused.

        Raises:
            LocalProtocolError: longer than any payload that parse() lets through.
        """
        if not 0 <= length <= self.max_payload:
            raise LocalProtocolError(f"cannot swallow {length} bytes, a payload has at most {self.max_payload}")
        self.swallowing += length

    def _parse_rarity(self, request: Request, data: memoryview, start: int, requests: list[Request]) -> int | Batch:
        """Deal with what is neither a plain request nor a WRITE that is all here; `start` is behind its header.

        Returns the position to go on at, or the finished batch.
        """
        if request.type == _DISC:
            self.disconnected = True
            requests.append(request)
            return Batch(requests, len(data))
        if request.type == _WRITE:
            refusal = self._refuse_write(request)
        elif request.type == Command.BLOCK_STATUS:
            refusal = self._refuse_status_payload(request)
        else:
            refusal = f"command {request.type} takes no payload, {request.length} bytes came with it"
        header_start = start - self.header_size
        if refusal:
            limit = self.max_payload if self._extended else max(self.max_payload, MAX_SWALLOWED_PAYLOAD_BYTES)
            if request.length > limit:
                text = f"{refusal}; a payload of {request.length} bytes is too long to skip (at most {limit})"
                return self._fail(requests, header_start, text)
            requests.append(msgspec.structs.replace(request, refused=Errno.EINVAL, reason=refusal))
            self.swallowing = request.length
            return start + self._swallow_some(len(data) - start)
        if len(data) - start < request.length:
            if request.length < self._large_payload:
                return Batch(requests, header_start)
            return Batch(requests, start, request)
        end = start + request.length
        payload = data[start:end]
        requests.append(
            request.with_payload(payload) if request.type == _WRITE else _with_status_payload(request, payload)
        )
        return end

    def _refuse_write(self, request: Request) -> str:
        if request.length > self.max_payload:
            return f"WRITE of {request.length} bytes is longer than the maximum payload {self.max_payload}"
        return ""

    @staticmethod
    def _refuse_status_payload(request: Request) -> str:
        length, maximum = request.length, messages.MAX_BLOCK_STATUS_PAYLOAD_BYTES
        if length > maximum:
            return f"BLOCK_STATUS payload of {length} bytes, at most {maximum} are allowed"
        if length < 8 or length % 4:
            return f"BLOCK_STATUS payload of {length} bytes, expected 8 and 4 for each context"
        return ""

    def _swallow_some(self, available: int) -> int:
        count = min(self.swallowing, available)
        self.swallowing -= count
        return count

    def _fail(self, requests: list[Request], position: int, text: str) -> Batch:
        """Break off: at once, or after the requests that came before the fault have been taken."""
        self._failure = RemoteProtocolError(text)
        if not requests:
            raise self._failure
        return Batch(requests, position, needs_data=False)


def _with_status_payload(request: Request, payload: memoryview) -> Request:
    parsed = messages.BLOCK_STATUS_PAYLOAD.parse(payload)
    return msgspec.structs.replace(request, length=parsed.effect_length, context_ids=parsed.context_ids)
