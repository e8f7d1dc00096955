"""What tests of qcow2 images have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pynbd.block.graph import Graph


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    """A graph that is closed after the test, with all that it holds."""
    graph = Graph()
    yield graph
    await graph.close_all()
