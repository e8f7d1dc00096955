"""A person who watches: what the guest and the server do is shown as it happens, where `PYNBD_WATCH` is set."""

from __future__ import annotations

import os
import sys
from typing import TextIO

WATCH_VARIABLE = "PYNBD_WATCH"


def watcher() -> TextIO | None:
    """Where consoles are shown, or None when nobody watches."""
    return sys.stderr if os.environ.get(WATCH_VARIABLE) else None


def announce(text: str) -> None:
    """Tell who watches what comes now."""
    stream = watcher()
    if stream is not None:
        stream.write(f"\n=== {text}\n")
        stream.flush()
