"""What was asked of a node by one user of it: the seed's `nr_bytes`, `nr_ops`, `total_time_ns`."""

from enum import IntEnum


class Operation(IntEnum):
    """The kinds of requests that are counted apart."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    CACHE = 5
    BLOCK_STATUS = 6


class Statistics:
    """Counters, one list of each kind, indexed by `Operation`."""

    __slots__ = ("bytes", "failed", "operations", "time_ns")

    def __init__(self) -> None:
        count = len(Operation)
        self.bytes = [0] * count
        self.operations = [0] * count
        self.failed = [0] * count
        self.time_ns = [0] * count

    def account(self, operation: int, operations: int, length: int, time_ns: int) -> None:
        """Count requests that were answered well.

        Args:
            operation: their kind.
            operations: how many.
            length: their bytes, together.
            time_ns: what they took, together, in nanoseconds.
        """
        self.operations[operation] += operations
        self.bytes[operation] += length
        self.time_ns[operation] += time_ns

    def as_dict(self) -> dict[str, dict[str, int]]:
        """All counters, by the operation's name."""
        return {
            kind.name.lower().replace("_", "-"): {
                "bytes": self.bytes[kind],
                "operations": self.operations[kind],
                "failed": self.failed[kind],
                "time-ns": self.time_ns[kind],
            }
            for kind in Operation
        }
