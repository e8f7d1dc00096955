"""Rounds go on when a server fails, begin with another server each time, and end in time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.benchmarks.cells import Cell
from tests.benchmarks.disks import Disks
from tests.benchmarks.loads import Start
from tests.benchmarks.rounds import LIMIT, Plan, Row, Run, replies_in_trace
from tests.benchmarks.servers import Disk, Server, Setup
from tests.peers import CommandError, Peer, pynbd_serve, run


def _run(tmp_path: Path, *servers: Server, seconds_left: float = 60, rounds: int = 2) -> tuple[Run, list[str]]:
    told: list[str] = []
    plan = Plan(rounds, 0.01, time.monotonic() + seconds_left)
    disks = Disks(tmp_path, 1 << 20)
    disks.random.touch()
    return Run(servers, Setup(disks, tcp=False), plan, told.append), told


def _serves(name: str) -> Server:
    @contextmanager
    def serve(_: Setup) -> Iterator[Peer]:
        with pynbd_serve("driver=null-co,read-zeroes=on,size=1M") as peer:
            yield peer

    return Server(name, sys.executable, {Disk.RANDOM: serve})


def _fails(name: str) -> Server:
    def serve(_: Setup) -> AbstractContextManager[Peer]:
        raise CommandError("no such luck\n" * 100)

    return Server(name, sys.executable, {Disk.RANDOM: serve})


def test_server_that_fails_is_left_out_of_its_cell(tmp_path: Path) -> None:
    """The other one is measured in all rounds, and the first of a round is never the same twice in a row."""
    run_, told = _run(tmp_path, _serves("good"), _fails("bad"))
    row = Row(Cell("start", Start()))
    run_.measure([row])
    assert row.samples["bad"] == [None, None]
    assert all(sample and sample.value > 0 for sample in row.samples["good"] + row.samples[LIMIT])
    assert row.remarks == ["bad: no such luck … no such luck"]
    assert [line.rpartition(" ")[2] for line in told] == ["good", "bad", LIMIT, "good", LIMIT]


def test_first_of_a_round_is_another_one_each_time(tmp_path: Path) -> None:
    run_, told = _run(tmp_path, _serves("one"), _serves("two"))
    run_.measure([Row(Cell("start", Start()))])
    assert [line.rpartition(" ")[2] for line in told] == ["one", "two", LIMIT, "two", "one", LIMIT]


def test_time_is_up_for_all_cells(tmp_path: Path) -> None:
    """Nothing is begun that would not end in time, and every cell says that it lacks rounds."""
    run_, told = _run(tmp_path, _serves("good"), seconds_left=-1)
    rows = [Row(Cell("a", Start())), Row(Cell("b", Start()))]
    run_.measure(rows)
    assert told == []
    assert [row.remarks for row in rows] == [["time was up after 0 of 2 rounds"]] * 2


def test_residency_is_the_least_of_all() -> None:
    """Who had less than all of the file in the page cache is remarked on, once."""
    row = Row(Cell("start", Start()))
    for part in (1.0, 0.5, 0.7):
        row.resident("cold", part)
    row.resident("warm", 1.0)
    assert row.residency == {"cold": 0.5, "warm": 1.0}
    assert row.all_remarks() == ["at least once only 50.0% of the file was cached for cold"]


@pytest.mark.parametrize(
    ("option", "answer", "replies"),
    [
        ("7 (go)", "1 (ack)", "simple"),
        ("8 (structured reply)", "2147483649 (unsupported)", "simple"),
        ("8 (structured reply)", "1 (ack)", "structured"),
        ("11 (extended headers)", "1 (ack)", "extended"),
    ],
)
def test_replies_are_what_the_trace_says(option: str, answer: str, replies: str) -> None:
    """What was asked for and refused does not count."""
    asked = f"nbd_send_option_request Sending option request {option}, len 0\n"
    told = f"nbd_receive_option_reply Received option reply {option}, type {answer}, len 0\n"
    assert replies_in_trace(asked + told) == replies


def test_no_trace_is_no_answer() -> None:
    """A QEMU without this trace says nothing, and nothing is made of that."""
    assert replies_in_trace("image: disk.raw\n") == "unknown"


def test_uvloop_is_what_it_says(tmp_path: Path) -> None:
    """The environment of --uvloop changes the loop of a program that knows nothing of it."""
    pytest.importorskip("uvloop")
    tell = "import asyncio\nasync def main(): print(type(asyncio.get_running_loop()).__module__)\nasyncio.run(main())"
    for uvloop, module in ((True, "uvloop"), (False, "asyncio.unix_events")):
        environment = Setup(Disks(tmp_path, 0), tcp=False, uvloop=uvloop).environment()
        assert run(sys.executable, "-c", tell, env=environment).strip() == module
