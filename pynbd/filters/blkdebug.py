"""`blkdebug`: makes requests fail, or stop, where a test wants them to.

Rules say *when* (an event that a format above announces, and the state that the engine is in) and *what* (which
kinds of requests fail from then on, where, with which error). Names and meanings are those of QEMU's driver
(docs/devel/blkdebug.txt, and BlkdebugEvent in qapi/block-core.json); see `blkdebug_rules` for the engine.

Limits: a break point that a format's event has hit holds the next request that arrives here (which is the one
announced, unless another one overtakes it between the event and the request).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from pynbd.block.driver import Filter
from pynbd.block.errors import BlockError, OptionError, io_error
from pynbd.block.extents import Extent
from pynbd.block.limits import MAX_ALIGNMENT_BYTES, Limits
from pynbd.block.node import Node
from pynbd.block.options import NodeOptions, Size
from pynbd.block.permissions import ChildRole, Permission
from pynbd.filters.blkdebug_rules import (
    MAX_CONFIG_BYTES,
    Engine,
    Event,
    InjectError,
    IoType,
    SetState,
    parse_config,
)

PermissionName = Literal["consistent-read", "write", "write-unchanged", "resize"]

MAX_LIMIT_BYTES = (1 << 31) - 1

LimitBytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_LIMIT_BYTES, extra={"size": True})]


class BlkDebugOptions(NodeOptions, frozen=True, kw_only=True):
    """The options of `blkdebug`, with QEMU's names.

    Args:
        config: a file of rules; they come after those of `inject-error` and `set-state`.
        inject_error: rules that make requests fail.
        set_state: rules that change the engine's state.
        align: the alignment of all requests in bytes; 0 for that of the child.
        max_transfer: the largest read or write in bytes; 0 for no limit.
        opt_write_zero: the alignment of write_zeroes in bytes; 0 for none.
        max_write_zero: the largest write_zeroes in bytes; 0 for no limit.
        opt_discard: the alignment of discards in bytes; 0 for none.
        max_discard: the largest discard in bytes; 0 for no limit.
        take_child_perms: permissions to hold on the child beside those that are needed.
        unshare_child_perms: permissions not to share on the child.
    """

    config: str = ""
    inject_error: tuple[InjectError, ...] = ()
    set_state: tuple[SetState, ...] = ()
    align: Size = 0
    max_transfer: LimitBytes = 0
    opt_write_zero: LimitBytes = 0
    max_write_zero: LimitBytes = 0
    opt_discard: LimitBytes = 0
    max_discard: LimitBytes = 0
    take_child_perms: tuple[PermissionName, ...] = ()
    unshare_child_perms: tuple[PermissionName, ...] = ()

    def __post_init__(self) -> None:
        if self.align & (self.align - 1) or self.align > MAX_ALIGNMENT_BYTES:
            raise ValueError(f"align: {self.align} is no power of two up to {MAX_ALIGNMENT_BYTES}")


def permissions(names: Sequence[str]) -> Permission:
    """The permissions of these names."""
    total = Permission.NONE
    for name in names:
        total |= Permission[name.upper().replace("-", "_")]
    return total


def announced_above(node: Node) -> bool:
    """Whether a format above a node announces its own requests (filters between the two passed over)."""
    for edge in node.parents:
        parent = edge.parent
        if not isinstance(parent, Node):
            continue
        if parent.is_filter or parent.driver.passes("read"):
            if announced_above(parent):
                return True
        elif parent.driver.is_format and not edge.role & ChildRole.COW:
            return True  # (a format announces what it does to its file, not what it reads from its backing file)
    return False


class BlkDebug(Filter):
    """Fail or hold requests by rule, to test what lies above."""

    name = "blkdebug"
    schemes = ("blkdebug",)
    Options = BlkDebugOptions
    child_aliases: ClassVar[Mapping[str, str]] = {"image": "file"}
    options: BlkDebugOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self.engine = Engine()
        self._pending: deque[str] = deque()
        self._suspended: list[tuple[str, asyncio.Future[None]]] = []
        self._changed = asyncio.Event()

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon or not image:
            raise OptionError(f"{filename}: expected blkdebug:CONFIG:IMAGE (CONFIG may be empty)")
        return ({"config": config} if config else {}) | {"file": {"filename": image}}

    # --- life ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        inject, state = list(self.options.inject_error), list(self.options.set_state)
        if self.options.config:
            more_inject, more_state = await asyncio.to_thread(read_config, self.options.config)
            inject += more_inject
            state += more_state
        self.limits = self._limits()
        self.engine.add(inject, state)
        self.engine.trigger("none")

    def _limits(self) -> Limits:
        """The limits that the options ask for.

        Raises:
            OptionError: one of them is not a multiple of what it must be.
        """
        given = self.options
        below = self.file.node.driver.limits.request_alignment
        alignment = max(given.align, below)
        zero_unit, discard_unit = max(alignment, given.opt_write_zero), max(alignment, given.opt_discard)
        for name, unit in (
            ("max_transfer", alignment),
            ("opt_write_zero", alignment),
            ("max_write_zero", zero_unit),
            ("opt_discard", alignment),
            ("max_discard", discard_unit),
        ):
            value = getattr(given, name)
            if value % unit:
                raise OptionError(f"{self.node.name}: {name.replace('_', '-')}: {value} is no multiple of {unit}")
        return Limits(
            request_alignment=given.align or 1,
            max_transfer=given.max_transfer,
            write_zeroes_alignment=given.opt_write_zero or 1,
            max_write_zeroes=given.max_write_zero,
            discard_alignment=given.opt_discard or 1,
            max_discard=given.max_discard,
        )

    def child_permissions(self, name: str, held: Permission, shared: Permission) -> tuple[Permission, Permission]:
        held, shared = super().child_permissions(name, held, shared)
        unshared = permissions(self.options.unshare_child_perms)
        return held | permissions(self.options.take_child_perms), shared & ~unshared

    # --- break points --------------------------------------------------------------------------------------

    def breakpoint(self, event: Event, tag: str) -> None:
        """Hold the next request that comes to a point, once.

        Args:
            event: the point.
            tag: the name by which the request will be let go.
        """
        self.engine.breakpoint(event, tag)

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the break points of a name, and let go all requests that they hold."""
        self.engine.remove_breakpoint(tag)
        self._pending = deque(pending for pending in self._pending if pending != tag)
        while self.is_suspended(tag):
            self.resume(tag)

    def resume(self, tag: str) -> None:
        """Let the request go that is held longest under a name.

        Raises:
            BlockError: there is none.
        """
        for entry in self._suspended:
            if entry[0] == tag:
                self._suspended.remove(entry)
                entry[1].set_result(None)
                return
        raise BlockError(f"{self.node.name}: no request is suspended under the name {tag!r}")

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is held under a name."""
        return any(name == tag for name, _ in self._suspended)

    async def wait_suspended(self, tag: str) -> None:
        """Wait until a request is held under a name (at once, if one is)."""
        while not self.is_suspended(tag):
            self._changed.clear()
            await self._changed.wait()

    async def _suspend(self) -> None:
        while self._pending:
            held = asyncio.get_running_loop().create_future()
            self._suspended.append((self._pending.popleft(), held))
            self._changed.set()
            await held

    # --- events and requests -------------------------------------------------------------------------------

    def debug_event(self, event: str) -> None:
        self._pending.extend(self.engine.trigger(event))
        super().debug_event(event)

    async def _request(self, kind: IoType, offset: int, length: int, *events: Event) -> None:
        """One request has come: announce it if nobody did, hold it if a break point says so, fail it by the rules.

        Raises:
            OSError: a rule's error; nothing was done then.
        """
        for event in events:
            self.debug_event(event)
            await self._suspend()
        await self._suspend()
        rule = self.engine.match(kind, offset, length)
        if rule is None or not rule.errno:
            return
        if not rule.immediately:
            await asyncio.sleep(0)
        raise io_error(rule.errno, self.node.name, f"injected into {kind} at {offset} for {length} bytes")

    def _core(self, event: Event) -> tuple[Event, ...]:
        """An event that formats announce, if there is no format above that does."""
        return () if announced_above(self.node) else (event,)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        await self._request("read", offset, len(into), *self._core("read_aio"))
        await self.file.read(offset, into, flags)

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        await self._request("write", offset, len(data), *self._core("write_aio"), "pwritev")
        await self._done(self.file.write(offset, data, flags))

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._request("write-zeroes", offset, length, "pwritev_zero")
        await self._done(self.file.write_zeroes(offset, length, flags))

    async def _done(self, request: Awaitable[None]) -> None:
        """Carry out a write, and announce its end, whatever that is."""
        try:
            await request
        finally:
            self.debug_event("pwritev_done")
            await self._suspend()

    async def discard(self, offset: int, length: int) -> None:
        await self._request("discard", offset, length)
        await self.file.discard(offset, length)

    async def flush_to_os(self) -> None:
        for event in self._core("flush_to_os"):
            self.debug_event(event)
            await self._suspend()

    async def flush_to_disk(self) -> None:
        await self._request("flush", 0, 0, *self._core("flush_to_disk"))

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        await self._request("block-status", offset, length)
        return await self.file.block_status(offset, length)


def read_config(filename: str) -> tuple[list[InjectError], list[SetState]]:
    """The rules in a file.

    Raises:
        OptionError: it can't be read, or holds something else; the text names the file and the line.
    """
    try:
        with Path(filename).open("rb") as config:
            text = config.read(MAX_CONFIG_BYTES + 1)
    except OSError as problem:
        raise OptionError(f"config: {filename}: {problem.strerror}") from problem
    if len(text) > MAX_CONFIG_BYTES:
        raise OptionError(f"config: {filename}: more than {MAX_CONFIG_BYTES} bytes")
    return parse_config(text.decode("utf-8", "replace"), filename)
