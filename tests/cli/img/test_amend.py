"""`pynbd img amend` beside qemu-img's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.chains import qemu
from tests.cli.img.side_by_side import failure, img, ok, qemu_img, same


@pytest.mark.parametrize(
    "words",
    [
        ("-o", "size=1M", "disk.raw"),
        ("-f", "raw", "-o", "help"),
        ("-f", "nonsense", "-o", "help"),
        ("disk.raw",),
        ("-o", "size=1M", "missing.raw"),
        ("-o", "size=1M"),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path) -> None:
    same("amend", *words)


def test_a_key_is_added(folder: Path) -> None:
    """Afterwards qemu-img opens the image with the new passphrase."""
    old, new = ("--object", "secret,id=s,data=abc"), ("--object", "secret,id=n,data=def")
    qemu("create", "-q", *old, "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "64k")
    image = "driver=luks,key-secret=s,file.driver=file,file.filename=a.luks"
    ok("amend", *old, *new, "--image-opts", "-o", "state=active,new-secret=n,iter-time=10", image)
    opened = "driver=luks,key-secret=n,file.driver=file,file.filename=a.luks"
    assert qemu_img("compare", *new, "--image-opts", opened, opened).status == 0
    assert failure("amend", *old, "--image-opts", "-o", "nonsense=1", image)


@pytest.mark.parametrize("slot", [0, None])
def test_the_last_key_is_erased_by_force_alone(slot: int | None, folder: Path) -> None:
    """As qemu-img does it; afterwards nothing opens the image."""
    secrets = ("--object", "secret,id=s,data=abc", "--object", "secret,id=n,data=def")
    which = "old-secret=s" if slot is None else f"keyslot={slot}"
    image = "driver=luks,key-secret={},file.driver=file,file.filename=a.luks"
    words = (*secrets, "--image-opts", "-o", f"state=inactive,{which}", image.format("s"))
    for amend in (qemu_img, img):
        Path("a.luks").unlink(missing_ok=True)
        qemu("create", "-q", *secrets, "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "64k")
        assert amend("amend", *words).status == 1
        assert qemu_img("compare", *secrets, "--image-opts", image.format("s"), image.format("s")).status == 0
        assert amend("amend", "--force", *words).status == 0
        assert qemu_img("compare", *secrets, "--image-opts", image.format("s"), image.format("s")).status > 1


def test_a_key_slot_in_use_is_filled_by_force_alone(folder: Path) -> None:
    secrets = ("--object", "secret,id=s,data=abc", "--object", "secret,id=n,data=def")
    image = "driver=luks,key-secret={},file.driver=file,file.filename=a.luks"
    words = (*secrets, "--image-opts", "-o", "state=active,keyslot=0,new-secret=n,iter-time=10", image.format("s"))
    for amend in (qemu_img, img):
        Path("a.luks").unlink(missing_ok=True)
        qemu("create", "-q", *secrets, "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "64k")
        assert amend("amend", *words).status == 1
        assert amend("amend", "--force", *words).status == 0
        assert qemu_img("compare", *secrets, "--image-opts", image.format("n"), image.format("n")).status == 0
        assert qemu_img("compare", *secrets, "--image-opts", image.format("s"), image.format("s")).status > 1


def test_help() -> None:
    assert "  new-secret=<str> " in ok("amend", "-f", "luks", "-o", "help")


def test_help_of_an_image_without_its_format(disk: Path) -> None:
    """It is looked at; what lies below need not be there."""
    qemu("create", "-q", "-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "a.qcow2", "1M")
    told = ok("amend", "-o", "help", "a.qcow2")
    assert told == ok("amend", "-f", "qcow2", "-o", "help")
    assert "has no options" in failure("amend", "-o", "help", disk)
    assert qemu_img("amend", "-o", "help", disk).status == 1


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("-o", "backing_file=other.raw,backing_fmt=raw"), 1),
        (("-o", "backing_file="), 1),
        (("-o", "backing_fmt=qcow2"), 1),
        (("-o", "backing_file=base.raw,backing_fmt=raw"), 0),
        (("-o", "size=0"), 0),
        (("--force", "-o", "compat=0.10"), 0),
        (("-o", ""), 1),
    ],
)
def test_the_disk_stays(folder: Path, words: tuple[str, ...], status: int) -> None:
    """What would show another disk is refused or ignored, as by qemu-img."""
    (folder / "base.raw").write_bytes(b"base" * 16384)
    (folder / "other.raw").write_bytes(b"other" * 16384)
    for name in ("ours", "theirs"):
        made = qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", f"{name}.qcow2")
        assert made.status == 0, made
    assert qemu_img("amend", *words, "theirs.qcow2").status == status
    assert img("amend", *words, "ours.qcow2").status == status
    assert qemu_img("compare", "-s", "ours.qcow2", "theirs.qcow2").status == 0
    assert qemu_img("compare", "ours.qcow2", "base.raw").status == 0
