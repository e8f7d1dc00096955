"""Bytes to begin with: what real ends of the protocol say to one another, and sound texts and images."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.fuzz.targets import ClientEnd, ServerEnd

MAX_TURNS = 50

URIS = [
    "nbd://localhost",
    "nbd://[::1]:10810/disk%20one",
    "nbds://alice@example.com:1/a/b?tls-certificates=/etc/pki&tls-verify-peer=0",
    "nbd+unix:///name?socket=/run/x.sock",
    "nbds+unix:///?socket=/run/x.sock&tls-psk-file=/keys&tls-hostname=h",
    "nbd+vsock://3:5/x",
]


def dialogues() -> dict[str, list[bytes]]:
    """What each end hears, for every wish of a client and every offer of a server."""
    found: dict[str, list[bytes]] = {"server": [], "client": []}
    for wish in range(64):
        for offer in (0, 4, 12, 28, 13, 14, 60):
            client, server = ClientEnd(wish), ServerEnd(offer)
            heard = {"server": b"", "client": b""}
            for _ in range(MAX_TURNS):
                to_client, server.sent = server.sent, b""
                heard["client"] += to_client
                if to_client:
                    client.receive(to_client)
                to_server, client.sent = client.sent, b""
                heard["server"] += to_server
                if not to_server:
                    break
                server.receive(to_server)
            found["server"].append(bytes([offer]) + heard["server"])
            found["client"].append(bytes([wish]) + heard["client"])
    return {name: sorted(set(data)) for name, data in found.items()}


def images() -> list[bytes]:
    """Small qcow2 images that qemu-img has made."""
    found = []
    with tempfile.TemporaryDirectory(prefix="pynbd-fuzz-") as folder:
        path = Path(folder) / "seed.qcow2"
        for options in (
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=512,refcount_bits=2,lazy_refcounts=off",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=512,compression_type=zstd",
        ):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64k"], check=True)
            writes = ["write -P 1 0 4k", "write -z 8k 4k"]
            for command in writes:
                subprocess.run(["qemu-io", "-c", command, path], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["qemu-img", "snapshot", "-c", "one", path], check=True)
            found.append(path.read_bytes())
    return found


def seeds_of(target: str) -> list[bytes]:
    """Where a target begins.

    Raises:
        OSError: there is no qemu-img to make images with.
    """
    if target == "uri":
        return [text.encode() for text in URIS]
    return images() if target == "image" else dialogues()[target]


def words_of(target: str) -> list[bytes]:
    """What a fuzzer would be long in finding."""
    if target == "uri":
        return [b"nbd://", b"nbds+unix://", b"?socket=", b"&tls-certificates=", b"%2F", b"[::1]"]
    if target == "image":
        return [b"QFI\xfb", bytes.fromhex("6803f857"), bytes.fromhex("23852875"), bytes.fromhex("44415441")]
    magics = (
        "4e42444d41474943 49484156454f5054 00420281861253 0003e889045565a9 25609513 67446698 668e33ef 21e41c71 6e8a278c"
    )
    return [bytes.fromhex(magic) for magic in magics.split()] + [b"base:allocation", b"disk", b"\x80\x00\x00\x01"]
