"""What a server tells of itself and of its exports, for people and as JSON (with nbdinfo's names)."""

from typing import Any

from nbd_protocol.client_negotiation import ClientNegotiation
from nbd_protocol.constants import OptionReplyType, TransmissionFlag
from nbd_protocol.negotiation import ExportInfo
from nbd_protocol.negotiation_events import ExportDescribed, MetaContextsListed, Refused
from pynbd.storage.nbd.address import NbdPlace
from pynbd.storage.nbd.handshake import Handshake

PROTOCOLS = {"oldstyle": "oldstyle", "newstyle": "newstyle", "fixed newstyle": "newstyle-fixed"}

ABILITIES = (
    ("is_rotational", TransmissionFlag.ROTATIONAL),
    ("is_read_only", TransmissionFlag.READ_ONLY),
    ("can_block_status_payload", TransmissionFlag.BLOCK_STATUS_PAYLOAD),
    ("can_cache", TransmissionFlag.SEND_CACHE),
    ("can_df", TransmissionFlag.SEND_DF),
    ("can_fast_zero", TransmissionFlag.SEND_FAST_ZERO),
    ("can_flush", TransmissionFlag.SEND_FLUSH),
    ("can_fua", TransmissionFlag.SEND_FUA),
    ("can_multi_conn", TransmissionFlag.CAN_MULTI_CONN),
    ("can_trim", TransmissionFlag.SEND_TRIM),
    ("can_zero", TransmissionFlag.SEND_WRITE_ZEROES),
)

UNITS = ("", "K", "M", "G", "T", "P", "E")


def human_size(size: int) -> str:
    """Bytes in the largest unit that says them exactly with at most one decimal: `64M`, `1.5G`, `1000`."""
    unit = 0
    while size >= 1024 and size % 1024 == 0:
        size //= 1024
        unit += 1
    if 1024 < size < 1 << 20 and size * 10 % 1024 == 0:
        return f"{size / 1024:.1f}{UNITS[unit + 1]}"
    return f"{size}{UNITS[unit]}"


def describe_server(negotiation: ClientNegotiation) -> dict[str, Any]:
    """How a server negotiates; after it has answered something."""
    return {
        "protocol": PROTOCOLS[negotiation.style],
        "TLS": negotiation.secure,
        "structured": negotiation.mode.value != "simple",
        "replies": negotiation.mode.value,
    }


def server_line(told: dict[str, Any]) -> str:
    """The same for people."""
    return f"protocol: {told['protocol']} {'with' if told['TLS'] else 'without'} TLS, using {told['replies']} packets"


def describe_export(place: NbdPlace, name: str, info: ExportInfo, contexts: tuple[str, ...]) -> dict[str, Any]:
    """An export; what the server does not tell is left out."""
    told: dict[str, Any] = {"export-name": name}
    if info.canonical_name not in (None, name):
        told["canonical-name"] = info.canonical_name
    if info.description:
        told["description"] = info.description
    told["uri"] = str(place.uri(name))
    told["contexts"] = list(contexts)
    told |= {ability: bool(info.flags & flag) for ability, flag in ABILITIES}
    told |= {
        "block_size_minimum": info.min_block,
        "block_size_preferred": info.preferred_block,
        "block_size_maximum": info.max_payload,
        "export-size": info.size,
        "export-size-str": human_size(info.size),
    }
    return told


def export_lines(told: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f'export="{told["export-name"]}":']
    size, human = told["export-size"], told["export-size-str"]
    lines.append(f"\texport-size: {size}" + (f" ({human})" if human != str(size) else ""))
    for key, value in told.items():
        if key == "contexts":
            lines += ["\tcontexts:", *(f"\t\t{context}" for context in value)] if value else []
        elif key not in ("export-name", "export-size", "export-size-str"):
            lines.append(f"\t{key}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


async def ask_about(handshake: Handshake, place: NbdPlace, export: str) -> dict[str, Any]:
    """Ask about an export, and describe it.

    A server that can't tell without serving is made to serve it for that; the handshake is over then. So is one that
    says that the export is empty: nbd-server 3.24 says so of each, as long as it is only asked.

    Raises:
        OSError: the server refuses the export, or the connection failed.
    """
    negotiation = handshake.negotiation
    negotiation.describe(export)
    event = await handshake.answer()
    contexts: tuple[str, ...] = ()
    if isinstance(event, ExportDescribed):
        negotiation.list_meta_contexts(export)
        listed = await handshake.answer()
        # A server that refuses has none to tell of; that is no failure.
        contexts = listed.contexts if isinstance(listed, MetaContextsListed) else ()
        if event.info.size:
            return describe_export(place, export, event.info, contexts)
    elif isinstance(event, Refused) and event.reply_type != OptionReplyType.ERR_UNSUP:
        raise handshake.refusal(event, export)
    connected, established = await handshake.connect(export)
    connected.close()
    return describe_export(place, export, established.info, contexts or tuple(established.contexts.values()))
