"""docker/compose.yaml as podman-compose runs it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.docker.engine import Container, Engine
from tests.peers import ROOT

COMPOSE_FILE = ROOT / "docker/compose.yaml"

PROJECT = "pynbd"


@dataclass(frozen=True)
class Composition:
    """The services of the file.

    podman 4.3 can't wait for a service to be done or healthy, so they are started one by one.
    """

    engine: Engine

    def compose(self, *words: str) -> str:
        """What podman-compose prints."""
        return self.engine.run(sys.executable, "-m", "podman_compose", "--file", COMPOSE_FILE, *words)

    def job(self, service: str) -> str:
        """What a service prints that runs to its end."""
        return self.compose("run", "--rm", "--no-deps", "-T", service)

    def start(self, service: str) -> Container:
        """Start one that stays."""
        self.compose("up", "--detach", "--no-build", "--no-deps", service)
        return Container(self.engine, f"{PROJECT}_{service}_1")


@contextlib.contextmanager
def composed(engine: Engine) -> Iterator[Composition]:
    """The file's services; all that they made is gone afterwards."""
    composition = Composition(engine)
    try:
        yield composition
    finally:
        composition.compose("down", "--volumes", "--timeout=0")
