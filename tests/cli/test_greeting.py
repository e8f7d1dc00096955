"""The lines to paste, for what no test can paste them into."""

from __future__ import annotations

from nbd_protocol.uri import NbdUri
from pynbd.cli.greeting import is_every_address, paste_lines


def test_lines_for_virtual_machines() -> None:
    options = "driver=nbd,server.type=vsock,server.cid=3,server.port=5,export=a,,b"
    assert paste_lines(NbdUri("nbd+vsock", host="3", port=5, export="a,b"), read_only=True) == [
        "  nbd+vsock://3:5/a,b",
        "    Linux     nbdfuse -r DIR/disk nbd+vsock://3:5/a,b",
        f"    QEMU      qemu-system-x86_64 -drive {options},if=virtio,readonly=on",
        f"    qemu-img  qemu-img info --image-opts {options}",
    ]
    secure = paste_lines(NbdUri("nbds+vsock", host="3", port=5), read_only=False)
    assert all("tls-creds=tls0,tls-hostname=NAME" in line for line in secure[2:])


def test_which_addresses_are_for_everybody() -> None:
    listen = ("0.0.0.0:1", "[::]:1", ":1", "127.0.0.1:1", "unix:/run/s", "vsock:1")
    assert [is_every_address(text) for text in listen] == [True, True, True, False, False, False]
