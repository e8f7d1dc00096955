"""`pynbd serve --workers`: clients are spread over processes, see one disk, and all of it ends with the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pynbd.server import landlock
from tests.cli.pynbd_command import failure
from tests.interop.wire_client import FLUSH, FUA, READ, WRITE, WireClient
from tests.peers import SYSTEM_PATH, Daemon, Peer, pynbd_serve, require_tool, run

PYNBD = (sys.executable, "-m", "pynbd", "serve")
PATIENCE_S = 60.0
DISK_BYTES = 1 << 20

HELD = """
import asyncio
import os
from pynbd import Filter

class Held(Filter):
    several_processes = "always"
    async def write(self, offset, data, flags):
        while not os.path.exists("go.on"):
            await asyncio.sleep(0.01)
        await self.file.write(offset, data, flags)
"""

FAILS_IN_WORKERS = """
from pynbd import Filter

class Picky(Filter):
    several_processes = "always"
    async def open(self):
        if self.node.shared:
            {}
    async def read(self, offset, into, flags):
        await self.file.read(offset, into, flags)
"""

SLOW_TO_OPEN = """
import asyncio
import os
from pynbd import Filter

class Slow(Filter):
    several_processes = "always"
    async def open(self):
        if self.node.shared:
            os.write(2, b"opening\\n")
            await asyncio.sleep(1000)
"""

TELLS_OF_FLUSHES = """
import os
from pynbd import Filter

class Teller(Filter):
    several_processes = "always"
    async def flush_to_disk(self):
        with open("flushes", "a") as file:
            print(os.getpid(), file=file)
"""

LOSES_WRITES = """
from pynbd import Filter

class Lost(Filter):
    several_processes = "always"
    async def flush_to_disk(self):
        if self.node.shared:
            raise OSError(5, "the disk is gone")
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("disk.raw")
    path.write_bytes(bytes(DISK_BYTES))
    return path


def filtered(text: str) -> str:
    """A disk with a filter of the test."""
    Path("filter.py").write_text(text)
    return "driver=./filter.py,file.driver=raw,file.file.driver=file,file.file.filename=disk.raw"


def until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def children(pid: int) -> list[Daemon]:
    """The processes that a process has started."""
    return [Daemon(int(word)) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def serving(*words: str | Path, count: int = 2) -> Iterator[tuple[Peer, list[Daemon]]]:
    """A server and its workers; when it has ended none of these is left."""
    with pynbd_serve("--workers", str(count), "-v", *words) as peer:
        workers = children(peer.pid)
        assert len(workers) == count
        until(lambda: not any(clients_of(peer, worker) for worker in workers), "who asked whether it is there is gone")
        yield peer, workers
        if not peer.stopped:
            assert peer.stop() == 0, peer.log()
    assert all(worker.poll() == 0 for worker in workers)


def clients_of(peer: Peer, process: Daemon) -> int:
    """How many connections of the server's clients a worker has: they have the socket's name."""
    place = f" {peer.endpoint.socket_path}"
    names = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(place)}
    found = 0
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found += os.readlink(entry).removeprefix("socket:[").rstrip("]") in names  # noqa: PTH115  # no file
    return found


async def is_gone(client: WireClient) -> bool:
    """Whether its connection ends, without another word."""
    try:
        return await asyncio.wait_for(client.reader.read(), PATIENCE_S) == b""
    except ConnectionResetError:
        return True


# --- clients --------------------------------------------------------------------------------------------------


async def test_clients_are_spread_and_see_one_disk(disk: Path) -> None:
    with serving("-f", "raw", disk, count=3) as (peer, workers):
        clients = [await WireClient.connect(peer.endpoint) for _ in range(6)]
        assert [clients_of(peer, worker) for worker in workers] == [2, 2, 2]
        for number, client in enumerate(clients):
            assert (await client.call(WRITE, number * 4096, payload=bytes([number + 1]) * 4096)).error == 0
        for client in clients:
            assert (await client.call(FLUSH)).error == 0
            for number in range(6):
                assert (await client.call(READ, number * 4096, 4096)).data == bytes([number + 1]) * 4096
        assert (await clients[0].call(WRITE, 0, flags=FUA, payload=b"durable")).error == 0
        assert disk.read_bytes()[:7] == b"durable"
        for client in clients:
            await client.end()


async def test_a_flush_covers_what_other_workers_have_answered(disk: Path) -> None:
    """So each of them makes each flush, whether or not anything was written there."""
    with serving(filtered(TELLS_OF_FLUSHES)) as (peer, workers):
        clients = [await WireClient.connect(peer.endpoint) for _ in range(2)]
        assert (await clients[0].call(WRITE, 0, payload=b"x")).error == 0
        for _ in range(3):
            for client in clients:
                assert (await client.call(FLUSH)).error == 0
        flushes = Path("flushes").read_text().split()
        assert sorted(flushes) == sorted([str(worker.pid) for worker in workers] * 3)
        for client in clients:
            await client.end()


def test_tools_that_open_several_connections(random_disk: Path, disk: Path) -> None:
    require_tool("nbdcopy", package="libnbd-bin")
    with serving("-f", "raw", f"a={random_disk}", f"b={disk}") as (peer, _):
        disk.write_bytes(bytes(random_disk.stat().st_size))
    with serving("-f", "raw", f"a={random_disk}", f"b={disk}") as (peer, _):
        run("nbdcopy", "--threads=4", "--connections=4", "--flush", peer.uri("a"), peer.uri("b"))
        assert "can_multi_conn: true" in run("nbdinfo", peer.uri("b"))
    assert disk.read_bytes() == random_disk.read_bytes()


def test_a_qcow2_image_is_read_by_several(disk: Path) -> None:
    require_tool("qemu-img", package="qemu-utils")
    disk.write_bytes(os.urandom(DISK_BYTES))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2")
    with serving("-r", "top.qcow2") as (peer, _):
        run("nbdcopy", "--threads=4", "--connections=4", peer.uri(), "copy.raw")
    assert Path("copy.raw").read_bytes() == disk.read_bytes()
    assert "node '#qcow2" in failure("serve", "--workers", "2", "-k", "s", "top.qcow2")


async def test_clients_beyond_the_most_wait(disk: Path) -> None:
    with serving("-f", "raw", "-e", "2", disk) as (peer, workers):
        first = await WireClient.connect(peer.endpoint)
        second = await WireClient.connect(peer.endpoint)
        third = asyncio.create_task(WireClient.connect(peer.endpoint))
        assert (await first.call(READ, 0, 512)).error == 0
        assert (await second.call(READ, 0, 512)).error == 0
        assert not third.done()
        assert sum(clients_of(peer, worker) for worker in workers) == 2
        await first.end()
        async with asyncio.timeout(PATIENCE_S):
            client = await third
        await second.end()
        await client.end()


async def test_many_who_come_together_are_all_greeted(disk: Path) -> None:
    """More than a worker is handed before it has looked at those that it has."""
    with serving("-f", "raw", disk) as (peer, _):
        connections = [peer.endpoint.connect() for _ in range(300)]
        for connection in connections:
            assert await asyncio.to_thread(connection.recv, 8, socket.MSG_WAITALL) == b"NBDMAGIC"
            connection.close()


async def test_it_stops_when_the_last_client_has_gone(disk: Path) -> None:
    with serving("-f", "raw", "--exit-last", disk) as (peer, _):
        clients = [await WireClient.connect(peer.endpoint) for _ in range(3)]
        for client in clients[:2]:
            await client.end()
        assert (await clients[2].call(WRITE, 0, payload=b"last")).error == 0
        await clients[2].end()
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 0


def test_tls(disk: Path, pki: Path) -> None:
    require_tool("nbdcopy", package="libnbd-bin")
    shutil.copytree(pki, "server")
    with serving("--tls-certificates", "server", "--tls-verify-peer", "-f", "raw", disk) as (peer, _):
        uri = f"nbds+unix:///?socket={peer.endpoint.socket_path}&tls-verify-peer=false&tls-certificates="
        run("nbdcopy", "--threads=2", "--connections=2", f"{uri}{pki}", "copy.raw")
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            shutil.copy(pki / "stranger" / name, f"server/{name}")
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged("certificates and keys were read again")
        for _ in range(2):  # each of the workers
            run("nbdinfo", "--size", f"{uri}{pki / 'stranger'}")
            run("nbdinfo", "--size", f"{uri}{pki}", status=1)


def test_rules_and_the_log_are_read_again_by_all(disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    config, log = Path("c.toml"), Path("log")
    text = '[server]\nworkers = 2\n[export.a]\ndisk = "disk.raw"\nformat = "raw"\n'
    config.write_text(text)
    with pynbd_serve("-v", "--config", config, "--log-file", log) as peer:
        assert len(children(peer.pid)) == 2
        for _ in range(2):
            run("nbdinfo", "--size", peer.uri("a"))
        log.rename("old")
        config.write_text(f'{text}[[export.a.access]]\npolicy = "deny"\naddress = "all"\n')
        peer.process.send_signal(signal.SIGHUP)
        until(lambda: log.exists() and "rules of c.toml were read again" in log.read_text(), "read again")
        for _ in range(2):
            run("nbdinfo", "--size", peer.uri("a"), status=1)
        until(lambda: log.read_text().count("hidden from it by rule 0") >= 2, "told by both")
        config.write_text(text.replace("[export", "client-limits = { connections = 1 }\n[export"))
        peer.process.send_signal(signal.SIGHUP)
        until(lambda: "client-limits: connections can't be had with several workers" in log.read_text(), "refused")


async def test_lines_for_programs_say_which_worker_it_was(disk: Path) -> None:
    """Clients at Unix sockets have the same names at several of them."""
    with serving("-f", "raw", "--log-format", "json", disk) as (peer, workers):
        clients = [await WireClient.connect(peer.endpoint) for _ in range(2)]
        peer.until(lambda: peer.log().count("client-come") == 2, "who has come")
        lines = [json.loads(line) for line in peer.log().splitlines() if line.startswith("{")]
        found = {line["worker"] for line in lines if line["event"] == "client-come"}
        assert found == {worker.pid for worker in workers}
        assert not any("worker" in line for line in lines if line["event"] == "ready")
        for client in clients:
            await client.end()


# --- the end --------------------------------------------------------------------------------------------------


async def with_writes_in_flight(peer: Peer) -> list[WireClient]:
    """Two clients with writes that have begun and not ended."""
    clients = [await WireClient.connect(peer.endpoint) for _ in range(2)]
    for number, client in enumerate(clients):
        client.send(WRITE, number * 4096, payload=bytes([number + 1]) * 4096)
        # Requests are begun in the order in which they come: when this one is answered the write is under way.
        marker = client.send(READ, 0, 512)
        assert (await client.reply(512)).cookie == marker
    return clients


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_in_flight_is_finished(signal_number: signal.Signals, disk: Path) -> None:
    with serving(filtered(HELD)) as (peer, workers):
        clients = await with_writes_in_flight(peer)
        for worker in workers:
            worker.send_signal(signal_number)  # as Ctrl-C does, which reaches all of them
        peer.process.send_signal(signal_number)
        Path("go.on").touch()
        for client in clients:
            reply = await client.reply()
            assert (reply.cookie, reply.error) == (1, 0)
            assert await is_gone(client)
            client.close()
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 0
    assert disk.read_bytes()[:8192] == b"\1" * 4096 + b"\2" * 4096


async def test_workers_of_a_server_that_was_killed_end(disk: Path) -> None:
    """In order: what was in flight is answered. Nobody else has the disk before they are gone."""
    with serving(filtered(HELD)) as (peer, workers):
        clients = await with_writes_in_flight(peer)
        peer.stop(signal.SIGKILL)
        assert "Is another process using the image" in failure("serve", "-k", "s", "-f", "raw", disk)
        Path("go.on").touch()
        for client in clients:
            assert (await client.reply()).error == 0
            assert await is_gone(client)
            client.close()
        for worker in workers:
            worker.wait(PATIENCE_S)


async def test_a_worker_that_was_killed_takes_its_clients_with_it(disk: Path) -> None:
    """Others go on, and take those who come. When none is left, the server ends."""
    with serving("-f", "raw", disk) as (peer, workers):
        clients = [await WireClient.connect(peer.endpoint) for _ in range(2)]
        alone, busy = sorted(workers, key=lambda worker: clients_of(peer, worker))
        assert (clients_of(peer, alone), clients_of(peer, busy)) == (1, 1)
        busy.send_signal(signal.SIGKILL)
        # Another client may have left right before, which the worker had no time to tell.
        peer.until_logged(f"worker process {busy.pid}: ended by signal 9; clients: ")
        assert "are gone, 1 workers are left" in peer.log()
        ended, pending = await asyncio.wait(
            [asyncio.create_task(is_gone(client)) for client in clients], return_when=asyncio.FIRST_COMPLETED
        )
        assert (len(ended), len(pending)) == (1, 1)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        another = await WireClient.connect(peer.endpoint)
        assert clients_of(peer, alone) == 2
        alone.send_signal(signal.SIGKILL)
        assert await is_gone(another)
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 1
        peer.stopped = True
        assert "no worker process is left to serve the clients" in peer.log()
        for client in (*clients, another):
            client.close()


async def test_a_second_signal_ends_all_at_once(disk: Path) -> None:
    with serving(filtered(HELD)) as (peer, workers):
        clients = await with_writes_in_flight(peer)
        assert peer.endpoint.socket_path is not None
        peer.process.send_signal(signal.SIGTERM)
        until(lambda: not Path(str(peer.endpoint.socket_path)).exists(), "the socket is gone")
        peer.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 128 + signal.SIGTERM
        peer.stopped = True
        for worker in workers:
            worker.wait(PATIENCE_S)
        for client in clients:
            client.close()


def test_what_a_worker_could_not_flush_is_told(disk: Path) -> None:
    words = ["--workers", "2", "-q", "--run", "true", filtered(LOSES_WRITES)]
    says = "not everything could be flushed, what was written last may be lost: the disk is gone"
    done = subprocess.run([*PYNBD, *words], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"pynbd serve: {says}"


# --- the beginning --------------------------------------------------------------------------------------------


def test_an_error_of_a_worker_is_told_once(disk: Path) -> None:
    what = filtered(FAILS_IN_WORKERS.format('raise OSError(5, "not for me")'))
    assert failure("serve", "--workers", "3", "-k", "s", what) == "not for me"
    what = filtered(FAILS_IN_WORKERS.format('raise ArithmeticError("a mistake")'))
    assert failure("serve", "--workers", "3", "-k", "s", what).startswith("ArithmeticError: a mistake (")
    what = filtered(FAILS_IN_WORKERS.format("__import__('os')._exit(7)"))
    assert failure("serve", "--workers", "2", "-k", "s", what).endswith(": exit status 7")
    assert not Path("s").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_breaks_off_an_opening(number: signal.Signals, disk: Path) -> None:
    words = [*PYNBD, "--workers", "2", "-k", "s", filtered(SLOW_TO_OPEN)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert [server.stderr.readline() for _ in range(2)] == ["opening\n"] * 2
            server.send_signal(number)
            # The pipe ends when the workers, which hold it too, have ended.
            said = server.communicate(timeout=PATIENCE_S)[1]
            if number == signal.SIGTERM:
                assert (server.returncode, said) == (1, "pynbd serve: stopped before clients could connect\n")
            else:
                assert (server.returncode, said) == (-number, "")
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.raw"], "Could not open 'missing.raw': No such file"),
        (["disk.raw"], "its format was guessed"),
        (["driver=memory,size=1M"], "(driver memory) is for one process"),
        (["-f", "raw", "--filter", "delay,read=1ms", "disk.raw"], "(driver delay) is for one process"),
        (["-f", "raw", "-s", "disk.raw"], "export '': snapshot can't be had with several workers"),
        (["-f", "raw", "-B", "b", "disk.raw"], "export '': bitmaps can't be had with several workers"),
        (["-f", "raw", "--client-limits", "requests=3", "disk.raw"], "client-limits: requests can't be had"),
        (["-f", "raw", "--client-limits", "bytes-per-second=3", "disk.raw"], "bytes-per-second can't be had"),
        (["--single", "-f", "raw", "disk.raw"], "--workers: there is one client"),
    ],
)  # fmt: skip
def test_what_can_not_be_had(words: list[str], says: str, disk: Path) -> None:
    assert says in failure("serve", "--workers", "2", *([] if "--single" in words else ["-k", "s"]), *words)
    assert not Path("s").exists()


def test_resize_can_not_be_had(disk: Path) -> None:
    Path("c.toml").write_text(
        '[server]\nworkers = "auto"\n[export.a]\ndisk = "disk.raw"\nformat = "raw"\nresize = true\n'
    )
    says = "c.toml: export 'a': resize can't be had with several workers: the others would not learn of another size"
    assert failure("serve", "--check-config", "--config", "c.toml") == says


@pytest.mark.parametrize("text", ["0", "65", "-1", "many", ""])
def test_no_numbers_of_workers(text: str, disk: Path) -> None:
    run(*PYNBD, f"--workers={text}", disk, status=1)


def test_one_worker_is_none(disk: Path) -> None:
    """So disks are served that several could not have."""
    with pynbd_serve("--workers", "1", disk) as peer:
        assert children(peer.pid) == []


def test_as_many_as_processors(disk: Path) -> None:
    count = len(os.sched_getaffinity(0))
    with pynbd_serve("--workers", "auto", "-f", "raw", disk) as peer:
        assert len(children(peer.pid)) == (count if count > 1 else 0)


def test_a_command(disk: Path) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    command = ["--workers", "2", "-f", "raw", "--run", 'nbdinfo --size "$uri"; exit 7', str(disk)]
    assert run(*PYNBD, *command, status=7) == f"{DISK_BYTES}\n"


def test_the_background_holds_nothing_of_who_started_it(disk: Path) -> None:
    """The command returns, with the ends of its pipes, while the workers serve."""
    require_tool("nbdinfo", package="libnbd-bin")
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"pynbd-test-{os.getpid()}.sock"  # a short name
    words = ["--workers", "2", "--fork", "--pid-file", "pid", "-f", "raw", "-k", str(place), str(disk)]
    assert run(*PYNBD, *words) == ""
    server = Daemon(int(Path("pid").read_text()))
    workers = children(server.pid)
    try:
        assert len(workers) == 2
        for process in workers:
            assert {os.readlink(f"/proc/{process.pid}/fd/{stream}") for stream in (0, 1, 2)} == {"/dev/null"}  # noqa: PTH115  # what it names
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={place}") == f"{DISK_BYTES}\n"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE_S)
    assert all(worker.poll() == 0 for worker in workers)
    assert not Path("pid").exists()
    assert not place.exists()


def test_started_with_sockets(disk: Path) -> None:
    """Those that listen are the server's alone."""
    require_tool("nbdcopy", package="libnbd-bin")
    words = [sys.executable, "-m", "pynbd", "serve", "--workers", "2", "-f", "raw", str(disk)]
    run("nbdcopy", "--", "[", *words, "]", "copy.raw", env={"PATH": SYSTEM_PATH})
    assert Path("copy.raw").read_bytes() == disk.read_bytes()


# --- rights ---------------------------------------------------------------------------------------------------


def test_all_of_them_are_confined(disk: Path) -> None:
    if landlock.version() < 1:
        pytest.skip("this kernel has no Landlock")
    with serving("--confine", "-f", "raw", disk) as (peer, workers):
        for pid in (peer.pid, *(worker.pid for worker in workers)):
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
        run("nbdcopy", "--threads=2", "--connections=2", peer.uri(), "copy.raw")


async def test_a_second_signal_ends_workers_that_are_confined(disk: Path) -> None:
    """Whom no signal of the server reaches any more (Landlock of version 6)."""
    if landlock.version() < 1:
        pytest.skip("this kernel has no Landlock")
    with serving("--confine", filtered(HELD)) as (peer, workers):
        clients = await with_writes_in_flight(peer)
        peer.process.send_signal(signal.SIGTERM)
        until(lambda: not Path(str(peer.endpoint.socket_path)).exists(), "the socket is gone")
        peer.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(peer.process.wait, PATIENCE_S) == 128 + signal.SIGTERM
        peer.stopped = True
        for worker in workers:
            worker.wait(PATIENCE_S)
        for client in clients:
            client.close()


def test_all_of_them_are_another_user(disk: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with serving("--user", "nobody", "-f", "raw", disk) as (peer, workers):
        peer.until_logged("clients can connect")
        for pid in (peer.pid, *(worker.pid for worker in workers)):
            uids = Path(f"/proc/{pid}/status").read_text().split("Uid:\t")[1].split()[:4]
            assert "0" not in uids
