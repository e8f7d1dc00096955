"""Keeping bytes where they lie in files for longer than they would stay there: what `Driver.hold_located` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.block.child import Child

Release = Callable[[], None]
"""Ends what `Driver.hold_located` has begun; to be called once."""

Revoke = Callable[[], None]
"""Tells whoever holds that it is over."""


def hold_nothing() -> None:
    """The `Release` of what stays where it is in any case."""


def hold_all(revoke: Revoke, *children: Child | None, own: Release = hold_nothing) -> Release | None:
    """Hold what several nodes locate, all or none.

    Args:
        revoke: see `Driver.hold_located`.
        children: their edges.
        own: what the node above holds already; it is released if the others can't be held.

    Returns:
        what releases all; None if one of them can't be held.
    """
    releases = [own]
    for child in children:
        if child is None:
            continue
        release = child.node.driver.hold_located(revoke)
        if release is None:
            _call_all(releases)
            return None
        releases.append(release)
    releases = [release for release in releases if release is not hold_nothing]
    match releases:
        case []:
            return hold_nothing
        case [release]:
            return release
    return lambda: _call_all(releases)


def _call_all(releases: list[Release]) -> None:
    for release in releases:
        release()
