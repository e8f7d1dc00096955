"""docs/drivers.md and docs/options.md against the drivers themselves."""

import re

import pytest

from pynbd.block import registry
from pynbd.block.graph import Graph
from pynbd.cli.driver_reference import describe
from tests.peers import ROOT

BUILT_IN = sorted(name for name, target in registry.BUILT_IN.items() if target.startswith("pynbd."))

DRIVERS = (ROOT / "docs" / "drivers.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()

SECTIONS = {
    title: text
    for title, text in re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", DRIVERS, re.M | re.S)
    if title in BUILT_IN
}


def test_every_driver_has_a_section_that_begins_with_its_limits() -> None:
    assert sorted(SECTIONS) == BUILT_IN
    assert [name for name, text in SECTIONS.items() if not text.startswith("\n**Limits:** ")] == []
    assert [name for name in BUILT_IN if f"[{name}](#{name})" not in DRIVERS] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_of_a_driver_is_in_its_section(name: str) -> None:
    facts = describe(registry.driver_class(name))
    text = SECTIONS["file"] if name == "host_device" else SECTIONS[name]
    words = [option.name.rpartition(".")[2] for option in facts.options if option.own]
    words += [*facts.children, *facts.aliases] if name != "nofilter" and facts.kind != "filter" else []
    assert [word for word in words if f"`{word}`" not in text] == []


def test_no_section_names_an_option_that_is_gone() -> None:
    for name, text in SECTIONS.items():
        facts = describe(registry.driver_class(name))
        known = {word for option in facts.options for word in (option.name, option.name.rpartition(".")[2])}
        for cell in re.findall(r"^\| (`[^|]*) \|", text, re.M):
            for word in re.findall(r"`([^`]+)`", cell):
                assert word in known, f"{name}: {word}"


def test_options_of_every_node_are_all_there() -> None:
    section = OPTIONS.partition("## Options of every node")[2]
    facts = describe(registry.driver_class("nofilter"))
    names = [option.name for option in facts.options if not option.own and option.kind != "group"]
    assert [name for name in names if f"| `{name}` |" not in section] == []


def test_descriptions_in_the_documents_are_right() -> None:
    """Every dotted description and every json: one is understood, as far as it can be without opening anything."""
    found = [
        text
        for document in (DRIVERS, OPTIONS)
        for text in re.findall(
            r"^    (driver=\S+)$|`((?:driver=[^`\s…]+,[^`\s…]+)|(?:json:\{[^`]*\}))`", document, re.M
        )
    ]
    descriptions = [indented or quoted for indented, quoted in found]
    assert len(descriptions) >= 6
    graph = Graph()
    for description in descriptions:
        graph.check(graph.describe(description))


def test_filters_in_the_documents_are_right() -> None:
    graph = Graph()
    lines = re.findall(r"--filter ([\w-]+,\S+) disk\.raw", DRIVERS)
    assert len(lines) >= 3
    for line in lines:
        graph.check(graph.describe(f"driver={line},file.filename=disk.raw"))


def test_the_trusted_drivers_are_named() -> None:
    sentence = OPTIONS.partition("## Where a name is not trusted")[2]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(registry.IMAGE_ALLOW_LIST)
