"""The ratios as a chart: an SVG file without scripts, fonts or colours that only fit one background."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

BAR_PX = 9
GAP_PX = 9
"""Between cells."""

NAME_PX = 190
PLOT_PX = 520
VALUE_PX = 60
TOP_PX = 62
BOTTOM_PX = 24

LEAST_RATIO, MOST_RATIO = 0.5, 2.0
"""The axis shows at least these, however alike all are."""

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 14px }
  .small { font-size: 10px; fill: #59636e }
  .even { stroke: #1f2328; stroke-width: 1.5 }
  .grid { stroke: #d1d9e0; stroke-width: 1 }
  .spread { stroke: #1f2328; stroke-width: 1 }
  .target { stroke: #bc4c00; stroke-width: 2.5 }
  .peer0 { fill: #0969da } .peer1 { fill: #8250df } .peer2 { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .even, .spread { stroke: #f0f6fc }
    .grid { stroke: #3d444d }
    .target { stroke: #f0883e }
    .peer0 { fill: #4493f8 } .peer1 { fill: #ab7df8 } .peer2 { fill: #3fb950 }
  }
"""
"""The background is whatever the page's is, light or dark."""

PEER_COLOURS = 3


@dataclass(frozen=True)
class Axis:
    """Where a ratio is, from left to right, by its logarithm: twice as fast is as far from 1 as half as fast."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> Axis:
        """An axis that has room for all values, from a power of two to a power of two."""
        low, high = min([LEAST_RATIO, *values]), max([MOST_RATIO, *values])
        return cls(2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high)))

    def x(self, ratio: float) -> float:
        """Pixels from the chart's left edge."""
        return NAME_PX + PLOT_PX * math.log2(ratio / self.low) / math.log2(self.high / self.low)

    def marks(self) -> list[float]:
        """The powers of two."""
        return [2.0**power for power in range(round(math.log2(self.low)), round(math.log2(self.high)) + 1)]


def chart(data: Mapping[str, Any]) -> str:
    """The report's ratios as SVG: for each cell a bar for each peer, from 1 to the median.

    A thin line on a bar is the spread over the rounds, a thick one across it the target. Left out are cells without a
    peer that was measured, and those that are held to a figure instead of a peer.

    Args:
        data: a report, as `report.as_data` makes it.
    """
    cells = [cell for cell in data["cells"] if cell["ratios"] and "bound" not in cell]
    peers = list(dict.fromkeys(name for cell in cells for name in cell["ratios"]))
    told = [told for cell in cells for told in cell["ratios"].values()]
    axis = Axis.around([value for one in told for value in (one["low"], one["high"], one.get("target", 1))])
    tops = [TOP_PX]
    for cell in cells:
        tops.append(tops[-1] + BAR_PX * len(cell["ratios"]) + GAP_PX)
    bars = "".join(_cell(cell, peers, axis, top) for cell, top in zip(cells, tops, strict=False))
    targets = "".join(_targets(cell, axis, top) for cell, top in zip(cells, tops, strict=False))
    width, height = NAME_PX + PLOT_PX + VALUE_PX, tops[-1] + BOTTOM_PX
    even = _line("even", axis.x(1), TOP_PX - 6, axis.x(1), tops[-1])
    label = f"Ratio of {data['ours']} to other NBD servers"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}">\n<style>{STYLE}</style>\n'
        f"{_head(data, peers, label)}{_grid(axis, tops[-1])}{bars}{even}{targets}</svg>\n"
    )


def _head(data: Mapping[str, Any], peers: Sequence[str], label: str) -> str:
    text = [_text("title", 8, 18, f"{label}: above 1 is faster")]
    text.append(_text("small", 8, 34, f"{data['about']}; medians of {data['rounds']} rounds, their spread, targets"))
    x = NAME_PX
    for number, name in enumerate(peers):
        text.append(f'<rect class="{_colour(number)}" x="{x}" y="40" width="10" height="{BAR_PX}"/>\n')
        text.append(_text("small", x + 14, 48, f"to {name}"))
        x += 30 + 8 * len(name)
    text += [_line("target", x + 3, 39, x + 3, 50), _text("small", x + 14, 48, "target")]
    return "".join(text)


def _grid(axis: Axis, bottom: float) -> str:
    return "".join(
        _line("grid", axis.x(mark), TOP_PX - 6, axis.x(mark), bottom)
        + _text("small", axis.x(mark), bottom + 14, f"{mark:g}", anchor="middle")
        for mark in axis.marks()
    )


def _cell(cell: Mapping[str, Any], peers: Sequence[str], axis: Axis, top: float) -> str:
    baseline = top + BAR_PX * len(cell["ratios"]) / 2 + 4
    parts = [_text("name", NAME_PX - 8, baseline, cell["name"], anchor="end")]
    for place, (name, told) in enumerate(cell["ratios"].items()):
        y = top + place * BAR_PX
        left, right = sorted([axis.x(1), axis.x(told["median"])])
        colour = _colour(peers.index(name))
        parts.append(
            f'<rect class="{colour}" x="{left:.1f}" y="{y + 0.5:.1f}" width="{right - left:.1f}" height="{BAR_PX - 1}">'
            f"<title>{escape(_tip(cell['name'], name, told))}</title></rect>\n"
        )
        middle = y + BAR_PX / 2
        parts.append(_line("spread", axis.x(told["low"]), middle, axis.x(told["high"]), middle))
        parts.append(_text("small", NAME_PX + PLOT_PX + 8, y + BAR_PX - 1, f"{told['median']:.2f}"))
    return "".join(parts)


def _targets(cell: Mapping[str, Any], axis: Axis, top: float) -> str:
    return "".join(
        _line(
            "target", axis.x(told["target"]), top + place * BAR_PX, axis.x(told["target"]), top + (place + 1) * BAR_PX
        )
        for place, told in enumerate(cell["ratios"].values())
        if "target" in told
    )


def _tip(cell: str, peer: str, told: Mapping[str, Any]) -> str:
    target = f", target {told['target']:g}" if "target" in told else ""
    return f"{cell} to {peer}: {told['median']:.2f} ({told['low']:.2f} to {told['high']:.2f}){target}"


def _colour(number: int) -> str:
    return f"peer{number % PEER_COLOURS}"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>\n'


def _text(kind: str, x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>\n'
