"""The anti-forensic splitter of LUKS1: a key blown up to thousands of stripes, all of which are needed to get it back.

Whoever destroys any one stripe on disk has destroyed the key (LUKS On-Disk Format Specification, chapter 2.4).
"""

import os

from pynbd.crypto.hashes import digest


def diffuse(block: int, length: int, hash_name: str) -> int:
    """The block with each piece, as long as the hash, replaced by the hash of its number and itself."""
    data = block.to_bytes(length, "little")
    size = len(digest(hash_name, b""))
    pieces = (
        digest(hash_name, number.to_bytes(4, "big") + data[start : start + size])[: length - start]
        for number, start in enumerate(range(0, length, size))
    )
    return int.from_bytes(b"".join(pieces), "little")


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """`stripes` times as many bytes, from which `merge` makes the key again."""
    length, mixed = len(key), 0
    random = os.urandom(length * (stripes - 1))
    for start in range(0, len(random), length):
        mixed = diffuse(mixed ^ int.from_bytes(random[start : start + length], "little"), length, hash_name)
    return random + (mixed ^ int.from_bytes(key, "little")).to_bytes(length, "little")


def merge(material: bytes, length: int, hash_name: str) -> bytes:
    """The key of `length` bytes that was split."""
    mixed = 0
    last = len(material) - length
    for start in range(0, last, length):
        mixed = diffuse(mixed ^ int.from_bytes(material[start : start + length], "little"), length, hash_name)
    return (mixed ^ int.from_bytes(material[last:], "little")).to_bytes(length, "little")
