"""Secrets: as QEMU reads them, and never shown."""

from __future__ import annotations

import base64
import os
import sys
import traceback
from pathlib import Path

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto.library import aes_encryptor
from pynbd.crypto.secrets import MAX_SECRET_BYTES, Secret

HUNTER = "hunter2"
KEY = bytes(range(32))
IV = bytes(range(16))


def secret(objects: Objects | None = None, **options: str) -> Secret:
    """One secret, with the id `s` unless it is given."""
    made = (objects or Objects()).make({"qom-type": "secret", "id": "s", **options})
    assert isinstance(made, Secret)
    return made


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def encrypted(content: bytes) -> bytes:
    """As QEMU wants it: AES-256-CBC, PKCS #7."""
    padding = 16 - len(content) % 16
    return aes_encryptor(KEY, "cbc", IV).update(content + bytes([padding]) * padding)


def with_key() -> Objects:
    objects = Objects()
    secret(objects, id="key", data=text(KEY), format="base64")
    return objects


def test_data() -> None:
    assert secret(data=HUNTER).reveal() == HUNTER.encode()
    assert secret(data="pässwörd").passphrase() == "pässwörd".encode()
    assert secret(data="").reveal() == b""
    assert secret(data="\udcff").reveal() == b"\xff"  # as it came from the command line


def test_a_file_is_taken_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"with a newline\n")
    assert secret(file=str(path)).reveal() == b"with a newline\n"


def test_base64(tmp_path: Path) -> None:
    content = os.urandom(100)
    path = tmp_path / "key"
    path.write_bytes(base64.encodebytes(content))
    assert secret(file=str(path), format="base64").reveal() == content
    assert secret(data=text(content), format="base64").reveal() == content


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000])
def test_encrypted_by_another_secret(length: int, tmp_path: Path) -> None:
    content = os.urandom(length)
    options = {"keyid": "key", "iv": text(IV)}
    assert secret(with_key(), data=text(encrypted(content)), format="base64", **options).reveal() == content
    path = tmp_path / "secret"
    path.write_bytes(encrypted(content))
    assert secret(with_key(), file=str(path), **options).reveal() == content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either data or file"),
        ({"data": HUNTER, "file": "x"}, "give either data or file"),
        ({"data": HUNTER + "!", "format": "base64"}, "the secret is no base64"),
        ({"data": HUNTER, "iv": text(IV)}, "iv has a meaning only together with keyid"),
        ({"data": HUNTER, "keyid": "none"}, "there is no secret 'none'"),
        ({"data": HUNTER, "keyid": "key"}, "iv must be 16 bytes in base64; it has 0"),
        ({"data": HUNTER, "keyid": "key", "iv": "AAAA"}, "iv must be 16 bytes in base64; it has 3"),
        ({"data": HUNTER, "keyid": "key", "iv": "!"}, "iv is no base64"),
        ({"data": HUNTER, "keyid": "key", "iv": text(IV)}, "7 encrypted bytes are no multiple of 16"),
        ({"data": "", "keyid": "key", "iv": text(IV)}, "0 encrypted bytes"),
        ({"data": "A" * 16, "keyid": "key", "iv": text(IV)}, "it was not encrypted with 'key'"),
        ({"data": HUNTER, "keyid": "short", "iv": text(IV)}, "keyid 'short' has 5 bytes, expected 32"),
        ({"data": "x" * (MAX_SECRET_BYTES + 1)}, f"more than {MAX_SECRET_BYTES} bytes"),
    ],
)
def test_wrong_ones(options: dict[str, str], said: str) -> None:
    objects = with_key()
    secret(objects, id="short", data="12345")
    with pytest.raises(OptionError) as caught:
        secret(objects, **options)
    assert said in str(caught.value)
    assert HUNTER not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"secret 's': .*/none: No such file"):
        secret(file=str(tmp_path / "none"))


def test_a_file_that_never_ends() -> None:
    with pytest.raises(OptionError, match="more than"):
        secret(file="/dev/zero")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_passphrases_are_text(content: bytes) -> None:
    made = secret(data=text(content), format="base64")
    assert made.reveal() == content
    with pytest.raises(OptionError, match="must be UTF-8 without NUL"):
        made.passphrase()


def test_neither_repr_nor_str_shows_it() -> None:
    made = secret(data=HUNTER)
    assert HUNTER not in f"{made!r} {made}"
    options = Secret.Options(qom_type="secret", id="s", data=HUNTER)  # type: ignore[call-arg]
    assert HUNTER not in f"{options!r} {options}"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(OptionError, match=r"pip install 'pynbd\[crypto\]'"):
        secret(with_key(), data="A" * 16, keyid="key", iv=text(IV))
