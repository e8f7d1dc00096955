"""What a server can't do any more once its disks are open: asked from inside, by a driver that tries."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError, OptionError
from pynbd.cli.privileges import Identity, become, identity
from pynbd.server import landlock
from tests.cli.pynbd_command import failure
from tests.peers import Peer, nbdkit, pynbd_serve, require_tool, run

DISK_BYTES = 1 << 20
NOBODY = "nobody"

PROBE = """
import json, os, signal, socket, subprocess
from pynbd import Filter

def tried(call, *arguments):
    try:
        done = call(*arguments)
    except OSError as problem:
        return os.strerror(problem.errno)
    except ImportError as problem:
        return str(problem)  # whose Python lies where only root may look
    if hasattr(done, "close"):
        done.close()
    return "possible"

def report():
    return {
        "passwd": tried(open, "/etc/passwd"),
        "folder": tried(os.listdir, "/etc"),
        "beside": tried(open, "beside.txt"),
        "new": tried(open, "new.txt", "w"),
        "remove": tried(os.unlink, "beside.txt"),
        "disk": tried(open, "disk.raw", "r+b"),
        "program": tried(subprocess.run, ["/bin/true"]),
        "connect": tried(socket.create_connection, ("127.0.0.1", 1)),
        "listen": tried(socket.create_server, ("127.0.0.1", 0)),
        "signal": tried(os.kill, os.getppid(), 0),
        "module": tried(__import__, "colorsys"),
    }

def answer(offset, into):
    into[:] = (b"" if offset else json.dumps(report()).encode()).ljust(len(into))  # it is tried once
"""

IN_A_THREAD = """
class Probe(Filter):
    def read(self, offset, into):
        answer(offset, into)
"""

ON_THE_LOOP = """
class Probe(Filter):
    async def read(self, offset, into):
        answer(offset, into)
"""

HAS_A_THREAD = """
import threading
from pynbd import Driver
threading.Thread(target=threading.Event().wait, daemon=True).start()

class Busy(Driver):
    size = 512
    def read(self, offset, into): ...
"""

CONFINED = {
    "passwd": "Permission denied",
    "folder": "Permission denied",
    "beside": "Permission denied",
    "new": "Permission denied",
    "remove": "Permission denied",
    "disk": "possible",
    "program": "Permission denied",
    "connect": "Permission denied",
    "listen": "Permission denied",
    "signal": "Operation not permitted",
    "module": "possible",
}

FREE = {**dict.fromkeys(CONFINED, "possible"), "connect": "Connection refused"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a disk, and a file beside it that is not served."""
    with tempfile.TemporaryDirectory(prefix="pynbd-") as folder:
        monkeypatch.chdir(folder)
        path = Path(folder)
        (path / "disk.raw").write_bytes(bytes(DISK_BYTES))
        (path / "beside.txt").write_text("not for clients")
        yield path


@pytest.fixture
def confinable() -> None:
    """Skips where the kernel can't do it."""
    version = landlock.version()
    if version < 6:
        pytest.skip(f"this kernel has Landlock of version {version}, and these tests need 6 (Linux 6.12)")


def as_root() -> None:
    """Skip who is not."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")


def report(peer: Peer) -> dict[str, str]:
    """What the driver found when it tried."""
    require_tool("nbdcopy", package="libnbd-bin")
    run("nbdcopy", peer.uri(), "report.json")
    found: dict[str, str] = json.loads(Path("report.json").read_bytes()[:4096])
    return found


def thread_states(peer: Peer) -> list[dict[str, str]]:
    """What the kernel says of each thread of a server."""
    return [
        dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line)
        for thread in Path(f"/proc/{peer.pid}/task").iterdir()
    ]


def probing(where: str) -> list[str]:
    """The arguments that serve disk.raw through the driver that tries."""
    Path("probe.py").write_text(PROBE + where)
    return ["driver=./probe.py,file.driver=raw,file.file.driver=file,file.file.filename=disk.raw"]


# --- confinement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [IN_A_THREAD, ON_THE_LOOP], ids=["thread", "loop"])
def test_who_is_not_confined_can_do_all_that(place: Path, where: str) -> None:
    with pynbd_serve(*probing(where)) as peer:
        assert report(peer) == FREE


@pytest.mark.usefixtures("confinable")
@pytest.mark.parametrize("where", [IN_A_THREAD, ON_THE_LOOP], ids=["thread", "loop"])
def test_who_is_confined_can_not(place: Path, where: str) -> None:
    with pynbd_serve("--confine", "-v", *probing(where)) as peer:
        assert report(peer) == CONFINED
        peer.until_logged("confined by Landlock, version ")
        assert {state["NoNewPrivs"] for state in thread_states(peer)} == {"1"}
    assert (place / "beside.txt").exists()


@pytest.mark.usefixtures("confinable")
def test_more_can_be_granted(place: Path) -> None:
    (place / "more").mkdir()
    shutil.move("beside.txt", "more/beside.txt")
    probe = PROBE.replace("beside.txt", "more/beside.txt").replace("new.txt", "more/new.txt")
    (place / "probe.py").write_text(probe + IN_A_THREAD)
    disk = "driver=./probe.py,file.driver=raw,file.file.driver=file,file.file.filename=disk.raw"
    with pynbd_serve("--confine", "--may-read", "/etc/passwd", "--may-read", "more", disk) as peer:
        assert report(peer) == {**CONFINED, "passwd": "possible", "beside": "possible"}
    with pynbd_serve("--confine", "--may-write", "more", disk) as peer:
        assert report(peer) == {**CONFINED, "beside": "possible", "new": "possible", "remove": "possible"}


@pytest.mark.usefixtures("confinable")
def test_a_chain_of_images_is_served_as_ever(place: Path) -> None:
    require_tool("qemu-img", package="qemu-utils")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2")
    with pynbd_serve(
        "--confine", "--discard", "unmap", "--detect-zeroes", "unmap", "--pid-file", "pid", "top.qcow2"
    ) as peer:
        qemu_io = ["qemu-io", "-f", "raw", "-c", "read -P 0 0 1M", "-c", "write -P 7 0 128k"]
        run(*qemu_io, "-c", "discard 64k 64k", "-c", "flush", "-c", "read -P 7 0 64k", peer.uri())
        assert Path("pid").read_text() == f"{peer.pid}\n"
    assert not Path("pid").exists()
    run("qemu-img", "check", "-q", "top.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 0 64k", "-c", "read -P 0 64k 64k", "top.qcow2")


@pytest.mark.usefixtures("confinable")
def test_certificates_that_were_replaced_are_read_again(place: Path, pki: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    shutil.copytree(pki, "pki")
    with pynbd_serve(
        "--confine", "-v", "--tls-certificates", "pki", "--tls-verify-peer", "-f", "raw", "disk.raw"
    ) as peer:
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            shutil.copy(pki / "stranger" / name, f"pki/new-{name}")
            Path(f"pki/new-{name}").replace(f"pki/{name}")
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged("certificates and keys were read again")
        uri = f"nbds+unix:///?socket={peer.endpoint.socket_path}&tls-certificates="
        assert run("nbdinfo", "--size", f"{uri}{pki}/stranger&tls-verify-peer=false") == f"{DISK_BYTES}\n"
        run("nbdinfo", "--size", f"{uri}{pki}&tls-verify-peer=false", status=1)


@pytest.mark.usefixtures("confinable")
def test_a_server_below_is_found_again_by_its_name(place: Path) -> None:
    require_tool("qemu-io", package="qemu-utils")
    with contextlib.ExitStack() as below:
        first = below.enter_context(nbdkit("memory", f"{DISK_BYTES}", tcp=True))
        port = first.endpoint.port
        disk = f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},reconnect-delay=30"
        with pynbd_serve("--confine", disk) as peer:
            run("qemu-io", "-f", "raw", "-c", "read -P 0 0 4k", peer.uri())
            first.stop(signal.SIGKILL)
            peer.until_logged("the connection was lost")
            program = [
                "nbdkit",
                "-f",
                "--exit-with-parent",
                "-i",
                "127.0.0.1",
                "-p",
                str(port),
                "memory",
                str(DISK_BYTES),
            ]
            with subprocess.Popen(program) as second:
                try:
                    run("qemu-io", "-f", "raw", "-c", "read -P 0 0 4k", peer.uri())
                finally:
                    second.kill()


@pytest.mark.usefixtures("confinable")
def test_threads_for_which_it_would_not_hold_are_told(place: Path) -> None:
    (place / "busy.py").write_text(HAS_A_THREAD)
    said = failure("serve", "-k", "nbd.sock", "--confine", "./busy.py")
    assert said.startswith("--confine: there are threads that can't be confined: ")
    assert not (place / "nbd.sock").exists()


ENDS_SOON = """
import threading, time
from pynbd.server import landlock
threading.Thread(target=time.sleep, args=(0.2,)).start()
print(landlock.other_threads())
"""


def test_threads_that_are_ending_are_waited_for() -> None:
    """The kernel knows a thread a moment longer than whoever has joined it."""
    assert run(sys.executable, "-c", ENDS_SOON) == "[]\n"


def test_a_kernel_without_landlock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with pytest.raises(BlockError, match="this kernel has no Landlock"):
        landlock.restrict(landlock.Grants({}, connect=False))


def test_an_older_kernel_is_asked_for_what_it_knows() -> None:
    known = {abi: landlock.handled(abi) for abi in (1, 2, 3, 4, 5, 6)}
    assert not known[1][0] & landlock.FsAccess.REFER
    assert known[2][0] & landlock.FsAccess.REFER
    assert not known[2][0] & landlock.FsAccess.TRUNCATE
    assert known[3][0] & landlock.FsAccess.TRUNCATE
    assert not known[3][1]
    assert known[4][1] & landlock.NetAccess.CONNECT_TCP
    assert not known[4][0] & landlock.FsAccess.IOCTL_DEV
    assert known[5][0] & landlock.FsAccess.IOCTL_DEV
    assert not known[5][2]
    assert known[6][2] & landlock.Scope.SIGNAL


# --- the user -------------------------------------------------------------------------------------------------


def test_it_serves_as_somebody_else(place: Path) -> None:
    as_root()
    nobody = pwd.getpwnam(NOBODY)
    (place / "disk.raw").chmod(0o600)
    (place / "beside.txt").chmod(0o600)
    place.chmod(0o755)
    with pynbd_serve("--user", NOBODY, "--pid-file", "pid.txt", *probing(IN_A_THREAD)) as peer:
        found = report(peer)
        assert (found["beside"], found["disk"], found["passwd"]) == (
            "Permission denied",
            "Permission denied",
            "possible",
        )
        for state in thread_states(peer):
            assert state["Uid"].split() == [str(nobody.pw_uid)] * 4
            assert state["Gid"].split() == [str(nobody.pw_gid)] * 4
            assert state["Groups"].split() == [str(nobody.pw_gid)]
            assert int(state["CapEff"], 16) == int(state["CapPrm"], 16) == 0
        assert Path("pid.txt").read_text() == f"{peer.pid}\n"
    # The folder is root's: what was made there at first can't be removed, but it says nothing any more.
    assert Path("pid.txt").read_text() == ""


@pytest.mark.usefixtures("confinable")
def test_both_go_together(place: Path) -> None:
    as_root()
    with pynbd_serve("--user", NOBODY, "--group", "0", "--confine", "-f", "raw", "disk.raw") as peer:
        assert [state["Groups"].split() for state in thread_states(peer)] == [["0"]] * len(thread_states(peer))
        require_tool("qemu-io", package="qemu-utils")
        run("qemu-io", "-f", "raw", "-c", "write -P 3 0 4k", "-c", "flush", peer.uri())
    assert (place / "disk.raw").read_bytes()[:4096] == bytes([3]) * 4096


def test_names_and_numbers_of_users() -> None:
    root = pwd.getpwuid(0)
    assert identity("", "") == Identity(None, None, ())
    assert identity("0", "") == identity(root.pw_name, "") == Identity(0, 0, tuple(os.getgrouplist(root.pw_name, 0)))
    assert identity("4000000000", "4000000001") == Identity(4000000000, 4000000001, (4000000001,))
    assert identity("", "7") == Identity(None, 7, (7,))
    for user, group, said in (
        ("nobody of that name", "", "--user: there is no user 'nobody of that name'"),
        ("", "none", "--group: there is no group 'none'"),
        ("4294967295", "0", "--user: there is no user '4294967295'"),
        ("4000000000", "", "--user: nothing is known of the user 4000000000: give a --group as well"),
    ):
        with pytest.raises(OptionError) as refused:
            identity(user, group)
        assert str(refused.value) == said


def test_only_root_can_become_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(BlockError, match="only root can become somebody else"):
        become(Identity(7, 7, (7,)))


@pytest.mark.parametrize("flags", [["--user", "0"], ["--confine"]])
def test_a_command_has_our_rights(flags: list[str], place: Path) -> None:
    assert failure("serve", "--run", "true", *flags, "disk.raw").startswith("--run is for a command with our rights")


def test_what_confinement_leaves_is_said_with_it(place: Path) -> None:
    assert "give that as well" in failure("serve", "--may-read", "/etc", "disk.raw")
