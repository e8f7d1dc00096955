"""Interleaved rounds: every server in turn, cell after cell, again and again."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks import process
from tests.benchmarks.cells import Cell
from tests.benchmarks.commands import ImgCommand
from tests.benchmarks.disks import RESIDENT_ENOUGH, residency, settle, warm
from tests.benchmarks.limits import limit
from tests.benchmarks.loads import (
    CachedBesideUncached,
    Client,
    Memory,
    Place,
    Sample,
    Start,
    Uncached,
    fill,
    start_to_first_read,
    tls_uri,
)
from tests.benchmarks.servers import MEMORY_BYTES, Disk, Server, Setup
from tests.peers import SYSTEM_PATH, CommandError, Peer, run

LIMIT = "limit"
"""Under this name a row keeps what the machine itself can do."""

SETTLE_S = 1.1
"""What a measurement takes beside its own time on the machine that this was written on: starting, filling, settling,
warming up."""

LONGEST_S = 3.0
"""No measurement runs longer, however few there are: more rounds say more than longer ones."""

SHORTEST_S = 0.5

LIMIT_PART = 0.5
"""The limit is measured for this part of the time that a server gets."""

SERVERS_A_LIMIT = 3
"""So many servers share the time that the limit of their cell takes, or fewer: the plan is only an estimate."""

LONGEST_REMARK = 400
"""Characters of an error that the report shows; a program with 64 connections can say the same thing 64 times."""

STRUCTURED_REPLIES, EXTENDED_HEADERS = 8, 11
"""NBD_OPT_STRUCTURED_REPLY and NBD_OPT_EXTENDED_HEADERS, in the NBD specification's "Option types"."""


@dataclass(frozen=True)
class Plan:
    """How a run goes: how many rounds, how long each measurement is, and when all is over."""

    rounds: int
    seconds: float
    deadline_s: float
    pin: bool = False

    @classmethod
    def within(cls, budget_s: float, measurements: int, rounds: int, seconds: float | None, *, pin: bool) -> Plan:
        """The plan that fits `budget_s`, unless `seconds` says how long a measurement is.

        `measurements` is how many a round has. With `pin`, servers run on the first
        processor and clients on the second.
        """
        if seconds is None:
            each_s = budget_s / max(1, measurements * rounds) - SETTLE_S
            seconds = min(LONGEST_S, max(SHORTEST_S, each_s / (1 + LIMIT_PART / SERVERS_A_LIMIT)))
        return cls(rounds, seconds, time.monotonic() + budget_s, pin)

    @property
    def left_s(self) -> float:
        """How much time is left."""
        return self.deadline_s - time.monotonic()


@dataclass
class Row:
    """All samples of a cell: for each server one for each round, None where it could not be had.

    `samples` has the machine's limit, too. `residency` tells the least part of the file that was in the page cache
    before and after a server's measurements, `replies` what was negotiated with the cell's client.
    """

    cell: Cell
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    residency: dict[str, float] = field(default_factory=dict)
    replies: dict[str, str] = field(default_factory=dict)

    def remark(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def resident(self, server: str, part: float) -> None:
        """Keep how much of the file was in the page cache."""
        self.residency[server] = min(part, self.residency.get(server, part))

    def all_remarks(self) -> list[str]:
        """The remarks, and one on every server that had less than enough of the file in the page cache."""
        cold = {server: part for server, part in self.residency.items() if part < RESIDENT_ENOUGH}
        return [
            *self.remarks,
            *(f"at least once only {part:.1%} of the file was cached for {server}" for server, part in cold.items()),
        ]


@dataclass
class Run:
    """What all measurements of a run share.

    Args:
        servers: the contenders.
        setup: disks and transport.
        plan: rounds and times.
        tell: called with a line on every measurement.
        commands: filled with each server's command line, by "SERVER DISK".
    """

    servers: Sequence[Server]
    setup: Setup
    plan: Plan
    tell: Callable[[str], None]
    commands: dict[str, str] = field(default_factory=dict)

    def measure(self, rows: Sequence[Row]) -> None:
        """All cells in all rounds. A server that fails is left out of the rest of its cell, with a remark.

        When the time is up, what is left is left out, with a remark: rounds go over all cells, so that none is without
        figures because others were measured well.
        """
        longest_s = 0.0
        for number in range(self.plan.rounds):
            for row in rows:
                if self.plan.left_s < longest_s:
                    self._time_is_up(rows)
                    return
                begun_s = time.monotonic()
                self.measure_round(row, number)
                longest_s = max(longest_s, time.monotonic() - begun_s)

    def _time_is_up(self, rows: Sequence[Row]) -> None:
        for row in rows:
            done = len(next(iter(row.samples.values()), []))
            if done < self.plan.rounds:
                row.remark(f"time was up after {done} of {self.plan.rounds} rounds")

    def measure_round(self, row: Row, number: int) -> None:
        """One round of one cell."""
        able = [server for server in self.servers if server.takes_part(row.cell.disk)]
        # Who goes first changes, so that nobody always follows the same one.
        first = number % len(able)
        measurements: list[tuple[str, Callable[[], Sample | None]]] = [
            (server.name, functools.partial(_one, row, server, self)) for server in able[first:] + able[:first]
        ]
        measurements.append((LIMIT, functools.partial(_limit, row.cell, self)))
        for name, one in measurements:
            sample = None
            if name not in row.failed:
                self.tell(f"round {number + 1} of {self.plan.rounds}: {row.cell.name}, {name}")
                try:
                    sample = one()
                except (CommandError, AssertionError, OSError, subprocess.SubprocessError) as error:
                    row.failed.add(name)
                    row.remark(f"{name}: {_brief(str(error))}")
            row.samples.setdefault(name, []).append(sample)


ON_RANDOM = (Disk.RANDOM, Disk.FILTERED, Disk.TLS)
"""Disks whose data are in the raw file of random data."""

COMPRESSED = {Disk.ZLIB_IMAGE: "zlib", Disk.ZSTD_IMAGE: "zstd"}
"""Disks in compressed images, and by what."""

IMAGES = (Disk.IMAGE, Disk.EMPTY_IMAGE, Disk.CHAIN, *COMPRESSED)
"""Disks in qcow2 images; what the machine could do without the format says nothing of them."""


def _limit(cell: Cell, run_: Run) -> Sample | None:
    setup, plan = run_.setup, run_.plan
    if cell.disk in IMAGES or cell.disk in (Disk.TLS, Disk.FILES):
        return None
    on_file = cell.disk in ON_RANDOM
    path, size_bytes = (setup.disks.random, setup.disks.size_bytes) if on_file else (None, MEMORY_BYTES)
    seconds = plan.seconds * LIMIT_PART
    sample = limit(cell.load, path=path, size_bytes=size_bytes, tcp=setup.tcp, seconds=seconds, pin=plan.pin)
    if on_file and sample is not None:
        settle(setup.disks.random)
    return sample


def _one(row: Row, server: Server, run_: Run) -> Sample:
    cell, setup, plan = row.cell, run_.setup, run_.plan
    if isinstance(cell.load, ImgCommand):
        return _by_command(row, cell.load, server, run_)
    if isinstance(cell.load, Start):
        row.replies[server.name] = "simple"
        if not row.samples.get(server.name):
            start_to_first_read(lambda: server.serves[cell.disk](setup))  # what it is made of comes into the page cache
        return start_to_first_read(lambda: server.serves[cell.disk](setup))
    files = _files(cell, setup)
    with _served(cell, server, setup, plan) as (peer, size_bytes):
        run_.commands.setdefault(f"{server.name} {cell.disk.name.lower()}", " ".join(peer.command))
        if server.name not in row.replies and not isinstance(cell.load, Memory):
            row.replies[server.name] = _replies(peer, cell, setup)
        for path in files:
            row.resident(server.name, warm(path, _fincore()))
        sample = cell.load.measure(Place(peer, setup.disks, size_bytes, plan.seconds, "1" if plan.pin else ""))
    if isinstance(cell.load, CachedBesideUncached | Uncached):
        row.remarks.extend(f"{server.name}: {note}" for note in sample.notes)
    else:
        for path in files:
            row.resident(server.name, residency(path, _fincore()))
    for path in files:
        settle(path)
    return sample


def _by_command(row: Row, load: ImgCommand, server: Server, run_: Run) -> Sample:
    """The same where no server is asked, but a command about files is given."""
    setup, plan = run_.setup, run_.plan
    files = setup.files
    assert server.tool is not None
    tool = server.tool(setup)
    run_.commands.setdefault(f"{server.name} {row.cell.name}", " ".join(load.command(tool, files)))
    is_first = not row.samples.get(server.name)
    try:
        if load.of_data:
            for path in load.sources(files):
                row.resident(server.name, warm(path, _fincore()))
        if load.of_data or is_first:
            load.run(tool, files)  # so that the memory is there: for what it reads, the program, and what it writes
        sample = load.run(tool, files, cpus="1" if plan.pin else "")
        if is_first:
            load.check_output(files)
    finally:
        files.output.unlink(missing_ok=True)
    return sample


def _files(cell: Cell, setup: Setup) -> list[Path]:
    """What is to be in the page cache while a cell is measured."""
    disks = setup.disks
    if cell.disk is Disk.CHAIN:
        return disks.chain
    if cell.disk in COMPRESSED:
        return [setup.files.text_image(COMPRESSED[cell.disk])]
    return {Disk.IMAGE: [disks.image]}.get(cell.disk, [disks.random] if cell.disk in ON_RANDOM else [])


@contextlib.contextmanager
def _served(cell: Cell, server: Server, setup: Setup, plan: Plan) -> Iterator[tuple[Peer, int]]:
    if cell.disk in IMAGES and cell.disk not in COMPRESSED:
        setup.disks.make_images()
    if cell.disk is Disk.EMPTY_IMAGE:
        setup.disks.make_empty_image()
    with server.serves[cell.disk](setup) as peer:
        if plan.pin:
            process.pin(peer.pid, {0})
        size_bytes = {
            Disk.MEMORY: MEMORY_BYTES,
            Disk.PYTHON: MEMORY_BYTES,
            **dict.fromkeys(COMPRESSED, setup.files.text_bytes),
        }.get(cell.disk, setup.disks.size_bytes)
        if cell.disk is Disk.MEMORY:
            fill(peer.uri(), size_bytes)
        yield peer, size_bytes


def _brief(text: str) -> str:
    """What went wrong, in one line: programs say it first or last."""
    lines = text.splitlines()
    return textwrap.shorten(" … ".join(lines if len(lines) < 3 else [lines[0], lines[-1]]), LONGEST_REMARK)


def _replies(peer: Peer, cell: Cell, setup: Setup) -> str:
    """Which replies a server negotiates with this client: simple, structured or extended."""
    client = cell.load.client
    if client is Client.LIBNBD:
        tls = cell.disk is Disk.TLS
        uri = f"{tls_uri(peer)}?tls-certificates={setup.disks.certificates}" if tls else peer.uri()
        # fio's engine, nbdcopy and nbdinfo are all libnbd: what the one negotiates, the others do.
        told = json.loads(run("nbdinfo", "--json", uri))
        return "extended" if told.get("extended") else "structured" if told["structured"] else "simple"
    if client is Client.OWN:
        return "simple"
    return replies_in_trace(run("sh", "-c", 'exec qemu-img --trace "nbd_*option*" info "$1" 2>&1', "sh", peer.uri()))


def replies_in_trace(trace: str) -> str:
    """The replies that QEMU's client has negotiated, by its own trace; "unknown" where it was built without tracing."""
    asked = "Sending option request" in trace
    acknowledged = {int(option) for option in re.findall(r"Received option reply (\d+) .* type 1 \(ack\)", trace)}
    if EXTENDED_HEADERS in acknowledged:
        return "extended"
    if STRUCTURED_REPLIES in acknowledged:
        return "structured"
    return "simple" if asked else "unknown"


def _fincore() -> str:
    path = shutil.which("fincore", path=SYSTEM_PATH)
    assert path, "fincore was there when the run began"
    return path
