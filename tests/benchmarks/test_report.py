"""The benchmark's own arithmetic, and that its report says what was measured."""

from __future__ import annotations

import io
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.benchmarks.cells import CELLS, Cell, chosen
from tests.benchmarks.loads import Fio, Sample, Start
from tests.benchmarks.report import as_data, comparison, figures, print_report
from tests.benchmarks.rounds import LONGEST_S, SHORTEST_S, Plan, Row, Terms
from tests.benchmarks.servers import DEFAULT_PEERS, PEERS, PYNBD, Disk
from tests.benchmarks.statistics import Spread, ratios

FIGURES = st.lists(st.one_of(st.none(), st.floats(0.001, 1e9)), min_size=1, max_size=8)


def test_ratio_is_taken_within_the_round() -> None:
    """A machine that slows down from round to round leaves the ratio alone."""
    assert ratios([100, 50, 10], [50, 25, 5], higher_is_better=True) == [2, 2, 2]
    assert ratios([100, 50, 10], [50, 25, 5], higher_is_better=False) == [0.5, 0.5, 0.5]


def test_round_with_a_gap_has_no_ratio() -> None:
    """A figure that is missing on either side takes its round out, not its neighbours."""
    assert ratios([100, None, 30], [50, 25, None], higher_is_better=True) == [2]
    assert ratios([100, 50], [50], higher_is_better=True) == [2]


@given(FIGURES)
def test_nobody_is_better_than_himself(values: list[float | None]) -> None:
    """The ratio to oneself is 1, whichever way is better."""
    for higher_is_better in (True, False):
        assert set(ratios(values, values, higher_is_better=higher_is_better)) <= {1}


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_spread_encloses_its_median(values: list[float]) -> None:
    """Low ≤ median ≤ high, and both ends were measured."""
    spread = Spread.of(values)
    assert spread.low <= spread.median <= spread.high
    assert {spread.low, spread.high} <= set(values)


def test_spread_of_nothing_is_an_error() -> None:
    """No figure is not a figure."""
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def _row() -> Row:
    cell = Cell("read", Fio("randread", 4096, 32), targets={"nbdkit": 1.2, "qemu-nbd": 3})

    def sample(value: float) -> Sample:
        return Sample(value, 1000, 4096000, p50_us=value, p99_us=2 * value, cpu_s=0.5, peak_resident_bytes=3 << 20)

    samples: dict[str, list[Sample | None]] = {
        "pynbd": [sample(150), sample(120)],
        "nbdkit": [sample(100), sample(100)],
        "qemu-nbd": [sample(60), None],
    }
    return Row(cell, samples, ["qemu-nbd: hung up"])


def test_comparison_knows_its_target() -> None:
    """The median of the rounds is held against the cell's target."""
    row = _row()
    to_nbdkit = comparison(row, "pynbd", "nbdkit")
    assert (to_nbdkit["median"], to_nbdkit["low"], to_nbdkit["high"]) == (1.35, 1.2, 1.5)
    assert to_nbdkit["reached"] is True
    assert comparison(row, "pynbd", "qemu-nbd")["reached"] is False
    assert comparison(row, "pynbd", "nbd-server") == {}


def test_figures_are_sums_where_sums_are_meant() -> None:
    """Processor time is taken over all requests of all rounds; memory is the worst of them."""
    told = figures(_row(), "pynbd")
    assert told["cpu_s_per_million_requests"] == 500
    assert told["median"] == 135
    assert told["p99_us"] == 270
    assert told["peak_resident_mib"] == 3
    assert figures(_row(), "nbd-server") == {}


def test_report_says_everything() -> None:
    """The table and the JSON have every server, ratio, remark, and the terms."""
    names = ["pynbd", "nbdkit", "qemu-nbd"]
    plan = Plan(2, 1.5, time.monotonic())
    data = as_data([_row()], names, plan, {"nbdkit random": Terms("nbdkit -f file X", "structured")}, "Unix socket")
    assert json.loads(json.dumps(data)) == data
    page = io.StringIO()
    print_report(data, names, Console(file=page, width=200))
    for text in (
        "1.35 (1.20 to 1.50)",
        "≥ 1.2",
        "2.50",
        "qemu-nbd: hung up",
        "nbdkit -f file X",
        "structured",
        "500 s/M",
    ):
        assert text in page.getvalue()


def test_start_is_better_when_shorter() -> None:
    """For times and memory, a ratio above 1 still means better."""
    row = Row(Cell("start", Start()), {"pynbd": [Sample(200)], "nbdkit": [Sample(100)]})
    assert comparison(row, "pynbd", "nbdkit")["median"] == 0.5


def test_plan_fits_its_budget() -> None:
    """Measurements get longer with the time there is, within bounds."""
    lengths = [Plan.within(budget_s, 50, 4, None, pin=False).seconds for budget_s in (1, 400, 600, 10_000)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (SHORTEST_S, LONGEST_S)
    assert Plan.within(600, 50, 4, 2.5, pin=True).seconds == 2.5


def test_cells_are_chosen_by_pattern() -> None:
    """Names and shell patterns choose; a name that is none is an error that tells the names."""
    assert chosen([]) == list(CELLS)
    assert [cell.name for cell in chosen(["read-4k-d1", "start"])] == ["read-4k-d1", "start"]
    assert all(cell.disk is Disk.MEMORY for cell in chosen(["memory-*"]))
    with pytest.raises(ValueError, match="read-4k-d1"):
        chosen(["read-5k"])


def test_every_cell_can_be_measured() -> None:
    """Pynbd and whoever a cell has a target for can serve the cell's disk."""
    servers = {server.name: server for server in (PYNBD, *PEERS)}
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert set(DEFAULT_PEERS) <= set(servers)
    for cell in CELLS:
        for name in ("pynbd", *cell.targets):
            assert cell.disk in servers[name].serves
