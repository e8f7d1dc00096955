"""The transmission phase of NBD: requests and replies, framed for the server and for the client.

::

    server    bytes  -> ServerTransmission.parse -> Batch of Request -> ExportRules.refusal -> Replies -> bytes
    client    request -> ClientTransmission.request -> bytes ... bytes -> ClientTransmission.receive -> events
"""

from nbd_protocol.constants import ReplyMode
from nbd_protocol.transmission_client import ClientTransmission
from nbd_protocol.transmission_events import DataChunk, Done, ErrorChunk, Event, HoleChunk, StatusChunk
from nbd_protocol.transmission_replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies, replies_for
from nbd_protocol.transmission_rules import ExportRules
from nbd_protocol.transmission_server import Batch, Request, ServerTransmission

__all__ = [
    "Batch",
    "ClientTransmission",
    "DataChunk",
    "Done",
    "ErrorChunk",
    "Event",
    "ExportRules",
    "ExtendedReplies",
    "HoleChunk",
    "Replies",
    "ReplyMode",
    "Request",
    "ServerTransmission",
    "SimpleReplies",
    "StatusChunk",
    "StructuredReplies",
    "replies_for",
]
