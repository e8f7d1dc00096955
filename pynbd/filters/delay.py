"""`delay`: makes requests slow, as on a far or busy server.

Limits: it does not bound the bandwidth (requests wait beside one another, not in a queue); a wait is at most
`MAX_DELAY_S`, and is as exact as the event loop's timers (about a millisecond).
"""

import asyncio
import errno
import math
import random
from collections.abc import Sequence

from pynbd.block.driver import Filter
from pynbd.block.errors import io_error
from pynbd.block.extents import Extent
from pynbd.block.options import NodeOptions, OnOff
from pynbd.block.requests import RequestFlag

MAX_DELAY_S = 3600.0
"""The longest wait; who asks for more has most likely mistaken the unit."""

UNITS_S = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "μs": 1e-6, "ns": 1e-9, "m": 60.0}

Duration = str | float
"""A time: a number of seconds, or text with a unit: `50ms`, `1.5s`, `20us`."""


def parse_duration(value: Duration, what: str) -> float:
    """Seconds from `1.5`, `"50ms"`, `"2s"`.

    Args:
        value: the text or number.
        what: the option's name, for the message.

    Raises:
        ValueError: it is no duration, negative, or over `MAX_DELAY_S`.
    """
    text = str(value).strip().lower()
    digits = text.rstrip("smunμ")
    unit = text[len(digits) :]
    try:
        seconds = float(digits) * UNITS_S[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{what}: {value!r} is no duration; write 1.5, 2s, 50ms, 20us or 300ns") from None
    if not (math.isfinite(seconds) and 0 <= seconds <= MAX_DELAY_S):
        raise ValueError(f"{what}: {value!r} is out of range (0 to {MAX_DELAY_S:g} seconds)")
    return seconds


class DelayOptions(NodeOptions, frozen=True, kw_only=True):
    """The options of `delay`: how long each kind of request waits before it is passed on.

    The names are those of nbdkit's filter (`discard` and `cache` are options of every node already).

    Args:
        read: reads.
        write: writes.
        zero: write_zeroes.
        trim: discards.
        flush: flushes.
        prefetch: the hint that bytes will be read soon (NBD's CACHE).
        extents: questions about what lies where.
        open: the opening of the node.
        close: its closing.
        jitter: up to so much more, evenly distributed, for each request that waits at all.
        fast_zero: whether write_zeroes that must be quick waits too; `off` refuses it with ENOTSUP at once.
    """

    read: Duration = 0.0
    write: Duration = 0.0
    zero: Duration = 0.0
    trim: Duration = 0.0
    flush: Duration = 0.0
    prefetch: Duration = 0.0
    extents: Duration = 0.0
    open: Duration = 0.0
    close: Duration = 0.0
    jitter: Duration = 0.0
    fast_zero: OnOff = True

    def __post_init__(self) -> None:
        delays_s(self)


DURATIONS = ("read", "write", "zero", "trim", "flush", "prefetch", "extents", "open", "close", "jitter")
"""The options that are times."""


def delays_s(options: DelayOptions) -> dict[str, float]:
    """All durations of the options in seconds, by name.

    Raises:
        ValueError: one of them is none; the text names it.
    """
    return {name: parse_duration(getattr(options, name), name) for name in DURATIONS}


WAITS_FOR = {
    "read": "read",
    "locate": "read",
    "finder": "read",
    "write": "write",
    "write_now": "write",
    "place_writes": "write",
    "fill_now": "write",
    "write_zeroes": "zero",
    "discard": "trim",
    "flush_to_disk": "flush",
    "cache": "prefetch",
    "block_status": "extents",
}
"""Which delay a member of the data path has; where that is 0, the filter is left out of the path."""


class Delay(Filter):
    """Let every request wait a while before it is passed to the child `file`."""

    name = "delay"
    Options = DelayOptions
    options: DelayOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._delays_s = delays_s(self.options)

    def passes(self, member: str) -> bool:
        if member == "write_zeroes" and not self.options.fast_zero:
            return False
        waits_for = WAITS_FOR.get(member)
        return not self._delays_s[waits_for] if waits_for else super().passes(member)

    async def _wait(self, kind: str) -> None:
        delay_s = self._delays_s[kind]
        if delay_s:
            await asyncio.sleep(delay_s + random.uniform(0, self._delays_s["jitter"]))

    async def open(self) -> None:
        await self._wait("open")

    async def close(self) -> None:
        await self._wait("close")

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self._wait("read")
        await self.file.read(offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self._wait("write")
        await self.file.write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if flags & RequestFlag.NO_FALLBACK and not self.options.fast_zero:
            raise io_error(errno.ENOTSUP, self.node.name, "write_zeroes is delayed, so it is not quick")
        await self._wait("zero")
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._wait("trim")
        await self.file.discard(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        await self._wait("prefetch")
        await self.file.cache(offset, length)

    async def flush_to_disk(self) -> None:
        await self._wait("flush")

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        await self._wait("extents")
        return await self.file.block_status(offset, length)
