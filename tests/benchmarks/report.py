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
from tests.benchmarks.rounds import LIMIT, Plan, Row
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
    busy = [sample.client_busy for sample in samples if sample.client_busy is not None]
    peaks = [sample.peak_resident_bytes for sample in samples if sample.peak_resident_bytes is not None]
    return {
        "median": value.median,
        "low": value.low,
        "high": value.high,
        "values": [sample.value if sample else None for sample in row.samples[server]],
        **latencies,
        **_cpu(samples),
        **({"client_busy": Spread.of(busy).median} if busy else {}),
        **({"peak_resident_mib": max(peaks) / (1 << 20)} if peaks else {}),
        **({"file_resident": row.residency[server]} if server in row.residency else {}),
        **({"replies": row.replies[server]} if server in row.replies else {}),
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


def share(row: Row, ours: str) -> dict[str, Any]:
    """The machine's own limit, and our part of it round by round; empty where there is none."""
    told, part = figures(row, LIMIT), comparison(row, ours, LIMIT)
    return {key: told[key] for key in ("median", "low", "high")} | {"share": part["median"]} if told and part else {}


def as_data(
    rows: Sequence[Row], names: Sequence[str], plan: Plan, commands: Mapping[str, str], about: str
) -> dict[str, Any]:
    """The whole report as plain data. The first of `names` is the one that the others are compared with."""
    return {
        "machine": machine(),
        "about": about,
        "ours": names[0],
        "names": list(names),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "commands": dict(commands),
        "cells": [
            {
                "name": row.cell.name,
                "disk": row.cell.disk.value,
                "client": row.cell.load.client.value,
                "unit": row.cell.load.unit,
                "higher_is_better": row.cell.load.higher_is_better,
                **({"bound": row.cell.bound} if row.cell.bound is not None else {}),
                "targets": dict(row.cell.targets),
                "limit": share(row, names[0]),
                "figures": {name: told for name in names if (told := figures(row, name))},
                "ratios": {name: told for name in names[1:] if (told := comparison(row, names[0], name))},
                "not_measured": not_measured(row, names[0]),
                "remarks": row.all_remarks(),
            }
            for row in rows
        ],
    }


def not_measured(row: Row, ours: str) -> list[str]:
    """Who took part and lacks a round, and we ourselves when we have none; the limit is nobody."""
    names = [name for name in row.samples if name != LIMIT and None in row.samples[name]]
    return names if row.samples.get(ours) else [*names, ours]


def missed(data: Mapping[str, Any]) -> list[str]:
    """A line on every target that was not reached, or whose peer took part and could not be compared."""
    lines = []
    for cell in data["cells"]:
        for name, target in cell["targets"].items():
            if name not in data["names"]:
                continue
            told = cell["ratios"].get(name)
            if told is None:
                lines.append(f"{cell['name']}: no ratio to {name}, wanted ≥ {target:g}")
            elif not told["reached"]:
                spread = f"{told['median']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
                lines.append(f"{cell['name']}: {spread} of {name}, wanted ≥ {target:g}")
        ours = cell["figures"].get(data["ours"])
        if "bound" in cell and (ours is None or ours["median"] > cell["bound"]):
            found = "not measured" if ours is None else f"{ours['median']:.0f} {cell['unit']}"
            lines.append(f"{cell['name']}: {found}, wanted ≤ {cell['bound']:g}")
    return lines


def replies(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Who negotiated what: "structured replies with libnbd" and the servers that did so with it."""
    found: dict[str, list[str]] = {}
    for cell in data["cells"]:
        for name, told in cell["figures"].items():
            if "replies" in told:
                servers = found.setdefault(f"{told['replies']} replies with {cell['client']}", [])
                servers.extend([name] if name not in servers else [])
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"kernel": platform.release(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]}


def conditions(data: Mapping[str, Any]) -> str:
    """How all of it was measured, in a sentence."""
    told = data["machine"]
    return (
        f"{data['about']}; {data['rounds']} interleaved rounds of {data['seconds']:.1f} s; Linux {told['kernel']}, "
        f"{told['processors']} processors, load {told['load_average']:.1f} at the end; "
        f"above 1 is in {data['ours']}'s favour"
    )


def print_report(data: Mapping[str, Any], console: Console) -> None:
    """The table, and below it the remarks and the terms."""
    console.print(_table(data))
    for remark, cells in remarks(data).items():
        console.print(Text(f"{', '.join(cells)}: {remark}", style="yellow"))
    for key, command in data["commands"].items():
        console.print(Text(f"{key}: {command}", style="dim"))
    for what, servers in replies(data).items():
        console.print(Text(f"{what}: {', '.join(servers)}", style="dim"))
    console.print(Text(conditions(data)))


def _table(data: Mapping[str, Any]) -> Table:
    names = data["names"]
    table = Table(title=data["about"], title_justify="left")
    table.add_column("cell", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for name in names[1:]:
        table.add_column(f"to {name}", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("p50/p99 µs", justify="right")
    table.add_column("server CPU", justify="right")
    table.add_column("client busy", justify="right")
    table.add_column("peak MiB", justify="right")
    for cell in data["cells"]:
        table.add_row(
            cell["name"],
            cell["unit"],
            *(
                _figure(cell["figures"].get(name, {}), cell.get("bound") if name == data["ours"] else None)
                for name in names
            ),
            *(_ratio(cell["ratios"].get(name, {})) for name in names[1:]),
            limit_text(cell, separator="\n"),
            *(_each(cell, names, of) for of in (latency_text, processor_text, client_text, peak_text)),
        )
    return table


def remarks(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every remark once, with the cells that it was made on."""
    cells: dict[str, list[str]] = {}
    for cell in data["cells"]:
        for remark in cell["remarks"]:
            cells.setdefault(remark, []).append(cell["name"])
    return cells


def _figure(told: Mapping[str, Any], bound: float | None) -> Text:
    if not told:
        return Text("–")  # noqa: RUF001  a dash stands for what there is not
    text = number_text(told["median"])
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


def number_text(value: float) -> str:
    """A figure with as many digits as say something."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def limit_text(cell: Mapping[str, Any], *, separator: str = " ") -> str:
    """The machine's limit and our share of it, "" where there is none."""
    told = cell["limit"]
    return f"{number_text(told['median'])}{separator}({told['share']:.0%})" if told else ""


def latency_text(told: Mapping[str, Any], _unit: str) -> str:
    """Half of the requests took no longer than the first, 99 of 100 no longer than the second."""
    return f"{told['p50_us']:.0f}/{told['p99_us']:.0f}" if "p50_us" in told else ""


def processor_text(told: Mapping[str, Any], unit: str) -> str:
    """Processor time of the server, for data or for requests."""
    if unit == "MB/s" and "cpu_s_per_gib" in told:
        return f"{told['cpu_s_per_gib']:.2f} s/GiB"
    return f"{told['cpu_s_per_million_requests']:.3g} s/M" if "cpu_s_per_million_requests" in told else ""


def client_text(told: Mapping[str, Any], _unit: str) -> str:
    """How much of a processor the client had to do."""
    return f"{told['client_busy']:.0%}" if "client_busy" in told else ""


def peak_text(told: Mapping[str, Any], _unit: str) -> str:
    """The most resident memory."""
    return f"{told['peak_resident_mib']:.0f}" if "peak_resident_mib" in told else ""
