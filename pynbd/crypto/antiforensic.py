"""The anti-forensic splitter of LUKS1: a key blown up to thousands of stripes, all of which are needed to get it back.

Whoever destroys any one stripe on disk has destroyed the key (LUKS On-Disk Format Specification, chapter 2.4).
"""

import os
from collections.abc import Callable

from pynbd.crypto.hashes import hasher

NUMBER_BYTES = 4


def diffuser(length: int, hash_name: str) -> Callable[[int], int]:
    """What mixes a block: each piece of it, as long as the hash, is replaced by the hash of its number and itself.

    Args:
        length: of a block, in bytes. Blocks are little-endian numbers.
        hash_name: the hash.
    """
    digest, size = hasher(hash_name)
    pieces = [
        (number.to_bytes(NUMBER_BYTES, "big"), start, start + size)
        for number, start in enumerate(range(0, length, size))
    ]

    def diffuse(block: int) -> int:
        data = block.to_bytes(length, "little")
        mixed = b"".join([digest(number + data[start:end]) for number, start, end in pieces])
        return int.from_bytes(mixed[:length], "little")

    return diffuse


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """`stripes` times as many bytes, from which `merge` makes the key again."""
    length, mixed, diffuse = len(key), 0, diffuser(len(key), hash_name)
    random = os.urandom(length * (stripes - 1))
    for start in range(0, len(random), length):
        mixed = diffuse(mixed ^ int.from_bytes(random[start : start + length], "little"))
    return random + (mixed ^ int.from_bytes(key, "little")).to_bytes(length, "little")


def merge(material: bytes, length: int, hash_name: str) -> bytes:
    """The key of `length` bytes that was split."""
    mixed, diffuse = 0, diffuser(length, hash_name)
    last = len(material) - length
    for start in range(0, last, length):
        mixed = diffuse(mixed ^ int.from_bytes(material[start : start + length], "little"))
    return (mixed ^ int.from_bytes(material[last:], "little")).to_bytes(length, "little")
