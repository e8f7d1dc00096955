"""buildah and podman in namespaces of their own, where no network leads out, and the image of docker/Dockerfile."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import peers
from tests.docker.base_image import make_base_root, pack
from tests.docker.namespace import own_namespaces
from tests.peers import ROOT, CommandError, require_tool

BUILD_LIMIT_S = 300.0

READY_LIMIT_S = 60.0
"""How long a container may take until it has said that clients can connect."""

READY_INTERVAL_S = 0.1

IMAGE = "localhost/pynbd"

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""

STORAGE_CONF = """
[storage]
driver = "{driver}"
graphroot = "{folder}/storage"
runroot = "/run/containers/storage"
"""

HARDENED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--tmpfs=/tmp")
"""What a careful operator adds; the image has to work under it."""


@dataclass(frozen=True)
class Engine:
    """Runs podman, buildah and clients where the containers are.

    Args:
        enter: what to put before a command to run it there.
        folder: for images, configuration and all else; removed at the end.
        uid: the user that the image runs as.
    """

    enter: list[str]
    folder: Path
    uid: int = 10809

    def run(self, *command: str | Path, status: int = 0, env: Mapping[str, str] | None = None) -> str:
        """What a command prints that runs beside the containers, as one on their host would."""
        conf = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
        where = {name: str(self.folder / file) for name, file in conf.items()}
        return peers.run(*self.enter, *command, status=status, env={**where, **(env or {})}, timeout_s=BUILD_LIMIT_S)

    def podman(self, *words: str | Path, status: int = 0) -> str:
        """What podman prints."""
        return self.run("podman", *words, status=status).strip()

    @contextlib.contextmanager
    def server(
        self, *words: str | Path, options: tuple[str | Path, ...] = (), **variables: str | Path
    ) -> Iterator[Container]:
        """A container that serves; on leaving it must end by SIGTERM with status 0.

        Args:
            words: what it is told after the image's name.
            options: of `podman run`.
            variables: PYNBD_SERVE_… for it.
        """
        told = [f"--env=PYNBD_SERVE_{name}={value}" for name, value in variables.items()]
        publish = "--publish=127.0.0.1:10809:10809"
        name = self.podman("run", "--detach", publish, *HARDENED, *told, *options, IMAGE, *words).splitlines()[-1]
        container = Container(self, name)
        try:
            container.until_logged("Stop with Ctrl-C.")
            yield container
            if container.state("Running") == "true":
                container.stop()
        finally:
            self.podman("rm", "--force", "--time=0", name)

    def owned_folder(self, name: str) -> Path:
        """A folder that belongs to the image's user."""
        path = self.folder / name
        path.mkdir()
        self.give(path)
        return path

    def give(self, *paths: Path) -> None:
        """Let them belong to the image's user."""
        for path in paths:
            os.chown(path, self.uid, self.uid)


@dataclass(frozen=True)
class Container:
    """One that was started."""

    engine: Engine
    name: str

    def state(self, key: str) -> str:
        """Something of its state: Running, ExitCode, Health.Status."""
        return self.engine.podman("inspect", "--format", f"{{{{.State.{key}}}}}", self.name)

    def log(self) -> str:
        """What it has printed."""
        return self.engine.run("sh", "-c", f"podman logs {self.name} 2>&1")

    def until_logged(self, text: str) -> None:
        """Wait until it has said this."""
        deadline = time.monotonic() + READY_LIMIT_S
        while text not in self.log():
            assert self.state("Running") == "true", f"it ended before it said {text!r}:\n{self.log()}"
            assert time.monotonic() < deadline, f"it never said {text!r}:\n{self.log()}"
            time.sleep(READY_INTERVAL_S)

    def execute(self, *words: str, status: int = 0) -> str:
        """What a command in it prints."""
        return self.engine.podman("exec", self.name, *words, status=status)

    def stop(self) -> None:
        """End it by SIGTERM; had it to be killed after 20 s, its status would be 137."""
        self.engine.podman("stop", "--time=20", self.name)
        assert self.state("ExitCode") == "0", self.log()


@contextlib.contextmanager
def engine_with_image(folder: Path) -> Iterator[Engine]:
    """The engine, once the image has been built. Skips where that can't be; see `own_namespaces`."""
    if os.geteuid():
        pytest.skip("containers are made as root here")
    for name in ("buildah", "podman", "runc"):
        require_tool(name, package=name)
    wheels = wheelhouse()
    with own_namespaces() as enter:
        engine = Engine(enter, folder)
        driver = "vfs" if peers.run("stat", "-f", "-c", "%T", folder).strip() == "overlayfs" else "overlay"
        (folder / "containers.conf").write_text(CONTAINERS_CONF.format(folder=folder))
        (folder / "storage.conf").write_text(STORAGE_CONF.format(folder=folder, driver=driver))
        try:
            _make_base_image(engine, next(wheels.glob("pip-*.whl")))
            _build(engine, wheels)
            yield engine
            assert engine.podman("ps", "--quiet") == "", "a test left its container"
        finally:
            engine.run("sh", "-c", "podman rm --all --force --time=0 >/dev/null 2>&1 || true")


def _make_base_image(engine: Engine, pip: Path) -> None:
    """Make what docker/Dockerfile begins with, under its name there, and see whether a container can run."""
    root = engine.folder / "base"
    root.mkdir()
    make_base_root(root, pip)
    pack(root, engine.folder / "base.tar")
    shutil.rmtree(root)
    first = next(line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if line.startswith("FROM "))
    name = f"localhost/{first.split()[1]}"
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
    engine.podman("import", "--change", path, "--change", "CMD python3", engine.folder / "base.tar", name)
    try:
        engine.podman("run", "--rm", name, "true")
    except CommandError as problem:
        if any(words in str(problem).lower() for words in ("not permitted", "permission denied", "not supported")):
            pytest.skip(f"this system runs no containers: {problem}")
        raise


def _build(engine: Engine, wheels: Path) -> None:
    """Build the image as its Dockerfile says, with packages from the folder alone."""
    pip_conf = engine.folder / "pip.conf"
    pip_conf.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    engine.run(
        *(ROOT / "docker/build_image", IMAGE, "--isolation=chroot", "--network=host", "--pull=never"),
        *(f"--volume={wheels}:/wheels:ro", f"--volume={pip_conf}:/etc/pip.conf:ro"),
    )


def wheelhouse() -> Path:
    """A folder with all packages that the image is built of; fetched once with the pip of this Python, and kept.

    So the build needs no network, and pip's settings on this machine hold for what it fetches.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = next(line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if "'.[" in line)
    extras = built.partition("[")[2].partition("]")[0].split(",")
    wanted = ["pip", *project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [one for extra in extras for one in project["project"]["optional-dependencies"][extra]]
    folder = ROOT / ".cache/containers" / f"wheels-{sysconfig.get_config_var('SOABI')}"
    made_of = folder / "made-of"
    if not made_of.exists() or made_of.read_text() != shlex.join(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fetch = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--wheel-dir")
        peers.run(*fetch, folder, *wanted, timeout_s=BUILD_LIMIT_S)
        made_of.write_text(shlex.join(wanted))
    return folder
