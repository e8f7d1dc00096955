"""The same disk in Python, served by nbdkit's python plugin: 256 MiB in memory."""

API_VERSION = 2

DISK = bytearray(256 << 20)


def open(readonly: bool) -> int:  # noqa: A001  the plugin's interface names it so
    """One handle serves all."""
    return 1


def get_size(handle: int) -> int:
    """The size in bytes."""
    return len(DISK)


def pread(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """Copy out."""
    buffer[:] = memoryview(DISK)[offset : offset + len(buffer)]


def pwrite(handle: int, buffer: bytes, offset: int, flags: int) -> None:
    """Copy in."""
    DISK[offset : offset + len(buffer)] = buffer
