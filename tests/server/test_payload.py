"""The payload of a large write, while it arrives. How it is written in parts is in test_connection.py."""

from nbd_protocol.transmission import Request
from pynbd.server.buffers import BufferPool
from pynbd.server.payload import Payload


def test_a_payload_keeps_what_has_arrived() -> None:
    pool = BufferPool()
    payload = Payload(Request(1, 0, 7, 0, 100_000), memoryview(b"the beginning"))
    payload.make_room(pool)
    assert len(payload.buffer) == 100_000
    assert bytes(payload.buffer[:13]) == b"the beginning"
    assert payload.filled == 13
    assert payload.whole is not None
    pool.give(payload.whole)
