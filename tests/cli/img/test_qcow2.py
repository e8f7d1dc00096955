"""The verbs with qcow2 images, made by both, beside qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.img.chains import make_chain, qemu, shown
from tests.cli.img.side_by_side import failure, ok, same

KEY = ("--object", "secret,id=s,data=abc")


@pytest.mark.parametrize(
    "words",
    [
        ("a.qcow2", "1G"),
        ("a, b.qcow2", "1M"),
        ("-q", "a.qcow2", "1000"),
        ("-o", "size=1M", "-o", "cluster_size=4k,extended_l2=off", "a.qcow2"),
        ("-o", "compat=0.10", "a.qcow2", "1M"),
        ("-o", "compression_type=zstd,refcount_bits=1,lazy_refcounts=on", "a.qcow2", "1M"),
        ("-o", "lazy_refcounts,noextended_l2", "a.qcow2", "1M"),
        ("-o", "nolazy_refcounts", "a.qcow2", "1M"),
        ("-o", "noise", "a.qcow2", "1M"),
        ("-o", "preallocation=metadata,data_file=d.raw,data_file_raw=on", "a.qcow2", "1M"),
        ("-o", "cluster_size=100", "a.qcow2", "1M"),
        ("-b", "base.qcow2", "a.qcow2"),
        ("-b", "base.qcow2", "-F", "qcow2", "a.qcow2"),
        ("-b", "base.qcow2", "-F", "raw", "a.qcow2", "5M"),
        ("-o", "backing_file=base.qcow2,backing_fmt=qcow2", "a.qcow2", "1M"),
        ("-b", "missing.qcow2", "-F", "qcow2", "a.qcow2"),
        ("-u", "-b", "missing.qcow2", "-F", "qcow2", "a.qcow2"),
        ("-u", "-b", "missing.qcow2", "-F", "qcow2", "a.qcow2", "1M"),
        ("-b", "", "a.qcow2", "1M"),
        ("-b", "../base.qcow2", "-F", "qcow2", "below/a.qcow2"),
    ],
)
def test_create(words: tuple[str, ...], folder: Path) -> None:
    """The same is said, and info tells the same of what either made."""
    qemu("create", "-q", "-f", "qcow2", "base.qcow2", "64M")
    Path("below").mkdir()
    same("create", "-f", "qcow2", *words)
    name = next((word for word in words if word.endswith("a.qcow2")), words[-2])
    if Path(name).exists():
        if "missing.qcow2" not in words:
            qemu("check", "-q", name)
        same("info", name)
        same("info", "--output=json", name)


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
def test_a_chain(output: str, folder: Path) -> None:
    make_chain()
    for name in ("top.qcow2", "./mid.qcow2", "base.qcow2"):
        same("info", output, name)
        same("info", output, "--backing-chain", name)
        same("map", output, name)
        same("measure", output, name)
    same("map", output, "--start-offset=100k", "--max-length=3M", "top.qcow2")


def test_a_chain_that_comes_back(folder: Path) -> None:
    """A loop is an error, not for ever; a missing backing file does not keep anybody from telling of the image."""
    qemu("create", "-q", "-f", "qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "1M")
    same("info", "a.qcow2")
    same("info", "--backing-chain", "a.qcow2")
    qemu("create", "-q", "-f", "qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M")
    same("info", "--backing-chain", "a.qcow2")


def test_a_chain_that_comes_back_by_a_way_round(folder: Path) -> None:
    """Its names grow with each image."""
    Path("below").mkdir()
    qemu("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    qemu("rebase", "-u", "-b", "below/../a.qcow2", "-F", "qcow2", "a.qcow2")
    for verb in ("map", "measure"):
        assert "comes back to it" in failure(verb, "a.qcow2")


def test_a_chain_as_long_as_may_be(folder: Path) -> None:
    """Images are opened one within the other; that of the 201st fails in a sentence."""
    for number in range(202):
        if not number:
            qemu("create", "-q", "-f", "qcow2", "0000.qcow2", "64k")
        else:
            ok(
                "create",
                "-q",
                "-f",
                "qcow2",
                "-u",
                "-b",
                f"{number - 1:04}.qcow2",
                "-F",
                "qcow2",
                f"{number:04}.qcow2",
                "64k",
            )
    assert "0198.qcow2" in ok("info", "0198.qcow2")
    assert ok("map", "0190.qcow2")
    assert "chain of more than 200" in failure("map", "0201.qcow2")


@pytest.mark.parametrize("other", ["base.qcow2", "disk.raw", "top.qcow2", "copy.qcow2"])
@pytest.mark.parametrize("options", [(), ("-s",)])
def test_compare(options: tuple[str, ...], other: str, disk: Path) -> None:
    make_chain()
    qemu("convert", "-O", "qcow2", "-c", "top.qcow2", "copy.qcow2")
    same("compare", *options, "top.qcow2", other)
    same("compare", *options, other, "copy.qcow2")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-W", "-m", "3"),
        ("-c",),
        ("-c", "-W", "-o", "compression_type=zstd"),
        ("-c", "-o", "cluster_size=4k"),
        ("-o", "cluster_size=2M"),
        ("-o", "extended_l2=on"),
        ("-o", "compat=0.10,preallocation=metadata"),
        ("-o", "data_file=d.raw"),
        ("-S", "0"),
        ("-S", "64k"),
    ],
)
def test_convert(options: tuple[str, ...], folder: Path) -> None:
    """To qcow2, and back: qemu-img finds the image sound, and in it what was there."""
    content = make_chain()
    ok("convert", "-O", "qcow2", *options, "top.qcow2", "copy.qcow2")
    assert shown("copy.qcow2") == content
    ok("convert", "copy.qcow2", "copy.raw")
    assert Path("copy.raw").read_bytes() == content


def test_convert_keeps_what_it_can_small(disk: Path) -> None:
    """As many clusters as qemu-img's copy has."""
    for options in ((), ("-c",), ("-o", "cluster_size=4k")):
        qemu("convert", "-O", "qcow2", *options, "disk.raw", "theirs.qcow2")
        ok("convert", "-O", "qcow2", *options, disk, "ours.qcow2")
        assert Path("ours.qcow2").stat().st_size <= Path("theirs.qcow2").stat().st_size


def test_convert_over_a_backing_file(folder: Path) -> None:
    """Only what the source has over its own is copied."""
    content = make_chain()
    ok("convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "copy.qcow2")
    assert shown("copy.qcow2") == content
    # Both show the same clusters of the base; what is written where differs.
    assert "base.qcow2" in same("map", "copy.qcow2")
    same("convert", "-O", "qcow2", "-B", "mid.qcow2", "top.qcow2", "other.qcow2")
    same("convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "top.qcow2", "other.qcow2")


def test_convert_encrypts(disk: Path) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    ok("convert", *KEY, "-O", "qcow2", "-o", options, disk, "a.qcow2")
    opened = "driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename=a.qcow2"
    qemu("convert", *KEY, "--image-opts", opened, "-O", "raw", "new.raw")
    assert Path("new.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("size", ["6M", "+1M", "-1M"])
def test_resize(size: str, folder: Path) -> None:
    """The same is said, and what is left reads the same."""
    make_chain()
    for images in ("ours", "theirs"):
        Path(f"{images}.qcow2").write_bytes(Path("base.qcow2").read_bytes())
    qemu("resize", "--shrink", "theirs.qcow2", size)
    assert ok("resize", "--shrink", "ours.qcow2", size) == "Image resized.\n"
    assert shown("ours.qcow2") == shown("theirs.qcow2")


def test_dd(folder: Path) -> None:
    content = make_chain()
    ok("dd", "-O", "qcow2", "bs=64k", "skip=3", "count=40", "if=top.qcow2", "of=part.qcow2")
    assert shown("part.qcow2") == content[3 << 16 : 40 << 16]
