"""Headers: built and parsed alike, and every broken one refused with its place."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import ImageError
from pynbd.crypto.ciphers import CipherSpec
from pynbd.crypto.layout import (
    HEADER_BYTES,
    MAX_ITERATIONS,
    SLOT_ENTRIES_OFFSET,
    Header,
    KeySlot,
    build_header,
    build_slot,
    header_names,
    key_material_sectors,
    parse_header,
    slot_sectors,
)

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=31)


def header(**changes: Any) -> Header:
    """A sound one."""
    starts, payload = slot_sectors(64)
    slots = [KeySlot(key_material_sector=start) for start in starts]
    slots[0] = KeySlot(active=True, iterations=1000, salt=b"s" * 32, key_material_sector=starts[0])
    made = Header(
        cipher_name="aes",
        cipher_mode="xts-plain64",
        hash_spec="sha256",
        payload_sector=payload,
        key_bytes=64,
        digest=b"d" * 20,
        digest_salt=b"m" * 32,
        digest_iterations=1000,
        uuid="6e1f5bd2-3a4c-4d1e-9f70-8a1b2c3d4e5f",
        slots=tuple(slots),
    )
    return msgspec.structs.replace(made, **changes)


def test_its_size_is_that_of_the_specification() -> None:
    assert (HEADER_BYTES, SLOT_ENTRIES_OFFSET, len(build_slot(KeySlot(key_material_sector=8)))) == (592, 208, 48)


def test_slots_lie_as_qemu_lays_them() -> None:
    assert slot_sectors(64) == ([8 + 504 * number for number in range(8)], 4040)
    assert slot_sectors(16) == ([8 + 128 * number for number in range(8)], 1032)
    assert key_material_sectors(24) == 188


@given(
    names=st.tuples(TEXT, TEXT, TEXT, TEXT),
    numbers=st.tuples(st.integers(1, 1 << 20), st.integers(0, 1 << 20)),
    salts=st.tuples(st.binary(min_size=20, max_size=20), st.binary(min_size=32, max_size=32)),
    active=st.lists(st.booleans(), min_size=8, max_size=8),
    key_bytes=st.sampled_from([16, 24, 32, 64]),
)
def test_what_was_built_is_parsed(
    names: tuple[str, str, str, str],
    numbers: tuple[int, int],
    salts: tuple[bytes, bytes],
    active: list[bool],
    key_bytes: int,
) -> None:
    starts, payload = slot_sectors(key_bytes)
    iterations, more = numbers
    made = Header(
        cipher_name=names[0],
        cipher_mode=names[1],
        hash_spec=names[2],
        payload_sector=payload + more,
        key_bytes=key_bytes,
        digest=salts[0],
        digest_salt=salts[1],
        digest_iterations=iterations,
        uuid=names[3],
        slots=tuple(
            KeySlot(active=on, iterations=iterations, salt=salts[1], key_material_sector=start)
            for on, start in zip(active, starts, strict=True)
        ),
    )
    built = build_header(made)
    assert len(built) == HEADER_BYTES
    assert parse_header(built, "x") == made
    assert build_header(parse_header(built, "x")) == built


@pytest.mark.parametrize(
    ("name", "mode", "key_bytes", "spec"),
    [
        ("aes", "xts-plain64", 64, CipherSpec()),
        ("aes", "xts-plain", 32, CipherSpec(cipher_alg="aes-128", ivgen_alg="plain")),
        ("aes", "ecb", 32, CipherSpec(cipher_mode="ecb", ivgen_alg="plain")),
        (
            "aes",
            "cbc-essiv:sha256",
            24,
            CipherSpec(cipher_alg="aes-192", cipher_mode="cbc", ivgen_alg="essiv", ivgen_hash_alg="sha256"),
        ),
        ("serpent", "cbc-plain", 32, CipherSpec(cipher_alg="serpent-256", cipher_mode="cbc", ivgen_alg="plain")),
        ("aes", "lrw-benbi", 48, CipherSpec(cipher_alg="aes-384", cipher_mode="lrw", ivgen_alg="benbi")),
    ],
)
def test_ciphers_in_qemus_words(name: str, mode: str, key_bytes: int, spec: CipherSpec) -> None:
    found = header(cipher_name=name, cipher_mode=mode, key_bytes=key_bytes).cipher
    assert found == spec
    if name == "aes" and "-" in mode and not mode.startswith("lrw"):
        assert header_names(spec) == (name, mode)


def changed(offset: int, value: int | bytes, length: int = 4) -> bytes:
    data = bytearray(build_header(header()))
    new = value if isinstance(value, bytes) else value.to_bytes(length, "big")
    data[offset : offset + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "x: at offset 0: no LUKS container: found b''"),
        (bytes(592), "no LUKS container"),
        (build_header(header())[:-1], "a LUKS header of 591 bytes, expected 592"),
        (changed(6, 2, 2), "x: at offset 6: version 2 of LUKS is not supported, only 1"),
        (changed(8, b"a" * 32), "x: at offset 8: LUKS header: cipher-name is no text that ends with a NUL"),
        (changed(40, b"\xff\0"), "at offset 40: LUKS header: cipher-mode is no text"),
        (changed(72, b"sha\n\0"), "at offset 72: LUKS header: hash-spec is no text"),
        (changed(168, b"u" * 40), "at offset 168: LUKS header: uuid is no text"),
        (changed(108, 0), "at offset 108: LUKS header: key-bytes is 0, expected 1 to 512"),
        (changed(108, 0xFFFFFFFF), "key-bytes is 4294967295"),
        (changed(164, 0), "at offset 164: LUKS header: mk-digest-iter is 0"),
        (changed(164, 0xFFFFFFFF), "mk-digest-iter is 4294967295"),
        (changed(208, 1), "at offset 208: LUKS key slot 0: its state is 0x00000001, expected 0x00ac71f3 or 0x0000dead"),
        (changed(208 + 48 * 7, 0), "at offset 544: LUKS key slot 7: its state is 0x00000000"),
        (changed(212, 0), "at offset 212: LUKS key slot 0 is active, but has no iterations"),
        (changed(212, MAX_ITERATIONS), f"iterations in all, at most {MAX_ITERATIONS} are made"),
        (changed(208 + 44, 3999), "at offset 252: LUKS key slot 0 has 3999 stripes, expected 4000"),
        (changed(208 + 40, 1), "key slot 0 begins at offset 512, inside of the header"),
        (changed(208 + 48 + 40, 8), "key slot 1 begins at offset 4096, inside of key slot 0"),
        (changed(208 + 48 + 40, 0xFFFFFFFF), "key slot 1 begins at offset 2199023255040, inside of the payload"),
        (changed(104, 4035), "the payload begins at offset 2065920, inside of key slot 7"),
        (changed(104, 1), "the payload begins at offset 512, inside of the header"),
    ],
)
def test_broken_ones_are_refused_with_their_place(data: bytes, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_header(data, "x")
    assert said in str(caught.value)


@given(place=st.integers(0, HEADER_BYTES - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_a_header_or_a_clear_error(place: int, bit: int) -> None:
    data = bytearray(build_header(header()))
    data[place] ^= 1 << bit
    try:
        parsed = parse_header(bytes(data), "x")
    except ImageError:
        return
    # Behind the NUL of a text anything may stand.
    assert parsed != header() or build_header(parsed) != data


@given(st.binary(min_size=HEADER_BYTES - 8, max_size=HEADER_BYTES - 8))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ImageError):
        parse_header(b"LUKS\xba\xbe" + struct.pack(">H", 1) + noise, "x")
