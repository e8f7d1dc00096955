"""The handshake of one connection: the protocol's state machine asked, and answered from the list of exports."""

import logging
import socket
from typing import TYPE_CHECKING, NamedTuple

from nbd_protocol.constants import Option, OptionReplyType
from nbd_protocol.negotiation import NeedData, select_contexts
from nbd_protocol.negotiation_events import Aborted, Closed, ExportQuery, ListExports, MetaContextQuery, Ready, StartTls
from nbd_protocol.server_negotiation import ServerNegotiation
from pynbd.crypto.tls_socket import TlsSocket, receive, send_all
from pynbd.server.export import Export
from pynbd.server.offer import Offer

if TYPE_CHECKING:
    from pynbd.server.tls import ServerTls

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 << 10


class Negotiated(NamedTuple):
    """What a handshake has led to.

    Args:
        sock: where the client is now: the socket that was there at first, or TLS on it.
        ready: what was agreed.
        export: the export that the client chose.
        trailing: bytes that came behind the handshake: the first requests.
    """

    sock: socket.socket | TlsSocket
    ready: Ready
    export: Export
    trailing: bytes


async def negotiate(
    sock: socket.socket,
    offer: Offer,
    negotiation: ServerNegotiation,
    tls: "ServerTls | None" = None,
) -> Negotiated | None:
    """Bring a client from the greeting to an export. Nothing of any disk is touched before it has chosen one.

    Args:
        sock: connected, non-blocking.
        offer: what this client is shown.
        negotiation: fresh; it knows whether there is TLS as well.
        tls: how, if there is.

    Returns:
        None if the client went away, or was sent away, politely.

    Raises:
        RemoteProtocolError: the client broke the protocol.
        TlsFailure: there is no TLS with this client.
        Refused: it is sent away.
        OSError: the connection is lost.
    """
    current: socket.socket | TlsSocket = sock
    chosen: Export | None = None
    while True:
        try:
            event = negotiation.next_event()
        finally:
            outgoing = negotiation.data_to_send()
            if outgoing:
                await send_all(current, outgoing)
        match event:
            case NeedData.NEED_DATA:
                negotiation.receive_data(await receive(current, RECEIVE_BYTES))
            case Ready() as ready:
                assert chosen is not None
                return Negotiated(current, ready, chosen, negotiation.trailing_data)
            case Aborted():
                return None
            case Closed(reason):
                log.debug("handshake ended: %s", reason)
                return None
            case ExportQuery(name=name) if (found := offer.find(name)) is not None:
                # The one whose size was told; by the time the answer has left, another may have its name.
                chosen = found
                negotiation.accept_export(offer.info(found))
            case StartTls():
                assert tls is not None  # without it the protocol's own end refuses
                negotiation.accept_tls()
                await send_all(sock, negotiation.data_to_send())
                current = secured = await tls.begin(sock)
                offer.proved(secured.identity)
            case ListExports() | ExportQuery() | MetaContextQuery():
                _answer(event, offer, negotiation)


def _answer(
    question: ListExports | ExportQuery | MetaContextQuery,
    offer: Offer,
    negotiation: ServerNegotiation,
) -> None:
    match question:
        case ListExports():
            negotiation.send_export_list([(export.name, export.description) for export in offer.shown()])
        case ExportQuery(name=name):
            negotiation.refuse(OptionReplyType.ERR_UNKNOWN, unknown_export(name))
        case MetaContextQuery(option=option, export=name, queries=queries):
            export = offer.find(name)
            if export is not None:
                names = select_contexts(Option(option), queries, export.contexts())
                negotiation.send_meta_contexts(list(enumerate(names, 1)))
            else:
                negotiation.refuse(OptionReplyType.ERR_UNKNOWN, unknown_export(name))


def unknown_export(name: str) -> str:
    """The text for a client that asks for an export which is not there."""
    return f"export {name!r} is not present" if name else "there is no default export; ask for one by name"
