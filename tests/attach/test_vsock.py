"""vsock: pynbd as the server and as the client of libnbd, nbdkit and QEMU, all inside one guest, which talks to itself.

The kernel under the tests need not have vsock: Debian's has a loopback for it, as a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attach.borrowed_root import ROOT, borrowing_guest, pynbd_there, there
from tests.attach.guest import Guest
from tests.attach.kernel import Kernel
from tests.cli.pynbd_command import pynbd
from tests.peers import require_tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK_BYTES = 4 << 20
DISK = f"driver=memory,size={DISK_BYTES}"
PORT = 10809
PATTERN_PORT = 5
TLS_PORT = 6
SERVER_NAME = "disks.example.com"
LOG = "/run/log"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made here, for the guest has no place for it, and sees this one."""
    folder = tmp_path_factory.mktemp("certificates") / "pki"
    pynbd("certs", folder, "--host", SERVER_NAME)
    return folder


@pytest.fixture(scope="module")
def guest(kernel: Kernel, initramfs: Path, pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest in which nbdkit and pynbd listen at vsock; asks for `pki` only so that it is there first."""
    for program, package in (("nbdinfo", "libnbd-bin"), ("nbdkit", "nbdkit"), ("qemu-img", "qemu-utils")):
        require_tool(program, package=package)
    with borrowing_guest(kernel, initramfs, tmp_path_factory.mktemp("guest")) as guest:
        guest.run("modprobe vsock_loopback")
        guest.run(there("nbdkit", "--vsock", "-p", str(PATTERN_PORT), "pattern", str(DISK_BYTES)))
        to_listen = ("--vsock", str(PORT), "--allow", "vsock:1")
        guest.run(pynbd_there("serve", "--fork", "--log-file", LOG, "-v", *to_listen, DISK))
        yield guest


def test_libnbd_finds_the_server(guest: Guest) -> None:
    """Also by its name for the machine that runs it: where there is none, that is the guest itself."""
    for uri in ("nbd+vsock://1/", f"nbd+vsock://1:{PORT}", "nbd+vsock:///"):
        assert guest.run(there("nbdinfo", "--size", uri)) == f"{DISK_BYTES}\n"
    assert "vsock:1:" in guest.run(f"cat {ROOT}{LOG}")


def test_qemu_finds_the_server(guest: Guest) -> None:
    place = f"driver=nbd,server.type=vsock,server.cid=1,server.port={PORT}"
    assert f"({DISK_BYTES} bytes)" in guest.run(there("qemu-img", "info", "--image-opts", place))


def test_data_of_a_peer_server_comes_through_both_ways(guest: Guest) -> None:
    """nbdcopy reads from nbdkit and writes to pynbd, and pynbd reads both again as a client."""
    pattern = f"nbd+vsock://1:{PATTERN_PORT}/"
    status, said = guest.status_of(there("nbdcopy", pattern, "nbd+vsock://1/"))
    # All is copied, and the two say goodbye: if nbdkit is the first to hang up, libnbd is told so in another way than
    # by other sockets, and complains.
    assert (status, said) in ((0, ""), (1, f"{pattern}: nbd_shutdown: recv: Transport endpoint is not connected\n"))
    ours = f'json:{{"driver": "nbd", "server": {{"type": "vsock", "cid": "1", "port": "{PORT}"}}}}'
    assert guest.run(pynbd_there("img", "compare", pattern, ours)) == "Images are identical.\n"


def test_nobody_listens_there(guest: Guest) -> None:
    status, said = guest.status_of(pynbd_there("info", "nbd+vsock://1:7/"))
    assert status == 1
    assert said == "pynbd info: Failed to connect to 'vsock:1:7': Connection reset by peer\n"


def test_who_is_denied_by_number_finds_nothing_and_a_command_knows_the_port(guest: Guest) -> None:
    serve = ("serve", "-v", "--vsock", "0", "--deny", "vsock:1", DISK)
    status, said = guest.status_of(pynbd_there(*serve, "--run", 'echo "$uri"; exec nbdinfo "$uri"'))
    assert status == 1
    assert "nbd+vsock://1:" in said
    assert "hidden from it by rule 0, deny address=vsock:1" in said
    assert "No such file or directory for the default export" in said


def test_tls(guest: Guest, pki: Path) -> None:
    """There is no host whose name a certificate could bear: it is compared with a name that is given, or with none."""
    serve = ("serve", "--fork", "--vsock", f"1:{TLS_PORT}", "--tls-certificates", pki, "--tls-verify-peer", DISK)
    guest.run(pynbd_there(*serve))
    uri = f"nbds+vsock://1:{TLS_PORT}/?tls-certificates={pki}"
    assert guest.run(there("nbdinfo", "--size", uri)) == f"{DISK_BYTES}\n"
    assert "with TLS" in guest.run(pynbd_there("info", f"{uri}&tls-hostname={SERVER_NAME}"))
    assert guest.status_of(there("nbdinfo", "--size", f"nbd+vsock://1:{TLS_PORT}/"))[0] == 1
