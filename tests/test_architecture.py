"""Imports point one way, and the wire knows nothing of sockets.

Decided by reading every file's syntax tree, so that imports inside functions and under TYPE_CHECKING count as well.

    cli → control → server, jobs → filters, formats, storage → crypto → block
    server, storage/nbd → nbd_protocol (and cli, control, which stand above the server: `pynbd info` speaks as a client)
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import ROOT

BUILT_ON = {
    "cli": {"control", "server", "jobs", "filters", "formats", "storage", "crypto", "block"},
    "control": {"server", "jobs", "filters", "formats", "storage", "crypto", "block"},
    "server": {"filters", "formats", "storage", "crypto", "block"},
    "jobs": {"filters", "formats", "storage", "crypto", "block"},
    "filters": {"crypto", "block"},
    "formats": {"crypto", "block"},
    "storage": {"crypto", "block"},
    "crypto": {"block"},
    "block": set[str](),
}
"""The parts of pynbd, and the other parts that each may import."""

DRIVER_PARTS = {"filters", "formats", "storage"}
"""The parts that hold drivers. `block` finds them by name in its registry, never by an import."""

SPEAKS_NBD = {"server", "cli", "control"}
"""The parts that may import nbd_protocol, beside the driver `storage.nbd`."""

SANS_IO = {"asyncio", "concurrent", "logging", "multiprocessing", "threading"} | (
    {"_socket", "_ssl", "select", "selectors", "socket", "socketserver", "ssl"}
    | {"fcntl", "os", "pathlib", "shutil", "signal", "subprocess", "tempfile"}
    | {"pynbd"}
)
"""What a sans-I/O library has no use for."""

PROTOCOL_MAY_USE = {"construct", "msgspec", "nbd_protocol"}
"""All that nbd_protocol imports from outside the standard library."""


def imports_of(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, absolute, with the line. `from a import b` names both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def files_of(folder: Path) -> list[tuple[Path, str]]:
    """Every Python file under `folder` with the name of the package it is in."""
    return [
        (path, ".".join(path.parent.relative_to(folder.parent).parts))
        for path in sorted(folder.rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


def _violations(root: Path) -> list[str]:
    found = []
    for path, package in files_of(root / "pynbd"):
        part = package.split(".")[1] if "." in package else ""
        for line, module in imports_of(path, package):
            reason = _why_pynbd_may_not(path, part, module)
            if reason:
                found.append(f"{path.relative_to(root)}:{line}: {reason}")
    for path, package in files_of(root / "protocol" / "nbd_protocol"):
        for line, module in imports_of(path, package):
            top = module.split(".")[0]
            if top in SANS_IO or (top not in sys.stdlib_module_names and top not in PROTOCOL_MAY_USE):
                found.append(f"{path.relative_to(root)}:{line}: nbd_protocol imports {module}")
    return sorted(set(found))


def _why_pynbd_may_not(path: Path, part: str, module: str) -> str:
    words = module.split(".")
    if words[0] == "tests":
        return "pynbd imports its tests"
    if words[0] == "nbd_protocol" and part and part not in SPEAKS_NBD and not _is_nbd_driver(path, part):
        return f"{part} imports {module}"
    if words[0] != "pynbd" or len(words) == 1 or not part:
        return ""
    target = words[1]
    if target in BUILT_ON and target != part and target not in BUILT_ON[part]:
        return f"{part} imports {module}"
    return ""


def _is_nbd_driver(path: Path, part: str) -> bool:
    # storage/nbd.py, or storage/nbd/ and storage/nbd_….py where it grows
    return part == "storage" and any(name == "nbd" or name.startswith("nbd_") for name in (path.stem, path.parent.name))


def test_imports_point_one_way() -> None:
    """No file of the tree imports against the arrows."""
    assert _violations(ROOT) == []


def test_every_part_has_its_arrows() -> None:
    """A new folder of pynbd takes its place in the order before anything imports it."""
    parts = {path.parent.name for path in (ROOT / "pynbd").glob("*/*.py")}
    assert parts <= set(BUILT_ON)


def test_block_reaches_no_driver() -> None:
    """The arrows leave no way from `block` to a driver, whatever else is changed in the table."""
    assert not BUILT_ON["block"] & DRIVER_PARTS
    for part in DRIVER_PARTS:
        assert not BUILT_ON[part] & DRIVER_PARTS


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("pynbd/block/x.py", "import pynbd.storage.file", "block imports pynbd.storage.file"),
        ("pynbd/block/x.py", "from pynbd import storage", "block imports pynbd.storage"),
        ("pynbd/block/x.py", "from .. import formats", "block imports pynbd.formats"),
        ("pynbd/block/x.py", "from ..storage.file import File", "block imports pynbd.storage.file"),
        ("pynbd/block/x.py", "def f():\n    import nbd_protocol", "block imports nbd_protocol"),
        (
            "pynbd/block/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pynbd.server",
            "block imports",
        ),
        ("pynbd/storage/file.py", "import nbd_protocol.uri", "storage imports nbd_protocol.uri"),
        ("pynbd/storage/nbd.py", "import pynbd.server.export", "storage imports pynbd.server.export"),
        ("pynbd/formats/qcow2/x.py", "from ...filters import delay", "formats imports pynbd.filters"),
        ("pynbd/server/x.py", "import pynbd.cli", "server imports pynbd.cli"),
        ("pynbd/server/x.py", "import tests.peers", "pynbd imports its tests"),
        ("protocol/nbd_protocol/x.py", "import asyncio", "nbd_protocol imports asyncio"),
        ("protocol/nbd_protocol/x.py", "from pynbd.block import node", "nbd_protocol imports pynbd.block"),
        ("protocol/nbd_protocol/x.py", "import rich", "nbd_protocol imports rich"),
    ],
)
def test_wrong_imports_are_seen(tmp_path: Path, path: str, source: str, said: str) -> None:
    """Each kind of import against the arrows is found, however it is written."""
    _write(tmp_path, path, source)
    assert any(said in line for line in _violations(tmp_path)), _violations(tmp_path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pynbd/storage/nbd.py", "import nbd_protocol.codec\nfrom ..block import driver"),
        ("pynbd/server/connection.py", "from nbd_protocol import codec\nfrom pynbd.block.node import Node"),
        ("pynbd/cli/serve.py", "import pynbd.server\nimport pynbd.block"),
        ("protocol/nbd_protocol/codec.py", "import struct, enum, construct, msgspec\nfrom . import messages"),
    ],
)
def test_right_imports_are_left_alone(tmp_path: Path, path: str, source: str) -> None:
    """Imports along the arrows are no finding."""
    _write(tmp_path, path, source)
    assert _violations(tmp_path) == []


def _write(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(source + "\n")
