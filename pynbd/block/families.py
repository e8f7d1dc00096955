"""Families: what some drivers can do beside serving bytes, each a small protocol that a driver implements or does not.

`isinstance(node.driver, Checkable)` tells whether a driver is of a family, before anything is asked of it. The seed
has all of these as members of `struct BlockDriver` that may be NULL.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from pynbd.block.backend import BlockBackend
    from pynbd.block.driver import CreationOptions

Progress = Callable[[int, int], None]
"""Told of long work: (done, total), in whatever unit the work has."""


def no_progress(done: int, total: int) -> None:
    """Nobody wants to know."""


class Repair(Enum):
    """What a check mends (QEMU's `BdrvCheckMode`)."""

    NOTHING = "nothing"
    LEAKS = "leaks"
    ALL = "all"


class CheckResult(msgspec.Struct, kw_only=True):
    """What a check found (QEMU's `BdrvCheckResult`, `BlockFragInfo`). Counts are of clusters, offsets of bytes."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = []
    """One line for each finding, as far as they are not too many."""


@runtime_checkable
class Checkable(Protocol):
    """The image's own structures can be checked, and mended (`bdrv_check`)."""

    async def check(self, repair: Repair, progress: Progress = no_progress) -> CheckResult:
        """Look through all structures of the image; mend what `repair` allows. The node is drained meanwhile.

        Raises:
            OSError: the image could not be read or written. What is told of as mended was.
        """


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One internal snapshot (QEMU's `QEMUSnapshotInfo`). Sizes are in bytes."""

    id: str
    name: str
    vm_state_size: int = 0
    date_s: int = 0
    date_ns: int = 0
    vm_clock_ns: int = 0
    icount: int | None = None
    disk_size: int = 0


@runtime_checkable
class Snapshots(Protocol):
    """The image keeps snapshots of itself (`bdrv_snapshot_*`). The node is drained while one is made or applied."""

    def snapshot_list(self) -> Sequence[SnapshotInfo]:
        """All snapshots, oldest first."""

    async def snapshot_create(self, name: str, *, vm_clock_ns: int = 0) -> SnapshotInfo:
        """Keep what the disk holds now under a name.

        Raises:
            BlockError: the name is taken, or there are too many. OSError: it could not be written; nothing changed.
        """

    async def snapshot_goto(self, name_or_id: str) -> None:
        """Let the disk hold again what a snapshot keeps.

        Raises:
            BlockError: there is none of that id or name. OSError: it could not be done; the disk is as it was.
        """

    async def snapshot_delete(self, name_or_id: str) -> None:
        """Forget a snapshot, and free what only it needed.

        Raises:
            BlockError: there is none, or it is in use. OSError: it could not be done; at worst clusters leak.
        """


@runtime_checkable
class VmStates(Protocol):
    """The image keeps a stream of bytes beside the disk: the state of a machine (`bdrv_save_vmstate`)."""

    async def save_vmstate(self, offset: int, data: memoryview) -> None:
        """Write into the state, which the next snapshot keeps."""

    async def load_vmstate(self, offset: int, into: memoryview) -> None:
        """Read from the state."""


@runtime_checkable
class Backed(Protocol):
    """The image names its backing file (`bdrv_change_backing_file`)."""

    def backing_name(self) -> tuple[str, str]:
        """(file name, format) of the backing file as they stand in the image; "" where it gives none."""

    async def change_backing_file(self, filename: str, format: str) -> None:
        """Write another name ("" for none) into the image. The graph stays as it is.

        Raises:
            OSError: it does not fit or could not be written; the image is as it was.
        """


@runtime_checkable
class Emptiable(Protocol):
    """The image can drop all that it holds, so that the backing file shows through (`bdrv_make_empty`)."""

    async def make_empty(self) -> None:
        """Drop all data. The node is drained meanwhile.

        Raises:
            OSError: it could not be done; all, some or nothing was dropped, and the image is sound.
        """


@runtime_checkable
class Amendable(Protocol):
    """Options of an existing image can be changed (`bdrv_amend_options`)."""

    AmendOptions: ClassVar[type[msgspec.Struct]]

    async def amend(self, changes: Mapping[str, Any], progress: Progress = no_progress, *, force: bool = False) -> None:
        """Change some options; what is not named stays.

        Args:
            changes: by name, as in `AmendOptions`; values as they were written (`opt.convert` types them).
            progress: told while it works.
            force: do also what destroys data, where a driver refuses that otherwise.

        Raises:
            OptionError: an option is unknown, or can't be changed so. OSError: the image could not be rewritten.
        """


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The size of an image that is yet to be made, in bytes (QEMU's `BlockMeasureInfo`)."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


@runtime_checkable
class Measurable(Protocol):
    """How large a new image would be can be told beforehand (`bdrv_measure`)."""

    @classmethod
    async def measure(cls, options: "CreationOptions", source: "BlockBackend | None") -> Measurement:
        """The size of the file that a new image would need.

        Args:
            options: as for creating it.
            source: what is to be copied into it; None for an empty image of `options.size`.
        """


class BitmapInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One bitmap that an image keeps (QEMU's `Qcow2BitmapInfo`)."""

    name: str
    granularity: int
    flags: tuple[str, ...] = ()


@runtime_checkable
class PersistentBitmaps(Protocol):
    """The image keeps dirty bitmaps. They live in `node.bitmaps` while it is open, those with `persistent` set are
    written back when it is closed. Those that are `inconsistent` can only be removed, or stay as they are.
    """

    def stored_bitmaps(self) -> Sequence[BitmapInfo]:
        """What the image keeps, as it stands on disk."""

    def can_store_bitmap(self, name: str, granularity: int) -> None:
        """Whether one more can be kept.

        Raises:
            BlockError: it can't, and why.
        """
