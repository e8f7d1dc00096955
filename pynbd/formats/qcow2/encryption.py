"""Encrypted guest data: LUKS with its header in clusters of the image, and the AES of old images.

Only the guest's bytes are encrypted; L1, L2, refcounts and compressed clusters are not (and a compressed cluster in an
encrypted image is refused). LUKS counts sectors from the beginning of the file, the old AES from that of the disk.
"""

import asyncio
from typing import Any

from pynbd.block.alignment import pieces
from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.crypto.ciphers import PIECE_BYTES, SECTOR_BYTES, SectorCipher, legacy_aes_cipher
from pynbd.crypto.luks import Luks
from pynbd.crypto.secrets import Secret
from pynbd.formats.qcow2.encrypt_options import EncryptAmendOptions, EncryptCreationOptions, EncryptOptions
from pynbd.formats.qcow2.header_file import Storage
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.layout import CryptMethod


class HeaderInClusters:
    """A store for a LUKS header that begins at an offset of the image's file."""

    def __init__(self, file: Storage, offset: int) -> None:
        self._file = file
        self._offset = offset

    async def read(self, offset: int, length: int) -> bytes:
        """See `HeaderStore`."""
        data = bytearray(length)
        await self._file.read(self._offset + offset, memoryview(data), 0)
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        """See `HeaderStore`."""
        await self._file.write(self._offset + offset, memoryview(data), 0)

    async def flush(self) -> None:
        """See `HeaderStore`."""
        await self._file.flush()


class Encryption:
    """The cipher of an open image.

    Args:
        method: how it is encrypted.
        cipher: None while there is no key.
        luks: the container, of LUKS.
    """

    def __init__(self, method: CryptMethod, cipher: SectorCipher | None, luks: Luks | None) -> None:
        self.method = method
        self.cipher = cipher
        self.luks = luks

    @classmethod
    async def opened(cls, image: Image, options: EncryptOptions, objects: Objects) -> "Encryption":
        """The encryption of an image.

        Raises:
            OptionError: another format was asked for, or there is no such secret.
            BlockError: the passphrase is wrong, or the cipher is not supported.
        """
        method = image.header.crypt_method
        kind = method.name.lower()
        if options.format is not None and options.format != kind:
            raise OptionError(f"{image.name}: encrypt.format is {options.format}, but the image is encrypted by {kind}")
        passphrase = objects.find(options.key_secret, Secret).passphrase() if options.key_secret is not None else None
        if method == CryptMethod.AES:
            return cls(method, legacy_aes_cipher(passphrase) if passphrase is not None else None, None)
        pointer = image.header.crypto
        if pointer is None:
            raise OptionError(f"{image.name}: it is encrypted by LUKS, but does not say where the LUKS header is")
        luks = await Luks.load(HeaderInClusters(image.file, pointer.offset), image.name)
        return cls(method, await luks.unlock(passphrase) if passphrase is not None else None, luks)

    def _sector(self, offset: int, host: int) -> int:
        return (host if self.method == CryptMethod.LUKS else offset) // SECTOR_BYTES

    async def decrypt(self, offset: int, host: int, data: memoryview) -> None:
        """Decrypt whole sectors in place.

        Args:
            offset: where they are on the disk.
            host: where they lie in the file.
            data: the sectors.
        """
        assert self.cipher is not None
        sector = self._sector(offset, host)
        for start, length in pieces(0, len(data), PIECE_BYTES):
            if start:
                await asyncio.sleep(0)
            self.cipher.decrypt(sector + start // SECTOR_BYTES, data[start : start + length])

    async def encrypted(self, offset: int, host: int, data: memoryview) -> memoryview:
        """Whole sectors, encrypted, in a buffer of their own."""
        assert self.cipher is not None
        sector = self._sector(offset, host)
        if len(data) <= PIECE_BYTES:
            return memoryview(self.cipher.encrypt(sector, data))
        whole = bytearray()
        for start, length in pieces(0, len(data), PIECE_BYTES):
            whole += self.cipher.encrypt(sector + start // SECTOR_BYTES, data[start : start + length])
            await asyncio.sleep(0)
        return memoryview(whole)

    def describe(self) -> dict[str, Any]:
        """What is worth telling (QEMU's `ImageInfoSpecificQCow2Encryption`)."""
        said: dict[str, Any] = {"format": self.method.name.lower()}
        return said | (self.luks.describe() if self.luks is not None else {})


def passphrase_of(options: EncryptCreationOptions, objects: Objects) -> bytes:
    """The passphrase of a new image.

    Raises:
        OptionError: none was named, or there is no such secret.
    """
    if not options.key_secret:
        raise OptionError("encrypt.key-secret: a new encrypted image needs one: --object secret,id=ID,file=PATH")
    return objects.find(options.key_secret, Secret).passphrase()


async def amend_keys(
    encryption: Encryption, changes: EncryptAmendOptions, options: EncryptOptions, objects: Objects, *, force: bool
) -> None:
    """Fill or erase key slots; see `Luks.amend`."""
    assert encryption.luks is not None
    passphrase = objects.find(options.key_secret, Secret).passphrase() if options.key_secret is not None else None
    await encryption.luks.amend(changes, objects, passphrase, force=force)
