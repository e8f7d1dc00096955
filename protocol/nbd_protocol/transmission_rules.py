"""Which requests an export refuses, and with what error: the one choke point for the server.

Sections "Request types", "Command flags" and "Error values" of ``doc/proto.md``. What passes here lies
within the export, is aligned, carries only flags that were advertised, and may be carried out as it is.
"""

from collections.abc import Iterable
from typing import Final

from nbd_protocol.constants import (
    MAX_PAYLOAD_BYTES,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.errors import LocalProtocolError
from nbd_protocol.transmission_server import Request

__all__ = ["ExportRules"]

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)

Refusal = tuple[Errno, str]

_ADVERTISED_BY: Final[dict[int, TransmissionFlag]] = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.CACHE: TransmissionFlag.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
    Command.RESIZE: TransmissionFlag.SEND_RESIZE,
}
"""The transmission flag without which a command must not be sent."""

_CHANGING: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES, Command.RESIZE})
_WITHOUT_RANGE: Final = frozenset({Command.FLUSH, Command.RESIZE})
_PAST_END: Final[dict[int, Errno]] = {Command.WRITE: Errno.ENOSPC, Command.WRITE_ZEROES: Errno.ENOSPC}
"""The error for a range that ends behind the export; EINVAL for all other commands."""


class ExportRules:
    """What one connection may ask of one export.

    Args:
        size: of the export in bytes. The attribute may be assigned at any time: a live resize.
        flags: the transmission flags that were told to the client.
        min_block: the minimum block size that was told, in bytes, a power of two up to 64 KiB.
        max_payload: the maximum payload that was told, in bytes; up to 32 MiB is served in any case.
        mode: the framing that was negotiated.
        context_ids: the metadata contexts that were selected for this export.

    Raises:
        LocalProtocolError: min_block is not what the specification allows.
    """

    def __init__(
        self,
        size: int,
        flags: int,
        *,
        min_block: int = 1,
        max_payload: int = MAX_PAYLOAD_BYTES,
        mode: ReplyMode = ReplyMode.SIMPLE,
        context_ids: Iterable[int] = (),
    ) -> None:
        if not 1 <= min_block <= 65536 or min_block & (min_block - 1):
            raise LocalProtocolError(f"minimum block size is {min_block}, expected a power of two from 1 to 65536")
        self.size = size
        self.flags: Final = TransmissionFlag(flags)
        self.min_block: Final = min_block
        self.max_payload: Final = max(max_payload, MAX_PAYLOAD_BYTES)
        self.mode: Final = mode
        self.context_ids: Final = frozenset(context_ids)
        self.misaligned_bits: Final = min_block - 1
        """What an aligned offset or length has no bits of."""
        self.writable: Final = not self.flags & TransmissionFlag.READ_ONLY
        self._allowed = {int(command): self._allowed_flags(command) for command in Command}
        # READ and WRITE without any of these bits, in range and aligned, need no further look.
        self._unusual_flags = {_READ: ~self._allowed[_READ]}
        if self.writable:
            self._unusual_flags[_WRITE] = ~self._allowed[_WRITE]

    def refusal(self, request: Request) -> Refusal | None:
        """Say why `request` must not be carried out, as the error to answer and a text; None if it may be.

        It does not look at the payload, so a partial WRITE can be judged before its payload is here.
        """
        length = request.length
        unusual = self._unusual_flags.get(request.type)
        if (
            unusual is not None
            and not request.flags & unusual
            and 0 < length <= self.max_payload
            and request.offset + length <= self.size
            and not (request.offset | length) & self.misaligned_bits
            and request.refused is None
        ):
            return None
        return self._examine(request)

    def _examine(self, request: Request) -> Refusal | None:
        if request.refused is not None:
            return request.refused, request.reason
        if request.type == Command.DISC:
            return None
        return (
            self._refuse_command(request)
            or self._refuse_flags(request)
            or self._refuse_range(request)
            or self._refuse_block_status(request)
        )

    def _allowed_flags(self, command: Command) -> int:
        offered, extended = self.flags, self.mode is ReplyMode.EXTENDED
        allowed = CommandFlag(0)
        if offered & TransmissionFlag.SEND_FUA:
            allowed |= CommandFlag.FUA
        if command is Command.READ and self.mode is not ReplyMode.SIMPLE:
            allowed |= CommandFlag.DF
        if command is Command.WRITE and extended:
            allowed |= CommandFlag.PAYLOAD_LEN
        if command is Command.WRITE_ZEROES:
            allowed |= CommandFlag.NO_HOLE
            if offered & TransmissionFlag.SEND_FAST_ZERO:
                allowed |= CommandFlag.FAST_ZERO
        if command is Command.BLOCK_STATUS:
            allowed |= CommandFlag.REQ_ONE
            if extended and offered & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
                allowed |= CommandFlag.PAYLOAD_LEN
        return int(allowed)

    def _refuse_command(self, request: Request) -> Refusal | None:
        if request.type not in self._allowed:
            return Errno.EINVAL, f"unknown command {request.type}"
        command = Command(request.type)
        if not self.writable and command in _CHANGING:
            return Errno.EPERM, f"{command.name} on a read-only export"
        needed = _ADVERTISED_BY.get(command)
        if needed is not None and not self.flags & needed:
            return Errno.EINVAL, f"{command.name} was not offered: {needed.name} is not set"
        if command is Command.BLOCK_STATUS and not self.context_ids:
            return Errno.EINVAL, "BLOCK_STATUS without a selected metadata context"
        return None

    def _refuse_flags(self, request: Request) -> Refusal | None:
        unexpected = request.flags & ~self._allowed[request.type]
        if not unexpected:
            return None
        return (
            Errno.EINVAL,
            f"{Command(request.type).name} with flags {unexpected:#x} that are unknown or were not offered",
        )

    def _refuse_range(self, request: Request) -> Refusal | None:
        if request.type in _WITHOUT_RANGE:
            return None
        name, offset, length = Command(request.type).name, request.offset, request.length
        if offset + length > self.size:
            error = _PAST_END.get(request.type, Errno.EINVAL)
            return error, f"{name} of {length} bytes at {offset} ends behind the export of {self.size} bytes"
        # The tail of an export whose size is no multiple of the block could not be reached otherwise.
        reaches_end = offset + length == self.size
        if offset & self.misaligned_bits or (length & self.misaligned_bits and not reaches_end):
            return (
                Errno.EINVAL,
                f"{name} of {length} bytes at {offset} is not aligned to blocks of {self.min_block} bytes",
            )
        if request.type in (Command.READ, Command.WRITE) and length > self.max_payload:
            return Errno.EINVAL, f"{name} of {length} bytes is longer than the maximum payload {self.max_payload}"
        return None

    def _refuse_block_status(self, request: Request) -> Refusal | None:
        if request.type != Command.BLOCK_STATUS:
            return None
        if not request.length:
            return Errno.EINVAL, "BLOCK_STATUS of no bytes"
        wanted = request.context_ids
        if wanted is None:
            return None
        if not wanted or len(set(wanted)) != len(wanted):
            return Errno.EINVAL, f"BLOCK_STATUS with a list of {len(wanted)} contexts that is empty or has duplicates"
        unknown = sorted(set(wanted) - self.context_ids)
        if unknown:
            return Errno.EINVAL, f"BLOCK_STATUS of contexts {unknown[:8]} that were not selected"
        return None
