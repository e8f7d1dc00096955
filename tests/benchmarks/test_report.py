"""The benchmark's own arithmetic, and that its report says what was measured."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.benchmarks.__main__ import main
from tests.benchmarks.cells import CELLS, IMG_CELLS, Cell, chosen
from tests.benchmarks.chart import Axis, chart
from tests.benchmarks.loads import Fio, Memory, Sample, Start
from tests.benchmarks.markdown import BEGIN, END, markdown, placed
from tests.benchmarks.report import as_data, comparison, figures, missed, not_measured, print_report, share
from tests.benchmarks.rounds import LIMIT, LONGEST_S, SHORTEST_S, Plan, Row
from tests.benchmarks.servers import DEFAULT_PEERS, PEERS, PYNBD, Disk
from tests.benchmarks.statistics import Spread, ratios
from tests.peers import ROOT

PAGE = ROOT / "docs" / "performance.md"
SVG = "{http://www.w3.org/2000/svg}"
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
        return Sample(
            value,
            1000,
            4096000,
            p50_us=value,
            p99_us=2 * value,
            cpu_s=0.5,
            client_busy=0.9,
            peak_resident_bytes=3 << 20,
        )

    samples: dict[str, list[Sample | None]] = {
        "pynbd": [sample(150), sample(120)],
        "nbdkit": [sample(100), sample(100)],
        "qemu-nbd": [sample(60), None],
        LIMIT: [sample(300), sample(240)],
    }
    row = Row(cell, samples, ["qemu-nbd: hung up"], replies={"nbdkit": "structured"})
    row.resident("nbdkit", 1)
    row.resident("nbdkit", 0.99)
    row.resident("pynbd", 1)
    return row


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
    assert told["client_busy"] == 0.9
    assert told["peak_resident_mib"] == 3
    assert figures(_row(), "nbd-server") == {}


NAMES = ["pynbd", "nbdkit", "qemu-nbd"]


def _data(*rows: Row) -> dict[str, Any]:
    plan = Plan(2, 1.5, time.monotonic())
    return as_data(rows or [_row()], NAMES, plan, {"nbdkit random": "nbdkit -f file X"}, "Unix socket")


def test_report_says_everything() -> None:
    """The table and the JSON have every server, ratio, remark, the limit, and the terms."""
    data = _data()
    assert json.loads(json.dumps(data)) == data
    page = io.StringIO()
    print_report(data, Console(file=page, width=200))
    for text in (
        "1.35 (1.20 to 1.50)",
        "≥ 1.2",
        "2.50",
        "90%",
        "qemu-nbd: hung up",
        "only 99.0% of the file was cached for nbdkit",
        "nbdkit -f file X",
        "structured replies with libnbd: nbdkit",
        "500 s/M",
        "(50%)",
    ):
        assert text in page.getvalue()


def test_share_is_of_the_same_round() -> None:
    """What we reach of the limit is taken round by round, as all ratios are."""
    told = share(_row(), "pynbd")
    assert (told["median"], told["share"]) == (270, 0.5)
    assert share(Row(Cell("read", Fio("randread", 4096, 32))), "pynbd") == {}


def test_missed_targets_are_listed() -> None:
    """A ratio below its target, one that could not be had, a figure beyond its bound; nothing of who took no part."""
    slow = Row(Cell("slow", Fio("randread", 4096, 1), targets={"nbdkit": 1, "qemu-nbd": 1, "nbd-server": 1}))
    slow.samples = {"pynbd": [Sample(90)], "nbdkit": [Sample(100)], "qemu-nbd": [None]}
    fat = Row(Cell("fat", Memory(under_load=False), bound=40), {"pynbd": [Sample(41)]})
    thin = Row(Cell("thin", Memory(under_load=False), bound=40), {"pynbd": [Sample(40)]})
    assert missed(_data(slow, fat, thin, Row(Cell("dead", Start(), bound=250)))) == [
        "slow: 0.90 (0.90 to 0.90) of nbdkit, wanted ≥ 1",
        "slow: no ratio to qemu-nbd, wanted ≥ 1",
        "fat: 41 MiB, wanted ≤ 40",
        "dead: not measured, wanted ≤ 250",
    ]


def test_markdown_is_a_table() -> None:
    """All rows have as many columns as the head, and what was missed is bold."""
    fat = Row(Cell("fat", Memory(under_load=False), bound=40), {"pynbd": [Sample(41)]})
    lines = markdown(_data(_row(), fat)).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "1.35 (1.20 to 1.50), ≥ 1.2 |" in lines[2]
    assert "**2.50 (2.50 to 2.50), ≥ 3**" in lines[2]
    assert "**41 (≤ 40)**" in lines[3]
    assert lines[4] == ""
    assert "- structured replies with libnbd: nbdkit" in lines


def test_table_takes_its_place_in_a_page() -> None:
    """Again and again, with nothing else changed; a file without the marks is the table's own."""
    page = f"# A\n{BEGIN}\nold\n{END}\nB\n"
    once = placed("| new |\n", page)
    assert once == f"# A\n{BEGIN}\n\n| new |\n\n{END}\nB\n"
    assert placed("| new |\n", once) == once
    assert placed("| new |\n", "| old |\n") == "| new |\n"
    assert BEGIN in PAGE.read_text()
    assert END in PAGE.read_text()


def test_chart_has_a_bar_for_each_ratio() -> None:
    """SVG that parses, whatever the names are; cells that are held to a figure are not in it."""
    odd = _row()
    odd.cell = Cell("<&>", odd.cell.load)
    fat = Row(Cell("fat", Memory(under_load=False), bound=40), {"pynbd": [Sample(41)], "nbdkit": [Sample(1)]})
    page = ElementTree.fromstring(chart(_data(_row(), odd, fat)))
    tips = [tip.text for tip in page.iter(f"{SVG}title")]
    assert tips == [
        "read to nbdkit: 1.35 (1.20 to 1.50), target 1.2",
        "read to qemu-nbd: 2.50 (2.50 to 2.50), target 3",
        "<&> to nbdkit: 1.35 (1.20 to 1.50)",
        "<&> to qemu-nbd: 2.50 (2.50 to 2.50)",
    ]
    kinds = [line.get("class") for line in page.iter(f"{SVG}line")]
    assert kinds.count("target") == 2 + 1  # and the one that explains them
    assert kinds.count("even") == 1


def test_chart_of_nothing_is_a_chart() -> None:
    """A run that was broken off at once has no ratios."""
    assert not list(ElementTree.fromstring(chart(_data(Row(_row().cell)))).iter(f"{SVG}title"))


@given(st.lists(st.floats(0.001, 1000), min_size=1))
def test_axis_has_room_and_keeps_the_order(values: list[float]) -> None:
    """Everything is between the two ends, what is larger is further to the right, and 1 is on the axis."""
    axis = Axis.around(values)
    places = [axis.x(value) for value in sorted(values)]
    assert places == sorted(places)
    assert axis.x(axis.low) <= places[0] <= places[-1] <= axis.x(axis.high)
    assert 1 in axis.marks()


def test_earlier_run_is_reported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--from measures nothing; --check makes missed targets the exit status."""
    kept, page, picture = tmp_path / "run.json", tmp_path / "table.md", tmp_path / "chart.svg"
    row = _row()
    row.samples["qemu-nbd"] = [Sample(60), Sample(60)]
    kept.write_text(json.dumps(_data(row)))
    assert main(["--from", str(kept), "--markdown", str(page), "--chart", str(picture)]) == 0
    assert page.read_text() == markdown(_data(row))
    assert picture.read_text() == chart(_data(row))
    assert main(["--from", str(kept), "--markdown", "-", "--check"]) == 1
    told = capsys.readouterr()
    assert told.out.endswith(page.read_text())
    assert told.err == "missed: read: 2.25 (2.00 to 2.50) of qemu-nbd, wanted ≥ 3\n"


def test_who_was_not_measured() -> None:
    """Who lacks a round, or all of them; a run that was broken off before us; not who takes no part in a cell."""
    cell = Cell("start", Start())
    samples: dict[str, list[Sample | None]] = {"pynbd": [Sample(1)], "nbdkit": [None], LIMIT: [None]}
    assert not_measured(Row(cell, samples), "pynbd") == ["nbdkit"]
    assert not_measured(Row(cell), "pynbd") == ["pynbd"]


def test_server_that_failed_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --check, too: its figures are missing."""
    kept = tmp_path / "run.json"
    kept.write_text(json.dumps(_data()))
    assert main(["--from", str(kept), "--json", str(tmp_path / "copy.json")]) == 1
    assert "could not be measured in all rounds: read by qemu-nbd" in capsys.readouterr().err


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
    assert chosen(["img-*"]) == list(IMG_CELLS)
    with pytest.raises(ValueError, match="read-4k-d1"):
        chosen(["read-5k"])


def test_every_cell_can_be_measured() -> None:
    """Pynbd and whoever a cell has a target for can serve the cell's disk."""
    servers = {server.name: server for server in (PYNBD, *PEERS)}
    assert len({cell.name for cell in (*CELLS, *IMG_CELLS)}) == len(CELLS) + len(IMG_CELLS)
    assert set(DEFAULT_PEERS) <= set(servers)
    for cell in (*CELLS, *IMG_CELLS):
        for name in ("pynbd", *cell.targets):
            assert servers[name].takes_part(cell.disk)
