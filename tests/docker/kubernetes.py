"""docker/kubernetes.yaml as podman plays it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.docker.engine import IMAGE, Container, Engine
from tests.peers import ROOT

MANIFEST = ROOT / "docker/kubernetes.yaml"

PODMAN_FORM = {
    "image: pynbd\n": f"image: {IMAGE}\n",
    "kind: Deployment\nmetadata:\n": (
        "kind: Deployment\nmetadata:\n  annotations: {io.podman.annotations.init.container.type: always}\n"
    ),
    "      automountServiceAccountToken:": "      restartPolicy: Never\n      automountServiceAccountToken:",
}

SECRET_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


@contextlib.contextmanager
def played(engine: Engine, pki: Path) -> Iterator[Container]:
    """The container of the manifest's deployment.

    podman 4.3 takes a secret as the text of a manifest, and its data as they are instead of in base64. It knows the
    image by the name that it was built under. It may start the container that makes the disk again when that has ended,
    and fail to remove it then: so it is told to do neither.
    """
    manifest = engine.folder / "kubernetes.yaml"
    text = MANIFEST.read_text()
    for before, after in PODMAN_FORM.items():
        assert text.count(before) >= 1, before
        text = text.replace(before, after)
    manifest.write_text(text)
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
