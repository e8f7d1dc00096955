"""What one wake-up of a connection may take, and the buffers for it."""

from nbd_protocol.transmission import ExtendedReplies
from pynbd.server.buffers import BufferPool, anonymous_memory
from pynbd.server.warm_regions import WarmRegions
from pynbd.server.wire import PIECE_BYTES

RECEIVE_BYTES = 260 << 10
"""What one wake-up receives at the most: four writes of 64 KiB, and what goes with them."""

LARGE_PAYLOAD_BYTES = 128 << 10
"""From that length on a payload goes straight to a buffer of its own. Of a shorter one, what has come is kept when the
rest has not, and is copied twice; to receive it by itself would take two more wake-ups."""

MAX_HEADER_BYTES = 64
"""More than a request has before its payload."""

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


SLOT_BYTES = (512, 4 << 10, 8 << 10, 16 << 10)
"""Usual lengths of short reads: what is the same for all of one length is worked out once."""

Slots = list[tuple[int, list[memoryview]]]


class Scratch:
    """What all connections of one loop share: buffers they take turns in using, of which nothing stays after a wake-up,
    and what is known of the files they read.
    """

    def __init__(self) -> None:
        self.buffers = BufferPool()
        self.received = memoryview(bytearray(RECEIVE_BYTES + LARGE_PAYLOAD_BYTES + MAX_HEADER_BYTES))
        self.arrived = self.received.toreadonly()
        """The same, for those who only look."""
        # At the start of a page: the kernel copies several times slower to addresses that are odd multiples of 16.
        self.answers = anonymous_memory(ANSWERS_BYTES + MAX_BATCH_REQUESTS * ExtendedReplies.done_size)
        self._slots: dict[tuple[int, int], Slots] = {}
        self.passing = anonymous_memory(PIECE_BYTES)
        self.warm = WarmRegions()

    def slots(self, header: int, length: int) -> Slots | None:
        """The places of as many equal answers as one batch has, one after another in the buffer of answers.

        Args:
            header: bytes before the data.
            length: of the data, in bytes.

        Returns:
            where each begins, and memory for its data; None for lengths that are not usual.
        """
        if length not in SLOT_BYTES:
            return None
        slots = self._slots.get((header, length))
        if slots is None:
            size, answers = header + length, self.answers
            starts = range(0, MAX_BATCH_REQUESTS * size, size)
            slots = self._slots[header, length] = [(at, [answers[at + header : at + size]]) for at in starts]
        return slots
