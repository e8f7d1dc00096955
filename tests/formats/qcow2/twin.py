"""Two folders with the same disks, in which pynbd and QEMU do the same: what they do, and how it is compared.

Operations are drawn as small numbers (`OPERATIONS`) that mean something only beside a disk as it is then: an offset is
taken modulo its size, a snapshot by its place in the list. So any list of them can be carried out, and made shorter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.driver import Qcow2
from tests.cli.img.side_by_side import Ending, img, qemu_img
from tests.formats.qcow2.dirty_extents import dirty
from tests.formats.qcow2.workload import COMPRESSED, UNMAP, in_file
from tests.peers import require_tool, run

DISK, SMALLER, LARGER = "disk.qcow2", "smaller.qcow2", "larger.qcow2"
"""The image, and what may lie below it."""

SIZE = 200 << 10
MAX_SIZE = 600 << 10
SNAPSHOTS = 3
BITMAPS = ("b0", "b1")
NOISE = random.Random(7).randbytes(3 << 10)
"""What does not compress."""

SECTOR = 512


class Request(NamedTuple):
    """One request to the disk."""

    kind: str
    offset: int
    length: int
    byte: int

    def for_qemu_io(self) -> str:
        """The same as a command of qemu-io."""
        where = f"{self.offset} {self.length}"
        return {
            "write": f"write -P {self.byte} {where}",
            "noise": f"write -s noise {where}",
            "compressed": f"write -c -P {self.byte} {where}",
            "compressed noise": f"write -c -s noise {where}",
            "zero": f"write -z {where}",
            "unmap": f"write -z -u {where}",
            "discard": f"discard {where}",
        }[self.kind]

    async def carry_out(self, backend: BlockBackend) -> None:
        """Make it here."""
        length = self.length
        if self.kind == "discard":
            await backend.discard(self.offset, length)
        elif self.kind in ("zero", "unmap"):
            await backend.write_zeroes(self.offset, length, UNMAP if self.kind == "unmap" else 0)
        else:
            noise = (NOISE * (length // len(NOISE) + 1))[:length]
            data = noise if "noise" in self.kind else bytes([self.byte]) * length
            await backend.write(self.offset, memoryview(data), COMPRESSED if "compressed" in self.kind else 0)


class State(NamedTuple):
    """What an operation is to know of the disk."""

    size: int
    cluster: int
    snapshots: list[str]
    bitmaps: list[str]
    version: str
    refcount_bits: int
    backing: str


KINDS = ("write", "write", "noise", "compressed", "compressed noise", "zero", "unmap", "discard")
REQUEST = st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 20), st.integers(0, 4), st.integers(0, 3))
NUMBER = st.integers(0, 7)
OTHERS = {
    "snapshot": ("create", "create", "apply", "apply", "delete"),
    "bitmap": ("--add", "--add", "--remove", "--clear", "--enable", "--disable", "--merge"),
    "resize": ("grow", "grow", "shrink"),
    "rebase": ("safe", "safe", "unsafe"),
    "commit": ("commit", "commit -d"),
    "amend": ("compat=1.1", "compat=0.10", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=16"),
}
OPERATIONS = st.one_of(
    st.lists(REQUEST, min_size=1, max_size=8),
    st.lists(REQUEST, min_size=1, max_size=8),
    *(st.tuples(st.just(verb), st.sampled_from(kinds), NUMBER, NUMBER) for verb, kinds in OTHERS.items()),
)
"""One: requests to the disk while it is open once, or what a verb does."""


def request(drawn: tuple[str, int, int, int], state: State) -> Request:
    """What is drawn, inside the disk."""
    kind, at, length, byte = drawn
    cluster = state.cluster
    # Unaligned as often as not; qemu-io compresses whole sectors only.
    unit = (cluster, SECTOR, 1)[at % 3]
    if "compressed" in kind:
        unit = (cluster, cluster, SECTOR)[at % 3]
    if kind == "discard" and state.bitmaps:
        unit = cluster  # for QEMU, what is discarded in part is dirty, though it stays
    offset = at // 3 % state.size // unit * unit
    wanted = (unit, cluster, 3 * cluster, max(cluster // 2, SECTOR), 37 * unit)[length]
    end = min(offset + max(wanted, unit), state.size)
    return Request(kind, offset, end - offset, byte)


def words(drawn: tuple[str, str, int, int], state: State) -> tuple[str, ...] | None:
    """The words of a verb for what is drawn; None where it makes no sense."""
    verb, kind, first, second = drawn
    if verb == "snapshot":
        return _snapshot_words(kind, first, state)
    if verb == "bitmap":
        extra = {"--add": (), "--merge": (BITMAPS[second % 2],)}.get(kind, ())
        if kind == "--add" and second:
            extra = ("-g", ("512", "4k", "128k")[second % 3])
        return ("bitmap", kind, *extra, DISK, BITMAPS[first % 2])
    if verb == "resize":
        by = (first + 1) * (512, 4096, 24 << 10)[second % 3]
        # QEMU leaves what was on the rest of the last cluster for a disk that grows again.
        smaller = max((state.size - by) // state.cluster, 1) * state.cluster
        size = state.size + by if kind == "grow" else min(smaller, state.size)
        # In an image of compat 0.10 it can't hide what lies below, and fails.
        if kind == "grow" and state.version == "0.10" and state.backing:
            return None
        return ("resize", "--shrink", "-f", "qcow2", DISK, str(size)) if size <= MAX_SIZE else None
    if verb == "rebase":
        below = (("", ""), (SMALLER, "qcow2"), (LARGER, "qcow2"))[first % 3]
        other = ("-b", below[0], "-F", below[1]) if below[0] else ("-b", "")
        # QEMU lets the new file show where an image that can't note zeroes had none below it.
        if kind == "safe" and state.version == "0.10" and not state.backing and below[0]:
            return None
        return ("rebase", *(("-u",) if kind == "unsafe" else ()), *other, "-f", "qcow2", DISK)
    if verb == "commit":
        return ("commit", "-q", *(("-d",) if kind == "commit -d" else ()), "-f", "qcow2", DISK)
    # QEMU leaves bitmaps in an image of compat 0.10, and warns of them from then on.
    if kind == "compat=0.10" and state.bitmaps:
        return None
    return ("amend", "-q", "-o", kind, "-f", "qcow2", DISK)


def _snapshot_words(kind: str, number: int, state: State) -> tuple[str, ...] | None:
    if kind == "create":
        # Where counts can't be raised, QEMU fails, and leaves clusters that leak.
        if len(state.snapshots) == SNAPSHOTS or state.refcount_bits == 1:
            return None
        name = next(f"s{n}" for n in range(SNAPSHOTS) if f"s{n}" not in state.snapshots)
        return ("snapshot", "-c", name, DISK)
    if not state.snapshots:
        return None
    # QEMU applies no snapshot while there are bitmaps.
    if kind == "apply" and state.bitmaps:
        return None
    return ("snapshot", "-a" if kind == "apply" else "-d", state.snapshots[number % len(state.snapshots)], DISK)


# --- the two who do it --------------------------------------------------------------------------------------------


def verb_by_pynbd(arguments: Sequence[str]) -> Ending:
    """`pynbd img …`, in this process."""
    return img(*arguments)


def requests_by_pynbd(requests: Sequence[Request]) -> list[bool | None]:
    """Whether each request went well; None if it was not made, since QEMU can't."""
    return asyncio.run(_requests_by_pynbd(requests))


async def _requests_by_pynbd(requests: Sequence[Request]) -> list[bool | None]:
    graph, backend, went = Graph(), BlockBackend("twin"), list[bool | None]()
    node = await graph.open(in_file(Path(DISK), discard="unmap"))
    graph.attach(backend, node, Permission.ALL & ~Permission.RESIZE)
    for request in requests:
        if await _is_done_otherwise(cast(Qcow2, node.driver), request):
            went.append(None)
            continue
        try:
            await request.carry_out(backend)
            went.append(True)
        except (OSError, BlockError):
            went.append(False)
    graph.detach(backend)
    await graph.close_all()
    return went


async def _is_done_otherwise(driver: Qcow2, request: Request) -> bool:
    """Whether pynbd does more than QEMU.

    QEMU compresses no clusters that hold data already (which may be zeroes; see `Twins.is_loose`). Where it can't make
    subclusters zero, for they are parts of a compressed cluster, it writes all of the request as data.
    """
    cluster, end = driver.header.cluster_size, request.offset + request.length
    packs = "compressed" in request.kind
    zeroes = driver.header.extended_l2 and request.kind in ("zero", "unmap")
    for start in range(request.offset // cluster * cluster, end, cluster):
        entry, bitmap = await driver.map.entry(start)
        if packs and (entry or bitmap):
            return True
        if zeroes and entry & layout.COMPRESSED:
            return True
    return False


def requests_by_qemu(requests: Sequence[Request]) -> list[bool]:
    """The same by qemu-io, all in one process."""
    if not requests:
        return []
    commands = [word for request in requests for word in ("-c", request.for_qemu_io())]
    program = require_tool("qemu-io", package="qemu-utils")
    done = subprocess.run([program, "-f", "qcow2", *commands, DISK], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done
    # It says a line or two for each that went well, and one for each that did not.
    said = [line for line in (done.stdout + done.stderr).splitlines() if " ops; " not in line]
    assert len(said) == len(requests), said
    return [" failed: " not in line for line in said]


# --- the two folders ----------------------------------------------------------------------------------------------


class Twins:
    """Two folders with the same disks.

    Args:
        folder: where they are made.
        options: of the image.
        backing: its backing file, if it has one.
    """

    def __init__(self, folder: Path, options: str, backing: str) -> None:
        self.ours, self.theirs = folder / "one", folder / "two"
        self.is_loose = False
        """Zeroes may lie in clusters or not: `commit` and `rebase` find those that QEMU copies as data."""
        self.bitmaps_are_loose = False
        """`rebase` has written what is not allocated, which was not the same in both."""
        self.done: list[str] = []
        """What was done, for whoever looks at a failure."""
        self.ours.mkdir()
        with contextlib.chdir(self.ours):
            Path("noise").write_bytes(NOISE)
            _must(qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", SMALLER, str(SIZE // 2)))
            _must(qemu_img("create", "-q", "-f", "qcow2", LARGER, str(SIZE * 2)))
            qemu_io = require_tool("qemu-io", package="qemu-utils")
            run(qemu_io, "-c", "write -P 77 64k 64k", "-c", "write -P 78 192k 64k", LARGER)
            run(qemu_io, "-c", "write -P 79 8k 52k", "-c", "write -P 80 92k 8k", SMALLER)
            extra = ["-b", backing, "-F", "qcow2"] if backing else []
            _must(qemu_img("create", "-q", "-f", "qcow2", "-o", options, *extra, DISK, str(SIZE)))
        shutil.copytree(self.ours, self.theirs)
        with contextlib.chdir(self.theirs):
            # Two images may not keep their data in one file.
            _must(qemu_img("create", "-q", "-f", "qcow2", "-o", options, *extra, DISK, str(SIZE)))

    def swap(self) -> None:
        """Let each go on with what the other one made."""
        self.ours, self.theirs = self.theirs, self.ours
        self.done.append("swap")

    def carry_out(self, operation: Any) -> None:
        """One operation in both folders; it must end alike."""
        with contextlib.chdir(self.ours):
            state = _state()
        if isinstance(operation, list):
            # QEMU 7.2 puts compressed data where others were given up, though somebody else may have taken the cluster.
            requests = [request(drawn, state) for drawn in operation]
            requests.sort(key=lambda one: "compressed" not in one.kind)
            self.done += [line.for_qemu_io() for line in requests]
            with contextlib.chdir(self.ours):
                ours = requests_by_pynbd(requests)
            with contextlib.chdir(self.theirs):
                theirs = requests_by_qemu([one for one, went in zip(requests, ours, strict=True) if went is not None])
            assert [went for went in ours if went is not None] == theirs, self.story(ours, theirs)
            return
        verb = words(operation, state)
        if verb is None:
            return
        self.done.append(" ".join(verb))
        with contextlib.chdir(self.ours):
            mine = verb_by_pynbd(verb)
        with contextlib.chdir(self.theirs):
            other = qemu_img(*verb)
        assert (mine.status, bool(mine.err)) == (other.status, bool(other.err)), self.story(mine, other)
        self.bitmaps_are_loose |= self.is_loose and verb[0] == "rebase"
        self.is_loose |= verb[0] in ("commit", "rebase")
        if mine.status:
            self.done[-1] += "  # fails"

    def story(self, *more: Any) -> str:
        """What was done, and what came of it."""
        return "\n".join([*self.done, *map(str, more)])

    def compare(self) -> None:
        """What is in both folders is alike, whoever looks at it."""
        found = []
        for folder in (self.ours, self.theirs):
            with contextlib.chdir(folder):
                facts = _facts()
            if self.is_loose:
                facts["map"] = _by_content(facts["map"], facts["disk"])
                del facts["check"]
            if self.bitmaps_are_loose:
                facts["bitmaps"] = {name: how[:-1] for name, how in facts["bitmaps"].items()}
            found.append(facts)
        for name, fact in found[0].items():
            assert fact == found[1][name], self.story(name, _difference(fact, found[1][name]))
        first, second = (_image_options(folder) for folder in (self.ours, self.theirs))
        _must(qemu_img("compare", "--image-opts", first, second))
        _must(qemu_img("compare", "--image-opts", second, first))


def _image_options(folder: Path) -> str:
    """The image of a folder for whoever is elsewhere: QEMU looks for a data file where it was started."""
    data_file = folder / "data.raw"
    options = f"driver=qcow2,file.driver=file,file.filename={folder / DISK}"
    return f"{options},data-file.driver=file,data-file.filename={data_file}" if data_file.exists() else options


def _must(ending: Ending) -> str:
    assert (ending.status, ending.err) == (0, ""), ending
    return ending.out


def _difference(first: Any, second: Any) -> str:
    if isinstance(first, bytes) and isinstance(second, bytes):
        at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), -1)
        return f"{len(first)} and {len(second)} bytes, first difference at {at}"
    return f"{first}\n{second}"


def _info() -> dict[str, Any]:
    told = json.loads(_must(img("info", "--output=json", DISK)))
    assert isinstance(told, dict)
    return told


def _state() -> State:
    told = _info()
    return State(
        told["virtual-size"],
        told["cluster-size"],
        [snapshot["name"] for snapshot in told.get("snapshots", [])],
        [bitmap["name"] for bitmap in told["format-specific"]["data"].get("bitmaps", [])],
        told["format-specific"]["data"]["compat"],
        told["format-specific"]["data"]["refcount-bits"],
        told.get("backing-filename", ""),
    )


# --- what is found in a folder ------------------------------------------------------------------------------------


def _facts() -> dict[str, Any]:
    """All that must be alike in both, each thing under its name; both tools must agree on all of it."""
    contents = asyncio.run(_contents())
    _must(qemu_img("convert", "-O", "raw", DISK, "read.raw"))
    read = Path("read.raw").read_bytes()
    Path("read.raw").unlink()
    assert read == contents["disk"], _difference(read, contents["disk"])
    facts: dict[str, Any] = dict(contents)
    told = json.loads(_must(qemu_img("info", "--output=json", DISK)))
    # Of what a data file takes, QEMU tells nothing.
    same = ("actual-size",) if "data-file" in told["format-specific"]["data"] else ()
    assert dict(_without(told, same)) == dict(_without(_info(), same))
    # Either may take space for the image in its own way; QEMU gives each snapshot a count of instructions, 0.
    facts["info"] = dict(_without(told, ("actual-size", "date-sec", "date-nsec", "icount")))
    where = json.loads(_must(qemu_img("map", "--output=json", DISK)))
    # QEMU does not ask a data file for holes.
    holes = not same
    assert _plain(where, holes=holes) == _plain(json.loads(_must(img("map", "--output=json", DISK))), holes=holes)
    facts["map"] = _plain(
        [dict(_without(extent, ("offset",))) for extent in where],
    )
    checked = _must(qemu_img("check", "--output=json", DISK))
    assert checked == _must(img("check", "--output=json", DISK))
    counts = json.loads(checked)
    facts["check"] = {name: counts.get(name, 0) for name in ("allocated-clusters", "compressed-clusters")}
    return facts


def _plain(extents: list[dict[str, Any]], *, holes: bool = False) -> list[dict[str, Any]]:
    """A map with extents that are alike made one, and without what differs.

    QEMU tells where clusters lie that count as zeroes, whatever is there.

    Args:
        extents: the map.
        holes: keep what it tells of holes in files, which depends on who wrote them.
    """
    found: list[dict[str, Any]] = []
    for extent in extents:
        extent = dict(extent, zero=extent["zero"] and (holes or not extent["data"]))
        if not extent["data"]:
            extent.pop("offset", None)
        if found and _continues(found[-1], extent):
            found[-1]["length"] += extent["length"]
        else:
            found.append(extent)
    return found


def _by_content(extents: list[dict[str, Any]], content: bytes) -> list[tuple[int, int, bool]]:
    """(offset, depth, whether it is data) of each sector, where zeroes are zeroes whatever they lie in."""
    return [
        (at, extent["depth"], extent["data"] and any(content[at : at + SECTOR]))
        for extent in extents
        for at in range(extent["start"], extent["start"] + extent["length"], SECTOR)
    ]


def _continues(first: dict[str, Any], second: dict[str, Any]) -> bool:
    alike = all(first.get(name) == second.get(name) for name in ("depth", "present", "zero", "data"))
    expected = first["offset"] + first["length"] if "offset" in first else None
    return alike and second.get("offset") == expected


def _without(facts: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if name == "snapshots":
            yield name, [dict(_without(snapshot, names)) for snapshot in value]
        elif name not in names:
            yield name, value


async def _contents() -> dict[str, Any]:
    """What pynbd finds on the disk, in its snapshots and in its bitmaps, and on the disks below."""
    graph = Graph()
    found: dict[str, Any] = {}
    node = await graph.open(in_file(Path(DISK), **{"read-only": True}))
    nodes = {"disk": node}
    for snapshot in node.driver.snapshot_list():  # type: ignore[attr-defined]  # a qcow2 image has them
        shown = {"driver": "qcow2-snapshot", "snapshot": snapshot.id, "file": node}
        nodes[f"snapshot {snapshot.name}"] = await graph.open(shown)
    for name in (SMALLER, LARGER):
        nodes[name] = await graph.open(in_file(Path(name), **{"read-only": True}))
    for name, opened in nodes.items():
        data = bytearray(opened.size)
        await opened.path.read(0, memoryview(data), 0)
        found[name] = bytes(data)
    found["bitmaps"] = {
        bitmap.name: (bitmap.granularity, bitmap.enabled, bitmap.size, dirty(bitmap))
        for bitmap in node.bitmaps.values()
    }
    await graph.close_all()
    return found
