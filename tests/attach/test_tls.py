"""nbd-client through TLS: who has the right certificate gets the disk, and nobody else does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.conftest import DISK_BYTES
from tests.attach.disks import sparse_disk
from tests.attach.filesystem_scenario import check_image, live_through
from tests.attach.guest import Guest
from tests.attach.nbd_client import attach_command, attached, is_attached, size_bytes
from tests.attach.server import ServerUnderTest
from tests.cli.pynbd_command import pynbd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SERVER_NAME = "disks.example.com"

CA = "-cacertfile /tmp/pki/ca-cert.pem"
CLIENT = "-certfile /tmp/pki/client-cert.pem -keyfile /tmp/pki/client-key.pem"
NAME = f"-tlshostname {SERVER_NAME}"
RIGHT = f"{CA} {CLIENT} {NAME}"
STRANGER_CA = "-cacertfile /tmp/stranger/ca-cert.pem"
STRANGER = "-certfile /tmp/stranger/client-cert.pem -keyfile /tmp/stranger/client-key.pem"

REFUSED = {
    "another authority than the server's": f"{STRANGER_CA} {CLIENT} {NAME}",
    "another name than the server's": f"{CA} {CLIENT} -tlshostname elsewhere.example.com",
    "the address, which is not in the certificate": f"{CA} {CLIENT}",
    "no client certificate": f"{CA} {NAME}",
    "a client certificate of another authority": f"{CA} {STRANGER} {NAME}",
    "no TLS": "",
}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders: `pki` of the server and its clients, and one of a `stranger`."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("pki", "stranger"):
        pynbd("certs", folder / name, "--host", SERVER_NAME)
    return folder


@pytest.fixture
def server(tmp_path: Path, pki: Path) -> Iterator[ServerUnderTest]:
    """`pynbd serve` for clients with a certificate."""
    disk = sparse_disk(tmp_path / "disk.raw", DISK_BYTES)
    tls = ("--tls-certificates", str(pki / "pki"), "--tls-verify-peer")
    with ServerUnderTest(disk, tmp_path / "server.log", options=("--discard", "unmap", *tls)) as running:
        yield running


@pytest.fixture
def guest(guest: Guest, pki: Path) -> Guest:
    """A guest that has all the files which a client may show or believe."""
    for folder in ("pki", "stranger"):
        guest.run(f"mkdir /tmp/{folder}")
        for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
            guest.put_file(f"/tmp/{folder}/{name}", (pki / folder / name).read_bytes())
    return guest


def test_filesystem_lives_behind_tls(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server, RIGHT) as device:
        kept = live_through(guest, device, server.disk)
    server.stop()
    check_image(server.disk, kept)


def test_attached_by_ioctl_over_four_connections(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server, f"{RIGHT} -L -C 4") as device:
        assert size_bytes(guest) == DISK_BYTES
        guest.run(f"head -c 300000 /dev/urandom >/tmp/data && dd if=/tmp/data of={device} conv=fsync 2>/tmp/dd")
        guest.run(f"echo 3 >/proc/sys/vm/drop_caches && head -c 300000 {device} | cmp - /tmp/data")


def test_nobody_else_gets_the_disk(guest: Guest, server: ServerUnderTest) -> None:
    for who, options in REFUSED.items():
        status, output = guest.status_of(attach_command(server, options))
        assert status != 0, f"{who}: {output}"
        assert not is_attached(guest), who
        assert guest.run("cat /sys/block/nbd0/size").strip() == "0", who
    with attached(guest, server, RIGHT):
        assert size_bytes(guest) == DISK_BYTES
