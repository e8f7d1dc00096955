"""Encrypted images, LUKS and the old AES: QEMU's are read and written here, and ours there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError, OptionError, PermissionConflict
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from pynbd.crypto import hashes
from pynbd.formats.qcow2.driver import Qcow2
from tests.formats.luks_images import objects, qemu, qemu_secrets
from tests.formats.qcow2.test_creation import parsed
from tests.formats.qcow2.workload import Workload, in_file

SIZE = (1 << 20) + 512


@pytest.fixture
async def graph(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Graph]:
    """One with secrets, where keys are made fast."""
    monkeypatch.setattr(hashes, "MEASURED_S", 0.002)
    graph = Graph(objects())
    yield graph
    await graph.close_all()


def description(path: Path, secret: str | None = "s0", **options: Any) -> dict[str, Any]:
    encrypt = {} if secret is None else {"encrypt": {"key-secret": secret}}
    return in_file(path, **encrypt, **options)


def options_of(kind: str) -> str:
    return f"encrypt.format={kind},encrypt.key-secret=s0" + (",encrypt.iter-time=10" if kind == "luks" else "")


def image_options(path: Path, kind: str) -> str:
    return f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s0,file.filename={path}"


def is_sound(path: Path, kind: str) -> bool:
    qemu("qemu-img", "check", "-q", *qemu_secrets(), "--image-opts", image_options(path, kind))
    return True


def read_by_qemu(path: Path, kind: str) -> bytes:
    raw = path.with_suffix(".read")
    qemu("qemu-img", "convert", *qemu_secrets(), "--image-opts", "-O", "raw", image_options(path, kind), raw)
    return raw.read_bytes()


async def create(graph: Graph, path: Path, options: str) -> None:
    path.touch()
    backend = BlockBackend("creation")
    node = await graph.open({"driver": "file", "filename": str(path)})
    graph.attach(backend, node, Permission.ALL)
    await Qcow2.create_image(backend, parsed(options, SIZE))
    graph.detach(backend)
    await graph.close(node)


@pytest.mark.parametrize(
    "extra", ["", ",extended_l2=on", ",cluster_size=4k", ",preallocation=metadata", ",compat=0.10"]
)
@pytest.mark.parametrize("kind", ["luks", "aes"])
@pytest.mark.parametrize("ours", [True, False])
async def test_written_here_and_read_there(graph: Graph, tmp_path: Path, kind: str, extra: str, ours: bool) -> None:
    if kind == "aes" and not ours:
        extra = extra.replace(",extended_l2=on", "")
    path = tmp_path / "image.qcow2"
    if ours:
        await create(graph, path, options_of(kind) + extra)
    else:
        words = options_of(kind) + extra
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *qemu_secrets(), "-o", words, path, str(SIZE))
    assert is_sound(path, kind)
    work = await Workload.opened(graph, description(path), bytes(SIZE), seed=4)
    if "preallocation" in extra:
        # What nobody wrote is noise: zeroes that were never encrypted.
        work.model[:] = await work.read(0, SIZE)
    for _ in range(60):
        await work.round(4, compressed=False)
    await work.check()
    await work.close()
    assert is_sound(path, kind)
    assert read_by_qemu(path, kind) == work.model


@pytest.mark.parametrize("kind", ["luks", "aes"])
async def test_of_the_old_version_and_back(graph: Graph, tmp_path: Path, kind: str) -> None:
    """Zeroes that must be written out then are encrypted (qemu-img 7.2 writes them plain, as noise to the guest)."""
    path, twin = tmp_path / "image.qcow2", tmp_path / "twin.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *qemu_secrets(), "-o", options_of(kind), path, str(SIZE))
    words = ("write -P 7 0 256k", "write -z 64k 64k", "write -z 512k 64k")
    commands = [word for command in words for word in ("-c", command)]
    qemu("qemu-io", *qemu_secrets(), *commands, "--image-opts", image_options(path, kind))
    content = read_by_qemu(path, kind)
    before = path.read_bytes()
    node = await graph.open(description(path, None))
    with pytest.raises(OptionError, match="passphrase"):
        await amend(node, {"compat": "0.10"})
    await graph.close(node)
    assert path.read_bytes() == before
    work = await Workload.opened(graph, description(path), content, seed=1)
    await work.driver.amend({"compat": "0.10"})
    await work.check()
    await work.round(4, compressed=False)
    await work.close()
    assert path.read_bytes()[7] == 2
    assert is_sound(path, kind)
    assert read_by_qemu(path, kind) == work.model
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *qemu_secrets(), "-o", options_of(kind), twin, str(SIZE))
    commands = ["-c", "write -P 7 0 256k", "-c", "write -z 512k 64k"]
    qemu("qemu-io", *qemu_secrets(), *commands, "--image-opts", image_options(twin, kind))
    content = read_by_qemu(twin, kind)
    qemu("qemu-img", "amend", *qemu_secrets(), "--image-opts", "-o", "compat=0.10", image_options(twin, kind))
    work = await Workload.opened(graph, description(twin), content, seed=1)
    await work.check()
    if kind == "luks":
        await work.driver.amend({"encrypt": {"state": "active", "new-secret": "s1", "iter-time": "10"}})
    await work.driver.amend({"compat": "1.1"})
    await work.check()
    await work.close()
    assert is_sound(twin, kind)
    assert read_by_qemu(twin, kind) == content


async def amend(node: Node, changes: dict[str, str]) -> None:
    driver = node.driver
    assert isinstance(driver, Qcow2)
    await driver.amend(changes)


@pytest.mark.parametrize("kind", ["luks", "aes"])
async def test_without_the_right_key(graph: Graph, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.qcow2"
    await create(graph, path, options_of(kind))
    node = await graph.open(description(path, None))
    assert (await node.info()).encrypted
    assert (await node.info()).specific["encrypt"]["format"] == kind
    with pytest.raises(PermissionConflict, match="passphrase"):
        graph.attach(BlockBackend("reader"), node, Permission.CONSISTENT_READ)
    await graph.close(node)
    other = "aes" if kind == "luks" else "luks"
    with pytest.raises(OptionError, match="but the image is encrypted by"):
        await graph.open(description(path, None, encrypt={"format": other, "key-secret": "s0"}))
    if kind == "luks":
        with pytest.raises(BlockError):
            await graph.open(description(path, "s2"))


async def test_compressed_clusters_are_refused(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    await create(graph, path, options_of("luks"))
    work = await Workload.opened(graph, description(path), bytes(SIZE), seed=4)
    with pytest.raises(OSError, match="encrypted image"):
        await work.backend.write(0, memoryview(bytes(65536)), 32)
    await work.close()


@pytest.mark.parametrize("kind", ["luks", "aes"])
async def test_snapshots_and_the_state_of_a_machine(graph: Graph, tmp_path: Path, kind: str) -> None:
    """What snapshots keep is encrypted like the disk, whatever pieces a state is written in."""
    path = tmp_path / "kept.qcow2"
    qemu("qemu-img", "create", "-q", *qemu_secrets(), "-f", "qcow2", "-o", options_of(kind), path, str(SIZE))
    work = await Workload.opened(graph, description(path), bytes(SIZE), seed=3)
    for _ in range(10):
        await work.round(4, compressed=False)
    before, state = bytes(work.model), work.random.randbytes(200_003)
    for at in range(0, len(state), 30_001):
        await work.driver.save_vmstate(at, memoryview(state)[at : at + 30_001])
    await work.driver.snapshot_create("one")
    assert state[:64] not in path.read_bytes()
    for _ in range(10):
        await work.round(4, compressed=False)
    await work.driver.snapshot_goto("one")
    work.model[:] = before
    await work.check()
    found = bytearray(len(state) - 7)
    await work.driver.load_vmstate(7, memoryview(found))
    assert found == state[7:]
    await work.close()
    assert is_sound(path, kind)
    assert read_by_qemu(path, kind) == before


async def test_key_slots_are_filled_and_erased(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    await create(graph, path, options_of("luks"))
    work = await Workload.opened(graph, description(path), bytes(SIZE), seed=4)
    await work.round(4, compressed=False)
    await work.driver.amend({"encrypt": {"state": "active", "new-secret": "s1", "iter-time": "10"}})
    await work.close()
    again = await Workload.opened(graph, description(path, "s1"), work.model, seed=4)
    await again.check()
    await again.driver.amend({"encrypt": {"state": "inactive", "old-secret": "s0"}})
    await again.close()
    with pytest.raises(BlockError):
        await graph.open(description(path))
    image = image_options(path, "luks").replace("key-secret=s0", "key-secret=s1")
    qemu("qemu-io", *qemu_secrets(), "-c", "read 0 64k", "--image-opts", image)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"keyslot": "8"}, r"encrypt\.keyslot: .*<= 7"),
        ({"iter-time": "600001"}, r"encrypt\.iter-time: .*<= 600000"),
        ({"state": "gone"}, r"encrypt\.state: "),
    ],
)
async def test_changes_of_key_slots_have_limits(
    graph: Graph, tmp_path: Path, changes: dict[str, str], expected: str
) -> None:
    """Those of a container of its own, and nothing has been written then."""
    path = tmp_path / "image.qcow2"
    await create(graph, path, options_of("luks"))
    work = await Workload.opened(graph, description(path), bytes(SIZE), seed=5)
    before = path.read_bytes()
    with pytest.raises(OptionError, match=expected):
        await work.driver.amend({"encrypt": {"state": "active", "new-secret": "s1", **changes}})
    assert path.read_bytes() == before
    await work.close()


async def test_a_container_takes_at_most_so_long(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"encrypt\.iter-time: .*<= 600000"):
        await create(
            graph, tmp_path / "image.qcow2", "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=600001"
        )
