"""What the kernel tells of a running server: processor time, memory, threads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")


def with_descendants(pid: int) -> list[int]:
    """The process and everything it has started that still runs (nbd-server serves each client from a child)."""
    parents: dict[int, int] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        fields = _stat_fields(int(stat.parent.name))
        if fields:
            parents[int(stat.parent.name)] = int(fields[1])
    family = [pid]
    for member in family:
        family.extend(child for child, parent in parents.items() if parent == member)
    return family


def cpu_seconds(pid: int) -> float:
    """Processor seconds, user and system, that a process, its running descendants and its reaped children have used."""
    ticks = 0
    for member in with_descendants(pid):
        fields = _stat_fields(member)
        # utime, stime, cutime, cstime: fields 14 to 17 of proc(5), counted here from the state, which is field 3
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Resident memory now, of a process and its running descendants."""
    return sum(_status_kib(member, "VmRSS") for member in with_descendants(pid)) * 1024


def peak_resident_bytes(pid: int) -> int:
    """The most resident memory that there ever was, of a process and its running descendants."""
    return sum(_status_kib(member, "VmHWM") for member in with_descendants(pid)) * 1024


def pin(pid: int, cpus: set[int]) -> None:
    """Confine every thread of a process, and so those it will start, to `cpus`."""
    for task in (PROC / str(pid) / "task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has ended since
            os.sched_setaffinity(int(task.name), cpus)


def _stat_fields(pid: int) -> list[str]:
    try:
        # The second field is the program's name in parentheses and may itself contain spaces and parentheses.
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []  # ended since it was listed


def _status_kib(pid: int, key: str) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)
