"""Ciphers for sectors: what disks are encrypted with, by the names that QEMU gives them.

    cipher = make_cipher(CipherSpec(cipher_alg="aes-256", cipher_mode="xts", ivgen_alg="plain64"), key)
    cipher.decrypt(sector, view)            in place
    encrypted = cipher.encrypt(sector, data)

A sector has 512 bytes, and its number goes into its initialisation vector, so that equal sectors do not look equal. A
call takes any number of sectors that follow each other. The number counts from the payload on in the format luks, from
the beginning of the file in qcow2 with LUKS, and from the beginning of the disk in qcow2 with the old AES.

Calls run where they are made, and keep the interpreter lock (the packages below do). With AES-256, 1 MiB took 0.5 ms
(CBC to decrypt), 1.4 ms (ECB), 2.7 ms (CTR), 3.1 ms (XTS) and 3.8 ms (CBC to encrypt) on the machine that it was
written on, where QEMU took 2.2 ms for XTS. So whoever has more than a few sectors gives them in pieces of
`PIECE_BYTES`, and lets the event loop run between two of them. A cipher may be used from several threads.
"""

from typing import Protocol

import msgspec

from pynbd.block.errors import OptionError
from pynbd.crypto import libcrypto
from pynbd.crypto.hashes import check_hash
from pynbd.crypto.ivs import IVGENS, IvGenerator, iv_generator, plain64
from pynbd.crypto.library import AES_BLOCK_BYTES, Pool, aes_decryptor, aes_encryptor
from pynbd.crypto.xts import XtsOverEcb

SECTOR_BYTES = 512

SECTOR_WORDS = SECTOR_BYTES // 8

ROOM_BYTES = AES_BLOCK_BYTES - 1
"""What `cryptography` wants behind the end of a buffer that it fills in blocks, and does not use here."""

PIECE_BYTES = 64 << 10
"""What is encrypted at a time without holding up anybody else: about a fifth of a millisecond."""

AES_KEY_BYTES = {"aes-128": 16, "aes-192": 24, "aes-256": 32}

CIPHER_MODES = ("xts", "cbc", "ctr", "ecb")

NO_CIPHERS = ("serpent", "twofish", "cast5", "3des", "des", "sm4", "camellia", "blowfish")
"""Ciphers of other programs that are missing here, each known by the beginning of its name."""

Bytes = bytes | bytearray | memoryview


class CipherSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which cipher, in QEMU's words.

    Args:
        cipher_alg: `aes-128`, `aes-192` or `aes-256`.
        cipher_mode: `xts`, `cbc`, `ctr` or `ecb`.
        ivgen_alg: `plain64`, `plain` or `essiv`.
        ivgen_hash_alg: of `essiv`: `sha256` or `md5`; "" for the others.
    """

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = ""

    @property
    def key_bytes(self) -> int:
        """The length of the key in bytes: XTS takes two keys."""
        return AES_KEY_BYTES[self.cipher_alg] * (2 if self.cipher_mode == "xts" else 1)

    def check(self) -> None:
        """Check that there is such a cipher.

        Raises:
            OptionError: there is not; which part of it is missing.
        """
        if self.cipher_alg not in AES_KEY_BYTES:
            what = "is not supported" if self.cipher_alg.startswith(NO_CIPHERS) else "is unknown"
            raise OptionError(f"cipher-alg: {self.cipher_alg!r} {what}; there are: {', '.join(AES_KEY_BYTES)}")
        if self.cipher_mode not in CIPHER_MODES:
            raise OptionError(f"cipher-mode: {self.cipher_mode!r} is unknown; there are: {', '.join(CIPHER_MODES)}")
        if self.ivgen_alg not in IVGENS:
            raise OptionError(f"ivgen-alg: {self.ivgen_alg!r} is unknown; there are: {', '.join(IVGENS)}")
        if self.ivgen_alg == "essiv":
            if not self.ivgen_hash_alg:
                raise OptionError("ivgen-hash-alg: essiv needs a hash (sha256)")
            check_hash(self.ivgen_hash_alg, "ivgen-hash-alg")
            iv_generator("essiv", self.ivgen_hash_alg, b"")  # not every hash will do


class SectorCipher(Protocol):
    """Encrypts and decrypts sectors of 512 bytes with one key."""

    def decrypt(self, sector: int, data: memoryview) -> None:
        """Decrypt whole sectors in place.

        Args:
            sector: the number of the first one.
            data: writable and contiguous, of type `B`.
        """

    def encrypt(self, sector: int, data: Bytes) -> bytearray:
        """Whole sectors, encrypted, in a buffer of their own.

        Args:
            sector: the number of the first one.
            data: contiguous, of type `B`; it stays as it is.
        """


def make_cipher(spec: CipherSpec, key: bytes) -> SectorCipher:
    """The cipher that a specification stands for.

    Args:
        spec: which one.
        key: of `spec.key_bytes`.

    Raises:
        OptionError: there is no such cipher, the key has another length, or the package `cryptography` is missing.
    """
    spec.check()
    if len(key) != spec.key_bytes:
        raise OptionError(
            f"{spec.cipher_alg} in mode {spec.cipher_mode} takes {spec.key_bytes} bytes of key, not {len(key)}"
        )
    aes_encryptor(key[:16], "ecb")  # tells at once if the package is missing
    if spec.cipher_mode == "ecb":
        return EcbCipher(key)
    ivs = iv_generator(spec.ivgen_alg, spec.ivgen_hash_alg, key)
    if spec.cipher_mode == "xts":
        return XtsCipher(key, ivs)
    return CbcCipher(key, ivs) if spec.cipher_mode == "cbc" else CtrCipher(key, ivs)


def legacy_aes_cipher(passphrase: bytes) -> SectorCipher:
    """The cipher of qcow and of qcow2's encryption method 1: AES-128-CBC with `plain64`.

    Args:
        passphrase: its first 16 bytes are the key, zeroes follow if it is shorter.
    """
    key = passphrase[:16].ljust(16, b"\0")
    return CbcCipher(key, plain64)


def xor(*parts: Bytes) -> memoryview:
    """Bytes of one length XORed with each other."""
    result = 0
    for part in parts:
        result ^= int.from_bytes(part, "little")
    return memoryview(result.to_bytes(len(parts[0]), "little"))


class EcbCipher:
    """Every block by itself: equal blocks look equal. QEMU has it, and so it is here."""

    def __init__(self, key: bytes) -> None:
        self._encryptors = Pool(lambda: aes_encryptor(key, "ecb"))
        self._decryptors = Pool(lambda: aes_decryptor(key, "ecb"))

    def decrypt(self, sector: int, data: memoryview) -> None:
        """See `SectorCipher`."""
        decryptor = self._decryptors.take()
        data[:] = decryptor.update(data)
        self._decryptors.give(decryptor)

    def encrypt(self, sector: int, data: Bytes) -> bytearray:
        """See `SectorCipher`."""
        encryptor = self._encryptors.take()
        result = bytearray(encryptor.update(data))
        self._encryptors.give(encryptor)
        return result


class CtrCipher:
    """A key stream: the sector's IV, counted up block by block as a big-endian number, and encrypted."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        self._ivs = ivs
        self._streams = Pool(lambda: aes_encryptor(key, "ctr"))

    def decrypt(self, sector: int, data: memoryview) -> None:
        """See `SectorCipher`."""
        data[:] = self.encrypt(sector, data)

    def encrypt(self, sector: int, data: Bytes) -> bytearray:
        """See `SectorCipher`."""
        ivs = bytes(self._ivs(sector, len(data) // SECTOR_BYTES))
        result = bytearray(len(data))
        source, target = memoryview(data), memoryview(result)
        stream = self._streams.take()
        iv = 0
        for at in range(0, len(data), SECTOR_BYTES):
            stream.reset_nonce(ivs[iv : iv + AES_BLOCK_BYTES])
            stream.update_into(source[at : at + SECTOR_BYTES], target[at : at + SECTOR_BYTES])
            iv += AES_BLOCK_BYTES
        self._streams.give(stream)
        return result


class Chain:
    """A context of AES-CBC that goes on and on, and the last encrypted block that went through it."""

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        self.context = (aes_encryptor if encrypting else aes_decryptor)(key, "cbc")
        self.last = bytes(AES_BLOCK_BYTES)


class CbcCipher:
    """Each block is XORed with the encrypted one before it, the first of a sector with the sector's IV.

    A context is used as if all that goes through it were one stream, and what that does to the first block of each
    sector is made up for: it is XORed with the encrypted block before it as well as with the IV.
    """

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        self._ivs = ivs
        self._encryptors = Pool(lambda: Chain(key, encrypting=True))
        self._decryptors = Pool(lambda: Chain(key, encrypting=False))

    def decrypt(self, sector: int, data: memoryview) -> None:
        """See `SectorCipher`."""
        if not data:
            return
        count = len(data) // SECTOR_BYTES
        plain = bytearray(len(data) + ROOM_BYTES)
        before = bytearray(AES_BLOCK_BYTES * count)
        before_words, words = memoryview(before).cast("Q"), data.cast("Q")
        chain = self._decryptors.take()
        before[:AES_BLOCK_BYTES] = chain.last
        before_words[2::2] = words[SECTOR_WORDS - 2 : -SECTOR_WORDS : SECTOR_WORDS]
        before_words[3::2] = words[SECTOR_WORDS - 1 : -SECTOR_WORDS : SECTOR_WORDS]
        chain.last = bytes(data[-AES_BLOCK_BYTES:])
        chain.context.update_into(data, plain)
        self._decryptors.give(chain)
        data[:] = memoryview(plain)[: len(data)]
        first = first_blocks(words)
        mended = xor(first, before, self._ivs(sector, count)).cast("Q")
        words[0::SECTOR_WORDS], words[1::SECTOR_WORDS] = mended[0::2], mended[1::2]

    def encrypt(self, sector: int, data: Bytes) -> bytearray:
        """See `SectorCipher`."""
        source = bytearray(data)
        result = bytearray(len(source) + ROOM_BYTES)
        if not source:
            return source
        with memoryview(source) as plain, memoryview(result) as encrypted:
            words, done = plain.cast("Q"), encrypted[: len(source)].cast("Q")
            starts = xor(first_blocks(words), self._ivs(sector, len(source) // SECTOR_BYTES)).cast("Q")
            chain = self._encryptors.take()
            low, high = memoryview(chain.last).cast("Q")
            for number in range(len(starts) // 2):
                word, at = SECTOR_WORDS * number, SECTOR_BYTES * number
                words[word] = starts[2 * number] ^ low
                words[word + 1] = starts[2 * number + 1] ^ high
                chain.context.update_into(plain[at : at + SECTOR_BYTES], encrypted[at:])
                low, high = done[word + SECTOR_WORDS - 2], done[word + SECTOR_WORDS - 1]
            chain.last = bytes(encrypted[len(source) - AES_BLOCK_BYTES : len(source)])
            self._encryptors.give(chain)
            words.release()
            done.release()
        del result[len(source) :]
        return result


def first_blocks(words: memoryview) -> bytearray:
    """The first block of each sector.

    Args:
        words: the sectors, as numbers of 64 bits.
    """
    blocks = bytearray(len(words) // SECTOR_WORDS * AES_BLOCK_BYTES)
    found = memoryview(blocks).cast("Q")
    found[0::2], found[1::2] = words[0::SECTOR_WORDS], words[1::SECTOR_WORDS]
    return blocks


class XtsCipher:
    """XTS, by OpenSSL itself where there is one that takes the key, else over ECB."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        self._ivs = ivs
        context = libcrypto.XtsContext if libcrypto.takes(key) else XtsOverEcb
        self._encryptors = Pool(lambda: context(key, encrypting=True))
        self._decryptors = Pool(lambda: context(key, encrypting=False))

    def decrypt(self, sector: int, data: memoryview) -> None:
        """See `SectorCipher`."""
        context = self._decryptors.take()
        context.sectors(data, self._ivs(sector, len(data) // SECTOR_BYTES))
        self._decryptors.give(context)

    def encrypt(self, sector: int, data: Bytes) -> bytearray:
        """See `SectorCipher`."""
        result = bytearray(data)
        context = self._encryptors.take()
        context.sectors(result, self._ivs(sector, len(data) // SECTOR_BYTES))
        self._encryptors.give(context)
        return result
