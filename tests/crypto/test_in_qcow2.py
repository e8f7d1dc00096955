"""Encryption as it lies in qcow2 images that QEMU has made: LUKS in clusters of the image, and the old AES."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pynbd.block.errors import BlockError
from pynbd.crypto.ciphers import SECTOR_BYTES, SectorCipher, legacy_aes_cipher
from pynbd.crypto.luks import Luks
from tests.formats.luks_images import PASSPHRASE, qemu, qemu_secrets

CLUSTER = 65536

CRYPTO_HEADER = 0x0537BE77
"""The header extension that says where the LUKS header lies (docs/interop/qcow2)."""

OFFSET_MASK = 0x00FFFFFFFFFFFE00


class InClusters:
    """A store for a header that begins in the middle of a file."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._offset = offset

    async def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._offset + offset)
            return file.read(length)

    async def write(self, offset: int, data: bytes) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._offset + offset)
            file.write(data)

    async def flush(self) -> None:
        """A file that another process reads needs none."""


def made(path: Path, kind: str) -> Path:
    """An image with one pattern at its third cluster; its first two are written after that one."""
    options = f"encrypt.format={kind},encrypt.key-secret=s0" + (",encrypt.iter-time=10" if kind == "luks" else "")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *qemu_secrets(), "-o", options, path, "1M")
    commands = ["-c", "write -P 7 128k 64k", "-c", "write -P 8 0 128k"]
    qemu("qemu-io", *qemu_secrets(), *commands, "--image-opts", description(path, kind))
    return path


def description(path: Path, kind: str) -> str:
    return f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s0,file.filename={path}"


def cluster_offsets(data: bytes) -> list[int]:
    """Where the first three clusters of the disk lie in the file."""
    (table,) = struct.unpack_from(">Q", data, 40)
    (below,) = struct.unpack_from(">Q", data, table)
    entries = struct.unpack_from(">3Q", data, below & OFFSET_MASK)
    return [entry & OFFSET_MASK for entry in entries]


def crypto_header(data: bytes) -> int:
    (at,) = struct.unpack_from(">I", data, 100)
    while True:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == CRYPTO_HEADER:
            offset: int = struct.unpack_from(">Q", data, at + 8)[0]
            return offset
        assert kind
        at += 8 + (length + 7) // 8 * 8


def decrypted(cipher: SectorCipher, offset: int, data: bytes) -> bytes:
    buffer = bytearray(data)
    cipher.decrypt(offset // SECTOR_BYTES, memoryview(buffer))
    return bytes(buffer)


async def test_luks_counts_sectors_of_the_file(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "luks")
    data = path.read_bytes()
    luks = await Luks.load(InClusters(path, crypto_header(data)), "disk.qcow2")
    cipher = await luks.unlock(PASSPHRASE.encode())
    with pytest.raises(BlockError, match="opens none of the key slots"):
        await luks.unlock(b"wrong")
    for offset, byte in zip(cluster_offsets(data), (8, 8, 7), strict=True):
        assert decrypted(cipher, offset, data[offset : offset + CLUSTER]) == bytes([byte]) * CLUSTER
    # And what is put there QEMU reads.
    offset = cluster_offsets(data)[1]
    encrypted = bytes(cipher.encrypt(offset // SECTOR_BYTES, b"\5" * CLUSTER))
    await InClusters(path, offset).write(0, encrypted)
    qemu("qemu-io", *qemu_secrets(), "-c", "read -P 5 64k 64k", "--image-opts", description(path, "luks"))


async def test_the_old_aes_counts_sectors_of_the_disk(tmp_path: Path) -> None:
    path = made(tmp_path / "disk.qcow2", "aes")
    data = path.read_bytes()
    cipher = legacy_aes_cipher(PASSPHRASE.encode())
    for number, (offset, byte) in enumerate(zip(cluster_offsets(data), (8, 8, 7), strict=True)):
        assert decrypted(cipher, number * CLUSTER, data[offset : offset + CLUSTER]) == bytes([byte]) * CLUSTER
    offset = cluster_offsets(data)[1]
    encrypted = bytes(cipher.encrypt(CLUSTER // SECTOR_BYTES, b"\5" * CLUSTER))
    await InClusters(path, offset).write(0, encrypted)
    qemu("qemu-io", *qemu_secrets(), "-c", "read -P 5 64k 64k", "--image-opts", description(path, "aes"))
