"""Keys for TLS: what is wrong with a file of them, who is let in, and that no certificate stands in for one."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto import tls_credentials
from pynbd.crypto.tls_credentials import TlsCredentials
from pynbd.crypto.tls_psk import TlsCredsPsk
from tests.crypto.tls_ends import credentials, secured

HAS_KEYS = hasattr(ssl.SSLContext, "set_psk_server_callback")
needs_keys = pytest.mark.skipif(not HAS_KEYS, reason="this Python's ssl has no pre-shared keys (3.13 has)")

KEYS = "alice:00112233445566778899aabbccddeeff\n\nbob:ffeeddccbbaa99887766554433221100\nc:d:" + "00" * 32 + "\n"

Make = Callable[..., TlsCredentials]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(endpoint: str, content: str = KEYS, **options: str) -> TlsCredentials:
        path = tmp_path / f"{endpoint}.psk"
        path.write_text(content)
        tree = {"qom-type": "tls-creds-psk", "id": "tls0", "endpoint": endpoint, "file": str(path), **options}
        made = Objects().make(tree)
        assert isinstance(made, TlsCredsPsk)
        return made

    return make


@pytest.mark.skipif(HAS_KEYS, reason="this Python's ssl has them")
def test_a_python_without_them(make: Make) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(OptionError, match=f"keys for TLS need Python 3.13 or later, and this is {version}"):
        make("server")


@needs_keys
@pytest.mark.parametrize("user", ["alice", "bob", "c:d"])
async def test_who_has_a_key(user: str, make: Make) -> None:
    async with secured(make("server"), make("client", username=user), hostname=None) as (server, client):
        assert server.identity == user
        assert server.version == "TLSv1.3"
        await client.send_all(b"data")
        assert await server.receive(10) == b"data"


@needs_keys
async def test_tls_1_2(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def old_context(endpoint: str) -> ssl.SSLContext:
        context = before(endpoint)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    before = tls_credentials.new_context
    monkeypatch.setattr("pynbd.crypto.tls_psk.new_context", old_context)
    async with secured(make("server"), make("client", username="alice"), hostname=None) as (server, _):
        assert (server.version, server.identity) == ("TLSv1.2", "alice")


@needs_keys
@pytest.mark.parametrize(
    "content",
    ["alice:ff112233445566778899aabbccddeeff\n", KEYS.replace("alice", "mallory") + "alice:" + "11" * 16],
)
async def test_who_has_another_key(content: str, make: Make) -> None:
    with pytest.raises(OSError, match="the TLS handshake failed"):
        async with secured(make("server"), make("client", content, username="alice"), hostname=None):
            pass


@needs_keys
async def test_whom_nobody_knows(make: Make) -> None:
    with pytest.raises(OSError, match="the TLS handshake failed"):
        async with secured(make("server"), make("client", "eve:" + "11" * 16, username="eve"), hostname=None):
            pass


@needs_keys
async def test_a_certificate_is_no_key(make: Make, pki: Path) -> None:
    """Whoever has any certificate could stand between the ends, for nobody verifies it here."""
    with pytest.raises(OSError, match=r"not that it knows the key|handshake failed"):
        async with secured(
            credentials("server", pki, verify_peer=False), make("client", username="alice"), hostname=None
        ):
            pass


@needs_keys
async def test_reload(make: Make) -> None:
    server = make("server", "bob:" + "11" * 16)
    client = make("client", username="alice")
    with pytest.raises(OSError, match="the TLS handshake failed"):
        async with secured(server, client, hostname=None):
            pass
    make("server", KEYS)  # writes the file
    server.reload()
    async with secured(server, client, hostname=None) as (end, _):
        assert end.identity == "alice"


@needs_keys
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("alice", "line 1: expected USER:KEY, the key in hexadecimal"),
        ("00112233445566778899aabbccddeeff", "line 1: expected USER:KEY, the user's name"),
        (":00112233445566778899aabbccddeeff", "line 1: expected USER:KEY, the user's name"),
        ("\nalice:secret", "line 2: expected USER:KEY, the key in hexadecimal"),
        ("alice:0011", "line 1: a key of 2 bytes, expected 16 to 256"),
        ("alice:" + "00" * 257, "line 1: a key of 257 bytes, expected 16 to 256"),
        ("x" * 129 + ":" + "00" * 16, "the user's name of 1 to 128 bytes"),
        ("bob:" + "00" * 16, "has no key for username 'alice'"),
    ],
)
def test_what_is_wrong(content: str, says: str, make: Make) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        make("client", content, username="alice")
    assert "secret" not in str(caught.value)


@needs_keys
def test_files(make: Make, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text(KEYS)
    tree = {"qom-type": "tls-creds-psk", "id": "tls0", "endpoint": "server"}
    made = Objects().make({**tree, "dir": str(tmp_path)})
    assert "0011" not in repr(made)
    with pytest.raises(OptionError, match="give either dir or file"):
        Objects().make(tree)
    with pytest.raises(FileNotFoundError, match=r"/nonexistent/keys\.psk: No such file"):
        Objects().make({**tree, "dir": "/nonexistent"})
