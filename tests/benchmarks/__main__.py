"""The command: chooses cells and servers, measures, reports."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.cells import CELLS, IMG_CELLS, Cell, chosen
from tests.benchmarks.chart import chart
from tests.benchmarks.disks import Disks
from tests.benchmarks.markdown import BEGIN, END, markdown, placed
from tests.benchmarks.report import as_data, missed, print_report
from tests.benchmarks.rounds import Plan, Row, Run
from tests.benchmarks.servers import DEFAULT_PEERS, PEERS, PYNBD, Server, Setup
from tests.peers import ROOT, SYSTEM_PATH, CommandError
from tests.peers import run as run_client

CLIENTS = ("fio", "fincore", "qemu-img", "nbdcopy", "nbdinfo", "taskset")
"""The programs that the benchmark itself uses."""

LEAST_SIZE_MIB = 256
"""A smaller disk would not hold the areas that the cells use."""

WIDTH_WITHOUT_TERMINAL = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    The exit status is 0 when every server could be measured, and with --check only if all targets were reached; 1 if
    not; 2 for arguments that make no sense and for programs that are missing.
    """
    options = _parser().parse_args(arguments)
    if options.list:
        sys.stdout.write("".join(f"{cell.name}\n" for cell in (*CELLS, *IMG_CELLS)))
        return 0
    if options.from_json:
        return _report(json.loads(options.from_json.read_text()), options)
    try:
        cells = chosen(options.cells)
        servers = _servers(options.peers.split(",") if options.peers else DEFAULT_PEERS, cells)
        if options.workers > 1 and options.pin:
            raise ValueError("--workers is for several processors, and --pin leaves the servers one")
        if options.uvloop:
            _require_uvloop(options.python)
    except ValueError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        return 2
    return _report(_measure(cells, servers, options), options)


def _measure(cells: Sequence[Cell], servers: Sequence[Server], options: argparse.Namespace) -> dict[str, Any]:
    """All cells, as the report's data; what was measured until then when it is broken off."""
    weight = _weight(cells, servers)
    plan = Plan.within(options.minutes * 60, weight, options.rounds, options.seconds, pin=options.pin)
    options.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.directory))
    disks = Disks(folder, max(options.size, LEAST_SIZE_MIB) << 20)
    setup = Setup(disks, options.transport == "tcp", options.python, uvloop=options.uvloop, workers=options.workers)
    rows = [Row(cell) for cell in cells]
    with Console(stderr=True).status("making the disks") as progress:
        run = Run(servers, setup, plan, progress.update)
        try:
            disks.make()
            run.measure(rows)
        except KeyboardInterrupt:
            progress.console.print("stopped; what was measured until here:")
        finally:
            disks.remove()
    return as_data(rows, [server.name for server in servers], plan, run.commands, _about(setup, plan))


def _about(setup: Setup, plan: Plan) -> str:
    told = run_client(setup.pynbd_python, "-c", "import platform; print(platform.python_version())").strip()
    transport = "TCP loopback" if setup.tcp else "Unix socket"
    pinned = ", server on processor 0 and client on processor 1" if plan.pin else ""
    workers = f", {setup.workers} workers" if setup.workers > 1 else ""
    return f"{transport}, pynbd on Python {told}{' with uvloop' if setup.uvloop else ''}{workers}{pinned}"


def _report(data: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Write all that is asked for, and judge."""
    if options.json:
        _write(json.dumps(data, indent=1) + "\n", options.json)
    if options.markdown:
        page = Path(options.markdown)
        _write(placed(markdown(data), page.read_text() if page.is_file() else ""), options.markdown)
    if options.chart:
        _write(chart(data), options.chart)
    if "-" not in (options.json, options.markdown, options.chart):
        print_report(data, _console())
    status = 0
    if options.check and (lines := missed(data)):
        sys.stderr.write("".join(f"missed: {line}\n" for line in lines))
        status = 1
    absent = [f"{cell['name']} by {name}" for cell in data["cells"] for name in cell["not_measured"]]
    if absent:
        sys.stderr.write(f"could not be measured in all rounds: {', '.join(absent)}\n")
        status = 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="pynbd measured beside other servers"
    )
    parser.add_argument(
        "--cells", nargs="+", default=[], metavar="NAME", help="only these cells (all but img-*); shell patterns do"
    )
    parser.add_argument("--list", action="store_true", help="print the names of all cells")
    parser.add_argument(
        "--peers", help=f"of {', '.join(peer.name for peer in PEERS)} ({','.join(DEFAULT_PEERS)} where they take part)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="interleaved rounds over all cells (%(default)s)")
    parser.add_argument("--seconds", type=float, help="length of a measurement (what fits --minutes)")
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (%(default)s)")
    parser.add_argument("--transport", choices=["unix", "tcp"], default="unix", help="(%(default)s)")
    parser.add_argument("--pin", action="store_true", help="servers on processor 0, clients on processor 1")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs pynbd (this one)")
    parser.add_argument("--uvloop", action="store_true", help="run pynbd on uvloop, which that Python must have")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="pynbd serves raw files by so many processes (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=512, metavar="MIB", help="size of the file that is served (%(default)s)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / ".cache" / "benchmarks",
        help="where that file is made (.cache/benchmarks)",
    )
    report = parser.add_argument_group("report", "FILE may be -: standard output, instead of the table")
    report.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    report.add_argument(
        "--markdown", metavar="FILE", help=f"write the table as Markdown; a FILE with {BEGIN} and {END} keeps the rest"
    )
    report.add_argument("--chart", metavar="FILE", help="write a chart of the ratios, always as SVG")
    report.add_argument("--check", action="store_true", help="list the targets that were missed; status 1 if any")
    report.add_argument(
        "--from",
        dest="from_json",
        type=Path,
        metavar="JSON",
        help="measure nothing: report what an earlier run has written by --json",
    )
    return parser


def _require_uvloop(python: str) -> None:
    try:
        run_client(python, "-c", "import uvloop")
    except CommandError:
        raise ValueError(f"{python} has no uvloop (the extra `uvloop` installs it)") from None


def _servers(names: Sequence[str], cells: Sequence[Cell]) -> list[Server]:
    """Pynbd, and those of `names` that take part in any of the cells."""
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise ValueError(f"no server is named {name!r}; there are: {', '.join(known)}")
    missing = [program for program in CLIENTS if shutil.which(program, path=SYSTEM_PATH) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)} (`make packages` installs them)")
    peers = [known[name] for name in names]
    servers = [PYNBD, *(peer for peer in peers if any(peer.takes_part(cell.disk) for cell in cells))]
    for server in servers:
        if server.missing():
            raise ValueError(server.missing())
    return servers


def _weight(cells: Sequence[Cell], servers: Sequence[Server]) -> int:
    """How many measurements a round has."""
    return sum(server.takes_part(cell.disk) for cell in cells for server in servers)


def _write(text: str, where: str) -> None:
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_WITHOUT_TERMINAL)


if __name__ == "__main__":
    sys.exit(main())
