"""Fixtures for tests of the block layer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from pynbd.block import registry
from pynbd.block.graph import Graph
from tests.block import drivers


@pytest.fixture(scope="session", autouse=True)
def test_drivers() -> Iterator[None]:
    """The drivers of these tests can be named like built-in ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, target in drivers.NAMES.items():
            patch.setitem(registry.BUILT_IN, name, target)
        yield


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Whatever a test opens is closed when it ends."""
    yield
    left, drivers.OPEN_DRIVERS[:] = list(drivers.OPEN_DRIVERS), []
    assert not left


@pytest_asyncio.fixture
async def graph() -> AsyncIterator[Graph]:
    """A graph that is closed at the end, users and all."""
    graph = Graph()
    yield graph
    await drivers.close(graph)
