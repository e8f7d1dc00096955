"""`Payload`: what a large write brings, while it arrives."""

import errno
from collections.abc import Callable
from time import perf_counter_ns

from nbd_protocol.transmission import Request
from pynbd.block.backend import BlockBackend
from pynbd.block.data_path import never
from pynbd.server.budget import Account
from pynbd.server.buffers import BufferPool
from pynbd.storage import linux
from pynbd.storage.in_place import keeps_others_waiting

PAYLOAD_STEP_BYTES = 1 << 20
"""Memory for a payload is reserved in such steps, as the payload arrives."""

WRITTEN_PART_BYTES = 128 << 10
"""Large payloads are written in parts of at least this length as they arrive, where nobody has to wait for it."""


def _nothing(memory: memoryview) -> int:
    """A filler that only finds out whether it is called."""
    return 0


class Payload:
    """The payload of a large write that is arriving: in a buffer of its own, or in the disk if that is memory."""

    __slots__ = (
        "admitted",
        "buffer",
        "filled",
        "fills",
        "in_parts",
        "placed",
        "request",
        "reserved",
        "whole",
        "write_ns",
        "written",
    )

    def __init__(self, request: Request, arrived: memoryview) -> None:
        self.request = request
        self.buffer = arrived
        self.filled = len(arrived)
        self.reserved = 0
        self.admitted = False  # whether it was counted against the client's rates
        self.whole: memoryview | None = None
        self.fills = True  # received straight into the disk, so far
        self.in_parts = True  # written as it arrives, so far
        self.placed = 0  # what is in the disk alone, and not in the buffer
        self.written = 0
        self.write_ns = 0

    def reserve(self, account: Account, buffers: BufferPool, retry: Callable[[], None]) -> bool:
        """Reserve memory for what arrives next; the first of it brings a buffer for the whole payload.

        Args:
            account: where it is taken from.
            buffers: where the buffer is taken from.
            retry: called once when it is worth trying again, if there is not enough now.

        Returns:
            whether the payload may go on arriving, or is complete.
        """
        length = self.request.length
        while self.reserved < length and self.reserved - self.filled < PAYLOAD_STEP_BYTES:
            step = min(PAYLOAD_STEP_BYTES, length - self.reserved)
            if not account.take(step, retry, begun=self.reserved > 0):
                return self.reserved > self.filled
            self.reserved += step
            if self.whole is None:
                self.whole = buffers.take(length)
                buffer = self.whole[:length]
                buffer[: self.filled] = self.buffer
                self.buffer = buffer
        return True

    def receive(self, backend: BlockBackend, receive_into: Callable[[memoryview], int], *, by_kernel: bool) -> int:
        """Receive what has arrived of it, no more than is reserved.

        Args:
            backend: what is written.
            receive_into: see `Wire.receive_into`; returns what this returns.
            by_kernel: whether it is the kernel that puts the bytes there.

        Raises:
            OSError: the connection is lost.
        """
        room = self.reserved - self.filled
        if by_kernel and self.fills and self._may_fill(backend):
            try:
                received = backend.fill_now(self.request.offset + self.filled, room, receive_into)
            except OSError as problem:
                if problem.errno != errno.EFAULT:
                    raise
                received = None  # no memory is left: the write of what follows says so
            if received is not None:
                if received > 0:
                    self.filled += received
                    self.placed = self.written = self.filled
                return received
            self.fills = False
        received = receive_into(self.buffer[self.filled : self.filled + room])
        if received > 0:
            self.filled += received
        return received

    def _may_fill(self, backend: BlockBackend) -> bool:
        """Whether what comes next may go straight into the disk: that must be memory, and have all that came before."""
        if self.written == self.filled:
            return True
        request, written = self.request, self.written
        self.fills = (
            backend.fill_now is not never
            and backend.fill_now(request.offset, request.length, _nothing) is not None
            and backend.write_now(request.offset + written, self.buffer[written : self.filled])
        )
        if self.fills:
            self.written = self.filled
        return self.fills

    def write_part(self, backend: BlockBackend) -> None:
        """Write what has arrived, if the driver can do so at once: the processor's cache has it still.

        Parts end where pages do, because others would have to be read first. Where a driver can't, the whole payload is
        written again when it has arrived, the usual way. Of a payload that breaks off, parts stay written: as on any
        disk, nothing is promised of a write that was not answered.
        """
        offset, end = self.request.offset, self.filled
        if end == self.written:
            return
        if end < self.request.length:
            end -= (offset + end) % linux.PAGE_BYTES
            if end - self.written < WRITTEN_PART_BYTES:
                return
        started = perf_counter_ns()
        part = self.buffer[self.written : end]
        if keeps_others_waiting() or not backend.write_now(offset + self.written, part):
            self.in_parts = False
            return
        self.written = end
        self.write_ns += perf_counter_ns() - started
