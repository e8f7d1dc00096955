"""The verbs while another process has the image open: what is refused, and what `-U` allows, as qemu-img has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import peers
from tests.cli.img.chains import make_chain
from tests.cli.img.side_by_side import img, qemu_img

LOOKS = (
    "info",
    "map",
    "check",
    "snapshot -l",
    "measure -O qcow2",
    "bench -c 1",
    "compare base.qcow2",
    "convert out.raw",
)
"""They only read."""

CHANGES = (
    "check -r all",
    "bench -w -c 1",
    "snapshot -c new",
    "snapshot -a old",
    "snapshot -U -c new",
    "resize +1M",
    "amend -o lazy_refcounts=on",
    "rebase -u -b base.qcow2 -F qcow2",
    "rebase -b base.qcow2 -F qcow2",
    "commit",
    "bitmap --add new",
    "create -f qcow2 1M",
    "convert -n -O qcow2 base.qcow2 target",
)


@contextlib.contextmanager
def held(holder: str, image: str) -> Iterator[None]:
    """The image is open in a server: ours or qemu-nbd, for writing or not."""
    options = ("-r",) if holder.endswith("reads") else ()
    serve = peers.pynbd_serve if holder.startswith("pynbd") else peers.qemu_nbd
    with serve(*options, "-f", "qcow2", image) if serve is peers.pynbd_serve else serve(image, *options, "-f", "qcow2"):
        yield


def words_of(command: str, image: str, *more: str) -> list[str]:
    """The words of a command, with the image where the verb takes it."""
    verb, *words = command.split()
    if words and words[-1] == "target":
        return [verb, *more, *words[:-1], image]
    operands = 1 if verb in ("resize", "bitmap", "create", "compare") or words[-1:] == ["out.raw"] else 0
    split = len(words) - operands
    return [verb, *more, *words[:split], image, *words[split:]]


@pytest.mark.parametrize("image", ["top.qcow2", "mid.qcow2"])
@pytest.mark.parametrize("holder", ["qemu writes", "qemu reads", "pynbd writes", "pynbd reads"])
def test_what_is_refused(holder: str, image: str, folder: Path) -> None:
    """Both are asked for the same, and nothing that is refused changes anything."""
    make_chain()
    before = {path: path.read_bytes() for path in folder.glob("*.qcow2")}
    with held(holder, image):
        for command in LOOKS:
            for more in ((), ("-U",)):
                words = words_of(command, "top.qcow2", *more)
                theirs, ours = qemu_img(*words), img(*words)
                if image == "mid.qcow2" and command == "check":  # which needs no backing file here
                    assert ours.status == 0
                    continue
                assert (ours.status, bool(ours.err)) == (theirs.status, bool(theirs.err)), (words, ours, theirs)
                assert not more or not ours.err
        if image == "mid.qcow2" or holder.endswith("reads"):
            return
        for command in CHANGES:
            words = words_of(command, image)
            theirs, ours = qemu_img(*words), img(*words)
            assert (theirs.status, ours.status) == (1, 1), (words, ours, theirs)
            assert "lock" in ours.err or "-U" in words
            assert {path: path.read_bytes() for path in folder.glob("*.qcow2")} == before


@pytest.mark.parametrize(
    "command",
    [
        "create -f raw disk.raw 2M",
        "convert -O raw base.qcow2 disk.raw",
        "dd if=base.qcow2 of=disk.raw",
        "create -f qcow2 -o data_file=disk.raw new.qcow2 1M",
    ],
)
def test_what_is_refused_is_not_emptied(command: str, folder: Path) -> None:
    """A raw disk that a reader has open, which lets nobody write."""
    make_chain()
    Path("disk.raw").write_bytes(b"x" * (1 << 20))
    with peers.qemu_nbd("disk.raw", "-f", "raw", "-r"):
        ending = img(*command.split())
    assert ending.status == 1, ending
    assert "lock" in ending.err
    assert Path("disk.raw").read_bytes() == b"x" * (1 << 20)
