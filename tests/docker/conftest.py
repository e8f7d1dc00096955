"""The image of docker/Dockerfile, built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.engine import Engine, engine_with_image


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """buildah, podman, and the image that they have built."""
    with engine_with_image(Path(tmp_path_factory.mktemp("containers"))) as made:
        yield made
