"""`pynbd img info` beside qemu-img's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pynbd.cli.img import qemu_json
from pynbd.cli.img.sizes import size_text
from tests import peers
from tests.cli.img.chains import qemu
from tests.cli.img.side_by_side import failure, ok, qemu_img, same
from tests.conftest import DiskMaker


@pytest.mark.parametrize(
    "output", [(), ("--output=json",), ("--output", "human"), ("--backing-chain", "--output=json")]
)
def test_raw(output: tuple[str, ...], disk: Path, odd: Path) -> None:
    same("info", *output, disk)
    same("info", *output, odd)
    same("info", *output, f"./{disk}")


@pytest.mark.parametrize(
    "words",
    [
        ("-f", "raw", "disk.raw"),
        ("disk.raw", "-f", "raw"),
        ("-f", "file", "disk.raw"),
        ("-f", "nbd", "disk.raw"),
        ("-U", "disk.raw"),
        ("-Uf", "raw", "disk.raw"),
        ("--format=raw", "--force-share", "disk.raw"),
        ("--out=json", "disk.raw"),
        ("--image-opts", "driver=raw,file.driver=file,file.filename=disk.raw"),
        ("--image-opts", "driver=file,filename=disk.raw"),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "disk.raw"}}',),
        ('json:{"driver": "raw", "offset": 1024, "file": {"driver": "file", "filename": "disk.raw"}}',),
        ("file:disk.raw",),
        ("missing.raw",),
        ("-f", "nonsense", "disk.raw"),
        ("--image-opts", "-f", "raw", "driver=raw,file.filename=disk.raw"),
        ("--output=xml", "disk.raw"),
        ("--bad", "disk.raw"),
        ("disk.raw", "disk.raw"),
        ("",),
        (),
    ],
)
def test_words(words: tuple[str, ...], disk: Path) -> None:
    """Options in all their forms, before and after the name, and what can't be done."""
    same("info", *words)


def test_options_before_the_verb(disk: Path) -> None:
    """They are taken, and what follows is the verb's."""
    assert ok("-T", "qcow2*", "info", disk).startswith("image: disk.raw\n")
    assert same("nonsense") == same() == ""


def test_luks(folder: Path) -> None:
    """A format with details, and lists among them."""
    created = qemu_img(
        *("create", "--object", "secret,id=s,data=abc", "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "1M")
    )
    assert created.status == 0, created
    assert "Format specific information:" in same("info", "a.luks")
    same("info", "--output=json", "a.luks")


def test_a_server(disk: Path) -> None:
    with peers.qemu_nbd(disk) as server:
        assert "virtual size: 10 MiB (10485760 bytes)" in ok("info", server.uri())


def test_a_name_that_is_no_text(make_disk: DiskMaker) -> None:
    name = "disk\udcff.raw"
    make_disk(512, name=name)
    assert json.loads(ok("info", "--output=json", name))["filename"] == "disk\ufffd.raw"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (1 << 60, "1 EiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


def test_sizes_beside_qemu_img(folder: Path) -> None:
    for number, size in enumerate((512, 1 << 20, (1 << 20) - 512, 123456768, 1000 << 20, 1234 << 30)):
        name = f"{number}.raw"
        with Path(name).open("wb") as file:
            file.truncate(size)
        same("info", name)


def test_json() -> None:
    assert qemu_json.pretty({}) == "{\n}"
    assert qemu_json.pretty([]) == "[\n]"
    assert qemu_json.pretty({"a": [1, {"b": None}], "c": True}).count("\n") == 8
    assert qemu_json.compact({"filename": "x", "driver": "raw"}) == '{"driver": "raw", "filename": "x"}'


def test_what_is_said_of_a_missing_file() -> None:
    assert failure("info", "missing.raw") == "Could not open 'missing.raw': No such file or directory"


def test_names_with_letters_that_json_escapes(folder: Path) -> None:
    """QEMU writes the digits of an escape in capitals, and those of a backslash before a u not at all."""
    for name in ("é€\U0001f600\x07.raw", "a\\u00e9.raw", "a\\é.raw"):
        Path(name).write_bytes(bytes(512))
        same("info", "--output=json", name)


@pytest.mark.parametrize("kind", ["a file", "a pipe", "nothing"])
def test_data_files_are_not_looked_at(kind: str, folder: Path) -> None:
    """What an image names is described as it is named, whatever it is: nothing of it is opened."""
    qemu("create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "disk.qcow2", "1M")
    if kind != "a file":
        Path("data.raw").unlink()
    if kind == "a pipe":
        os.mkfifo("data.raw")
    for options in ((), ("--output=json",), ("--backing-chain",)):
        assert "data.raw" in same("info", *options, "disk.qcow2")
