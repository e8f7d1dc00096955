"""Unpacks a Linux x86 boot image to the ELF kernel inside it.

QEMU starts an ELF `vmlinux` directly; a `bzImage` would unpack itself in the guest, which costs seconds under software
emulation. Source: the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst), version 2.08 and later.
"""

from __future__ import annotations

import gzip
import lzma
import subprocess
from typing import Any

from construct import Const, Int8ul, Int16ul, Int32ul, Padding, Struct

SECTOR_BYTES = 512
SETUP_SECTORS_WHEN_ZERO = 4
BOOT_PROTOCOL_WITH_PAYLOAD = 0x0208

VMLINUX_LIMIT_BYTES = 256 << 20
"""A Debian kernel unpacks to 40 to 70 MiB; anything above this is a damaged file."""

BootHeader = Struct(
    Padding(0x1F1),
    "setup_sectors" / Int8ul,
    Padding(0x202 - 0x1F2),
    "magic" / Const(b"HdrS"),
    "version" / Int16ul,
    Padding(0x248 - 0x208),
    "payload_offset" / Int32ul,
    "payload_length" / Int32ul,
)

XZ_MAGIC = b"\xfd7zXZ\0"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ELF_MAGIC = b"\x7fELF"
TRAILER_BYTES = 4
"""After an xz or zstd payload the kernel's build appends the unpacked size; a gzip payload ends in it by itself."""


def vmlinux_of(image: bytes) -> bytes:
    """Return the ELF kernel inside the boot image `image`; raise ValueError when there is none."""
    header: Any = BootHeader.parse(image)
    if header.version < BOOT_PROTOCOL_WITH_PAYLOAD:
        raise ValueError(f"boot protocol {header.version:#x} at offset 0x206; expected at least 0x208")
    protected_mode = ((header.setup_sectors or SETUP_SECTORS_WHEN_ZERO) + 1) * SECTOR_BYTES
    start = protected_mode + header.payload_offset
    vmlinux = _decompressed(image[start : start + header.payload_length])
    if not vmlinux.startswith(ELF_MAGIC):
        raise ValueError(f"the payload at offset {start} unpacks to {vmlinux[:4]!r}; expected {ELF_MAGIC!r}")
    return vmlinux


def _decompressed(payload: bytes) -> bytes:
    if payload.startswith(XZ_MAGIC):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, max_length=VMLINUX_LIMIT_BYTES)
    if payload.startswith(GZIP_MAGIC):
        return gzip.decompress(payload)
    if payload.startswith(ZSTD_MAGIC):
        unpacked = subprocess.run(
            ["zstd", "--decompress", "--stdout"],
            input=payload[:-TRAILER_BYTES],
            capture_output=True,
            check=True,
        )
        return unpacked.stdout
    raise ValueError(f"kernel payload begins with {payload[:6].hex()}; expected xz, gzip or zstd")
