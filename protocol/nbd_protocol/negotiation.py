"""What both ends of the negotiation have in common: what is told of an export, and what may be told of it when."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from nbd_protocol import messages as m
from nbd_protocol.constants import MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, InfoType, Option, ReplyMode, TransmissionFlag

MAX_EXPORT_SIZE_BYTES: Final = (1 << 63) - 1
"""Offsets of files and block devices are signed on both ends: a larger export could not be addressed."""
MAX_MIN_BLOCK_BYTES: Final = 64 * 1024
"""The specification's cap for the minimum block size (section "Block size constraints")."""
DEFAULT_PREFERRED_BLOCK_BYTES: Final = 4096
"""What the specification has a client assume where a server tells no block sizes."""
NO_PAYLOAD_LIMIT: Final = 0xFFFFFFFF
"""The maximum payload of a server that has no maximum."""


class NeedData(enum.Enum):
    """The type of NEED_DATA, so that a type checker can tell it from the events."""

    NEED_DATA = enum.auto()


NEED_DATA: Final = NeedData.NEED_DATA
"""next_event() has nothing to tell before more bytes are given to receive_data()."""


class ExportInfo(msgspec.Struct, frozen=True):
    """What one end tells the other of an export (proto.md, "Option reply types", NBD_INFO_*).

    Arguments:
        size: bytes.
        flags: transmission flags, HAS_FLAGS may be left out. A server gives all that the export is able to; those that
            were not negotiated for are taken out by advertised_flags().
        canonical_name: what the server calls the export, which may be another name than it was asked for; None: untold.
        description: for people; None: untold.
        min_block: bytes; requests are multiples of it. A power of two, at most 64 KiB.
        preferred_block: bytes; requests of this size and alignment are efficient. A power of two, not below min_block.
        max_payload: bytes; the longest WRITE and the longest answer to a READ. 0xffffffff is "no limit".
    """

    size: int
    flags: TransmissionFlag
    canonical_name: str | None = None
    description: str | None = None
    min_block: int = 1
    preferred_block: int = DEFAULT_PREFERRED_BLOCK_BYTES
    max_payload: int = MAX_PAYLOAD_BYTES

    def fault(self) -> str | None:
        """What of it no end of the protocol may say (value found, value expected), or None."""
        if not 0 <= self.size <= MAX_EXPORT_SIZE_BYTES:
            return f"export size {self.size}, expected 0…{MAX_EXPORT_SIZE_BYTES}"
        if not (_is_power_of_two(self.min_block) and self.min_block <= MAX_MIN_BLOCK_BYTES):
            return f"minimum block size {self.min_block}, expected a power of two up to {MAX_MIN_BLOCK_BYTES}"
        if not (_is_power_of_two(self.preferred_block) and self.preferred_block >= self.min_block):
            return f"preferred block size {self.preferred_block}, expected a power of two from {self.min_block} up"
        if not self.min_block <= self.max_payload <= NO_PAYLOAD_LIMIT:
            return f"maximum payload {self.max_payload}, expected {self.min_block}…{NO_PAYLOAD_LIMIT}"
        return None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def advertised_flags(offered: TransmissionFlag, mode: ReplyMode, *, resize: bool = False) -> TransmissionFlag:
    """Of the flags that an export is able to, those that may be told to a client who negotiated `mode`.

    SEND_DF needs structured replies or extended headers, BLOCK_STATUS_PAYLOAD needs extended headers, SEND_FAST_ZERO
    needs SEND_WRITE_ZEROES, and the experimental SEND_RESIZE needs `resize`. HAS_FLAGS is always set.
    """
    flags = offered | TransmissionFlag.HAS_FLAGS
    if mode is ReplyMode.SIMPLE:
        flags &= ~TransmissionFlag.SEND_DF
    if mode is not ReplyMode.EXTENDED:
        flags &= ~TransmissionFlag.BLOCK_STATUS_PAYLOAD
    if not flags & TransmissionFlag.SEND_WRITE_ZEROES:
        flags &= ~TransmissionFlag.SEND_FAST_ZERO
    if not resize:
        flags &= ~TransmissionFlag.SEND_RESIZE
    return flags


def infos_to_tell(info: ExportInfo, asked: Iterable[int]) -> list[m.Info]:
    """The infos that answer an INFO or GO which asks for the types `asked`.

    EXPORT is told always. So is BLOCK_SIZE: a client that did not ask for it needs it most.
    """
    asked = frozenset(asked)
    told: list[m.Info] = [m.InfoExport(info.size, info.flags)]
    if InfoType.NAME in asked and info.canonical_name is not None:
        told.append(m.InfoName(info.canonical_name))
    if InfoType.DESCRIPTION in asked and info.description is not None:
        told.append(m.InfoDescription(text_for_people(info.description)))
    told.append(m.InfoBlockSize(info.min_block, info.preferred_block, info.max_payload))
    return told


def info_from_told(told: Iterable[m.Info]) -> ExportInfo | None:
    """What infos tell, the inverse of infos_to_tell(); None if EXPORT, which no answer may lack, is not among them."""
    fields: dict[str, Any] = {}
    for info in told:
        match info:
            case m.InfoExport(size=size, flags=flags):
                fields |= {"size": size, "flags": flags}
            case m.InfoName(name=name):
                fields |= {"canonical_name": name}
            case m.InfoDescription(description=description):
                fields |= {"description": description}
            case m.InfoBlockSize(minimum=minimum, preferred=preferred, maximum_payload=maximum):
                fields |= {"min_block": minimum, "preferred_block": preferred, "max_payload": maximum}
            case m.InfoUnknown():
                continue
    return ExportInfo(**fields) if "size" in fields else None


def select_contexts(option: Option, queries: Sequence[str], available: Iterable[str]) -> list[str]:
    """Of the `available` metadata contexts, those that `queries` ask for, each once, in the order of `available`.

    LIST_META_CONTEXT without queries is everything, and a query that ends in a colon everything beneath it (`base:`,
    `qemu:`, `qemu:dirty-bitmap:`). SET_META_CONTEXT takes full names only: no queries and `base:` select nothing.
    Unknown namespaces are passed over. Source: proto.md, NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    """
    listing = option == Option.LIST_META_CONTEXT
    if listing and not queries:
        return list(dict.fromkeys(available))
    exact = set(queries)
    leaves = tuple(query for query in exact if query.endswith(":")) if listing else ()
    return [name for name in dict.fromkeys(available) if name in exact or name.startswith(leaves)]


def text_for_people(text: str) -> str:
    """`text` as it may be sent where a person reads it: no NUL, no lone surrogates, cut to the longest string."""
    encoded = text.replace("\0", "").encode("utf-8", "replace")
    return encoded[:MAX_STRING_BYTES].decode("utf-8", "ignore")


def name_of(number: int) -> str:
    """What an option or a reply is called in error texts: the specification's name, or the number of an unknown one."""
    return number.name if isinstance(number, enum.Enum) else str(number)
