"""What the tests of conformance share."""

from collections.abc import AsyncIterator

import pytest

from tests.server.clients import Served, serving
from tests.server.conformance.haggler import MEMORY


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(MEMORY, MEMORY) as served:
        yield served
