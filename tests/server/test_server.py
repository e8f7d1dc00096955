"""Listening, the clients that come and go, the limits of their number, and an orderly end."""

import asyncio
import errno
import logging
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from nbd_protocol.constants import Command, Errno, ReplyMode
from pynbd.server import server as server_module
from pynbd.server.limits import ClientLimits
from pynbd.server.server import NbdServer, remove_dead_socket
from tests.server.clients import (
    LIMIT_S,
    MODES,
    Client,
    add_export,
    no_descriptors_left,
    open_descriptors,
    serving,
)
from tests.server.held import HELD, held, pattern

KIB, MIB = 1 << 10, 1 << 20

MEMORY = {"driver": "memory", "size": 4 * MIB}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="pynbd-test-") as folder:
        yield Path(folder)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


# --- listening ------------------------------------------------------------------------------------------------


async def test_a_dead_socket_is_replaced_and_a_live_one_is_not(folder: Path) -> None:
    path = str(folder / "nbd")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    first, second = NbdServer([]), NbdServer([])
    first.listen_unix(path)
    with pytest.raises(OSError, match="another server listens there"):
        second.listen_unix(path)
    await first.close()
    assert not Path(path).exists()
    second.listen_unix(path)
    await second.close()


async def test_a_file_that_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "data"
    path.write_text("precious")
    server = NbdServer([])
    with pytest.raises(OSError, match="is no socket"):
        server.listen_unix(str(path))
    assert path.read_text() == "precious"
    remove_dead_socket(str(folder / "nothing"))
    await server.close()


async def test_a_socket_that_another_server_has_made_since_is_left_alone(folder: Path) -> None:
    path = folder / "nbd"
    first, second = NbdServer([]), NbdServer([])
    first.listen_unix(str(path))
    path.unlink()
    second.listen_unix(str(path))
    await first.close()
    assert path.exists()
    await second.close()
    assert not path.exists()


async def test_tcp_ports(folder: Path) -> None:
    before = open_descriptors()
    server, other = NbdServer([]), NbdServer([])
    ((host, port),) = await server.listen_tcp("127.0.0.1", 0)
    assert host == "127.0.0.1"
    assert port
    with pytest.raises(OSError, match=f"can't listen on 127.0.0.1:{port}: "):
        await other.listen_tcp("127.0.0.1", port)
    everywhere = await other.listen_tcp("", 0)
    assert len({port for _, port in everywhere}) == 1
    await server.close()
    await other.close()
    assert open_descriptors() == before


async def test_ipv6() -> None:
    async with serving(MEMORY) as served:
        ((host, port),) = await served.server.listen_tcp("::1", 0)
        assert host == "::1"
        sock = socket.socket(socket.AF_INET6)
        served.sockets.append(sock)
        sock.setblocking(False)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.get_running_loop().sock_connect(sock, ("::1", port))
            assert (await asyncio.get_running_loop().sock_recv(sock, 8)) == b"NBDMAGIC"


# --- clients --------------------------------------------------------------------------------------------------


async def test_clients_are_counted() -> None:
    gone: list[int] = []
    async with serving(MEMORY, MEMORY) as served:
        server = served.server
        server.on_client_gone.append(lambda: gone.append(len(server.connections)))
        clients = [await served.connect(), await served.connect("disk1"), await served.connect("disk1")]
        assert [export.clients for export in server.exports.values()] == [1, 2]
        assert server.served == 3
        assert await clients[1].disconnect()
        clients[2].sock.close()
        await served.until_gone(1)
        assert [export.clients for export in server.exports.values()] == [1, 0]
        assert gone == [2, 1]


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_clients_than_allowed_and_the_next_when_one_leaves(most: int) -> None:
    async with serving(MEMORY, server_options={"max_clients": most}) as served:
        clients = [await served.connect() for _ in range(most)]
        waiting = [asyncio.create_task(served.connect()) for _ in range(2)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert len(served.server.connections) == most
        for number, task in enumerate(waiting):
            if number % 2 or most == 1:
                assert await (clients.pop(0)).disconnect()
            else:
                clients.pop(0).sock.close()
            async with asyncio.timeout(LIMIT_S):
                clients.append(await task)
            await clients[-1].write(0, b"x")


@pytest.mark.parametrize("how", ["vanish", "garbage", "abort", "silence"])
async def test_handshakes_that_fail_leave_their_place(how: str) -> None:
    """Also the last place: nobody else would leave, and let the next one in."""
    async with serving(
        MEMORY, server_options={"max_clients": 1, "limits": ClientLimits(handshake_timeout=0.05)}
    ) as served:
        for _ in range(5):
            sock = await served.open_socket()
            match how:
                case "vanish":
                    sock.close()
                case "garbage":
                    sock.send(b"\xff" * 100)
                case "abort":
                    sock.send(b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0")
        server = served.server
        server.handshake_timeout_s = LIMIT_S if how != "silence" else 0.2
        client = await served.connect()
        await client.write(0, b"x")
        assert await client.disconnect()
        client = await served.connect()
        await client.write(0, b"x")


async def test_every_place_is_given_again_and_again() -> None:
    async with serving(MEMORY, server_options={"max_clients": 3}) as served:

        async def come_and_go(seed: int) -> None:
            for turn in range(20):
                if (seed + turn) % 3 == 0:
                    (await served.open_socket()).close()
                client = await served.connect(mode=MODES[turn % 3])
                await client.write(4096 * seed, bytes([turn]) * 4096)
                assert await client.read(4096 * seed, 4096) == bytes([turn]) * 4096
                if turn % 2:
                    assert await client.disconnect()
                else:
                    client.sock.close()

        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(come_and_go(seed) for seed in range(10)))


async def test_out_of_descriptors_clients_wait_and_are_served_later(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(MEMORY) as served:
        working = await served.connect()
        sock = await served.open_socket()  # its handshake begins
        late = socket.socket(socket.AF_UNIX)
        served.sockets.append(late)
        late.setblocking(False)
        with no_descriptors_left():
            async with asyncio.timeout(LIMIT_S):
                await asyncio.get_running_loop().sock_connect(late, served.address)
            await until(lambda: "can't accept a client" in caplog.text)
            # Who is in goes on; large reads, too, for which a descriptor would be wanted.
            await working.write(0, b"x" * MIB)
            assert await working.read(0, MIB) == b"x" * MIB
        async with asyncio.timeout(LIMIT_S):
            assert await asyncio.get_running_loop().sock_recv(late, 8) == b"NBDMAGIC"
            assert await asyncio.get_running_loop().sock_recv(sock, 8) == b"NBDMAGIC"


# --- stalls ---------------------------------------------------------------------------------------------------


async def begin_payload(client: Client, length: int, sent: int) -> None:
    """The beginning of a WRITE whose end does not come."""
    _, buffers = client.prepared(Command.WRITE, 0, payload=bytes(length))
    data = memoryview(b"".join(buffers))[:sent]
    await client.send_bytes(data)


async def test_those_who_hold_what_others_wait_for_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stall; those who wait for memory are not to blame, though they do not move either."""
    monkeypatch.setattr(server_module, "STALL_CHECK_S", 0.05)
    options = {"payload_pool": 2 * MIB}
    async with serving({"driver": "memory", "size": 64 * MIB}, server_options=options) as served:
        stalled = [await served.connect() for _ in range(2)]
        for client in stalled:
            await begin_payload(client, 32 * MIB, MIB + 300 * KIB)
        await until(lambda: served.server.budget.taken > MIB)
        others = [await served.connect() for _ in range(4)]
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(client.write(8 * MIB * n, bytes(8 * MIB)) for n, client in enumerate(others)))
        assert len(served.server.connections) >= 4
        assert all([not (await client.ask(Command.FLUSH)).error for client in others])


async def test_a_slow_reader_that_holds_what_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STALL_CHECK_S", 0.05)
    options = {"payload_pool": 0}
    async with serving({"driver": HELD, "size": 64 * MIB}, server_options=options) as served:
        held(served.node()).release()
        slow = await served.connect(mode=ReplyMode.SIMPLE, receive_bytes=1)
        await slow.send(Command.READ, 0, 32 * MIB)
        await until(lambda: served.server.budget.taken)
        other = await served.connect(mode=ReplyMode.SIMPLE)
        async with asyncio.timeout(LIMIT_S):
            assert await other.read(0, 32 * MIB) == pattern(0, 32 * MIB)
        assert not await slow.at_end()


async def test_a_payload_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STALL_CHECK_S", 0.01)
    monkeypatch.setattr(server_module, "STALL_CHECKS", 3)
    async with serving(MEMORY) as served:
        idle, stalled = await served.connect(), await served.connect()
        await begin_payload(stalled, 2 * MIB, MIB)
        assert not await stalled.at_end()
        assert len(served.server.connections) == 1
        await idle.write(0, b"who asks for nothing may stay")


async def test_who_moves_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STALL_CHECK_S", 0.005)
    monkeypatch.setattr(server_module, "STALL_CHECKS", 100)
    async with serving(MEMORY) as served:
        client = await served.connect()
        cookie, buffers = client.prepared(Command.WRITE, 0, payload=bytes(600 * KIB))
        data = b"".join(buffers)
        checks = len(data) // 20
        for start in range(0, len(data), checks):
            await client.send_bytes(data[start : start + checks])
            await asyncio.sleep(0.01)
        assert not (await client.reply(cookie)).error


# --- the end --------------------------------------------------------------------------------------------------


async def test_closing_ends_handshakes_and_idle_clients_at_once() -> None:
    async with serving(MEMORY) as served:
        shaking, idle = await served.open_socket(), await served.connect()
        await until(lambda: served.server._handshakes)
        async with asyncio.timeout(LIMIT_S):
            await served.server.close()
        assert await idle.at_end()
        async with asyncio.timeout(LIMIT_S):
            while await asyncio.get_running_loop().sock_recv(shaking, 100):
                pass
        with pytest.raises(OSError):
            await served.open_socket()


async def test_closing_waits_for_what_is_in_flight_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ABORT_GRACE_S", 0.05)
    async with serving({"driver": HELD}) as served:
        driver = held(served.node())
        client = await served.connect()
        await client.send(Command.WRITE, 0, payload=b"x" * 512)
        await driver.until(1)
        async with asyncio.timeout(LIMIT_S):
            await served.server.close(grace_s=0.05)
        assert not await client.at_end()
        # It was not cancelled: it ends when it ends, and then its connection is gone.
        (connection,) = served.server.connections
        assert connection.in_flight == 1
        driver.release()
        await served.until_gone()
        assert driver.written == {0: b"x" * 512}


async def test_a_client_that_takes_no_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ABORT_GRACE_S", 0.05)
    async with serving(MEMORY) as served:
        client = await served.connect(mode=ReplyMode.SIMPLE, receive_bytes=1)
        for _ in range(3):
            await client.send(Command.READ, 0, 4 * MIB)
        await until(lambda: any(connection.wire.queued for connection in served.server.connections))
        async with asyncio.timeout(LIMIT_S):
            await served.server.close(grace_s=0.05)
        assert not served.server.connections


async def test_removing_an_export_sends_its_clients_away_when_they_are_answered() -> None:
    async with serving(MEMORY, {"driver": HELD}) as served:
        driver = held(served.node("disk1"))
        others, busy, idle = await served.connect(), await served.connect("disk1"), await served.connect("disk1")
        cookie = await busy.send(Command.READ, 0, 512)
        await driver.until(1)
        removing = asyncio.create_task(served.server.remove_export("disk1"))
        assert await idle.at_end()
        assert (await busy.ask(Command.READ, 0, 512)).error == Errno.ESHUTDOWN
        assert "not present" in (await served.refused("disk1")).text
        assert not removing.done()
        driver.release()
        assert bytes((await busy.reply(cookie)).data) == pattern(0, 512)
        async with asyncio.timeout(LIMIT_S):
            export = await removing
        assert await busy.at_end()
        served.graph.detach(export.backend)
        await others.write(0, b"others do not notice")
        with pytest.raises(KeyError):
            await served.server.remove_export("disk1")


async def test_two_exports_are_removed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with serving(MEMORY) as served:
        for name in ("a", "b", "c"):
            await add_export(served.graph, served.server, name, {"driver": HELD})
        clients = {name: await served.connect(name) for name in ("a", "b", "c")}
        for name, client in clients.items():
            await client.send(Command.READ, 0, 512)
            await held(served.node(name)).until(1)
        drivers = [held(served.node(name)) for name in clients]
        removing = [asyncio.create_task(served.server.remove_export(name)) for name in clients]
        await asyncio.sleep(0)
        for left, driver in enumerate(reversed(drivers)):
            driver.release()
            await served.until_gone(2 - left)
        async with asyncio.timeout(LIMIT_S):
            for export in await asyncio.gather(*removing):
                served.graph.detach(export.backend)
        assert not caplog.records


async def test_an_export_whose_disk_has_gone_when_the_handshake_ends() -> None:
    async with serving(MEMORY, MEMORY) as served:
        export = served.server.exports["disk1"]
        info = export.info()
        export.info = lambda **_: info  # type: ignore[method-assign]  # what was told a moment ago
        node = export.backend.node
        served.graph.detach(export.backend)
        client = await served.connect("disk1")
        assert await client.at_end()
        await until(lambda: not served.server._handshakes)
        assert not served.server.connections
        served.graph.attach(export.backend, node)


async def test_an_export_that_is_removed_during_a_handshake() -> None:
    """Whoever got in between is sent away at once."""
    async with serving(MEMORY, MEMORY) as served:
        reached = 0
        for turns in range(30):
            if "disk1" not in served.server.exports:
                await add_export(served.graph, served.server, "disk1", MEMORY)
            task = asyncio.create_task(served.connect("disk1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            async with asyncio.timeout(LIMIT_S):
                export = await served.server.remove_export("disk1")
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, Client):
                assert await outcome.at_end()
                reached += 1
            served.sockets.pop().close()
            await served.until_gone()
            await until(lambda: not served.server._handshakes)
            served.graph.detach(export.backend)
        assert 0 < reached < 30


@pytest.mark.parametrize("in_use", [0, 3, 1000])
def test_any_port_of_vsock_is_one_that_uris_can_tell(in_use: int) -> None:
    """The kernel itself is asked in tests/attach: not every machine has vsock."""
    tried: list[int] = []

    class Socket:
        def bind(self, address: tuple[int, int]) -> None:
            tried.append(address[1])
            if len(tried) <= in_use:
                raise OSError(errno.EADDRINUSE, "in use")

    sock = cast(socket.socket, Socket())
    if in_use < 1000:
        server_module.bind_vsock(sock, 1, 0)
        assert len(tried) == in_use + 1
    else:
        with pytest.raises(OSError, match="in use"):
            server_module.bind_vsock(sock, 1, 0)
    assert all(49152 <= port <= 65535 for port in tried)
    tried.clear()
    if in_use:
        with pytest.raises(OSError, match="in use"):
            server_module.bind_vsock(sock, 1, 10809)
    else:
        server_module.bind_vsock(sock, 1, 10809)
    assert tried == [10809], "a port that is wanted is tried once"
