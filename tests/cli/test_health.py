"""`pynbd health`: servers that answer, and those that do not."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests import peers
from tests.cli.pynbd_command import PYNBD, failure, pynbd


def health(status: int = 0, **variables: str | Path) -> str:
    """What it says of the server that those variables describe."""
    env = {f"PYNBD_SERVE_{name}": str(value) for name, value in variables.items()}
    return peers.run(*PYNBD, "health", env=env, status=status)


def test_servers_that_answer(random_disk: Path) -> None:
    with peers.pynbd_serve(random_disk, tcp=True) as peer:
        assert pynbd("health", peer.uri()) == f"127.0.0.1:{peer.endpoint.port}: answers\n"
        assert health(PORT=str(peer.endpoint.port)) == f"127.0.0.1:{peer.endpoint.port}: answers\n"
        # as in an image, where it listens on all addresses
        assert "127.0.0.1" in health(PORT=str(peer.endpoint.port), DEFAULT_BIND="0.0.0.0")
    with peers.qemu_nbd(random_disk) as peer:
        assert pynbd("health", peer.uri()) == f"{peer.endpoint.socket_path}: answers\n"


def test_every_address_of_the_configuration_file_is_asked(tmp_path: Path, random_disk: Path) -> None:
    with peers.pynbd_serve("-r", random_disk, tcp=True) as one, peers.pynbd_serve("-r", random_disk) as other:
        config = tmp_path / "pynbd.toml"
        config.write_text(
            f'[server]\nlisten = ["127.0.0.1:{one.endpoint.port}", "unix:{other.endpoint.socket_path}"]\n'
        )
        assert health(CONFIG=config).count(": answers\n") == 2
        other.stop()
        with pytest.raises(peers.CommandError, match=r"nbd\.sock.: No such file"):
            health(CONFIG=config)


def test_a_server_that_demands_tls_answers_without_certificates(pki: Path, random_disk: Path) -> None:
    """Who watches over it need not be a client that may come in."""
    with peers.pynbd_serve("--tls-certificates", pki, "--tls-verify-peer", random_disk, tcp=True) as peer:
        assert "answers, and says no more without TLS" in health(PORT=str(peer.endpoint.port))
        uri = f"nbds://localhost:{peer.endpoint.port}/?tls-certificates={pki}"
        assert pynbd("health", uri) == f"localhost:{peer.endpoint.port}: answers\n"
        assert "certificate" in failure("health", f"{uri}/stranger")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    assert "Connection refused" in failure("health", f"nbd://127.0.0.1:{peers.free_port()}")
    assert "No such file" in failure("health", f"nbd+unix:///?socket={tmp_path}/none")


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        told = failure("health", "--timeout", "0.2", f"nbd://127.0.0.1:{port}")
        assert told == f"'127.0.0.1:{port}' does not answer within 0.2 s"


def test_what_is_no_nbd_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(peers.READY_LIMIT_S)
        port = other.getsockname()[1]

        def answer() -> None:
            with other.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert f"Failed to connect to '127.0.0.1:{port}'" in failure("health", f"nbd://127.0.0.1:{port}")
        finally:
            thread.join()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "1e9", "nan"])
def test_times_that_are_none(seconds: str) -> None:
    assert "is no time in seconds" in failure("health", f"--timeout={seconds}", "nbd://localhost")


def test_a_port_that_only_the_server_knows() -> None:
    with pytest.raises(peers.CommandError, match="the server takes any port there"):
        health(PORT="0")
