"""`pynbd copy`: the same bytes on the other side, no more than is needed on the way, and no half copies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.cli.zero_runs import BLOCK_BYTES, runs
from tests import peers
from tests.cli.pynbd_command import PYNBD, failure, pynbd
from tests.conftest import DiskMaker

MIB = 1 << 20


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk, in steps of 64 KiB: the file system may take a block for itself."""
    return path.stat().st_blocks * 512 >> 16 << 16


@pytest.fixture
def zeroes_disk(tmp_path: Path) -> Path:
    """4 MiB without a hole, of which only each fourth 64 KiB, and one byte near the end, are no zeroes."""
    source = random.Random(6)
    content = bytearray()
    for number in range(64):
        content += bytes(65536) if number % 4 else source.randbytes(65536)
    content[-4097] = 1
    path = tmp_path / "zeroes.raw"
    path.write_bytes(content)
    return path


# --- to a new file ----------------------------------------------------------------------------------------------


def test_to_a_new_file(sparse_disk: Path, tmp_path: Path) -> None:
    """Of the same bytes, size and holes; and nothing else is left in the folder."""
    target = tmp_path / "copy" / "a: new, file.raw"
    target.parent.mkdir()
    assert pynbd("copy", sparse_disk, target) == ""
    assert target.read_bytes() == sparse_disk.read_bytes()
    assert allocated(target) <= allocated(sparse_disk)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("size", [0, 1, 511, 4097, 3 * MIB + 1])
def test_any_size(size: int, make_disk: DiskMaker, tmp_path: Path) -> None:
    disk, target = make_disk(size), tmp_path / "copy.raw"
    pynbd("copy", disk, target)
    assert target.read_bytes() == disk.read_bytes()


def test_zeroes_are_found_in_data(zeroes_disk: Path, tmp_path: Path) -> None:
    """They take no space; unless that is wanted."""
    sparse, full = tmp_path / "sparse.raw", tmp_path / "full.raw"
    pynbd("copy", zeroes_disk, sparse)
    pynbd("copy", "--allocated", zeroes_disk, full)
    assert sparse.read_bytes() == full.read_bytes() == zeroes_disk.read_bytes()
    assert allocated(sparse) == 16 * 65536
    assert allocated(full) == 4 * MIB


def test_allocated_holes(sparse_disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "full.raw"
    pynbd("copy", "--allocated", sparse_disk, target)
    assert target.read_bytes() == sparse_disk.read_bytes()
    assert allocated(target) == 64 * MIB


def test_descriptions(random_disk: Path, tmp_path: Path) -> None:
    """Anything that can be opened can be copied: a part of a file, memory, a tree of options."""
    part, nothing, whole = (tmp_path / name for name in ("part.raw", "nothing.raw", "whole.raw"))
    pynbd("copy", f"driver=raw,offset=1M,size=3000,file.driver=file,file.filename={random_disk}", part)
    assert part.read_bytes() == random_disk.read_bytes()[MIB : MIB + 3000]
    pynbd("copy", "driver=memory,size=1G", nothing)
    assert (nothing.stat().st_size, allocated(nothing)) == (1 << 30, 0)
    whole.write_bytes(bytes(8 * MIB))
    pynbd("copy", f"file://{random_disk}", f'json:{{"driver": "file", "filename": "{whole}"}}')
    assert whole.read_bytes() == random_disk.read_bytes()


# --- to what is there -------------------------------------------------------------------------------------------


def test_into_a_larger_file(sparse_disk: Path, tmp_path: Path) -> None:
    """Zeroes are written too, and what lies behind stays."""
    target = tmp_path / "old.raw"
    target.write_bytes(b"x" * (65 * MIB))
    pynbd("copy", sparse_disk, target)
    assert target.read_bytes() == sparse_disk.read_bytes() + b"x" * MIB


def test_into_zeroes(sparse_disk: Path, tmp_path: Path) -> None:
    """Who says that the destination is zero gets what they said."""
    target = tmp_path / "old.raw"
    target.write_bytes(bytes(64 * MIB - 1) + b"x")
    pynbd("copy", "--destination-is-zero", sparse_disk, target)
    assert allocated(target) == 64 * MIB
    assert target.read_bytes() == sparse_disk.read_bytes()


def test_too_small(random_disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.raw"
    target.write_bytes(b"x" * 512)
    said = failure("copy", random_disk, target)
    assert said == f"{target}: the destination has 512 bytes, too few for the {8 * MIB} of {random_disk}"
    assert target.read_bytes() == b"x" * 512


def test_bytes_of_another_format(tmp_path: Path) -> None:
    """What looks like an image is not taken for raw unless that is said, and then it is copied as it is."""
    image, target = tmp_path / "disk.qcow", tmp_path / "copy.qcow"
    peers.run(peers.require_tool("qemu-img"), "create", "-q", "-f", "qcow", image, "1M")
    assert "qcow image" in failure("copy", image, target)
    pynbd("copy", "-f", "raw", image, target)
    assert target.read_bytes() == image.read_bytes()


# --- over NBD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "nbdkit in blocks", "nbd-server", "pynbd"])
def test_there_and_back(kind: str, sparse_disk: Path, make_disk: DiskMaker, tmp_path: Path) -> None:
    """A file to a server full of other bytes, and from there to a new file."""
    remote, back = make_disk(64 * MIB, seed=9, name="remote.raw"), tmp_path / "back.raw"
    servers: dict[str, Callable[[], AbstractContextManager[peers.Peer]]] = {
        "qemu-nbd": lambda: peers.qemu_nbd(remote, "--discard=unmap"),
        "nbdkit": lambda: peers.nbdkit("file", remote),
        "nbdkit in blocks": lambda: peers.nbdkit(
            "file",
            remote,
            "blocksize-minimum=4096",
            "blocksize-maximum=128k",
            "blocksize-error-policy=error",
            options=["--filter=blocksize-policy"],
        ),
        "nbd-server": lambda: peers.nbd_server({"disk": remote}, "flush = true", "trim = true"),
        "pynbd": lambda: peers.pynbd_serve("-f", "raw", "--discard=unmap", remote),
    }
    with servers[kind]() as peer:
        pynbd("copy", sparse_disk, peer.uri())
        pynbd("copy", "--requests", "3", "--request-size", "1M", peer.uri(), back)
    assert remote.read_bytes() == back.read_bytes() == sparse_disk.read_bytes()
    assert allocated(back) <= allocated(sparse_disk)


def test_server_to_server(random_disk: Path, make_disk: DiskMaker) -> None:
    remote = make_disk(8 * MIB, extents=[], name="remote.raw")
    with peers.nbdkit("file", random_disk, options=["-r"]) as source, peers.qemu_nbd(remote, qemu10=False) as target:
        pynbd("copy", source.uri(), target.uri())
    assert remote.read_bytes() == random_disk.read_bytes()


@pytest.mark.parametrize(("option", "flushes"), [("--flush", True), ("--no-flush", False)])
def test_it_is_flushed_at_the_end(option: str, flushes: bool, random_disk: Path, tmp_path: Path) -> None:
    """Unless that is not wanted; and several connections are made where the server allows them."""
    log = tmp_path / "requests.log"
    with peers.nbdkit("memory", "8M", f"logfile={log}", options=["--filter=log"]) as peer:
        pynbd("copy", option, "--connections", "3", random_disk, peer.uri())
        said = log.read_text()
        assert ("Flush id=" in said) == flushes
        assert said.count(" Connect ") == 3
        assert pynbd("copy", "--destination-is-zero", "driver=memory,size=8M", peer.uri()) == ""


def test_read_only_destination(random_disk: Path) -> None:
    with peers.nbdkit("memory", "8M", options=["-r"]) as peer:
        assert "this export read-only" in failure("copy", random_disk, peer.uri())


# --- failures ---------------------------------------------------------------------------------------------------


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Not even a file of another name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with peers.nbdkit(
        "memory", "64M", "error-pread=EIO", "error-pread-rate=100%", options=["--filter=error", "--filter=noextents"]
    ) as peer:
        # The first bytes are looked at for the format's sake.
        said = failure("copy", "-f", "raw", peer.uri(), folder / "copy.raw")
        assert "read at " in said
        assert "the server says 'Input/output error'" in said
        assert peer.uri() in said
    assert not list(folder.iterdir())


def test_a_destination_that_fails(random_disk: Path) -> None:
    with peers.nbdkit(
        "memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", options=["--filter=error"]
    ) as peer:
        assert "the server says 'No space left on device'" in failure("copy", random_disk, peer.uri())


def test_a_server_that_dies(tmp_path: Path) -> None:
    """In the middle of a copy: one line, and no file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with peers.nbdkit("pattern", "1G", "rdelay=20ms", options=["--filter=delay", "--filter=noextents"]) as peer:
        process = subprocess.Popen(
            [*PYNBD, "copy", "-f", "raw", peer.uri(), folder / "copy.raw"], stderr=subprocess.PIPE, text=True
        )
        while not any(allocated(path) for path in folder.glob(".copy.raw.*.partial")):
            assert process.poll() is None
            os.sched_yield()
        peer.stop(signal.SIGKILL)
        _, said = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert process.returncode == 1
    assert said.startswith("pynbd copy: ")
    assert said.count("\n") == 1
    assert "read at " in said
    assert "the connection was lost" in said
    assert not list(folder.iterdir())


def test_names_that_are_wrong(random_disk: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.raw"
    assert failure("copy", missing, tmp_path / "x") == f"Could not open '{missing}': No such file or directory"
    assert failure("copy", random_disk, missing / "x") == f"Could not create '{missing}/x': No such file or directory"
    assert failure("copy", random_disk, tmp_path).startswith(f"Could not open '{tmp_path}': it is a directory")
    assert "no driver for http://" in failure("copy", "http://x", tmp_path / "x")
    assert failure("copy", random_disk, "nbd://127.0.0.1:1").endswith("Connection refused")
    assert "only raw files can be made" in failure("copy", "-O", "qcow2", random_disk, tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == [random_disk]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests", "0"], "--requests: 0 is not in 1 to 1024"),
        (["--request-size", "1G"], "--request-size: 1073741824 is not in 4096 to 33554432"),
        (["--request-size", "5000"], "--request-size: 5000 is no multiple of 4096"),
        (["--requests", "1024", "--request-size", "32M"], "--requests times --request-size"),
        (["--request-size", "big"], "--request-size: 'big' is no size"),
    ],
)
def test_numbers_out_of_range(options: list[str], said: str, random_disk: Path, tmp_path: Path) -> None:
    assert said in failure("copy", *options, random_disk, tmp_path / "x")


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """And who interrupts a copy is left with nothing half-made."""
    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "copy.raw"
    with peers.nbdkit("pattern", "1M", "rdelay=1", options=["--filter=delay", "--filter=noextents"]) as peer:
        process = subprocess.Popen(
            [*PYNBD, "copy", "-f", "raw", "--request-size", "1M", peer.uri(), target], stderr=subprocess.PIPE, text=True
        )
        while not list(folder.glob(".copy.raw.*.partial")):
            assert process.poll() is None
            os.sched_yield()
        target.write_text("mine")
        _, said = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert (process.returncode, said) == (1, f"pynbd copy: {target}: the copy can't be given its name: File exists\n")
    assert list(folder.iterdir()) == [target]
    assert target.read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """A signal ends it soon, and nothing half-made is left."""
    folder = tmp_path / "folder"
    folder.mkdir()
    target = folder / "copy.raw"
    with peers.nbdkit("pattern", "1G", "rdelay=100ms", options=["--filter=delay", "--filter=noextents"]) as peer:
        process = subprocess.Popen(
            [*PYNBD, "copy", "-f", "raw", "--requests", "1", peer.uri(), target], stderr=subprocess.PIPE, text=True
        )
        while not any(allocated(path) for path in folder.glob(".copy.raw.*.partial")):
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(number)
        _, said = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert process.returncode == 1
    assert said == f"pynbd copy: interrupted; {target} holds a part of {peer.uri()}\n"
    assert not list(folder.iterdir())


# --- the bar ----------------------------------------------------------------------------------------------------


def test_progress_on_a_terminal(random_disk: Path, tmp_path: Path) -> None:
    terminal = pexpect.spawn(
        PYNBD[0], [*PYNBD[1:], "copy", "-p", str(random_disk), str(tmp_path / "copy.raw")], timeout=60
    )
    terminal.expect("100%")
    terminal.expect("8.4/8.4 MB|8.0/8.0 MiB")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert (tmp_path / "copy.raw").read_bytes() == random_disk.read_bytes()


def test_no_progress_elsewhere(random_disk: Path, tmp_path: Path) -> None:
    assert pynbd("copy", "-p", random_disk, tmp_path / "copy.raw") == ""


# --- zeroes in data ---------------------------------------------------------------------------------------------

blocks = st.sampled_from(["zero", "data", "late"])


@given(kinds=st.lists(blocks, min_size=1, max_size=20), cut=st.integers(0, BLOCK_BYTES - 1))
def test_runs(kinds: list[str], cut: int) -> None:
    """Runs cover the data without a gap, alternate, and are zero exactly where whole blocks are."""
    content = {"zero": bytes(BLOCK_BYTES), "data": b"x" * BLOCK_BYTES, "late": bytes(BLOCK_BYTES - 1) + b"x"}
    data = b"".join(content[kind] for kind in kinds)[: len(kinds) * BLOCK_BYTES - cut]
    found = list(runs(memoryview(data)))
    position, before = 0, None
    for start, length, zero in found:
        assert start == position
        assert length > 0
        assert zero is not before
        position, before = start + length, zero
    assert position == len(data)
    for index in range(0, len(data), BLOCK_BYTES):
        expected = not any(data[index : index + BLOCK_BYTES])
        assert expected == next(zero for start, length, zero in found if start <= index < start + length)
