"""Ciphers: each against one context of `cryptography` for each sector, and against vectors of the standards."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import OptionError
from pynbd.crypto import libcrypto
from pynbd.crypto.ciphers import (
    AES_KEY_BYTES,
    CIPHER_MODES,
    SECTOR_BYTES,
    CipherSpec,
    SectorCipher,
    legacy_aes_cipher,
    make_cipher,
)
from pynbd.crypto.hashes import digest
from pynbd.crypto.xts import XtsOverEcb

SOURCE = random.Random(4)

SPECS = [
    CipherSpec(cipher_alg=alg, cipher_mode=mode, ivgen_alg=ivgen, ivgen_hash_alg=hash_name)
    for alg in AES_KEY_BYTES
    for mode in CIPHER_MODES
    for ivgen, hash_name in (("plain", ""), ("plain64", ""), ("essiv", "sha256"), ("essiv", "md5"))
]


def name(spec: CipherSpec) -> str:
    return "-".join([spec.cipher_alg, spec.cipher_mode, spec.ivgen_alg, spec.ivgen_hash_alg]).rstrip("-")


def reference_iv(spec: CipherSpec, key: bytes, sector: int) -> bytes:
    number = (sector & 0xFFFFFFFF if spec.ivgen_alg == "plain" else sector).to_bytes(16, "little")
    if spec.ivgen_alg != "essiv":
        return number
    return Cipher(algorithms.AES(digest(spec.ivgen_hash_alg, key)), modes.ECB()).encryptor().update(number)


def reference(spec: CipherSpec, key: bytes, sector: int, data: bytes) -> bytes:
    """Encrypt one sector, as the standards say it."""
    iv = reference_iv(spec, key, sector)
    if spec.cipher_mode == "xts" and spec.cipher_alg == "aes-192":
        return reference_xts(key, iv, data)
    kinds: dict[str, Any] = {"xts": modes.XTS, "cbc": modes.CBC, "ctr": modes.CTR, "ecb": lambda _: modes.ECB()}
    return Cipher(algorithms.AES(key), kinds[spec.cipher_mode](iv)).encryptor().update(data)


def reference_xts(key: bytes, iv: bytes, data: bytes) -> bytes:
    """XTS block by block, which OpenSSL does not have with AES-192."""
    half = len(key) // 2
    blocks = Cipher(algorithms.AES(key[:half]), modes.ECB()).encryptor()
    tweak = int.from_bytes(Cipher(algorithms.AES(key[half:]), modes.ECB()).encryptor().update(iv), "little")
    done = b""
    for start in range(0, len(data), 16):
        masked = int.from_bytes(data[start : start + 16], "little") ^ tweak
        result = int.from_bytes(blocks.update(masked.to_bytes(16, "little")), "little") ^ tweak
        done += result.to_bytes(16, "little")
        tweak <<= 1
        if tweak >> 128:
            tweak ^= (1 << 128) | 0x87
    return done


def decrypted(cipher: SectorCipher, sector: int, data: bytes | bytearray) -> bytes:
    buffer = bytearray(data)
    cipher.decrypt(sector, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 3, 1 << 40])
def test_every_sector_is_as_by_itself(spec: CipherSpec, first: int) -> None:
    key = SOURCE.randbytes(spec.key_bytes)
    cipher = make_cipher(spec, key)
    for sectors in (1, 2, 7, 8, 9, 33):
        data = SOURCE.randbytes(sectors * SECTOR_BYTES)
        expected = b"".join(
            reference(spec, key, first + number, data[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES])
            for number in range(sectors)
        )
        assert cipher.encrypt(first, data) == expected
        assert cipher.encrypt(first, memoryview(bytearray(data))) == expected
        assert decrypted(cipher, first, expected) == data


@pytest.mark.parametrize("spec", SPECS[:: len(AES_KEY_BYTES) + 1], ids=name)
def test_nothing_at_all(spec: CipherSpec) -> None:
    cipher = make_cipher(spec, SOURCE.randbytes(spec.key_bytes))
    assert cipher.encrypt(5, b"") == b""
    cipher.decrypt(5, memoryview(bytearray()))


@given(spec=st.sampled_from(SPECS), pieces=st.lists(st.integers(1, 20), min_size=1, max_size=6), data=st.data())
def test_pieces_make_the_whole(spec: CipherSpec, pieces: list[int], data: st.DataObject) -> None:
    """Nothing of a call is left behind for the next one, however they are mixed."""
    cipher = make_cipher(spec, bytes(range(spec.key_bytes)))
    plain = data.draw(st.randoms(use_true_random=False)).randbytes(sum(pieces) * SECTOR_BYTES)
    whole = cipher.encrypt(9, plain)
    sector = 0
    for count in pieces:
        begin, end = sector * SECTOR_BYTES, (sector + count) * SECTOR_BYTES
        assert cipher.encrypt(9 + sector, plain[begin:end]) == whole[begin:end]
        assert decrypted(cipher, 9 + sector, whole[begin:end]) == plain[begin:end]
        sector += count


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.ivgen_alg == "plain64"], ids=name)
def test_several_threads_at_a_time(spec: CipherSpec) -> None:
    cipher = make_cipher(spec, SOURCE.randbytes(spec.key_bytes))
    data = SOURCE.randbytes(16 * SECTOR_BYTES)
    expected = {sector: bytes(cipher.encrypt(sector, data)) for sector in range(4)}
    wrong: list[int] = []

    def work(sector: int) -> None:
        rounds = [(bytes(cipher.encrypt(sector, data)), decrypted(cipher, sector, expected[sector])) for _ in range(50)]
        if rounds != [(expected[sector], data)] * 50:
            wrong.append(sector)

    threads = [threading.Thread(target=work, args=(sector,)) for sector in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("encrypting", [True, False])
@pytest.mark.parametrize("key_bytes", [32, 64])
def test_both_ways_of_xts_agree(encrypting: bool, key_bytes: int) -> None:
    assert libcrypto.load() is not None
    key, tweaks = SOURCE.randbytes(key_bytes), bytearray(SOURCE.randbytes(16 * 21))
    one = bytearray(SOURCE.randbytes(21 * SECTOR_BYTES))
    other = bytearray(one)
    libcrypto.XtsContext(key, encrypting=encrypting).sectors(one, tweaks)
    XtsOverEcb(key, encrypting=encrypting).sectors(memoryview(other), tweaks)
    assert one == other


def test_xts_without_a_libcrypto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcrypto, "load", lambda: None)
    test_every_sector_is_as_by_itself(CipherSpec(), 3)


def test_xts_as_in_ieee_1619() -> None:
    """Vector 4 of its annex B: a data unit of 512 bytes, AES-128."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    cipher = make_cipher(CipherSpec(cipher_alg="aes-128"), key)
    encrypted = cipher.encrypt(0, bytes(range(256)) * 2)
    assert encrypted[:32].hex() == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"


def test_the_old_cipher_of_qcow2() -> None:
    """The passphrase itself is the key of AES-128-CBC."""
    data = SOURCE.randbytes(3 * SECTOR_BYTES)
    for passphrase, key in ((b"", bytes(16)), (b"short", b"short" + bytes(11)), (b"x" * 40, b"x" * 16)):
        cipher = legacy_aes_cipher(passphrase)
        spec = CipherSpec(cipher_alg="aes-128", cipher_mode="cbc")
        assert cipher.encrypt(1 << 33, data) == make_cipher(spec, key).encrypt(1 << 33, data)
        assert decrypted(cipher, 8, cipher.encrypt(8, data)) == data


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cipher_alg": "serpent-256"}, "cipher-alg: 'serpent-256' is not supported; there are: aes-128"),
        ({"cipher_alg": "twofish-128"}, "'twofish-128' is not supported"),
        ({"cipher_alg": "cast5-128"}, "'cast5-128' is not supported"),
        ({"cipher_alg": "3des"}, "'3des' is not supported"),
        ({"cipher_alg": "rot-13"}, "cipher-alg: 'rot-13' is unknown"),
        ({"cipher_mode": "lrw"}, "cipher-mode: 'lrw' is unknown; there are: xts, cbc, ctr, ecb"),
        ({"ivgen_alg": "benbi"}, "ivgen-alg: 'benbi' is unknown; there are: plain, plain64, essiv"),
        ({"ivgen_alg": "essiv"}, "essiv needs a hash"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "sha1"}, "'sha1' gives 20 bytes"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "sha512"}, "'sha512' gives 64 bytes"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "crc32"}, "ivgen-hash-alg: there is no hash 'crc32' here"),
    ],
)
def test_what_is_not_there_is_refused_by_name(options: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        CipherSpec(**options).check()
    assert said in str(caught.value)


def test_a_key_of_another_length() -> None:
    with pytest.raises(OptionError, match="takes 64 bytes of key, not 32"):
        make_cipher(CipherSpec(), bytes(32))


def test_a_key_that_openssl_refuses() -> None:
    """Whose halves are the same: the kernel takes it, and so does the way over ECB."""
    key, data = bytes(64), SOURCE.randbytes(3 * SECTOR_BYTES)
    expected = b"".join(
        reference_xts(key, sector.to_bytes(16, "little"), data[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES])
        for sector in range(3)
    )
    assert make_cipher(CipherSpec(), key).encrypt(0, data) == expected
