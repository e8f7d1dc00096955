"""The image of docker/Dockerfile: built, run as a careful operator would, and used by clients from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pynbd import __version__
from tests.conftest import DiskMaker
from tests.docker.compose import composed
from tests.docker.engine import IMAGE, Engine
from tests.docker.kubernetes import played
from tests.peers import CommandError, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

URI = "nbd://127.0.0.1/"


def in_image(engine: Engine, script: str) -> str:
    """What a shell in a new container prints."""
    return engine.podman("run", "--rm", "--network=none", "--entrypoint=sh", IMAGE, "-c", script)


def test_what_it_says_of_itself(engine: Engine) -> None:
    (image,) = json.loads(engine.podman("inspect", IMAGE))
    config = image["Config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["pynbd"], ["serve"])
    assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("10809:10809", "/data", "SIGTERM")
    assert set(config["ExposedPorts"]) == {"10809/tcp"}
    assert image["Healthcheck"]["Test"] == ["CMD", "pynbd", "health"]
    assert config["Labels"]["org.opencontainers.image.title"] == "pynbd"
    assert engine.podman("run", "--rm", IMAGE, "--version") == f"pynbd {__version__}"


def test_nothing_in_it_builds_or_installs(engine: Engine) -> None:
    """Neither pip nor what pynbd was built with, nor its source tree and wheels."""
    names = ("pip", "pip3*", "hatchling", "setuptools", "wheel", "*.whl", "ensurepip", "gcc*", "cc", "make", "src")
    words = " -o ".join(f"-name '{name}'" for name in names)
    assert in_image(engine, f"find / -xdev \\( {words} \\) 2>/dev/null || true") == ""
    assert in_image(engine, "python3 -c 'import cryptography, isal, backports.zstd, pynbd; print(pynbd.__file__)'") == (
        in_image(engine, "ls /opt/pynbd/lib/python3.*/site-packages/pynbd/__init__.py")
    )


def test_its_user_owns_no_program(engine: Engine) -> None:
    """What breaks into the server finds nothing that it could change but the data, and nothing that makes it root."""
    assert in_image(engine, "id -u; id -g").split() == ["10809", "10809"]
    writable = in_image(engine, "find / -xdev -writable -not -type l -not -path '/proc/*' 2>/dev/null || true")
    folders = {"/data", "/pki", "/tmp", "/var/tmp"}
    assert {path for path in writable.split() if not path.startswith(("/dev/", "/run/"))} == folders
    assert in_image(engine, "find / -xdev -perm /6000 -type f 2>/dev/null || true") == ""


def test_no_start_compiles_anything(engine: Engine) -> None:
    """On a read-only file system compiled modules can't be kept: each start would begin with seconds of it."""
    loaded = "import sys, pynbd.cli.serving, pynbd.cli.health; print(*(m.__cached__ for m in [*sys.modules.values()] "
    loaded += "if getattr(m, '__cached__', None)), sep='\\n')"
    missing = in_image(engine, f'python3 -c "{loaded}" | while read -r file; do test -e "$file" || echo "$file"; done')
    assert missing == ""


def test_a_disk_from_outside(engine: Engine, make_disk: DiskMaker) -> None:
    """Written and read by qemu-img, nbdcopy and nbdinfo through a published port; then ended, and nothing is lost."""
    data = engine.owned_folder("disk")
    run("qemu-img", "create", "-q", "-f", "qcow2", data / "disk.qcow2", "64M")
    engine.give(data / "disk.qcow2")
    source = make_disk(8 << 20)
    with engine.server(options=(f"--volume={data}:/data",), DISK="d=/data/disk.qcow2", DISCARD="unmap") as container:
        told = json.loads(engine.run("nbdinfo", "--json", f"{URI}d"))["exports"][0]
        assert (told["export-size"], told["is_read_only"]) == (64 << 20, False)
        engine.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, f"{URI}d")
        engine.run("nbdcopy", f"{URI}d", engine.folder / "copy.raw")
        # This client sends no flush, so that only the server's orderly end brings it to the disk.
        engine.run("qemu-io", "-t", "unsafe", "-f", "raw", "-c", "write -P 0x5a 32M 1M", f"{URI}d")
        assert "Read-only file system" in container.execute("sh", "-c", "touch /opt/x 2>&1 || true")
        assert container.execute("cat", "/proc/1/comm") == "pynbd"
        assert container.execute("cat", "/proc/1/status").count("Uid:\t10809\t10809\t10809\t10809") == 1
        container.stop()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, engine.folder / "copy.raw")
    assert "No errors were found" in run("qemu-img", "check", data / "disk.qcow2")
    assert "Pattern" not in run("qemu-io", "-r", "-c", "read -P 0x5a 32M 1M", data / "disk.qcow2")


def test_health(engine: Engine) -> None:
    """Healthy while it answers, unhealthy when it hangs, and healthy again."""
    at_once = ('--health-cmd=["pynbd","health"]', "--health-retries=1", "--health-start-period=0s")
    with engine.server(options=at_once, DISK="driver=memory,size=1M") as container:
        engine.podman("healthcheck", "run", container.name)
        assert container.state("Health.Status") == "healthy"
        engine.podman("kill", "--signal=STOP", container.name)
        engine.podman("healthcheck", "run", container.name, status=1)
        assert container.state("Health.Status") == "unhealthy"
        assert "does not answer within 4 s" in container.state("Health.Log")
        engine.podman("kill", "--signal=CONT", container.name)
        engine.podman("healthcheck", "run", container.name)
        assert container.state("Health.Status") == "healthy"


def test_tls(engine: Engine, pki: Path) -> None:
    """By variables, with a folder that is mounted. The health check has no certificate, and needs none."""
    folder = engine.owned_folder("pki")
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        shutil.copy(pki / name, folder)
    engine.give(*folder.iterdir())
    options = (f"--volume={folder}:/pki:ro",)
    variables = {"TLS_CERTIFICATES": "/pki", "TLS_VERIFY_PEER": "on", "DISK": "driver=memory,size=1M"}
    with engine.server(options=options, **variables) as container:
        secure = "nbds://127.0.0.1/?tls-certificates="
        assert engine.run("nbdinfo", "--size", f"{secure}{pki}") == "1048576\n"
        engine.run("nbdinfo", "--size", f"{secure}{pki}/stranger", status=1)
        engine.run("nbdinfo", "--size", URI, status=1)
        engine.podman("healthcheck", "run", container.name)
        # Certificates that were replaced are taken without a restart.
        engine.podman("kill", "--signal=HUP", container.name)
        assert engine.run("nbdinfo", "--size", f"{secure}{pki}") == "1048576\n"


def test_a_configuration_file(engine: Engine) -> None:
    """Mounted, it says where to listen as well; the health check reads it."""
    config = engine.folder / "pynbd.toml"
    config.write_text("""
[server]
listen = ["0.0.0.0:10810", "unix:/tmp/nbd.sock"]
[export.one]
disk = { driver = "memory", size = "1M" }
[export.two]
disk = { driver = "null", size = "2M" }
read-only = true
""")
    options = (f"--volume={config}:/etc/pynbd/pynbd.toml:ro", "--publish=127.0.0.1:10810:10810")
    with engine.server(options=options, CONFIG="/etc/pynbd/pynbd.toml") as container:
        engine.podman("healthcheck", "run", container.name)
        assert "/tmp/nbd.sock" in container.execute("pynbd", "health")
        assert engine.run("nbdinfo", "--size", "nbd://127.0.0.1:10810/two") == f"{2 << 20}\n"
        # The same image is a client, too.
        command = ("run", "--rm", "--network=host", IMAGE, "info", "--size", "nbd://127.0.0.1:10810/one")
        assert engine.podman(*command) == str(1 << 20)


def test_flags_and_another_user(engine: Engine) -> None:
    """Flags replace variables, and any user will do, as on clusters that choose one for each project."""
    with engine.server(
        *("serve", "-r", "-D", "by flag", "-p", "10809", "driver=null,size=1M"),
        options=("--user=123456:0",),
        DESCRIPTION="by variable",
        PORT="1",
    ) as container:
        assert container.execute("id", "-u") == "123456"
        told = json.loads(engine.run("nbdinfo", "--json", URI))["exports"][0]
        assert (told["is_read_only"], told["description"]) == (True, "by flag")


def test_what_is_wrong_is_in_the_log(engine: Engine) -> None:
    """In one line, and the status is 1."""

    def refusal(*options: str) -> str:
        with pytest.raises(CommandError, match="status 1, expected 0") as failed:
            engine.podman("run", "--rm", "--network=none", *options, IMAGE)
        return str(failed.value)

    assert "PYNBD_SERVE_PROT: there is no such option" in refusal("--env=PYNBD_SERVE_PROT=1")
    assert "nothing to serve" in refusal()
    assert "'/data/none.raw': No such file or directory" in refusal("--env=PYNBD_SERVE_DISK=/data/none.raw")


def test_the_compose_file(engine: Engine) -> None:
    """Certificates, disk and server are made, and the client comes in through TLS, and only so."""
    with composed(engine) as services:
        services.job("certificates")
        services.job("disk")
        server = services.start("server")
        server.until_logged("Stop with Ctrl-C.")
        engine.podman("healthcheck", "run", server.name)
        assert services.job("verify").splitlines()[-1] == "verified"
        # Made once: neither the disk nor the certificates are made anew.
        assert services.job("certificates") == services.job("disk") == ""
        server.stop()


def test_the_manifest_for_kubernetes(engine: Engine, pki: Path) -> None:
    """Volumes, configuration, secret, the container that makes the disk, security context and probe."""
    with played(engine, pki) as container:
        container.until_logged("Stop with Ctrl-C.")
        uri = f"nbds://localhost/disk?tls-certificates={pki}"
        assert engine.run("nbdinfo", "--size", uri) == f"{8 << 30}\n"
        engine.run("nbdinfo", "--size", "nbd://localhost/disk", status=1)
        (told,) = json.loads(engine.podman("inspect", container.name))
        assert told["HostConfig"]["ReadonlyRootfs"] is True
        assert told["EffectiveCaps"] in (None, [])
        assert container.execute("id", "-u") == "10809"
        engine.podman("healthcheck", "run", container.name)
        container.stop()
