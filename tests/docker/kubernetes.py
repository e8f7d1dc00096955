"""docker/kubernetes.yaml as podman plays it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.docker.engine import IMAGE, Container, Engine
from tests.peers import ROOT

MANIFEST = ROOT / "docker/kubernetes.yaml"

KEEP_FIRST = "io.podman.annotations.init.container.type: always"

SECRET_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


@contextlib.contextmanager
def played(engine: Engine, pki: Path) -> Iterator[Container]:
    """The container of the manifest's deployment.

    podman 4.3 takes a secret as the text of a manifest, and its data as they are instead of in base64. It knows the
    image by the name that it was built under. The container that makes the disk is removed by it when that is done, at
    times before it knows that it has ended: so it is told to keep it.
    """
    manifest = engine.folder / "kubernetes.yaml"
    text = MANIFEST.read_text().replace("image: pynbd\n", f"image: {IMAGE}\n")
    template = "  template:\n    metadata:\n"
    assert text.count(template) == 1
    manifest.write_text(text.replace(template, f"{template}      annotations: {{{KEEP_FIRST}}}\n"))
    lines = ["apiVersion: v1", "kind: Secret", "metadata: {name: pynbd-server-pki}", "data:"]
    for name in SECRET_FILES:
        lines += [f"  {name}: |", *(f"    {line}" for line in (pki / name).read_text().splitlines())]
    secret = engine.folder / "secret.yaml"
    secret.write_text("\n".join(lines) + "\n")
    engine.podman("secret", "create", "pynbd-server-pki", secret)
    try:
        engine.podman("play", "kube", manifest)
        (name,) = engine.podman("ps", "--all", "--filter=name=-pynbd$", "--format={{.Names}}").split()
        yield Container(engine, name)
    finally:
        engine.podman("play", "kube", "--down", manifest)
        engine.podman("secret", "rm", "pynbd-server-pki")
        engine.podman("volume", "rm", "--all", "--force")
