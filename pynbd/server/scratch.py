"""What one wake-up of a connection may take, and the buffers for it."""

from nbd_protocol.transmission import ExtendedReplies
from pynbd.server.buffers import BufferPool, anonymous_memory
from pynbd.server.wire import PIECE_BYTES

RECEIVE_BYTES = 256 << 10
"""What one wake-up receives at the most (payloads of large writes go straight to buffers of their own)."""

INLINE_READ_BYTES = 64 << 10
"""Located reads up to this length are copied into the buffer of answers; longer ones are sent from the file."""

ALIGNED_READ_BYTES = 32 << 10
ALIGNMENT = 64
"""From that length on the data of a read begin at such an address in the buffer: the kernel copies to others much
slower. Those of a disk in memory are sent from where they lie."""

SENT_FROM_FILE_BYTES = 64 << 10
"""From that length on they are sent from the page cache, as long as the client keeps up with it."""

MAX_BATCH_REQUESTS = 64
MAX_BATCH_BYTES = 1 << 20
"""What one wake-up serves of one connection, before the others have their turn."""

ANSWERS_BYTES = MAX_BATCH_BYTES + 2 * INLINE_READ_BYTES
"""Answers of one batch with the data of reads; the others need a few bytes each, for which there is room beside."""


class Scratch:
    """The buffers that all connections of one loop take turns in using: nothing stays in them after a wake-up."""

    def __init__(self) -> None:
        self.buffers = BufferPool()
        self.received = memoryview(bytearray(RECEIVE_BYTES + (128 << 10)))
        self.arrived = self.received.toreadonly()
        """The same, for those who only look."""
        # At the start of a page: the kernel copies several times slower to addresses that are odd multiples of 16.
        self.answers = anonymous_memory(ANSWERS_BYTES + MAX_BATCH_REQUESTS * ExtendedReplies.done_size)
        self.passing = anonymous_memory(PIECE_BYTES)
