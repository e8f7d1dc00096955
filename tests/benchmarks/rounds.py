"""Interleaved rounds: every server in turn, again and again, for each cell."""

from __future__ import annotations

import contextlib
import json
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.benchmarks import process
from tests.benchmarks.cells import Cell
from tests.benchmarks.disks import RESIDENT_ENOUGH, settle, warm
from tests.benchmarks.loads import CachedBesideUncached, Memory, Place, Sample, Start, fill, start_to_first_read
from tests.benchmarks.servers import MEMORY_BYTES, Disk, Server, Setup
from tests.peers import SYSTEM_PATH, CommandError, Peer, run

SETTLE_S = 1.2
"""What a measurement takes beside its own time on the machine that this was written on: starting, filling, settling."""

LONGEST_S = 3.0
"""No measurement runs longer, however few there are: more rounds say more than longer ones."""

SHORTEST_S = 0.5

LONGEST_REMARK = 400
"""Characters of an error that the report shows; a program with 64 connections can say the same thing 64 times."""


@dataclass(frozen=True)
class Plan:
    """How a run goes: how many rounds, how long each measurement is, and when all is over."""

    rounds: int
    seconds: float
    deadline_s: float
    server_cpus: frozenset[int] = frozenset()
    client_cpus: str = ""

    @classmethod
    def within(cls, budget_s: float, measurements: int, rounds: int, seconds: float | None, *, pin: bool) -> Plan:
        """The plan that fits `budget_s`, unless `seconds` says how long a measurement is.

        `measurements` is how many a round has. With `pin`, servers run on the first
        processor and clients on the second.
        """
        if seconds is None:
            each_s = budget_s / max(1, measurements * rounds) - SETTLE_S
            seconds = min(LONGEST_S, max(SHORTEST_S, each_s))
        deadline_s = time.monotonic() + budget_s
        return cls(rounds, seconds, deadline_s, frozenset({0}) if pin else frozenset(), "1" if pin else "")

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline_s


@dataclass
class Row:
    """All samples of a cell: for each server one for each round, None where it could not be had."""

    cell: Cell
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Terms:
    """Under which terms a server was measured: its command line, and which replies it negotiated."""

    command: str
    replies: str


def measure(
    row: Row, servers: Sequence[Server], setup: Setup, plan: Plan, terms: dict[str, Terms], tell: Callable[[str], None]
) -> None:
    """One cell in all its rounds. A server that fails is left out of the rest of the cell, with a remark.

    Args:
        row: the cell; its samples and remarks are filled in as they come.
        servers: the contenders; those that can't serve the cell's disk are passed over.
        setup: disks and transport.
        plan: rounds and times; when its time is up, the remaining rounds are left out, with a remark.
        terms: filled with each server's command line, by "SERVER DISK".
        tell: called with a line on every measurement.
    """
    cell = row.cell
    able = [server for server in servers if cell.disk in server.serves]
    row.samples.update({server.name: [] for server in able})
    failed: set[str] = set()
    for number in range(plan.rounds):
        if plan.over:
            row.remarks.append(f"time was up after {number} of {plan.rounds} rounds")
            break
        # Who goes first changes, so that nobody always follows the same one.
        for server in able[number % len(able) :] + able[: number % len(able)]:
            sample = None
            if server.name not in failed:
                tell(f"{cell.name}: round {number + 1} of {plan.rounds}, {server.name}")
                try:
                    sample = _one(cell, server, setup, plan, terms, row)
                except (CommandError, AssertionError, OSError) as error:
                    failed.add(server.name)
                    row.remarks.append(f"{server.name}: {_brief(str(error))}")
            row.samples[server.name].append(sample)


def _one(cell: Cell, server: Server, setup: Setup, plan: Plan, terms: dict[str, Terms], row: Row) -> Sample:
    if cell.disk in (Disk.RANDOM, Disk.FILTERED):
        resident = warm(setup.disks.random, _fincore())
        if resident < RESIDENT_ENOUGH:
            row.remarks.append(f"only {resident:.1%} of the file was in the page cache before {server.name}")
    if isinstance(cell.load, Start):
        return start_to_first_read(lambda: server.serves[cell.disk](setup))
    with _served(cell, server, setup, plan) as (peer, size_bytes):
        key = f"{server.name} {cell.disk.name.lower()}"
        if key not in terms and not isinstance(cell.load, Memory):
            terms[key] = Terms(" ".join(peer.command), _replies(peer))
        place = Place(peer, setup.disks, size_bytes, plan.seconds, plan.client_cpus)
        sample = cell.load.measure(place)
    if isinstance(cell.load, CachedBesideUncached):
        row.remarks.extend(f"{server.name}: {note}" for note in sample.notes)
    if cell.disk is Disk.RANDOM:
        settle(setup.disks.random)
    return sample


@contextlib.contextmanager
def _served(cell: Cell, server: Server, setup: Setup, plan: Plan) -> Iterator[tuple[Peer, int]]:
    with server.serves[cell.disk](setup) as peer:
        if plan.server_cpus:
            process.pin(peer.pid, set(plan.server_cpus))
        size_bytes = {Disk.MEMORY: MEMORY_BYTES, Disk.PYTHON: MEMORY_BYTES}.get(cell.disk, setup.disks.size_bytes)
        if cell.disk is Disk.MEMORY:
            fill(peer.uri(), size_bytes)
        yield peer, size_bytes


def _brief(text: str) -> str:
    """What went wrong, in one line: programs say it first or last."""
    lines = text.splitlines()
    return textwrap.shorten(" … ".join(lines if len(lines) < 3 else [lines[0], lines[-1]]), LONGEST_REMARK)


def _replies(peer: Peer) -> str:
    # fio's engine and nbdinfo are both libnbd: what the one negotiates, the other does.
    return "structured" if json.loads(run("nbdinfo", "--json", peer.uri()))["structured"] else "simple"


def _fincore() -> str:
    path = shutil.which("fincore", path=SYSTEM_PATH)
    assert path, "fincore was there when the run began"
    return path
