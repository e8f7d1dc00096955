"""Which clusters of a disk an overlay holds: one byte for each, in pages that exist only where something changed."""

from enum import IntEnum

PAGE_CLUSTERS = 4096
"""Clusters of one page, a byte each."""

MAX_PAGES = 1 << 16
"""Pages of one map: at most 256 MiB of memory; with clusters of 64 KiB that is 16 TiB of changes."""

MAX_PAGES_LOOKED_AT = 4096
"""In one question after a run, which is cut short there: a gap of any size takes bounded time."""


class ClusterState(IntEnum):
    """What an overlay knows of a cluster."""

    BELOW = 0  # nothing: the backing file has it
    DATA = 1  # it lies in the overlay's file
    ZERO = 2  # it reads as zeroes, whatever lies in any file


UNIFORM = {state: bytes((state,)) * PAGE_CLUSTERS for state in ClusterState}
"""Pages whose clusters are all alike; they are shared, and copied before they change."""


class ClusterMap:
    """The state of every cluster; at first each is `BELOW`."""

    __slots__ = ("_counts", "_pages")

    def __init__(self) -> None:
        self._pages: dict[int, bytes | bytearray] = {}
        self._counts = {ClusterState.DATA: 0, ClusterState.ZERO: 0}

    def count(self, state: ClusterState) -> int:
        """Clusters in a state other than `BELOW`."""
        return self._counts[state]

    def state(self, cluster: int) -> int:
        """The state of one cluster."""
        page = self._pages.get(cluster // PAGE_CLUSTERS)
        return page[cluster % PAGE_CLUSTERS] if page is not None else ClusterState.BELOW

    def run(self, first: int, last: int) -> tuple[int, int]:
        """The clusters from `first` on that are alike.

        Args:
            first: the first cluster.
            last: one past the last cluster of interest, more than `first`.

        Returns:
            (state, end): one past the last cluster of the run. More of the same may follow it.
        """
        state = self.state(first)
        kind = bytes((state,))
        most = min(last, (first // PAGE_CLUSTERS + MAX_PAGES_LOOKED_AT) * PAGE_CLUSTERS)
        while first < most:
            index, begin = divmod(first, PAGE_CLUSTERS)
            end = min(begin + most - first, PAGE_CLUSTERS)
            page = self._pages.get(index)
            if page is None or isinstance(page, bytes):
                if state != (page[0] if page else ClusterState.BELOW):
                    break
                first += end - begin
                continue
            rest = len(page[begin:end].lstrip(kind))
            first += end - begin - rest
            if rest:
                break
        return state, first

    def reserve(self, first: int, last: int) -> bool:
        """Make sure that `set` on the clusters [first, last) will find room; False if there is too little."""
        if first >= last:
            return True
        pages = range(first // PAGE_CLUSTERS, (last - 1) // PAGE_CLUSTERS + 1)
        if len(pages) > MAX_PAGES:
            return False
        missing = [index for index in pages if index not in self._pages]
        if len(self._pages) + len(missing) > MAX_PAGES:
            return False
        for index in missing:
            self._pages[index] = UNIFORM[ClusterState.BELOW]
        return True

    def set(self, first: int, last: int, state: ClusterState) -> None:
        """Give the clusters [first, last), for which room was reserved, a state."""
        while first < last:
            index, begin = divmod(first, PAGE_CLUSTERS)
            end = min(begin + last - first, PAGE_CLUSTERS)
            page = self._pages[index]
            for counted in self._counts:
                self._counts[counted] -= page.count(counted, begin, end)
            if state in self._counts:
                self._counts[state] += end - begin
            if end - begin == PAGE_CLUSTERS:
                page = UNIFORM[state]
            else:
                page = bytearray(page) if isinstance(page, bytes) else page
                page[begin:end] = UNIFORM[state][begin:end]
            self._pages[index] = page
            first += end - begin

    def forget(self, first: int) -> list[tuple[int, int]]:
        """Make every cluster from `first` on `BELOW`.

        Returns:
            the runs [first, last) of those that were `DATA`.
        """
        runs: list[tuple[int, int]] = []
        for index in sorted(index for index in self._pages if (index + 1) * PAGE_CLUSTERS > first):
            start, end = max(index * PAGE_CLUSTERS, first), (index + 1) * PAGE_CLUSTERS
            cluster = start
            while cluster < end:
                state, stop = self.run(cluster, end)
                if state == ClusterState.DATA:
                    runs.append((cluster, stop))
                cluster = stop
            self.set(start, end, ClusterState.BELOW)
            if start % PAGE_CLUSTERS == 0:
                del self._pages[index]
        return runs
