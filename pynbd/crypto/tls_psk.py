"""`TlsCredsPsk`: keys that both ends have already, under an id, as QEMU's object `tls-creds-psk`.

    tls-creds-psk,id=tls0,endpoint=server,dir=/etc/pynbd                keys.psk, with a line USER:KEY for each client
    tls-creds-psk,id=tls0,endpoint=client,dir=/etc/pynbd,username=alice
    tls-creds-psk,id=tls0,endpoint=client,file=alice.psk,username=alice

Keys are hexadecimal. Python's ssl knows them from 3.13 on.
"""

import binascii
import errno
import socket
import ssl
import sys
from pathlib import Path
from typing import ClassVar, Literal

from pynbd.block.errors import OptionError
from pynbd.block.objects import ObjectOptions, Objects
from pynbd.crypto.tls_credentials import TlsCredentials, new_context
from pynbd.crypto.tls_socket import TlsFailure, TlsSocket

MAX_KEYS_BYTES = 16 << 20
"""The largest file of keys: a hundred thousand users and more."""

MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 256
"""Shorter ones can be guessed, longer ones OpenSSL does not take."""

MAX_USER_BYTES = 128
"""The longest name of a user that OpenSSL takes."""

CIPHERS = "kECDHEPSK+AESGCM:kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kECDHEPSK+AES:kDHEPSK+AES:kPSK+AESGCM"
"""For TLS 1.2, whose other ciphers want certificates."""


class TlsCredsPskOptions(ObjectOptions, frozen=True, kw_only=True):
    """Options of keys.

    Args:
        endpoint: which end they are for, `client` or `server`.
        dir: a folder with the file keys.psk; or else
        file: the file.
        username: whose key a client uses.
    """

    endpoint: Literal["client", "server"] = "client"
    dir: str = ""
    file: str = ""
    username: str = "qemu"


class TlsCredsPsk(TlsCredentials):
    """Keys by user."""

    kind = "tls-creds-psk"
    Options: ClassVar[type[ObjectOptions]] = TlsCredsPskOptions

    def __init__(self, options: ObjectOptions, objects: Objects) -> None:
        super().__init__(options, objects)
        assert isinstance(options, TlsCredsPskOptions)
        self.options = options
        self.endpoint = options.endpoint
        if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
            version = ".".join(map(str, sys.version_info[:2]))
            raise OptionError(f"{self._name}: keys for TLS need Python 3.13 or later, and this is {version}")
        self._keys = self._load()

    def __repr__(self) -> str:
        return f"TlsCredsPsk(id={self.id!r})"

    @property
    def wants_client_identity(self) -> bool:
        return True

    def reload(self) -> None:
        self._keys = self._load()

    def files(self) -> list[Path]:
        return [Path(name) for name in (self.options.dir, self.options.file) if name]

    def begin(self, sock: socket.socket, hostname: str | None = None) -> TlsSocket:
        # A context for each connection: what asks for a key does not say for which one it asks.
        context = new_context(self.endpoint)
        context.set_ciphers(CIPHERS)
        server = self.endpoint == "server"
        users: list[str] = []
        if server:
            # The types of Python 3.11, which is the least that this runs on, know neither of the two.
            context.set_psk_server_callback(lambda user: self._key_of(user or "", users))  # type: ignore[attr-defined]
        else:
            key = self._keys[self.options.username]
            context.set_psk_client_callback(lambda _: (self.options.username, key))  # type: ignore[attr-defined]

        def identify(connection: ssl.SSLObject) -> str:
            if connection.getpeercert(binary_form=True) is not None:
                # Nobody verifies it: it may be anybody's.
                raise TlsFailure(errno.EACCES, "the other end has shown a certificate, and not that it knows the key")
            return users[-1] if users else ""

        return TlsSocket(sock, context, server_side=server, identify=identify)

    def _key_of(self, user: str, users: list[str]) -> bytes:
        key = self._keys.get(user, b"")
        if key:
            users.append(user)
        return key

    # --- the file ---------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self.kind} {self.id!r}"

    def _load(self) -> dict[str, bytes]:
        options = self.options
        if bool(options.dir) == bool(options.file):
            raise OptionError(f"{self._name}: give either dir or file")
        path = Path(options.file or Path(options.dir, "keys.psk"))
        try:
            with path.open("rb") as file:
                content = file.read(MAX_KEYS_BYTES + 1)
        except OSError as problem:
            raise OSError(problem.errno, f"{self._name}: {path}: {problem.strerror}") from None
        if len(content) > MAX_KEYS_BYTES:
            raise OptionError(f"{self._name}: {path}: longer than {MAX_KEYS_BYTES} bytes")
        keys: dict[str, bytes] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                user, key = self._parsed(line, f"{self._name}: {path}, line {number}")
                keys[user] = key
        if self.endpoint == "client" and options.username not in keys:
            raise OptionError(f"{self._name}: {path} has no key for username {options.username!r}")
        return keys

    @staticmethod
    def _parsed(line: bytes, where: str) -> tuple[str, bytes]:
        """The user and the key of a line; the key is repeated in no message."""
        name, colon, text = line.rpartition(b":")
        try:
            user, key = name.decode(), binascii.unhexlify(text.strip())
        except ValueError:
            raise OptionError(f"{where}: expected USER:KEY, the key in hexadecimal") from None
        if not colon or not 1 <= len(name) <= MAX_USER_BYTES or "\0" in user:
            raise OptionError(f"{where}: expected USER:KEY, the user's name of 1 to {MAX_USER_BYTES} bytes")
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise OptionError(f"{where}: a key of {len(key)} bytes, expected {MIN_KEY_BYTES} to {MAX_KEY_BYTES}")
        return user, key
