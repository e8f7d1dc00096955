"""The figures as a table in Markdown, for the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.report import (
    client_text,
    conditions,
    latency_text,
    limit_text,
    number_text,
    peak_text,
    processor_text,
    remarks,
    replies,
)

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Between these lines of a document the table has its place."""


def markdown(data: Mapping[str, Any]) -> str:
    """The table, and below it how it was measured. Only our own latency, processor time and memory: JSON has the rest.

    Args:
        data: a report, as `report.as_data` makes it.
    """
    ours, peers = data["ours"], data["names"][1:]
    head = ["cell", "unit", *data["names"], *(f"to {name}" for name in peers), "limit (share)"]
    head += [f"{ours} p50/p99 µs", f"{ours} CPU", "client busy", f"{ours} peak MiB"]
    lines = [_line(head), _line(["---", "---", *["--:"] * (len(head) - 2)])]
    lines += [_line(_cells(cell, ours, peers)) for cell in data["cells"]]
    lines += ["", f"{conditions(data)}. **Bold** is a target that was missed."]
    lines += ["", *(f"- {what}: {', '.join(servers)}" for what, servers in replies(data).items())]
    lines += [f"- {', '.join(cells)}: {remark}" for remark, cells in remarks(data).items()]
    return "\n".join(lines) + "\n"


def placed(table: str, page: str) -> str:
    """A page with the table between its two marks, and else unchanged; the table alone for a page without marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n\n{table}\n{end}{after}" if end else table


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _cells(cell: Mapping[str, Any], ours: str, peers: Sequence[str]) -> list[str]:
    own = cell["figures"].get(ours, {})
    return [
        cell["name"],
        cell["unit"],
        _own(own, cell.get("bound")),
        *(_median(cell["figures"].get(name, {})) for name in peers),
        *(_ratio(cell["ratios"].get(name, {})) for name in peers),
        limit_text(cell),
        *(of(own, cell["unit"]) for of in (latency_text, processor_text, client_text, peak_text)),
    ]


def _median(told: Mapping[str, Any]) -> str:
    return number_text(told["median"]) if told else ""


def _own(told: Mapping[str, Any], bound: float | None) -> str:
    if not told or bound is None:
        return _median(told)
    text = f"{_median(told)} (≤ {bound:g})"
    return text if told["median"] <= bound else f"**{text}**"


def _ratio(told: Mapping[str, Any]) -> str:
    if not told:
        return ""
    text = f"{told['median']:.2f} ({told['low']:.2f} to {told['high']:.2f})"
    if "target" not in told:
        return text
    text = f"{text}, ≥ {told['target']:g}"
    return text if told["reached"] else f"**{text}**"
