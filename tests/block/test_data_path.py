"""Who wants to be asked for each request is not passed by what asks for many at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.data_path import no_finder, no_place
from pynbd.block.graph import Graph
from tests.peers import require_tool, run

FILTER = """
from pynbd.block.driver import Filter

class Watcher(Filter):
    def locate(self, offset, length):
        return self.file.locate(offset, length)

    def write_now(self, offset, data):
        return self.file.write_now(offset, data)
"""


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph()
    yield graph
    await graph.close_all()


async def test_a_filter_that_watches_single_requests(graph: Graph, tmp_path: Path) -> None:
    """Of a qcow2 image, which has a finder, and of memory, which has a place for writes."""
    (tmp_path / "watcher.py").write_text(FILTER)
    image = tmp_path / "image.qcow2"
    run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", image, "1M")
    below: list[dict[str, Any]] = [
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}},
        {"driver": "memory", "size": 1 << 20},
    ]
    for description in below:
        node = await graph.open({"driver": str(tmp_path / "watcher.py"), "file": description})
        child = node.children["file"].node
        assert (child.path.finder is no_finder, child.path.place_writes is no_place) == (
            description["driver"] == "memory",
            description["driver"] == "qcow2",
        )
        assert node.path.finder is no_finder
        assert node.path.place_writes is no_place
        plain = await graph.open({"driver": "nofilter", "file": child.name})
        assert plain.path.finder == child.path.finder
        assert plain.path.place_writes == child.path.place_writes
        assert node.path.write_now(0, memoryview(b"x")) == child.path.write_now(0, memoryview(b"x"))
