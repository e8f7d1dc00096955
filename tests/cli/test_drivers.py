"""`pynbd drivers`: the list, one driver's options, and the schema, which must agree with what the graph accepts."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block import registry
from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph, field_names
from pynbd.block.options import parse_size
from pynbd.cli import main
from pynbd.cli.driver_reference import all_drivers, describe, size_text
from pynbd.cli.drivers import table
from pynbd.cli.options_schema import SIZE_TEXT, schema_of

Run = Callable[..., str]

BUILT_IN = sorted(name for name, target in registry.BUILT_IN.items() if target.startswith("pynbd."))
"""Without those that other tests may have registered."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """What `pynbd drivers …` prints."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> str:
        assert main(["drivers", *arguments]) == 0
        return capsys.readouterr().out

    return run


# --- for people ---------------------------------------------------------------------------------------------------


def test_the_list_has_a_line_for_each_driver(run: Run) -> None:
    lines = run().splitlines()
    for name in BUILT_IN:
        assert any(re.match(rf"{name}(, [\w-]+)*  +(storage|format|filter)  +\S", line) for line in lines), name
    assert all(len(line) <= 100 for line in lines)


def test_every_built_in_driver_and_option_is_explained() -> None:
    drivers = [driver for driver in all_drivers() if driver.name in BUILT_IN]
    assert [f"{driver.name}: {o.name}" for driver in drivers for o in driver.options if not o.summary] == []
    assert [driver.name for driver in drivers if not driver.summary or not driver.limits or driver.problem] == []


def test_one_driver(run: Run) -> None:
    text = run("blkdebug")
    assert text.startswith("blkdebug (filter): Fail or hold requests by rule")
    assert re.search(r"^Limits: ", text, re.M)
    assert "URIs: blkdebug:" in text
    assert re.search(r"^  file +data, filtered, also called image$", text, re.M)
    assert re.search(r"^  inject-error\.N\.errno +number +the error.*", text, re.M)
    assert re.search(r"^  inject-error\.N\.event +what brings it into force. \(required\)", text, re.M)
    assert re.search(r"^  cache\.no-flush +on\|off ", text, re.M)


def test_defaults_are_written_as_one_would_write_them(run: Run) -> None:
    assert "a power of two from 512 to 2M. (default 64k)" in " ".join(run("overlay").split())
    assert [size_text(size) for size in (0, 511, 512, 65536, 1 << 20, 3 << 30, 1 << 60)] == [
        *["0", "511", "512", "64k", "1M", "3G", "1E"]
    ]


def test_an_alias_names_the_same_driver(run: Run) -> None:
    assert run("null-co") == run("null")
    assert "Also called null-co, null-aio." in run("null")


def test_a_driver_in_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from pynbd.block.driver import Driver\n"
        'class Mine(Driver):\n    """My own disk."""\n    size = 1\n    async def read(self, offset, into): pass\n'
    )
    assert run(str(path)).startswith("mine (storage): My own disk.")
    schema = json.loads(run(str(path), "--schema"))
    assert schema["$ref"] == "#/$defs/BlockdevOptionsMine"
    assert {"$ref": "#/$defs/BlockdevOptionsMine"} in schema["$defs"]["BlockdevOptions"]["oneOf"]


def test_an_unknown_driver_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drivers", "overlays"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pynbd drivers: driver 'overlays' is unknown (did you mean 'overlay'?)")
    assert captured.err.count("\n") == 1


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """A driver that can't be loaded."""
    monkeypatch.setitem(registry.BUILT_IN, "broken", "pynbd_no_such_module:Broken")
    return "broken"


def test_one_driver_that_cannot_be_loaded_hides_no_other(
    run: Run, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run().splitlines()
    assert any(line.startswith(broken) and "can't be loaded" in line for line in lines)
    assert any(line.startswith("overlay") for line in lines)
    assert main(["drivers", "--schema"]) == 0
    captured = capsys.readouterr()
    assert broken not in json.loads(captured.out)["$defs"]["BlockdevOptions"]["discriminator"]["mapping"]
    assert captured.err.startswith("pynbd drivers: driver 'broken'")
    assert [driver.get("error", "")[:15] for driver in json.loads(run("--json")) if driver["name"] == broken] == [
        "driver 'broken'"
    ]


def test_a_narrow_terminal_wraps_the_last_column_only() -> None:
    lines = table([("name", "kind", "one two three four five six seven eight"), ("other", "k", "")], 12)
    assert lines == ["name   kind  one two three four five six", "             seven eight", "other  k"]


# --- for programs -------------------------------------------------------------------------------------------------


def test_json(run: Run) -> None:
    found = {driver["name"]: driver for driver in json.loads(run("--json"))}
    assert set(BUILT_IN) <= set(found)
    assert json.loads(run("--json", "overlay")) == found["overlay"]
    assert found["overlay"]["children"] == [
        {"name": "file", "aliases": [], "optional": False, "writable": True},
        {"name": "backing", "aliases": [], "optional": False, "writable": False},
    ]
    size = next(option for option in found["overlay"]["options"] if option["name"] == "cluster-size")
    assert (size["kind"], size["default"], size["required"], size["own"]) == ("size", "64k", False, True)


def definitions() -> dict[str, Any]:
    kinds = {name: registry.driver_class(name) for name in BUILT_IN}
    found: dict[str, Any] = json.loads(json.dumps(schema_of(kinds)))["$defs"]
    return found


def test_every_reference_resolves() -> None:
    found = definitions()

    def references(part: object) -> Iterable[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "$ref":
                    yield value
                yield from references(value)
        elif isinstance(part, list):
            for item in part:
                yield from references(item)

    assert {reference.removeprefix("#/$defs/") for reference in references(found)} <= set(found)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_schema_has_exactly_the_options_and_children(name: str) -> None:
    kind = registry.driver_class(name)
    schema = definitions()[f"BlockdevOptions{kind.__name__}"]
    assert set(schema["properties"]) == {*field_names(kind.Options), *kind.children, *kind.child_aliases}
    assert schema["additionalProperties"] is False
    assert name in schema["properties"]["driver"]["enum"]
    for child in (*kind.children, *kind.child_aliases):
        assert schema["properties"][child]["$ref"] == "#/$defs/BlockdevRef"


def valid(value: object, schema: dict[str, Any], defs: dict[str, Any]) -> bool:
    """As much of JSON Schema as these schemas use."""
    checks: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda ref: valid(value, defs[ref.removeprefix("#/$defs/")], defs),
        "anyOf": lambda parts: any(valid(value, part, defs) for part in parts),
        "oneOf": lambda parts: sum(valid(value, part, defs) for part in parts) == 1,
        "allOf": lambda parts: all(valid(value, part, defs) for part in parts),
        "enum": lambda values: value in values,
        "type": lambda name: is_of_type(value, name),
        "minimum": lambda least: not is_number(value) or value >= least,
        "maximum": lambda most: not is_number(value) or value <= most,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "items": lambda part: not isinstance(value, list) or all(valid(item, part, defs) for item in value),
        "required": lambda names: not isinstance(value, dict) or set(names) <= set(value),
        "properties": lambda parts: (
            not isinstance(value, dict)
            or all(valid(item, parts[key], defs) for key, item in value.items() if key in parts)
        ),
        "additionalProperties": lambda more: (
            more is not False or not isinstance(value, dict) or set(value) <= set(schema["properties"])
        ),
    }
    notes = {"description", "title", "default", "discriminator"}
    assert set(schema) <= set(checks) | notes, f"a keyword that this test does not know: {set(schema) - set(checks)}"
    return all(check(schema[keyword]) for keyword, check in checks.items() if keyword in schema)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_of_type(value: object, name: str) -> bool:
    if name in ("integer", "number"):
        return is_number(value) and (name == "number" or isinstance(value, int))
    return isinstance(value, {"object": dict, "string": str, "boolean": bool, "array": list, "null": type(None)}[name])


FILE = {"driver": "file", "filename": "x"}

TREES: list[tuple[dict[str, Any], bool]] = [
    ({"driver": "file", "filename": "x"}, True),
    ({"driver": "file"}, False),
    ({"filename": "x"}, False),
    ({"driver": "file", "filename": "x", "locking": "maybe"}, False),
    ({"driver": "file", "filename": "x", "cache": {"direct": True, "no-flush": "off"}}, True),
    ({"driver": "file", "filename": "x", "cache": {"indirect": True}}, False),
    ({"driver": "raw", "file": FILE, "size": 512}, True),
    ({"driver": "raw", "file": FILE, "size": "1.5G", "read-only": "on"}, True),
    ({"driver": "raw", "file": FILE, "size": "big"}, False),
    ({"driver": "raw", "file": FILE, "size": -1}, False),
    ({"driver": "raw", "file": FILE, "read-only": "perhaps"}, False),
    ({"driver": "raw", "file": "some-node"}, True),
    ({"driver": "raw"}, False),
    ({"driver": "raw", "file": {"driver": "raw", "file": {"driver": "nosuch"}}}, False),
    ({"driver": "null-co", "size": "1M"}, True),
    ({"driver": "memory"}, False),
    ({"driver": "blkdebug", "image": FILE}, True),
    ({"driver": "blkdebug", "file": FILE}, True),
    ({"driver": "blkdebug", "file": FILE, "image": FILE}, False),
    ({"driver": "blkdebug", "image": FILE, "inject-error": [{"event": "read_aio", "errno": 5, "once": "on"}]}, True),
    ({"driver": "blkdebug", "image": FILE, "inject-error": [{"event": "read"}]}, False),
    ({"driver": "blkdebug", "image": FILE, "set-state": [{"event": "none"}]}, False),
    ({"driver": "delay", "file": FILE, "read": "50ms", "write": 0.5}, True),
    ({"driver": "delay", "file": FILE, "read": [1]}, False),
    ({"driver": "overlay", "file": FILE, "backing": FILE, "cluster-size": "64k"}, True),
    ({"driver": "overlay", "file": FILE}, False),
    ({"driver": "nbd", "server": {"type": "unix", "path": "s"}}, True),
    ({"driver": "nbd", "server": {"type": "carrier pigeon"}}, False),
    ({"driver": "nofilter", "file": FILE, "speed": 1}, False),
]


@pytest.mark.parametrize(("tree", "right"), TREES, ids=lambda value: json.dumps(value)[:60])
def test_schema_and_graph_agree(tree: dict[str, Any], right: bool) -> None:
    defs = definitions()
    assert valid(tree, defs["BlockdevOptions"], defs) is right
    if right:
        Graph().check(tree, known=["some-node"])
    else:
        with pytest.raises(OptionError):
            Graph().check(tree, known=["some-node"])


@given(st.from_regex(SIZE_TEXT["pattern"], fullmatch=True) | st.text("0123456789.xkMGb ", max_size=8))
def test_the_schema_s_sizes_are_the_options_own(text: str) -> None:
    """What is out of range, or part of a byte, no pattern can tell."""
    try:
        parse_size(text)
    except OptionError as problem:
        told = str(problem)
        right = "is out of range" in told or "parts of bytes" in told
    else:
        right = True
    assert valid(text, SIZE_TEXT, {}) == right


def test_facts_come_from_the_class_itself() -> None:
    facts = describe(registry.driver_class("delay"))
    assert facts.limits.startswith("it does not bound the bandwidth")
    assert [option.name for option in facts.options if option.own][:3] == ["read", "write", "zero"]
