"""Tables in memory: L2 tables and refcount blocks, as compact arrays, as many as the cache may hold.

A table that was changed stays until it is written (`Image.commit` decides when, and in which order); all others give
way when there is no room. Nobody keeps a table over an `await`: it may be gone by then, and must be asked for again.
"""

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

SECTOR = 512
"""Bytes that a disk writes wholly or not at all."""


class Table:
    """One table.

    Args:
        offset: where it lies in the file, in bytes.
        words: its entries.
        is_new: nothing on disk points to it yet.
    """

    __slots__ = ("busy", "dirty_first", "dirty_last", "is_new", "offset", "used", "words")

    def __init__(self, offset: int, words: "array[int]", *, is_new: bool = False) -> None:
        self.offset = offset
        self.words = words
        self.is_new = is_new
        self.dirty_first, self.dirty_last = 0, 0
        """The entries [first, last) that are not on disk as they are here."""
        self.busy = 0
        """Writers at work on it."""
        self.used = True
        """Asked for since somebody last looked for what may go."""


class TableCache:
    """The tables of one kind, by their index: of the L1 entry, or of the refcount table's.

    Args:
        most: tables that are kept, as far as they are not dirty.
        read: gives the entries of the table at an offset.
    """

    def __init__(self, most: int, read: Callable[[int], Coroutine[Any, Any, "array[int]"]]) -> None:
        self.most = max(most, 2)
        self.tables: dict[int, Table] = {}
        self.dirty: dict[int, Table] = {}
        self._read = read
        self._loading: dict[int, asyncio.Future[None]] = {}

    def get(self, index: int) -> Table | None:
        """The table, if it is here."""
        table = self.tables.get(index)
        if table is not None:
            table.used = True
        return table

    async def load(self, index: int, offset: int) -> Table:
        """The table, read if need be.

        Raises:
            OSError: it can't be read.
        """
        while (table := self.get(index)) is None:
            if index in self._loading:
                await asyncio.shield(self._loading[index])
                continue
            done = self._loading[index] = asyncio.get_running_loop().create_future()
            try:
                words = await self._read(offset)
                if index not in self.tables:
                    self.add(index, Table(offset, words))
            finally:
                del self._loading[index]
                done.set_result(None)
        return table

    def add(self, index: int, table: Table) -> None:
        """Keep a table, and let others go if there are too many."""
        if len(self.tables) >= self.most:
            self._make_room()
        self.tables[index] = table

    def _make_room(self) -> None:
        """Let the tables go that nobody asked for lately (a clock: each has a second chance)."""
        for _ in range(2):
            for index, table in list(self.tables.items()):
                if len(self.tables) < self.most:
                    return
                if index in self.dirty or table.busy:
                    continue
                if table.used:
                    table.used = False
                    # To the end of the line.
                    del self.tables[index]
                    self.tables[index] = table
                else:
                    del self.tables[index]

    def drop_unused(self) -> None:
        """Let the tables go that nobody asked for since this was called last."""
        for index, table in list(self.tables.items()):
            if index in self.dirty or table.busy:
                continue
            if table.used:
                table.used = False
            else:
                del self.tables[index]

    def forget(self, index: int) -> None:
        """Drop a table, changed or not: nothing points to it any more."""
        self.tables.pop(index, None)
        self.dirty.pop(index, None)

    def forget_all(self) -> None:
        """Drop all tables: others have taken their places."""
        self.tables.clear()
        self.dirty.clear()

    def mark(self, index: int, first: int, last: int) -> None:
        """The entries [first, last) of a table were changed."""
        table = self.tables[index]
        if index in self.dirty:
            table.dirty_first, table.dirty_last = min(table.dirty_first, first), max(table.dirty_last, last)
        else:
            table.dirty_first, table.dirty_last = first, last
            self.dirty[index] = table

    def take_dirty(self) -> list[tuple[int, Table, int, int]]:
        """(index, table, first, last) of all that is dirty; it counts as clean from now on, and stays here as long as
        it is `busy`.
        """
        taken = [(index, table, table.dirty_first, table.dirty_last) for index, table in self.dirty.items()]
        self.dirty.clear()
        for _, table, _, _ in taken:
            table.busy += 1
        return taken

    def give_back(self, taken: list[tuple[int, Table, int, int]], *, written: bool) -> None:
        """What `take_dirty` gave is done with; if it was not written, it is dirty again."""
        for index, table, first, last in taken:
            table.busy -= 1
            if not written and self.tables.get(index) is table:
                self.mark(index, first, last)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tables)


def from_disk(data: bytes | bytearray | memoryview, typecode: str = "Q") -> "array[int]":
    """Entries from big-endian bytes."""
    words = array(typecode)
    words.frombytes(data)
    words.byteswap()
    return words


def to_disk(words: "array[int]") -> bytes:
    """Big-endian bytes of entries."""
    swapped = words[:]
    swapped.byteswap()
    return swapped.tobytes()


def joined(pieces: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """(offset, bytes) of the same pieces by offset, with those that follow each other in one."""
    found: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in sorted(pieces):
        if offset != end:
            found.append((offset, []))
        found[-1][1].append(data)
        end = offset + len(data)
    return [(offset, b"".join(parts)) for offset, parts in found]


def whole_sectors(first: int, last: int, entry_bytes: int, table_bytes: int) -> tuple[int, int]:
    """The bytes [start, stop) of a table that hold the entries [first, last), widened to sectors."""
    start = first * entry_bytes // SECTOR * SECTOR
    return start, min(-(-last * entry_bytes // SECTOR) * SECTOR, table_bytes)
