"""`pynbd serve` reads the rules of its configuration again: whom it lets in then, and what it says of mistakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbd_protocol.client_negotiation import ClientNegotiation
from nbd_protocol.constants import Command, Errno, ReplyMode
from nbd_protocol.negotiation_events import Established
from pynbd.server import landlock
from tests.peers import CommandError, Peer, pynbd_serve, require_tool, run
from tests.server.clients import LIMIT_S, Client, negotiate, negotiation_for

SIZE = f"{1 << 20}\n"

ME = os.geteuid()

EXPORT = '[export.a]\ndisk = "disk.raw"\nformat = "raw"\n'

TLS = '[server]\ntls-certificates = "pki"\ntls-verify-peer = true\n'

AUTHZ = '[[object]]\nqom-type = "authz-list"\nid = "who"\nrules = [{{ match = "CN={}", policy = "allow" }}]\n'


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration, in the working directory."""
    monkeypatch.chdir(tmp_path)
    require_tool("nbdinfo", package="libnbd-bin")
    Path("disk.raw").write_bytes(bytes(1 << 20))
    path = Path("pynbd.toml")
    path.write_text(EXPORT)
    return path


def reload(peer: Peer, config: Path, text: str, says: str = "rules of pynbd.toml were read again") -> None:
    """Write the configuration, send SIGHUP, and wait until the server has said something that it has not said yet."""
    before = peer.log().count(says)
    config.write_text(text)
    peer.process.send_signal(signal.SIGHUP)
    peer.until(lambda: peer.log().count(says) > before, f"{says!r} once more")


def may_use(peer: Peer, export: str = "a", query: str = "", status: int = 0) -> bool:
    """Whether nbdinfo can; the export is there then."""
    scheme = "nbds" if query else "nbd"
    uri = f"{scheme}+unix:///{export}?socket={peer.endpoint.socket_path}{query}"
    return run("nbdinfo", "--size", uri, status=status) == SIZE


@contextlib.contextmanager
def serving(config: Path, *words: str | Path, tcp: bool = False) -> Iterator[Peer]:
    with pynbd_serve("-v", "--config", config, *words, tcp=tcp) as peer:
        yield peer


async def connected(peer: Peer, export: str = "a") -> Client:
    """A connection that stays."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    async with asyncio.timeout(LIMIT_S):
        await asyncio.get_running_loop().sock_connect(sock, str(peer.endpoint.socket_path))
    negotiation: ClientNegotiation = negotiation_for(ReplyMode.STRUCTURED)
    negotiation.connect(export)
    event = await negotiate(sock, negotiation)
    assert isinstance(event, Established)
    return Client(sock, event)


# --- what changes ---------------------------------------------------------------------------------------------


async def test_who_may_use_an_export(config: Path) -> None:
    """By user at a Unix socket. A connection that is there stays as it is."""
    plain = config.read_text()
    with serving(config) as peer:
        assert may_use(peer)
        staying = await connected(peer)
        reload(peer, config, f'{plain}[[export.a.access]]\npolicy = "deny"\nuid = {ME}\n')
        may_use(peer, status=1)
        peer.until_logged("refused: export 'a': hidden from it by rule 0, deny uid=")
        await staying.write(0, b"still here")
        assert await staying.read(0, 10) == b"still here"
        reload(peer, config, f'{plain}[[export.a.access]]\npolicy = "read-only"\ngid = {os.getegid()}\n')
        reading = await connected(peer)
        assert (await reading.ask(Command.WRITE, 0, payload=bytes(512))).error == Errno.EPERM
        assert await reading.read(0, 10) == b"still here"
        await staying.write(0, b"still more")
        reload(peer, config, plain)
        writing = await connected(peer)
        await writing.write(0, b"as before ")
        for client in (staying, reading, writing):
            assert await client.disconnect()


def test_who_may_connect(config: Path) -> None:
    """By address, before a client has said a word."""
    plain = config.read_text()
    with serving(config, tcp=True) as peer:
        uri = f"nbd://127.0.0.1:{peer.endpoint.port}/a"
        assert run("nbdinfo", "--size", uri) == SIZE
        reload(peer, config, '[server]\naccess = [{ policy = "deny", address = "127.0.0.0/8" }]\n' + plain)
        run("nbdinfo", "--size", uri, status=1)
        peer.until_logged("refused: rule 0, deny address=127.0.0.0/8")
        reload(peer, config, '[server]\naccess = [{ policy = "allow", address = "127.0.0.1" }]\n' + plain)
        assert run("nbdinfo", "--size", uri) == SIZE


def test_each_export_has_rules_of_its_own(config: Path) -> None:
    """One that is not in the file any more keeps those that it had."""
    nobody = f'[[export.{{}}.access]]\npolicy = "deny"\nuid = {ME}\n'
    both = EXPORT + EXPORT.replace("export.a", "export.b").replace("disk.raw", "b.raw")
    Path("b.raw").write_bytes(bytes(1 << 20))
    config.write_text(both)
    with serving(config) as peer:
        assert may_use(peer, "a")
        assert may_use(peer, "b")
        reload(peer, config, both + nobody.format("b"))
        assert may_use(peer, "a")
        may_use(peer, "b", status=1)
        reload(peer, config, EXPORT + nobody.format("a"))
        may_use(peer, "a", status=1)
        may_use(peer, "b", status=1)
        peer.until_logged("pynbd.toml: what else has changed there than rules and limits wants a restart")


async def test_limits(config: Path) -> None:
    """Connections that are there count among those that there may be."""
    plain = config.read_text()
    with serving(config) as peer:
        staying = [await connected(peer) for _ in range(2)]
        reload(peer, config, f"[server.client-limits]\nconnections = 2\n{plain}")
        may_use(peer, status=1)
        peer.until_logged("has 2 connections already, the most it may have")
        assert await staying.pop().disconnect()
        await until_served(lambda: may_use(peer))
        reload(peer, config, plain)
        staying += [await connected(peer) for _ in range(4)]
        for client in staying:
            assert await client.read(0, 1) == b"\0"
            assert await client.disconnect()


async def until_served(use: Callable[[], bool]) -> None:
    """Try until a place is free: that a connection is gone shows at its own end before it does at the server's."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(CommandError):
                assert use()
                return
            await asyncio.sleep(0.05)


def test_limits_of_the_command_line_stay(config: Path) -> None:
    plain = config.read_text()
    with serving(config, "--client-limits", "connections=5") as peer:
        reload(peer, config, f"[server.client-limits]\nhandshake-timeout = 0.000001\n{plain}")
        assert may_use(peer)


def test_who_is_authorized(config: Path, pki: Path) -> None:
    Path("pki").symlink_to(pki)
    alice, bob = f"&tls-certificates={pki}", f"&tls-certificates={pki / 'bob'}"
    plain = config.read_text()
    config.write_text(TLS + 'tls-authz = "who"\n' + AUTHZ.format("alice") + plain)
    with serving(config) as peer:
        assert may_use(peer, query=alice)
        may_use(peer, query=bob, status=1)
        reload(peer, config, TLS + 'tls-authz = "who"\n' + AUTHZ.format("bob") + plain)
        may_use(peer, query=alice, status=1)
        peer.until_logged("refused: 'CN=alice' is not authorized")
        assert may_use(peer, query=bob)
        reload(peer, config, TLS + plain)
        assert may_use(peer, query=alice)
        assert may_use(peer, query=bob)
        reload(peer, config, TLS + plain + '[[export.a.access]]\npolicy = "allow"\nname = "CN=ali*"\n')
        assert may_use(peer, query=alice)
        may_use(peer, query=bob, status=1)
        rule = '[[export.a.access]]\npolicy = "allow"\nauthz = "who"\n'
        reload(peer, config, TLS + AUTHZ.format("bob") + plain + rule)
        may_use(peer, query=alice, status=1)
        assert may_use(peer, query=bob)
        assert "wants a restart" not in peer.log()


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("[export.a\n", "pynbd.toml: "),
        ("{}[[export.a.access]]\npolicy = 'perhaps'\n", "pynbd.toml: export.a.access.0.policy: "),
        (
            "{}[[export.a.access]]\npolicy = 'allow'\naddress = '10.0.0.0/99'\n",
            "pynbd.toml: export.a.access.0: address: ",
        ),
        ("{}[[export.a.access]]\npolicy = 'allow'\nuid = 'n.o.body'\n", "pynbd.toml: export.a.access.0: uid: "),
        (
            "{}[[export.a.access]]\npolicy = 'allow'\nname = 'CN=x'\n",
            "pynbd.toml: export.a.access.0: nobody can be told",
        ),
        ("[server.client-limits]\nconections = 1\n{}", "pynbd.toml: server.client-limits.conections: "),
        ("[server]\ntls-authz = 'x'\n{}", "pynbd.toml: server.tls-authz: "),
        ("[server]\naccess = [{{ policy = 'read-only' }}]\n{}", "pynbd.toml: server.access.0: "),
        ("{}[export.b]\ndisk = 'driver=nonsense'\n", "pynbd.toml: export.b.disk: "),
    ],
)
def test_a_mistake_leaves_all_as_it_was(config: Path, wrong: str, says: str) -> None:
    """What was right before it in the file does not hold, either."""
    denied = config.read_text() + '[[export.a.access]]\npolicy = "deny"\nuid = 4294967294\n'
    with serving(config) as peer:
        old = "the old rules of pynbd.toml stay in use: "
        reload(peer, config, wrong.format(config.read_text()), f"{old}{says}")
        assert may_use(peer)
        assert "were read again" not in peer.log()
        reload(peer, config, denied.replace("4294967294", str(ME)))
        may_use(peer, status=1)


def test_a_file_that_is_gone(config: Path) -> None:
    with serving(config) as peer:
        config.unlink()
        peer.process.send_signal(signal.SIGHUP)
        peer.until_logged("the old rules of pynbd.toml stay in use: pynbd.toml: No such file or directory")
        assert may_use(peer)


def test_names_without_tls(config: Path, pki: Path) -> None:
    """TLS begins with the server: a file that asks for it later changes nothing of this one."""
    plain = config.read_text()
    with serving(config) as peer:
        text = TLS.replace('"pki"', f'"{pki}"') + 'tls-authz = "who"\n' + AUTHZ.format("alice") + plain
        reload(peer, config, text, "of pynbd.toml stay in use: server.tls-authz: this server was started without TLS")
        assert may_use(peer)


# --- beside other things --------------------------------------------------------------------------------------


def test_disks_of_the_command_line_keep_their_rules(config: Path) -> None:
    Path("b.raw").write_bytes(bytes(1 << 20))
    plain = config.read_text()
    with serving(config, "-f", "raw", "--deny", f"uid={ME}", "b=b.raw") as peer:
        may_use(peer, "b", status=1)
        reload(peer, config, f'{plain}[[export.a.access]]\npolicy = "deny"\nuid = {ME}\n')
        may_use(peer, "a", status=1)
        may_use(peer, "b", status=1)
        reload(peer, config, plain)
        assert may_use(peer, "a")
        may_use(peer, "b", status=1)
        assert "wants a restart" not in peer.log()


def test_what_else_has_changed_wants_a_restart(config: Path) -> None:
    plain = config.read_text()
    with serving(config) as peer:
        reload(peer, config, plain.replace('format = "raw"', 'format = "raw"\nread-only = true'), "wants a restart")
        assert may_use(peer)


@pytest.mark.skipif(landlock.version() < 6, reason="this kernel's Landlock is older than Linux 6.12")
def test_a_server_that_is_confined_reads_its_file(config: Path) -> None:
    plain = config.read_text()
    with serving(config, "--confine") as peer:
        assert may_use(peer)
        reload(peer, config, f'{plain}[[export.a.access]]\npolicy = "deny"\nuid = "root"\n')
        may_use(peer, status=1 if ME == 0 else 0)
