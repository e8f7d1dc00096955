"""The rules of `blkdebug`, and the engine that follows them. No I/O happens here.

An *event* is a point that a format (or the block layer) announces before it does something. Events bring rules
into force:

- `inject-error` rules of the event replace all that were in force, and stay in force until the next event that
  has such rules, or until they have struck once (`once`). While in force, they fail the requests that they match.
- `set-state` rules change the engine's state, a number that begins at 1. Rules with a `state` are heeded in that
  state only. The new state holds from the next event on.
- a break point is heeded once.

The event `none` happens once, when the node is opened: its rules are in force from the beginning.
"""

import errno
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec

from pynbd.block.errors import OptionError
from pynbd.block.options import MAX_SIZE_BYTES, OnOff, Size, convert

SECTOR_BYTES = 512

MAX_CONFIG_BYTES = 1 << 20
"""Of a configuration file."""

MAX_RULES = 4096
"""Of one node; each event looks at all of its own."""

MAX_ERRNO = 4095
"""As the kernel's."""

FIRST_STATE = 1

Event = Literal[
    "none",
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "cor_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "cluster_free",
    "empty_image_prepare",
    "flush_to_os",
    "flush_to_disk",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
]
"""BlkdebugEvent of qapi/block-core.json."""

EVENTS: frozenset[str] = frozenset(get_args(Event))

IoType = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
"""BlkdebugIOType of qapi/block-core.json."""

ANY_IO: frozenset[str] = frozenset(get_args(IoType)) - {"block-status"}
"""What a rule without `iotype` fails."""

State = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]


class InjectError(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A rule that makes requests fail (BlkdebugInjectErrorOptions).

    Args:
        event: what brings it into force.
        state: the state that the engine must be in then; 0 for any.
        iotype: the kind of requests; without it, all but block-status.
        errno: the error; 0 shields requests from older rules.
        sector: a sector of 512 bytes that requests must touch.
        offset: the same in bytes.
        once: strike once only.
        immediately: fail without letting others run first.
    """

    event: Event
    state: State = 0
    iotype: IoType | None = None
    errno: Annotated[int, msgspec.Meta(ge=0, le=MAX_ERRNO)] = errno.EIO
    sector: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE_BYTES // SECTOR_BYTES)] | None = None
    offset: Size | None = None
    once: OnOff = False
    immediately: OnOff = False

    def __post_init__(self) -> None:
        if self.sector is not None and self.offset is not None:
            raise ValueError("a rule takes sector or offset, not both")

    def matches(self, kind: IoType, offset: int, length: int) -> bool:
        """Whether a request is one that the rule fails."""
        if kind != self.iotype and (self.iotype is not None or kind not in ANY_IO):
            return False
        at = self.sector * SECTOR_BYTES if self.sector is not None else self.offset
        return at is None or offset <= at < offset + length


class SetState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule that changes the engine's state (BlkdebugSetStateOptions).

    Args:
        event: when.
        state: the state that the engine must be in then; 0 for any.
        new_state: the state that it gets.
    """

    event: Event
    state: State = 0
    new_state: State


class Engine:
    """The rules of one node, and what is in force."""

    def __init__(self) -> None:
        self.state = FIRST_STATE
        self.in_force: list[InjectError] = []
        self._inject: dict[str, list[InjectError]] = {}
        self._set: dict[str, list[SetState]] = {}
        self._break: list[tuple[str, str]] = []

    def add(self, inject: Iterable[InjectError], set_state: Iterable[SetState]) -> None:
        """Take in rules.

        Raises:
            OptionError: there are too many.
        """
        for rule in inject:
            self._inject.setdefault(rule.event, []).append(rule)
        for change in set_state:
            self._set.setdefault(change.event, []).append(change)
        count = sum(map(len, self._inject.values())) + sum(map(len, self._set.values()))
        if count > MAX_RULES:
            raise OptionError(f"blkdebug: {count} rules are too many (at most {MAX_RULES})")

    def breakpoint(self, event: Event, tag: str) -> None:
        """Hold the next request that comes to an event.

        Raises:
            OptionError: there is no such event.
        """
        if event not in EVENTS:
            raise OptionError(f"blkdebug: event {event!r} is none of: {', '.join(sorted(EVENTS))}")
        self._break.append((event, tag))

    def remove_breakpoint(self, tag: str) -> None:
        """Forget all break points of a name."""
        self._break = [point for point in self._break if point[1] != tag]

    def trigger(self, event: str) -> list[str]:
        """An event happens.

        Returns:
            the tags of the break points that it hits; they are used up.
        """
        if found := [rule for rule in self._inject.get(event, ()) if rule.state in (0, self.state)]:
            self.in_force = found
        hit = [tag for name, tag in self._break if name == event]
        if hit:
            self._break = [point for point in self._break if point[0] != event]
        for change in self._set.get(event, ()):
            if change.state in (0, self.state):
                self.state = change.new_state
                break
        return hit

    def match(self, kind: IoType, offset: int, length: int) -> InjectError | None:
        """The first rule in force that a request falls under, if any; one that strikes `once` is used up."""
        for rule in self.in_force:
            if rule.matches(kind, offset, length):
                if rule.once:
                    self.in_force.remove(rule)
                    self._inject[rule.event].remove(rule)
                return rule
        return None


SECTION = re.compile(r'\[\s*([\w-]+)(?:\s+"[^"]*")?\s*\]')
SETTING = re.compile(r'([\w-]+)\s*=\s*(?:"([^"]*)"|([^"\s]*))')


def parse_config(text: str, filename: str) -> tuple[list[InjectError], list[SetState]]:
    """The rules in a configuration: sections `[inject-error]` and `[set-state]` of lines `key = "value"`.

    Raises:
        OptionError: a line or a rule is wrong; the text names the file and the line.
    """
    sections: list[tuple[int, str, dict[str, Any]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if section := SECTION.fullmatch(line):
            sections.append((number, section[1], {}))
        elif not (setting := SETTING.fullmatch(line)) or not sections:
            raise OptionError(f'{filename}:{number}: expected [inject-error], [set-state] or key = "value": {line!r}')
        else:
            key, quoted, plain = setting.groups()
            sections[-1][2][key] = quoted if quoted is not None else plain
    inject: list[InjectError] = []
    changes: list[SetState] = []
    for number, name, values in sections:
        where = f"{filename}:{number}: "
        if name == "inject-error":
            inject.append(_rule(values, InjectError, where))
        elif name == "set-state":
            changes.append(_rule(values, SetState, where))
        else:
            raise OptionError(f"{where}section {name!r} is neither inject-error nor set-state")
    return inject, changes


def _rule(values: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    return convert(values, kind, path=where, driver="blkdebug")
