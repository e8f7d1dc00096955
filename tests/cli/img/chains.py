"""Chains of qcow2 images that qemu-img makes, and what is read through them."""

from __future__ import annotations

from pathlib import Path

from tests import peers


def qemu_io(image: str, *commands: str) -> None:
    """Let qemu-io write into an image."""
    words = [word for command in commands for word in ("-c", command)]
    peers.run(peers.require_tool("qemu-io", package="qemu-utils"), *words, image)


def qemu(*words: str) -> str:
    """What qemu-img prints; it must end well."""
    return peers.run(peers.require_tool("qemu-img", package="qemu-utils"), *words)


def make_chain() -> bytes:
    """`top.qcow2` over `mid.qcow2` over `base.qcow2`, each with data of its own, the top longer; what the top shows."""
    qemu("create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    qemu_io("base.qcow2", "write -P 1 0 1M")
    qemu("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
    qemu_io("mid.qcow2", "write -P 2 1M 1M", "write -P 2 3M 512")
    qemu("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "5M")
    qemu_io("top.qcow2", "write -P 3 2M 1M", "write -z 128k 192k", "write -P 3 4224k 512")
    return shown("top.qcow2")


def shown(image: str) -> bytes:
    """What a disk holds, read by qemu-img; the image must be sound."""
    if image.endswith(".qcow2"):
        qemu("check", "-q", image)
    qemu("convert", "-O", "raw", image, "shown.raw")
    content = Path("shown.raw").read_bytes()
    Path("shown.raw").unlink()
    return content
