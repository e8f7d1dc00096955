"""Drivers are found by name, and only there where a person named them does a name run code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pynbd.block import registry
from pynbd.block.driver import Driver, Filter
from pynbd.block.errors import OptionError
from tests.block import drivers

DRIVER = "from pynbd.block.driver import Driver, Filter\n"


@pytest.mark.parametrize("name", [name for name in registry.BUILT_IN if name not in drivers.NAMES])
def test_built_in_drivers_go_by_their_names(name: str) -> None:
    kind = registry.driver_class(name)
    assert kind.name == name
    assert kind.Options.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize(("alias", "name"), registry.ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    assert registry.driver_class(alias) is registry.driver_class(name)


@pytest.mark.parametrize(("scheme", "name"), registry.SCHEMES.items())
def test_schemes_belong_to_drivers_that_know_them(scheme: str, name: str) -> None:
    assert scheme in registry.driver_class(name).schemes


def test_every_scheme_of_a_built_in_driver_is_listed() -> None:
    for name in registry.BUILT_IN:
        for scheme in registry.driver_class(name).schemes:
            assert registry.SCHEMES[scheme] == name


def test_lists() -> None:
    names = list(registry.all_names())
    assert names == sorted(set(names))
    assert {"file", "raw", "memory", "watcher"} <= set(names)
    filters = registry.filter_names()
    assert {"delay", "nofilter", "blkdebug", "watcher"} <= set(filters)
    assert "raw" not in filters
    assert all(issubclass(registry.driver_class(name), Filter) for name in filters)


def test_an_unknown_name() -> None:
    with pytest.raises(OptionError, match=r"driver 'memroy' is unknown \(did you mean 'memory'\?\); there are: .*raw"):
        registry.driver_class("memroy")
    with pytest.raises(OptionError, match="driver 'xyzzy' is unknown; there are: "):
        registry.driver_class("xyzzy")


def test_what_an_image_may_name() -> None:
    for name in registry.BUILT_IN.keys() | registry.ALIASES.keys():
        if registry.ALIASES.get(name, name) in registry.IMAGE_ALLOW_LIST:
            assert registry.driver_class(name, trusted=False)
        else:
            with pytest.raises(OptionError, match="can't be named inside an image"):
                registry.driver_class(name, trusted=False)
    assert not registry.IMAGE_ALLOW_LIST - registry.BUILT_IN.keys()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no.such.module:X", "can't be loaded: No module named 'no"),
        ("pynbd.block.driver:Nothing", "can't be loaded: module 'pynbd.block.driver' has no attribute 'Nothing'"),
        ("pynbd.block.driver:Location", "is no pynbd.Driver"),
        ("pynbd.block.driver:FILTERED_CHILD", "is no pynbd.Driver"),
    ],
)
def test_what_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch, target: str, said: str) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "wrong", target)
    with pytest.raises(OptionError, match=said):
        registry.driver_class("wrong")


# --- files ----------------------------------------------------------------------------------------------------


def test_names_of_files() -> None:
    assert registry.is_python_file("x.py")
    assert registry.is_python_file("./a/x.py:Class")
    assert not registry.is_python_file("x.pyc")
    assert not registry.is_python_file("raw")
    assert not registry.is_python_file("x.py.raw")


def test_a_file_is_run_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(DRIVER + "class Mine(Driver): size = 5\n")
    kind = registry.driver_class(str(path))
    assert issubclass(kind, Driver)
    assert kind.size == 5
    assert kind.name == "mine"
    assert registry.driver_class(f"{path}:Mine") is kind
    assert registry.driver_class(str(tmp_path / "." / "mine.py")) is kind


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "mine.py: no such file"),
        ("x = 1", "mine.py: expected one Driver class, found none"),
        (DRIVER, "mine.py: expected one Driver class, found none"),
        (
            DRIVER + "class A(Driver): ...\nclass B(Filter): ...",
            r"expected one Driver class, found A, B \(say .*:CLASS\)",
        ),
        ("\n\n1/0", "mine.py:3: ZeroDivisionError: division by zero"),
        ("\n\ndef f(:", r"mine\.py:3: SyntaxError"),
        ("import json\n\njson.loads('{')", r"mine\.py:3: JSONDecodeError"),
        ("import json\ndef f():\n    json.loads('{')\n\nf()", r"mine\.py:3: JSONDecodeError"),
        ("x = '\0'", r"mine\.py: \w+Error: source code string cannot contain null bytes"),
        ("import no_such_module_at_all", "mine.py:1: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", "mine.py:1: SystemExit: 3"),
    ],
)
def test_wrong_files(tmp_path: Path, code: str | None, said: str) -> None:
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code)
    before = set(sys.modules)
    with pytest.raises(OptionError, match=said):
        registry.driver_class(str(path))
    if "Driver class" not in said:
        assert set(sys.modules) == before, "nothing half-made stays behind"


def test_a_class_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(DRIVER + "class Mine(Driver): size = 5\n")
    with pytest.raises(OptionError, match=r"mine.py: no Driver class 'Yours'; found: Mine"):
        registry.driver_class(f"{path}:Yours")
