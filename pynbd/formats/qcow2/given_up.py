"""Clusters that were given up: they lose a reference when nothing on disk points to them, and nobody reads there."""

import itertools
import logging
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from pynbd.block.errors import ImageError
from pynbd.block.holding import Release, Revoke
from pynbd.formats.qcow2.refcounts import Run

if TYPE_CHECKING:
    from pynbd.formats.qcow2.image import Image

MOST_HELD_BYTES = 256 << 20
"""Who holds places in the file does not keep more than this from being used again: a client that never fetches what it
has asked for must not make the file grow without bound."""

log = logging.getLogger(__name__)


class Cause(IntEnum):
    """Why clusters are given up, which decides whether the file hears of it when they become free."""

    OVERWRITTEN = 0  # never: they will be used again soon
    CUT_OFF = 1  # always: the disk was made shorter
    REQUEST = 2  # pass-discard-request: the guest has discarded them, or made them zero
    SNAPSHOT = 3  # pass-discard-snapshot: only a snapshot kept them
    OTHER = 4  # pass-discard-other


class Gone(NamedTuple):
    """What was given up.

    Args:
        run: clusters.
        cause: why.
        structure: whether they belonged to a structure of the image's own, which goes with them.
    """

    run: Run
    cause: Cause
    structure: bool


class GivenUp:
    """The clusters of one image that were given up.

    Args:
        image: the image.
    """

    def __init__(self, image: "Image") -> None:
        self.image = image
        self.gone: list[Gone] = []
        """Those that something on disk may point to still; the next commit sees to that."""
        self.passed = {Cause.CUT_OFF}
        """Causes for which the file hears of clusters that become free."""
        self._waiting: list[tuple[int, list[Gone]]] = []
        self._epoch = 0
        self._readers: dict[int, int] = {}
        self._holds: dict[int, tuple[int, Revoke]] = {}
        self._hold_numbers = itertools.count()

    def __bool__(self) -> bool:
        """Whether a commit would have any clusters lose a reference."""
        return bool(self.gone) or self._next_is_free()

    @property
    def bytes(self) -> int:
        """How much waits for the next commit."""
        return sum(gone.run.clusters for gone in self.gone) << self.image.cluster_bits

    def add(self, offset: int, length: int, cause: Cause, *, structure: bool = False) -> None:
        """Clusters lose a reference, as soon as nothing on disk points to them any more.

        Args:
            offset: in the file.
            length: bytes; all clusters that they touch are meant.
            cause, structure: see `Gone`.
        """
        first = offset >> self.image.cluster_bits
        count = -(-(offset + length) // self.image.cluster_size) - first
        if self.gone:
            last, *how = self.gone[-1]
            if last.first + last.clusters == first and how == [cause, structure]:
                self.gone[-1] = Gone(Run(last.first, last.clusters + count), cause, structure)
                return
        self.gone.append(Gone(Run(first, count), cause, structure))

    # --- who reads meanwhile -------------------------------------------------------------------------------

    def begin_read(self) -> int:
        """Somebody is going to read where the tables say now; what lies there stays until `end_read`."""
        epoch = self._epoch
        self._readers[epoch] = self._readers.get(epoch, 0) + 1
        return epoch

    def end_read(self, epoch: int) -> None:
        """The opposite of `begin_read`, with what it gave."""
        left = self._readers[epoch] - 1
        if left:
            self._readers[epoch] = left
        else:
            del self._readers[epoch]

    def hold(self, revoke: Revoke) -> Release:
        """As `begin_read`, for somebody who can't be waited for.

        Args:
            revoke: see `Driver.hold_located`; it is called by `end_holds`.
        """
        epoch, number = self.begin_read(), next(self._hold_numbers)
        self._holds[number] = epoch, revoke

        def release() -> None:
            if self._holds.pop(number, None) is not None:
                self.end_read(epoch)

        return release

    def end_holds(self) -> None:
        """All of `hold` are over: what was given up has to go now."""
        holds, self._holds = self._holds, {}
        for epoch, revoke in holds.values():
            self.end_read(epoch)
            revoke()

    def _waiting_bytes(self) -> int:
        """How much waits for those who read."""
        clusters = sum(gone.run.clusters for _, waiting in self._waiting for gone in waiting)
        return clusters << self.image.cluster_bits

    def _next_is_free(self) -> bool:
        """Whether nobody reads any more where something was that waits for it."""
        return bool(self._waiting) and not any(epoch <= self._waiting[0][0] for epoch in self._readers)

    # --- giving back ---------------------------------------------------------------------------------------

    def take(self) -> list[Gone]:
        """What was given up until now, for a commit, which tells `give_back` of it, or `put_back`."""
        taken, self.gone = self.gone, []
        return taken

    def put_back(self, taken: Sequence[Gone]) -> None:
        """The commit that took them failed: something on disk points to them still."""
        self.gone = [*taken, *self.gone]

    async def give_back(self, taken: Sequence[Gone]) -> None:
        """Nothing on disk points to these clusters any more, once another barrier has passed."""
        if taken:
            try:
                await self.image.barrier()
            except BaseException:
                self.put_back(taken)
                raise
            self._waiting.append((self._epoch, list(taken)))
            self._epoch += 1
        if self._holds and self._waiting_bytes() > MOST_HELD_BYTES:
            self.end_holds()
        while self._next_is_free():
            _, free = self._waiting.pop(0)
            for gone in free:
                await self.drop_references(*gone)

    async def drop_references(self, run: Run, cause: Cause, structure: bool) -> None:
        """Clusters lose a reference: nothing on disk points to them any more (see `add` for those where it does).

        Args:
            run: the clusters.
            cause, structure: see `Gone`.

        Raises:
            OSError: counts can't be read, or the image is corrupt.
        """
        image = self.image
        try:
            if cause in self.passed:
                # While they still count as used: who takes them next must not have his bytes discarded.
                for free in await image.refcounts.used_once(run):
                    await self._discard(free)
            unused = await image.refcounts.change(run.first, run.clusters, -1)
        except ImageError as problem:
            raise await image.corrupted(problem.problem, problem.offset, writing=True) from problem
        for free in unused:
            found = None if structure else image.metadata.known(free.first, free.first + free.clusters - 1)
            if found is not None:
                # It would be taken for something else, and written over.
                what = f"guest data were given up here, where {found[1].text} lies"
                raise await image.corrupted(what, found[0] << image.cluster_bits, writing=True)
            image.metadata.forget(free.first, free.clusters)

    async def _discard(self, run: Run) -> None:
        image = self.image
        offset = run.first << image.cluster_bits
        length = min(run.clusters << image.cluster_bits, image.file.size - offset)
        try:
            if length > 0:
                await image.file.discard(offset, length)
        except OSError as problem:
            # A hint that was not followed; the clusters are free all the same.
            log.debug("%s: discard at %d for %d bytes: %s", image.name, offset, length, problem)
