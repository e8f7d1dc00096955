"""Tables that nobody has used for some time are dropped from memory (`cache-clean-interval`)."""

import asyncio
from typing import Annotated

import msgspec

from pynbd.formats.qcow2.loaded_tables import LoadedTables

MAX_INTERVAL_S = 0xFFFF_FFFF
DEFAULT_INTERVAL_S = 600

Interval = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTERVAL_S)]
"""Seconds; 0 for never."""


class CacheCleaning:
    """The memory of an open image is looked through at intervals.

    Args:
        image: its tables.
        interval_s: seconds in which a table must have been used, to stay; 0 for always.
    """

    def __init__(self, image: LoadedTables, interval_s: int) -> None:
        self.image = image
        self.interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self._wait()

    def _wait(self) -> None:
        if self.interval_s:
            self._timer = asyncio.get_running_loop().call_later(self.interval_s, self._clean)

    def _clean(self) -> None:
        for cache in (self.image.l2, self.image.blocks):
            cache.drop_unused()
        self._wait()

    def end(self) -> None:
        """The image is going to be closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
