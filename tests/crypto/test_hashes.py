"""Hashes and PBKDF2: published vectors, and measured iterations that are a measure of something."""

from __future__ import annotations

import hashlib
import time

import pytest

from pynbd.block.errors import OptionError
from pynbd.crypto import hashes


def test_pbkdf2_as_in_rfc_6070() -> None:
    derived = hashes.derive_key("sha1", b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25)
    assert derived.hex() == "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"


def test_ripemd160() -> None:
    assert hashes.digest("ripemd160", b"abc").hex() == "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"


def test_unknown_ones_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match="hash-alg: there is no hash 'whirlpool' here; there are: md5, sha1"):
        hashes.check_hash("whirlpool", "hash-alg")


def test_one_that_openssl_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str, **_: object) -> None:
        raise ValueError("unsupported hash type " + name)

    monkeypatch.setattr(hashlib, "new", lacking)
    with pytest.raises(OptionError, match="hash-alg: the OpenSSL of this Python lacks the hash 'ripemd160'"):
        hashes.check_hash("ripemd160", "hash-alg")


def test_iterations_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that does 1000 iterations in a millisecond."""
    clock = 0.0

    def derive(hash_name: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
        nonlocal clock
        clock += iterations / 1e6
        return bytes(length)

    monkeypatch.setattr(hashes, "derive_key", derive)
    monkeypatch.setattr(time, "thread_time", lambda: clock)
    assert hashes.iterations_in("sha256", 64, 2.0) == pytest.approx(2_000_000, rel=1e-6)
    assert clock < 10 * hashes.MEASURED_S
