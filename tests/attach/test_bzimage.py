"""Boot images are unpacked to the kernel inside, and damaged ones are named as such."""

from __future__ import annotations

import gzip
import lzma

import pytest
from construct import ConstError

from tests.attach.bzimage import ELF_MAGIC, BootHeader, vmlinux_of

VMLINUX = ELF_MAGIC + bytes(range(256)) * 16
PAYLOAD_OFFSET = 64


def boot_image(payload: bytes, setup_sectors: int = 5, version: int = 0x20F) -> bytes:
    header = BootHeader.build(
        {
            "setup_sectors": setup_sectors,
            "version": version,
            "payload_offset": PAYLOAD_OFFSET,
            "payload_length": len(payload),
        }
    )
    start = ((setup_sectors or 4) + 1) * 512 + PAYLOAD_OFFSET
    return bytes(header.ljust(start, b"\0")) + payload


@pytest.mark.parametrize("setup_sectors", [0, 5])
@pytest.mark.parametrize(
    "payload", [gzip.compress(VMLINUX), lzma.compress(VMLINUX) + bytes(4)], ids=["gzip", "xz with a size after it"]
)
def test_kernel_is_unpacked(payload: bytes, setup_sectors: int) -> None:
    assert vmlinux_of(boot_image(payload, setup_sectors)) == VMLINUX


def test_payload_of_another_compression_is_named() -> None:
    with pytest.raises(ValueError, match="begins with 425a68"):
        vmlinux_of(boot_image(b"BZh91AY&SY"))


def test_payload_that_is_no_elf_is_named() -> None:
    with pytest.raises(ValueError, match="unpacks to b'#!/b'"):
        vmlinux_of(boot_image(gzip.compress(b"#!/bin/sh")))


def test_old_boot_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="boot protocol 0x207"):
        vmlinux_of(boot_image(gzip.compress(VMLINUX), version=0x207))


def test_file_that_is_no_boot_image_is_refused() -> None:
    with pytest.raises(ConstError):
        vmlinux_of(bytes(4096))
