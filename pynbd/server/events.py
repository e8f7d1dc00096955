"""What a line of the log is about, for programs that read it: an event, and who and what takes part.

Lines are for people; `about` puts beside one what they would have to pick out of its text. The handler decides whether
that is shown (`pynbd serve --log-format json`).
"""

from typing import Final

LISTENING: Final = "listening"
READY: Final = "ready"
STOPPING: Final = "stopping"
FAILED: Final = "failed"
RELOADED: Final = "reloaded"
RELOAD_FAILED: Final = "reload-failed"
CONFINED: Final = "confined"
CLIENT_COME: Final = "client-come"
CLIENT_GONE: Final = "client-gone"
CLIENT_REFUSED: Final = "client-refused"
CLIENT_FAILED: Final = "client-failed"
REQUEST_FAILED: Final = "request-failed"
LEFT_OUT: Final = "left-out"
"""Lines about a client that were too many."""

OTHER: Final = "other"
"""Whatever has no name of its own."""


def about(event: str, **fields: object) -> dict[str, object]:
    """What goes beside a line: the `extra` of a call that logs.

    Args:
        event: one of the names above.
        fields: who and what: `client`, `export`, `request`, `error` … What is None is left out.
    """
    return {"event": event, "fields": {name: value for name, value in fields.items() if value is not None}}
