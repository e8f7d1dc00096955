"""The figures as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.benchmarks.loads import Sample
from tests.benchmarks.rounds import Plan, Row, Terms
from tests.benchmarks.statistics import Spread, ratios


def figures(row: Row, server: str) -> dict[str, Any]:
    """All that is known of one server in one cell; empty when it has no sample."""
    samples = [sample for sample in row.samples.get(server, []) if sample is not None]
    if not samples:
        return {}
    value = Spread.of([sample.value for sample in samples])
    latencies = {
        key: Spread.of(known).median
        for key in ("p50_us", "p99_us")
        if (known := [figure for sample in samples if (figure := getattr(sample, key)) is not None])
    }
    peaks = [sample.peak_resident_bytes for sample in samples if sample.peak_resident_bytes is not None]
    return {
        "median": value.median,
        "low": value.low,
        "high": value.high,
        "values": [sample.value if sample else None for sample in row.samples[server]],
        **latencies,
        **_cpu(samples),
        **({"peak_resident_mib": max(peaks) / (1 << 20)} if peaks else {}),
    }


def _cpu(samples: Sequence[Sample]) -> dict[str, float]:
    counted = [sample for sample in samples if sample.cpu_s is not None and sample.requests]
    if not counted:
        return {}
    cpu_s = sum(sample.cpu_s or 0 for sample in counted)
    transferred_bytes = sum(sample.transferred_bytes or 0 for sample in counted)
    return {
        "cpu_s_per_million_requests": cpu_s / sum(sample.requests or 0 for sample in counted) * 1e6,
        **({"cpu_s_per_gib": cpu_s / transferred_bytes * (1 << 30)} if transferred_bytes else {}),
    }


def comparison(row: Row, ours: str, theirs: str) -> dict[str, Any]:
    """The ratio of one server to another round by round; empty when no round has both."""
    if ours not in row.samples or theirs not in row.samples:
        return {}
    per_round = ratios(
        [sample.value if sample else None for sample in row.samples[ours]],
        [sample.value if sample else None for sample in row.samples[theirs]],
        higher_is_better=row.cell.load.higher_is_better,
    )
    if not per_round:
        return {}
    spread = Spread.of(per_round)
    target = row.cell.targets.get(theirs)
    return {
        "median": spread.median,
        "low": spread.low,
        "high": spread.high,
        "rounds": per_round,
        **({"target": target, "reached": spread.median >= target} if target is not None else {}),
    }


def as_data(
    rows: Sequence[Row], names: Sequence[str], plan: Plan, terms: Mapping[str, Terms], about: str
) -> dict[str, Any]:
    """The whole report as plain data. The first of `names` is the one that the others are compared with."""
    return {
        "machine": machine(),
        "about": about,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "servers": {key: {"command": term.command, "replies": term.replies} for key, term in terms.items()},
        "cells": [
            {
                "name": row.cell.name,
                "disk": row.cell.disk.value,
                "unit": row.cell.load.unit,
                "higher_is_better": row.cell.load.higher_is_better,
                **({"bound": row.cell.bound} if row.cell.bound is not None else {}),
                "figures": {name: told for name in names if (told := figures(row, name))},
                "ratios": {name: told for name in names[1:] if (told := comparison(row, names[0], name))},
                "remarks": row.remarks,
            }
            for row in rows
        ],
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"kernel": platform.release(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]}


def print_report(data: Mapping[str, Any], names: Sequence[str], console: Console) -> None:
    """The table, and below it the remarks and the terms."""
    console.print(_table(data, names))
    for remark, cells in _remarks(data).items():
        console.print(Text(f"{', '.join(cells)}: {remark}", style="yellow"))
    for key, term in data["servers"].items():
        console.print(Text(f"{key} ({term['replies']} replies): {term['command']}", style="dim"))
    told = data["machine"]
    console.print(
        Text(
            f"{data['about']}; {data['rounds']} interleaved rounds of {data['seconds']:.1f} s; Linux {told['kernel']}, "
            f"{told['processors']} processors, load {told['load_average']:.1f}; above 1 is in {names[0]}'s favour"
        )
    )


def _table(data: Mapping[str, Any], names: Sequence[str]) -> Table:
    table = Table(title=data["about"], title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"to {name}", justify="right")
    table.add_column("p50/p99 µs", justify="right")
    table.add_column("server CPU", justify="right")
    table.add_column("peak MiB", justify="right")
    for cell in data["cells"]:
        table.add_row(
            cell["name"],
            cell["unit"],
            *(
                _figure(cell["figures"].get(name, {}), cell.get("bound") if name == names[0] else None)
                for name in names
            ),
            *(_ratio(cell["ratios"].get(name, {})) for name in names[1:]),
            *(_each(cell, names, of) for of in (_latency, _processor, _peak)),
        )
    return table


def _remarks(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every remark once, with the cells that it was made on."""
    cells: dict[str, list[str]] = {}
    for cell in data["cells"]:
        for remark in cell["remarks"]:
            cells.setdefault(remark, []).append(cell["name"])
    return cells


def _figure(told: Mapping[str, Any], bound: float | None) -> Text:
    if not told:
        return Text("–")  # noqa: RUF001  a dash stands for what there is not
    text = f"{told['median']:.3g}" if told["median"] < 1000 else f"{told['median']:.0f}"
    if bound is None:
        return Text(text)
    return Text(f"{text}\n≤ {bound:g}", style="green" if told["median"] <= bound else "red")


def _ratio(told: Mapping[str, Any]) -> Text:
    if not told:
        return Text("–")  # noqa: RUF001  as above
    text = f"{told['median']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
    if "target" not in told:
        return Text(text)
    return Text(f"{text}\n≥ {told['target']:g}", style="green" if told["reached"] else "red")


def _each(cell: Mapping[str, Any], names: Sequence[str], of: Callable[[Mapping[str, Any], str], str]) -> str:
    return "\n".join(of(cell["figures"][name], cell["unit"]) for name in names if name in cell["figures"])


def _latency(told: Mapping[str, Any], _unit: str) -> str:
    return f"{told['p50_us']:.0f}/{told['p99_us']:.0f}" if "p50_us" in told else ""


def _processor(told: Mapping[str, Any], unit: str) -> str:
    if unit == "MB/s" and "cpu_s_per_gib" in told:
        return f"{told['cpu_s_per_gib']:.2f} s/GiB"
    return f"{told['cpu_s_per_million_requests']:.3g} s/M" if "cpu_s_per_million_requests" in told else ""


def _peak(told: Mapping[str, Any], _unit: str) -> str:
    return f"{told['peak_resident_mib']:.0f}" if "peak_resident_mib" in told else ""
