"""nbd_protocol is sans-I/O: proved by what it imports, in the source and at run time."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nbd_protocol

FORBIDDEN = ("asyncio", "socket", "logging", "pynbd", "ssl", "select", "selectors", "threading", "time")
ALLOWED = {
    "__future__",
    "abc",
    "bisect",
    "collections",
    "construct",
    "dataclasses",
    "difflib",
    "enum",
    "errno",
    "functools",
    "io",
}
ALLOWED |= {"ipaddress", "itertools", "math", "msgspec", "nbd_protocol", "operator", "re", "string", "struct", "types"}
ALLOWED |= {"typing", "urllib"}

PACKAGE = Path(nbd_protocol.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_packages(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_only_what_a_sans_io_library_needs(path: Path) -> None:
    assert imported_packages(path.read_text()) <= ALLOWED


def test_forbidden_modules_are_not_allowed() -> None:
    assert not ALLOWED & set(FORBIDDEN)


def test_no_module_pulls_in_an_event_loop_or_the_server() -> None:
    """In a fresh interpreter, since here everything is loaded already.

    construct and msgspec import what they like; so what they bring alone is taken off.
    """
    names = [f"nbd_protocol.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE)])]
    code = f"""
import sys, construct, msgspec, urllib.parse, ipaddress, re
before = set(sys.modules)
import importlib
for name in {names!r}:
    importlib.import_module(name)
print(*sorted(set(sys.modules) - before))
"""
    completed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    brought = {name.partition(".")[0] for name in completed.stdout.split()}
    assert "nbd_protocol" in brought
    assert not brought & set(FORBIDDEN)
