"""LUKS images for tests: made by pynbd, by QEMU and by cryptsetup, all with quick passphrases."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.graph import Graph
from pynbd.block.objects import Objects
from pynbd.block.permissions import Permission
from pynbd.crypto import hashes
from pynbd.formats.luks import LuksCreationOptions, LuksFormat
from tests.peers import require_tool, run

PASSPHRASE = "pässword"
WORDS = {"s0": PASSPHRASE, "s1": "another, with a comma", "s2": "never used"}
SIZE = 1 << 20
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


def objects() -> Objects:
    """Secrets, each a passphrase."""
    made = Objects()
    for name, word in WORDS.items():
        made.make({"qom-type": "secret", "id": name, "data": word})
    return made


def qemu_secrets() -> list[str]:
    """The same for QEMU's tools."""
    return [
        word
        for name, passphrase in WORDS.items()
        for word in ("--object", f"secret,id={name},data={passphrase.replace(',', ',,')}")
    ]


def qemu(*command: str | Path) -> str:
    """Run one of QEMU's tools."""
    require_tool(str(command[0]), package="qemu-utils")
    return run(*command)


def qemu_create(path: Path, size: int = SIZE, **options: Any) -> None:
    """A new image by qemu-img."""
    given = {"key-secret": "s0", "iter-time": "10", **{name.replace("_", "-"): text for name, text in options.items()}}
    words = ",".join(f"{name}={text}" for name, text in given.items())
    qemu("qemu-img", "create", "-q", "-f", "luks", *qemu_secrets(), "-o", words, path, str(size))


def qemu_io(path: Path, *commands: str, secret: str = "s0") -> str:
    """What qemu-io makes of commands on an image."""
    words = [word for command in commands for word in ("-c", command)]
    image = f"driver=luks,key-secret={secret},file.filename={path}"
    return qemu("qemu-io", *qemu_secrets(), *words, "--image-opts", image)


async def create(path: Path, size: int = SIZE, **options: Any) -> None:
    """A new image by pynbd."""
    path.touch()
    given = {"key-secret": "s0", "iter-time": 1, **{name.replace("_", "-"): text for name, text in options.items()}}
    wanted = msgspec.convert({"size": size, **given}, LuksCreationOptions, strict=False)
    graph = Graph(objects())
    backend = BlockBackend("create")
    patch = pytest.MonkeyPatch()
    patch.setattr(hashes, "MEASURED_S", 0.002)
    try:
        node = await graph.open({"driver": "file", "filename": str(path)})
        graph.attach(backend, node, READ_WRITE)
        try:
            await LuksFormat.create_image(backend, wanted)
        finally:
            graph.detach(backend)
    finally:
        patch.undo()
        await graph.close_all()


@contextlib.asynccontextmanager
async def opened(
    path: Path, held: Permission = READ_WRITE, *, secret: str = "s0", read_only: bool = False
) -> AsyncIterator[BlockBackend]:
    """A user of an image that a secret unlocks."""
    tree = {"driver": "luks", "key-secret": secret, "read-only": read_only, "file": {"filename": str(path)}}
    graph = Graph(objects())
    backend = BlockBackend("test")
    try:
        node = await graph.open(tree)
        graph.attach(backend, node, held)
        try:
            yield backend
        finally:
            graph.detach(backend)
    finally:
        await graph.close_all()


async def content(path: Path, *, secret: str = "s0") -> bytes:
    """All that a disk holds."""
    async with opened(path, Permission.CONSISTENT_READ, secret=secret) as backend:
        into = bytearray(backend.size)
        await backend.read(0, memoryview(into))
        return bytes(into)
