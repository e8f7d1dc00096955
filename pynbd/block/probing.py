"""Which format an image has, told from its first bytes; and why a disk that was only *found* to be raw is fenced.

A guest that owns a raw disk may write any bytes it likes to it, also the header of a format whose backing file
is one of the host's secrets. If the format was probed, the next start would believe that header. So a probed
raw disk refuses writes that would make it look like something else; one that was *said* to be raw does not.
"""

import asyncio
import errno

from pynbd.block import registry
from pynbd.block.errors import OptionError, io_error
from pynbd.block.node import Node

PROBE_BYTES = 2048
"""How much of an image is looked at; every format's mark that is at the front lies in it."""

RAW = "raw"

SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("qcow2", 0, b"QFI\xfb\0\0\0\2"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\3"),
    ("qcow", 0, b"QFI\xfb\0\0\0\1"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("luks", 0, b"LUKS\xba\xbe\0\1"),
    ("luks2", 0, b"LUKS\xba\xbe\0\2"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
"""The marks of image formats: name, offset, bytes. Any of them makes a disk look like more than raw bytes."""


def signature_of(head: bytes) -> str | None:
    """The format whose mark stands in an image's first bytes, if any does."""
    for name, offset, mark in SIGNATURES:
        if head[offset : offset + len(mark)] == mark:
            return name
    return None


def probe_format(head: bytes, filename: str) -> str:
    """The format of an image.

    Args:
        head: its first `PROBE_BYTES` bytes.
        filename: its name, for the message and for formats that look at it.

    Raises:
        OptionError: it is a format that this version can't open.
    """
    signature = signature_of(head)
    if signature is None:
        return RAW
    # Only the driver of that mark is imported and asked.
    if signature in registry.BUILT_IN and registry.driver_class(signature).probe(head, filename):
        return signature
    raise OptionError(
        f"{filename}: this is a {signature} image, which can't be opened as a disk; "
        f"give -f raw to serve its bytes as they are"
    )


async def read_head(node: Node) -> bytes:
    """The first bytes of a node, `PROBE_BYTES` or as many as it has."""
    head = bytearray(min(PROBE_BYTES, node.size))
    if head:
        await node.path.read(0, memoryview(head), 0)
    return bytes(head)


class ProbedRawGuard:
    """Refuses changes that would make a disk that was probed as raw look like another format.

    Zeroes complete a mark as well as written bytes do (`QED` and a zero), and so does growing.
    """

    length = PROBE_BYTES

    def __init__(self, node: Node) -> None:
        self.node = node
        # Check and write go together: two writes that are harmless alone must not make a mark between them.
        self.lock = asyncio.Lock()

    async def check(self, offset: int, data: memoryview) -> None:
        """Let the write pass, or raise `EPERM`."""
        # What lies behind the end of a small disk may become zeroes when it grows.
        head = bytearray((await read_head(self.node)).ljust(PROBE_BYTES, b"\0"))
        end = min(offset + len(data), PROBE_BYTES)
        head[offset:end] = data[: end - offset]
        found = signature_of(bytes(head))
        if found is not None:
            raise io_error(
                errno.EPERM,
                self.node.name,
                f"this write would make a disk whose format was guessed as raw look like a {found} image; "
                f"say so if it is raw: give -f raw",
            )
