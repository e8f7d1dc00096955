"""Initialisation vectors: 16 bytes for each sector, made of its number.

`plain` and `plain64` are the number itself, of 32 and of 64 bits, little-endian; `essiv` encrypts it with a hash of the
key, so that nobody who lacks the key can foretell them.
"""

import sys
from array import array
from collections.abc import Callable

from pynbd.block.errors import OptionError
from pynbd.crypto.hashes import check_hash, digest
from pynbd.crypto.library import AES_BLOCK_BYTES, Pool, aes_encryptor

IVGENS = ("plain", "plain64", "essiv")

AES_KEY_BYTES = (16, 24, 32)

IvGenerator = Callable[[int, int], bytearray]
"""(first sector, count) → 16 bytes for each sector."""


def plain64(first: int, count: int) -> bytearray:
    """The sector numbers, 64 bits of each."""
    numbers = array("Q", range(first, first + count))
    if sys.byteorder == "big":
        numbers.byteswap()
    ivs = bytearray(AES_BLOCK_BYTES * count)
    memoryview(ivs).cast("Q")[::2] = memoryview(numbers)
    return ivs


def plain(first: int, count: int) -> bytearray:
    """The sector numbers, 32 bits of each: they repeat after 2 TiB."""
    ivs = plain64(first, count)
    if first + count > 1 << 32:
        memoryview(ivs).cast("I")[1::4] = memoryview(bytes(4 * count)).cast("I")
    return ivs


def iv_generator(name: str, hash_name: str, key: bytes) -> IvGenerator:
    """The generator of a name.

    Args:
        name: one of `IVGENS`.
        hash_name: of `essiv`; the others have none.
        key: the whole key of the cipher.

    Raises:
        OptionError: there is no such generator, or it can't be made with this hash.
    """
    if name == "plain64":
        return plain64
    if name == "plain":
        return plain
    if name == "essiv":
        return _essiv(hash_name, key)
    raise OptionError(f"ivgen-alg: there is no generator {name!r} here; there are: {', '.join(IVGENS)}")


def _essiv(hash_name: str, key: bytes) -> IvGenerator:
    check_hash(hash_name, "ivgen-hash-alg")
    salt = digest(hash_name, key)
    if len(salt) not in AES_KEY_BYTES:
        raise OptionError(
            f"ivgen-hash-alg: {hash_name!r} gives {len(salt)} bytes, and AES takes 16 (md5) or 32 (sha256) of them"
        )

    contexts = Pool(lambda: aes_encryptor(salt, "ecb"))

    def essiv(first: int, count: int) -> bytearray:
        encryptor = contexts.take()
        ivs = bytearray(encryptor.update(plain64(first, count)))
        contexts.give(encryptor)
        return ivs

    return essiv
