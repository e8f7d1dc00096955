"""AES-XTS (IEEE 1619) over sectors of 512 bytes, made of AES-ECB, which takes many of them in one call.

A block is encrypted as E(P ^ T) ^ T. T is the sector's tweak, encrypted with the second half of the key, times x^j in
GF(2^128) for the j-th block of the sector. The T of a group of sectors are worked out together, in one long integer:
the first block of each sector is there; times x it gives the second one, these two times x² the next two, and so on.

This serves keys of any length (OpenSSL has no XTS with AES-192), and all where there is no libcrypto. It takes 6 µs for
a sector; see `libcrypto` for what is faster.
"""

import functools

from pynbd.crypto.library import AES_BLOCK_BYTES, Pool, aes_decryptor, aes_encryptor

SECTOR_BYTES = 512

BLOCK_BITS = 8 * AES_BLOCK_BYTES

GROUP_SECTORS = 8
"""Sectors whose tweaks are worked out together; longer integers are no faster."""

STEPS = (1, 2, 4, 8, 16)
"""Blocks of each sector whose tweaks are known before a step, which doubles them: up to the 32 that a sector has."""


@functools.cache
def _overflow_masks(sectors: int) -> tuple[int, ...]:
    """For each step, the bits of the known blocks that leave them when they are shifted by its width."""
    masks = []
    for width in STEPS:
        block = ((1 << width) - 1 << BLOCK_BITS - width).to_bytes(AES_BLOCK_BYTES, "little")
        sector = (block * width).ljust(SECTOR_BYTES, b"\0")
        masks.append(int.from_bytes(sector * sectors, "little"))
    return tuple(masks)


def block_tweaks(first_blocks: bytes, sectors: int) -> int:
    """The tweaks of all blocks of some sectors, as one little-endian integer.

    Args:
        first_blocks: the 16 bytes of the first block of each sector.
        sectors: how many there are.
    """
    known = bytearray(SECTOR_BYTES * sectors)
    words, given = memoryview(known).cast("Q"), memoryview(first_blocks).cast("Q")
    words[0::64], words[1::64] = given[0::2], given[1::2]
    tweaks = int.from_bytes(known, "little")
    for width, mask in zip(STEPS, _overflow_masks(sectors), strict=True):
        over = tweaks & mask
        carry = over >> BLOCK_BITS - width
        # x^128 = x^7 + x^2 + x + 1
        product = (tweaks ^ over) << width ^ carry ^ carry << 1 ^ carry << 2 ^ carry << 7
        tweaks |= product << width * BLOCK_BITS
    return tweaks


class XtsOverEcb:
    """AES-XTS with one key, in one direction.

    Args:
        key: twice the key of AES: 32, 48 or 64 bytes.
        encrypting: the direction.
    """

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        data_key, tweak_key = key[: len(key) // 2], key[len(key) // 2 :]
        cipher = aes_encryptor if encrypting else aes_decryptor
        self._blocks = Pool(lambda: cipher(data_key, "ecb"))
        self._tweaks = Pool(lambda: aes_encryptor(tweak_key, "ecb"))

    def sectors(self, data: memoryview | bytearray, tweaks: bytearray) -> None:
        """Encrypt or decrypt sectors in place.

        Args:
            data: writable, of whole sectors.
            tweaks: 16 bytes for each of them.
        """
        encryptor, cipher = self._tweaks.take(), self._blocks.take()
        first_blocks = encryptor.update(tweaks)
        for start in range(0, len(data), GROUP_SECTORS * SECTOR_BYTES):
            piece = data[start : start + GROUP_SECTORS * SECTOR_BYTES]
            sectors = len(piece) // SECTOR_BYTES
            at = start // SECTOR_BYTES * AES_BLOCK_BYTES
            mask = block_tweaks(first_blocks[at : at + sectors * AES_BLOCK_BYTES], sectors)
            masked = (int.from_bytes(piece, "little") ^ mask).to_bytes(len(piece), "little")
            result = int.from_bytes(cipher.update(masked), "little") ^ mask
            data[start : start + len(piece)] = result.to_bytes(len(piece), "little")
        self._tweaks.give(encryptor)
        self._blocks.give(cipher)
