"""The real nbd-client, called in the guest as a user calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.attach.guest import HOST_ADDRESS, Guest
from tests.attach.server import ServerUnderTest

DEVICE = "/dev/nbd0"
NOT_ATTACHED = 1
"""The exit status of `nbd-client -c` for a device that is not attached."""


def attach_command(server: ServerUnderTest, options: str = "", device: str = DEVICE) -> str:
    """The shell command that attaches the server's export to `device`."""
    return f"nbd-client {HOST_ADDRESS} {server.port} {device} -N {server.export_name} {options}"


def attach(guest: Guest, server: ServerUnderTest, options: str = "", device: str = DEVICE) -> None:
    """Attach the server's export to `device` of the guest, and wait until it has its size.

    By ioctl (`-L`) the kernel learns of it from a child that nbd-client leaves behind, some time after it has ended.
    """
    size = f"/sys/block/{device.removeprefix('/dev/')}/size"
    guest.run(f"{attach_command(server, options, device)} && until test $(cat {size}) != 0; do :; done")


def detach(guest: Guest, device: str = DEVICE) -> None:
    """Detach `device`, and see that it is."""
    guest.run(f"nbd-client -d {device}")
    assert not is_attached(guest, device)


def is_attached(guest: Guest, device: str = DEVICE) -> bool:
    """What `nbd-client -c` says."""
    status, output = guest.status_of(f"nbd-client -c {device}")
    assert status in (0, NOT_ATTACHED), output
    return status == 0


@contextmanager
def attached(guest: Guest, server: ServerUnderTest, options: str = "", device: str = DEVICE) -> Iterator[str]:
    """Within the context the export is attached to `device`, which the context gives."""
    attach(guest, server, options, device)
    yield device
    detach(guest, device)


def queue_value(guest: Guest, name: str, device: str = DEVICE) -> str:
    """What the kernel says of the disk in `/sys/block/nbdN/queue/NAME`."""
    return guest.run(f"cat /sys/block/{device.removeprefix('/dev/')}/queue/{name}").strip()


def size_bytes(guest: Guest, device: str = DEVICE) -> int:
    """How long the kernel thinks that the disk is."""
    return int(guest.run(f"blockdev --getsize64 {device}"))
