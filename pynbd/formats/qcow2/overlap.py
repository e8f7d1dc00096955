"""The clusters that hold the image's own structures, and which of them are looked after when something is written
(`overlap-check`).

An image whose tables are wrong may call a structure data. What would be written there is refused, the image is marked
as corrupt, and nothing is written to it any more.
"""

from collections.abc import Collection
from enum import IntFlag
from typing import Literal

import msgspec

from pynbd.block.options import OnOff


class Kind(IntFlag):
    """What a cluster holds, in the order in which overlaps are told; it may be several in an image that is wrong."""

    MAIN_HEADER = 1 << 0
    ACTIVE_L1 = 1 << 1
    REFCOUNT_TABLE = 1 << 2
    SNAPSHOT_TABLE = 1 << 3
    INACTIVE_L1 = 1 << 4
    BITMAP_DIRECTORY = 1 << 5
    ACTIVE_L2 = 1 << 6
    REFCOUNT_BLOCK = 1 << 7
    INACTIVE_L2 = 1 << 8
    ENCRYPTION_HEADER = 1 << 9
    BITMAP = 1 << 10

    ANY_L2 = ACTIVE_L2 | INACTIVE_L2  # the disk and snapshots share tables

    @property
    def text(self) -> str:
        """The first of them, for messages."""
        return TEXTS[Kind(self & -self)]


TEXTS = {
    Kind.MAIN_HEADER: "the header",
    Kind.ACTIVE_L1: "the active L1 table",
    Kind.REFCOUNT_TABLE: "the refcount table",
    Kind.SNAPSHOT_TABLE: "the snapshot table",
    Kind.INACTIVE_L1: "an inactive L1 table",
    Kind.BITMAP_DIRECTORY: "the bitmap directory",
    Kind.ACTIVE_L2: "an active L2 table",
    Kind.REFCOUNT_BLOCK: "a refcount block",
    Kind.INACTIVE_L2: "an inactive L2 table",
    Kind.ENCRYPTION_HEADER: "the encryption header",
    Kind.BITMAP: "a bitmap",
}

WITH = {Kind.MAIN_HEADER: Kind.ENCRYPTION_HEADER, Kind.BITMAP_DIRECTORY: Kind.BITMAP}
"""What QEMU never looks after goes with what is nearest."""

CONSTANT = Kind.MAIN_HEADER | Kind.ACTIVE_L1 | Kind.REFCOUNT_TABLE | Kind.SNAPSHOT_TABLE | Kind.BITMAP_DIRECTORY
CACHED = CONSTANT | Kind.ACTIVE_L2 | Kind.REFCOUNT_BLOCK | Kind.INACTIVE_L1
TEMPLATES = {"none": Kind(0), "constant": CONSTANT, "cached": CACHED, "all": CACHED | Kind.INACTIVE_L2}
"""What each template of QEMU's looks after."""

Template = Literal["none", "constant", "cached", "all"]


class OverlapOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What is looked after: that of a template, with changes.

    Args:
        template: what counts for all that is not given.
        main_header: the header, and that of encryption.
        active_l1: the L1 table of the disk.
        active_l2: its L2 tables.
        refcount_table: the table of refcount blocks.
        refcount_block: those blocks.
        snapshot_table: the list of snapshots.
        inactive_l1: the L1 tables of snapshots.
        inactive_l2: their L2 tables.
        bitmap_directory: the list of bitmaps, and these.
    """

    template: Template = "all"
    main_header: OnOff | None = None
    active_l1: OnOff | None = None
    active_l2: OnOff | None = None
    refcount_table: OnOff | None = None
    refcount_block: OnOff | None = None
    snapshot_table: OnOff | None = None
    inactive_l1: OnOff | None = None
    inactive_l2: OnOff | None = None
    bitmap_directory: OnOff | None = None


def checked_kinds(chosen: "Template | OverlapOptions") -> Kind:
    """What the option `overlap-check` asks for."""
    options = OverlapOptions(template=chosen) if isinstance(chosen, str) else chosen
    kinds = TEMPLATES[options.template]
    for kind in TEMPLATES["all"]:
        wanted = getattr(options, str(kind.name).lower())
        if wanted is not None:
            kinds = kinds | kind if wanted else kinds & ~kind
    for kind, other in WITH.items():
        if kinds & kind:
            kinds |= other
    return kinds


class Metadata:
    """The clusters that hold an image's own structures, as far as they are known.

    Args:
        cluster_bits: two to the power of this is a cluster's size.
    """

    def __init__(self, cluster_bits: int) -> None:
        self.cluster_bits = cluster_bits
        self.kinds: dict[int, int] = {0: int(Kind.MAIN_HEADER)}
        """Number of a cluster → what it holds."""
        self.checked = int(checked_kinds("all"))
        """What nothing else is written over."""

    def clear(self) -> None:
        """Forget all but the header."""
        self.kinds = {0: int(Kind.MAIN_HEADER)}

    def note(self, kind: Kind, offset: int, length: int) -> None:
        """These bytes of the file belong to a structure."""
        end = offset + length
        self.note_clusters(kind, range(offset >> self.cluster_bits, ((end - 1) >> self.cluster_bits) + 1))

    def note_clusters(self, kind: Kind, clusters: Collection[int]) -> None:
        """These clusters belong to structures."""
        kinds, value = self.kinds, int(kind)
        if kinds.keys().isdisjoint(clusters):
            kinds.update(dict.fromkeys(clusters, value))
            return
        for cluster in clusters:
            kinds[cluster] = kinds.get(cluster, 0) | value

    def forget(self, first: int, count: int) -> None:
        """Nothing uses these clusters any more."""
        clusters = range(first, first + count)
        if not self.kinds.keys().isdisjoint(clusters):
            for cluster in clusters:
                self.kinds.pop(cluster, None)

    def known(self, first: int, last: int) -> tuple[int, Kind] | None:
        """(number, what it holds) of the first of the clusters [first, last] that belongs to a structure."""
        return self._find(first, last, -1)

    def overlap(self, first: int, last: int) -> tuple[int, Kind] | None:
        """The same, of those that are looked after."""
        return self._find(first, last, self.checked)

    def _find(self, first: int, last: int, mask: int) -> tuple[int, Kind] | None:
        kinds = self.kinds
        clusters = range(first, last + 1)
        if kinds.keys().isdisjoint(clusters):
            return None
        for cluster in clusters:
            if found := kinds.get(cluster, 0) & mask:
                return cluster, Kind(found)
        return None
