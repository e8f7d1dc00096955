"""The splitter: what was split is whole again only when nothing of it is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.crypto.antiforensic import diffuser, merge, split
from pynbd.crypto.hashes import HASHES, digest


@given(key=st.binary(min_size=1, max_size=100), stripes=st.integers(1, 20), hash_name=st.sampled_from(HASHES))
def test_merge_undoes_split(key: bytes, stripes: int, hash_name: str) -> None:
    material = split(key, stripes, hash_name)
    assert len(material) == len(key) * stripes
    assert merge(material, len(key), hash_name) == key


@given(data=st.data(), hash_name=st.sampled_from(HASHES))
def test_every_stripe_counts(data: st.DataObject, hash_name: str) -> None:
    key = bytes(range(32))
    material = bytearray(split(key, 7, hash_name))
    place = data.draw(st.integers(0, len(material) - 1))
    material[place] ^= data.draw(st.integers(1, 255))
    assert merge(bytes(material), len(key), hash_name) != key


@pytest.mark.parametrize("length", [16, 20, 32, 48, 64])
def test_pieces_are_numbered_and_the_last_is_cut(length: int) -> None:
    block = bytes(range(length))
    expected = digest("sha1", bytes(4) + block[:20])
    for number in range(1, 4):
        expected += digest("sha1", bytes([0, 0, 0, number]) + block[20 * number : 20 * number + 20])
    found = diffuser(length, "sha1")(int.from_bytes(block, "little")).to_bytes(length, "little")
    assert found == expected[:length]
