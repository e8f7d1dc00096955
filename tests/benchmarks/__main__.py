"""The command: chooses cells and servers, measures, reports."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.benchmarks.cells import CELLS, Cell, chosen
from tests.benchmarks.disks import Disks
from tests.benchmarks.report import as_data, print_report
from tests.benchmarks.rounds import Plan, Row, Terms, measure
from tests.benchmarks.servers import DEFAULT_PEERS, PEERS, PYNBD, Server, Setup
from tests.peers import ROOT, SYSTEM_PATH

CLIENTS = ("fio", "fincore", "qemu-img", "nbdinfo", "taskset")
"""The programs that the benchmark itself uses."""

LEAST_SIZE_MIB = 256
"""A smaller disk would not hold the areas that the cells use."""

WIDTH_WITHOUT_TERMINAL = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 when every server could be measured."""
    options = _parser().parse_args(arguments)
    if options.list:
        sys.stdout.write("".join(f"{cell.name}\n" for cell in CELLS))
        return 0
    try:
        cells = chosen(options.cells)
        servers = _servers(options.peers.split(","))
    except ValueError as error:
        sys.stderr.write(f"benchmarks: {error}\n")
        return 2
    budget_s = options.minutes * 60
    plan = Plan.within(budget_s, _weight(cells, servers), options.rounds, options.seconds, pin=options.pin)
    options.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.directory))
    disks = Disks(folder, max(options.size, LEAST_SIZE_MIB) << 20)
    setup = Setup(disks, options.transport == "tcp", options.python)
    terms: dict[str, Terms] = {}
    rows: list[Row] = []
    with Console(stderr=True).status("making the disks") as progress:
        try:
            disks.make()
            for cell in cells:
                rows.append(Row(cell))
                measure(rows[-1], servers, setup, plan, terms, progress.update)
        except KeyboardInterrupt:
            progress.console.print("stopped; what was measured until here:")
        finally:
            disks.remove()
    names = [server.name for server in servers]
    about = f"{'TCP loopback' if setup.tcp else 'Unix socket'}, {setup.pynbd_python} for pynbd"
    data = as_data(rows, names, plan, terms, about)
    if options.json:
        _write_json(data, options.json)
    if options.json != "-":
        print_report(data, names, _console())
    return int(any(None in row.samples[name] for row in rows for name in row.samples))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="pynbd measured beside other servers"
    )
    parser.add_argument("--cells", nargs="+", default=[], metavar="NAME", help="only these cells; shell patterns do")
    parser.add_argument("--list", action="store_true", help="print the names of all cells")
    parser.add_argument(
        "--peers", default=",".join(DEFAULT_PEERS), help=f"of {', '.join(peer.name for peer in PEERS)} (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=4, help="interleaved rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, help="length of a measurement (what fits --minutes)")
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (%(default)s)")
    parser.add_argument("--transport", choices=["unix", "tcp"], default="unix", help="(%(default)s)")
    parser.add_argument("--pin", action="store_true", help="servers on processor 0, clients on processor 1")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs pynbd (this one)")
    parser.add_argument(
        "--size", type=int, default=512, metavar="MIB", help="size of the file that is served (%(default)s)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / ".cache" / "benchmarks",
        help="where that file is made (.cache/benchmarks)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - writes them instead of the table")
    return parser


def _servers(names: Sequence[str]) -> list[Server]:
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise ValueError(f"no server is named {name!r}; there are: {', '.join(known)}")
    missing = [program for program in CLIENTS if shutil.which(program, path=SYSTEM_PATH) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)} (`make packages` installs them)")
    servers = [PYNBD, *(known[name] for name in names)]
    for server in servers:
        if server.missing():
            raise ValueError(server.missing())
    return servers


def _weight(cells: Sequence[Cell], servers: Sequence[Server]) -> int:
    """How many measurements a round has."""
    return sum(cell.disk in server.serves for cell in cells for server in servers)


def _write_json(data: object, where: str) -> None:
    text = json.dumps(data, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_WITHOUT_TERMINAL)


if __name__ == "__main__":
    sys.exit(main())
