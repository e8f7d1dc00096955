"""A user's disk in Python, served by pynbd: 256 MiB in memory."""

from pynbd.block.driver import Driver

DISK = bytearray(256 << 20)


class Ramdisk(Driver):
    """Bytes in a bytearray."""

    size = len(DISK)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        """Copy out."""
        into[:] = memoryview(DISK)[offset : offset + len(into)]

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        """Copy in."""
        DISK[offset : offset + len(data)] = data
