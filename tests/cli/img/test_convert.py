"""`pynbd img convert` beside qemu-img's."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.cli.img.chains import make_chain, qemu_io
from tests.cli.img.side_by_side import failure, img, ok, qemu_img, same
from tests.cli.pynbd_command import PYNBD
from tests.conftest import DiskMaker

MIB = 1 << 20


def allocated(path: str) -> int:
    """Bytes that a file takes on the disk, in steps of 64 KiB: the file system may take a block for itself."""
    return Path(path).stat().st_blocks * 512 >> 16 << 16


@pytest.mark.parametrize("words", [(), ("-W",), ("-m", "1"), ("-c",)])
def test_a_huge_disk_with_little_in_it(words: tuple[str, ...], folder: Path) -> None:
    """Nothing is done for each GiB of it, and no list of its parts is made."""
    made = qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "1P")
    assert made.status == 0, made
    qemu_io("huge.qcow2", "write -P 3 700T 3M", "write -P 4 10G 64k")
    ok("convert", *words, "-O", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "copy.qcow2")
    for pair in (("huge.qcow2", "copy.qcow2"), ("copy.qcow2", "huge.qcow2")):
        same("compare", *pair)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("disk.raw",),
        ("disk.raw", "new.raw"),
        ("-O", "raw", "disk.raw", "new.raw"),
        ("-O", "file", "disk.raw", "new.raw"),
        ("disk.raw", "-O", "raw", "new.raw", "-W"),
        ("-q", "-p", "disk.raw", "new.raw"),
        ("-S", "1k", "disk.raw", "new.raw"),
        ("-S", "0", "disk.raw", "new.raw"),
        ("-S", "100", "disk.raw", "new.raw"),
        ("-S", "nonsense", "disk.raw", "new.raw"),
        ("-m", "1", "disk.raw", "new.raw"),
        ("-m", "0", "disk.raw", "new.raw"),
        ("-m", "17", "disk.raw", "new.raw"),
        ("-m", "0x8", "disk.raw", "new.raw"),
        ("-r", "1G", "disk.raw", "new.raw"),
        ("-r", "nonsense", "disk.raw", "new.raw"),
        ("-c", "-O", "raw", "disk.raw", "new.raw"),
        ("-o", "size=1M", "disk.raw", "new.raw"),
        ("-o", "preallocation=falloc", "disk.raw", "new.raw"),
        ("-o", "preallocation=nonsense", "disk.raw", "new.raw"),
        ("-o", "size=1M", "-n", "disk.raw", "disk.raw"),
        ("-n", "disk.raw", "missing.raw"),
        ("-n", "disk.raw", "odd.raw"),
        ("-n", "odd.raw", "disk.raw"),
        ("-n", "-S", "0", "odd.raw", "disk.raw"),
        ("--target-is-zero", "disk.raw", "new.raw"),
        ("--target-image-opts", "disk.raw", "driver=raw,file.filename=new.raw"),
        ("-n", "--target-image-opts", "odd.raw", "driver=raw,offset=1M,file.driver=file,file.filename=disk.raw"),
        ("-C", "-S", "4k", "disk.raw", "new.raw"),
        ("-C", "--salvage", "disk.raw", "new.raw"),
        ("-C", "disk.raw", "new.raw"),
        ("--salvage", "disk.raw", "new.raw"),
        ("--bitmaps", "disk.raw", "new.raw"),
        ("-B", "disk.raw", "disk.raw", "new.raw"),
        ("-l", "snapshot", "disk.raw", "new.raw"),
        ("-t", "none", "-T", "none", "disk.raw", "new.raw"),
        ("-O", "nonsense", "disk.raw", "new.raw"),
        ("-f", "nonsense", "disk.raw", "new.raw"),
        ("missing.raw", "new.raw"),
        ("odd.raw", "new.raw"),
        ("odd.raw", "disk.raw", "odd.raw", "new.raw"),
        ("disk.raw", "disk.raw"),
        ("-n", "-f", "raw", "disk.raw", "disk.raw"),
    ],
)
def test_raw(words: tuple[str, ...], disk: Path, odd: Path, make_disk: DiskMaker) -> None:
    """The exit status, and every byte of whatever there is then."""
    images = {name: Path(name).read_bytes() for name in ("disk.raw", "odd.raw")}
    theirs = qemu_img("convert", *words)
    expected = {name.name: name.read_bytes() for name in Path().iterdir()}
    Path("new.raw").unlink(missing_ok=True)
    for name, content in images.items():
        Path(name).write_bytes(content)
    ours = img("convert", *words)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), (ours, theirs)
    assert {name.name: name.read_bytes() for name in Path().iterdir()} == expected


def test_holes_and_zeroes_take_no_space(disk: Path) -> None:
    """Unless that is wanted, or they are shorter than what is looked for."""
    content = bytearray(disk.read_bytes())
    content[9 * MIB : 9 * MIB + 4096] = b"\1" * 4096
    disk.write_bytes(content)
    for option, size in (("4k", 260 << 10), ("0", 10 * MIB), ("1M", 3 * MIB)):
        ok("convert", "-S", option, disk, "new.raw")
        assert Path("new.raw").read_bytes() == content
        assert allocated("new.raw") == size >> 16 << 16


def test_a_read_that_fails(disk: Path) -> None:
    """Nothing is left of the copy; with --salvage one sector is zeroes, and all else is there."""
    image = "driver=raw,file.driver=blkdebug,file.inject-error.0.event=read_aio,file.image.filename=disk.raw"
    one_sector = f"{image},file.inject-error.0.sector=2050"
    assert failure("convert", "--image-opts", image, "new.raw")
    assert not Path("new.raw").exists()
    ending = img("convert", "--salvage", "--image-opts", one_sector, "new.raw")
    assert (ending.status, ending.err.count("\n")) == (0, 1)
    assert f"offset {2050 * 512}" in ending.err
    expected = bytearray(disk.read_bytes())
    expected[2050 * 512 : 2051 * 512] = bytes(512)
    assert Path("new.raw").read_bytes() == expected


def test_a_file_that_was_there_stays_after_a_failure(disk: Path) -> None:
    Path("new.raw").touch()
    image = "driver=raw,file.driver=blkdebug,file.inject-error.0.event=read_aio,file.image.filename=disk.raw"
    assert failure("convert", "--image-opts", image, "new.raw")
    assert Path("new.raw").exists()


def test_an_image_that_is_written_to_is_not_copied(disk: Path) -> None:
    """Unless that is insisted on."""
    with peers.qemu_nbd(disk):
        same("convert", disk, "new.raw")
        assert not Path("new.raw").exists()
        same("convert", "-U", disk, "new.raw")
    assert Path("new.raw").read_bytes() == disk.read_bytes()


def test_luks_both_ways(disk: Path) -> None:
    """Through a format with a secret, in the order in which writes have to come; qemu-img reads it."""
    key = ("--object", "secret,id=s,data=abc")
    ok("convert", *key, "-O", "luks", "-o", "key-secret=s,iter-time=10", disk, "a.luks")
    opened = "driver=luks,key-secret=s,file.driver=file,file.filename=a.luks"
    theirs = qemu_img("convert", *key, "--image-opts", opened, "-O", "raw", "new.raw")
    assert theirs.status == 0, theirs
    assert Path("new.raw").read_bytes() == disk.read_bytes()
    ok("convert", *key, "--image-opts", opened, "again.raw")
    assert Path("again.raw").read_bytes() == disk.read_bytes()


def test_from_and_to_a_server(disk: Path, make_disk: DiskMaker) -> None:
    target = make_disk(10 * MIB, seed=7, name="target.raw")
    with peers.qemu_nbd(disk, "-r") as source, peers.qemu_nbd(target) as server:
        ok("convert", "-n", source.uri(), server.uri())
    assert target.read_bytes() == disk.read_bytes()


@contextlib.contextmanager
def copying(disk: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A copy to `new.raw` on its way; it is as slow as it is told to be."""
    command = [*PYNBD, "img", "convert", *options, "-m", "1", "-r", "2M", str(disk), "new.raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def a_quarter_done(disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The same, once it has said that it is so far."""
    with copying(disk, "-p") as process:
        assert process.stdout is not None
        said = b""
        while b"(25." not in said:
            assert process.poll() is None, said
            said += process.stdout.read(1)
        yield process


def test_a_signal_leaves_nothing_behind(random_disk: Path) -> None:
    """It is ended on its way."""
    with a_quarter_done(random_disk) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert (process.returncode, b"interrupted" in err) == (128 + signal.SIGTERM, True), err
    assert not Path("new.raw").exists()


@pytest.mark.parametrize("quiet", [(), ("-q",), ("-p", "-q")])
def test_who_asks_by_a_signal_is_told(quiet: tuple[str, ...], random_disk: Path) -> None:
    """SIGUSR1 has how far the copy is told on stderr, where `-p` does not show it."""
    with copying(random_disk, *quiet) as process:
        assert process.stderr is not None
        while not Path("new.raw").exists():  # the signal is known long before
            assert process.poll() is None
        told = 0.0
        while not told:
            process.send_signal(signal.SIGUSR1)
            line = process.stderr.readline()
            match = re.fullmatch(rb" {4}\((\d+\.\d\d)/100%\)\n", line)
            assert match, line
            told = float(match[1])
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert (process.returncode, out) == (128 + signal.SIGTERM, b""), (out, err)
    assert b"interrupted" in err


def test_the_same_signal_where_numbers_are_shown(random_disk: Path) -> None:
    """It changes nothing."""
    with a_quarter_done(random_disk) as process:
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    assert (process.returncode, err) == (0, b"")
    assert out.endswith(b"(100.00/100%)\r\n")


def test_progress_for_scripts(disk: Path) -> None:
    """Numbers from 0 to 100 that rise, and the end of the line, also after a failure."""
    with Path("zero.raw").open("wb") as file:
        file.truncate(1 << 20)
    same("convert", "-p", "zero.raw", "new.raw")
    same("convert", "-p", "-q", "zero.raw", "new.raw")
    same("convert", "-p", "missing.raw", "new.raw")
    for verb, words in (
        ("convert", ("disk.raw", "new.raw")),
        ("convert", ("-O", "qcow2", "-B", "disk.raw", "-F", "raw", "disk.raw", "a.qcow2")),
        ("rebase", ("-b", "zero.raw", "-F", "raw", "a.qcow2")),
        ("rebase", ("-u", "-b", "disk.raw", "-F", "raw", "a.qcow2")),
        ("amend", ("-o", "refcount_bits=64", "a.qcow2")),
        ("commit", ("a.qcow2",)),
    ):
        out = ok(verb, "-p", *words)
        assert re.match(r"^( {4}\(\d+\.\d\d/100%\)\r)+\n(Image committed\.\n)?$", out), out
        numbers = [float(number) for number in re.findall(r"[\d.]+(?=/100)", out)]
        assert (numbers[0], numbers[-1]) == (0, 100)
        assert numbers == sorted(set(numbers))


def test_an_unknown_cache_mode(disk: Path) -> None:
    """It is refused before anything is made."""
    assert "nonsense" in failure("convert", "-t", "nonsense", disk, "new.raw")
    assert not Path("new.raw").exists()


def test_help() -> None:
    assert "size=<size>" in ok("convert", "-O", "raw", "-o", "help")


def patchy(path: str, unit: int) -> bytes:
    """A disk of 12 MiB: data, zeroes and holes of odd numbers of units, here and there."""
    source = random.Random(unit)
    content = bytearray()
    while len(content) < 12 * MIB:
        length = source.randint(1, 40) * unit
        content += source.choice((source.randbytes(length), bytes(length), source.randbytes(64 * unit)))
    del content[12 * MIB :]
    with Path(path).open("wb") as file:
        for at in range(0, 12 * MIB, unit):
            piece = content[at : at + unit]
            if any(piece) or source.random() < 0.5:
                file.seek(at)
                file.write(piece)
        file.truncate(12 * MIB)
    return bytes(content)


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
@pytest.mark.parametrize(("unit", "words"), [(4096, ()), (65536, ()), (4096, ("-S", "0")), (4096, ("-W",))])
def test_patchy_disks_become_what_qemu_makes_of_them(cluster: str, unit: int, words: tuple[str, ...]) -> None:
    """The same bytes in as many clusters, there and back."""
    content = patchy("patchy.raw", unit)
    options = ("-O", "qcow2", "-o", f"cluster_size={cluster}")
    assert qemu_img("convert", "-f", "raw", *options, *words, "patchy.raw", "theirs.qcow2").status == 0
    ok("convert", "-f", "raw", *options, *words, "patchy.raw", "ours.qcow2")
    assert qemu_img("compare", "theirs.qcow2", "ours.qcow2").status == 0
    checked = [qemu_img("check", "--output", "json", name) for name in ("theirs.qcow2", "ours.qcow2")]
    assert [ending.status for ending in checked] == [0, 0]
    theirs, ours = (json.loads(ending.out).get("allocated-clusters", 0) for ending in checked)
    assert ours == theirs or "0" in words  # what is zero and has to have space need not be written by us
    ok("convert", "-f", "qcow2", "-O", "raw", *words, "theirs.qcow2", "back.raw")
    assert Path("back.raw").read_bytes() == content
    assert qemu_img("convert", "-f", "qcow2", "-O", "raw", *words, "theirs.qcow2", "expected.raw").status == 0
    assert allocated("back.raw") <= allocated("expected.raw")


@pytest.mark.parametrize(
    ("unit", "words"), [(4096, ()), (4096, ("--target-is-zero",)), (65536, ("--target-is-zero", "-W"))]
)
@pytest.mark.parametrize(("outer", "inner"), [("64k", "64k"), ("64k", "4k"), ("4k", "2M")])
def test_an_image_inside_an_image(outer: str, inner: str, unit: int, words: tuple[str, ...]) -> None:
    """Clusters of the inner one are left out, and their places in the outer one are other clusters' then."""
    patchy("patchy.raw", unit)
    assert qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={inner}", "inner", "12M").status == 0
    os.truncate("inner", 32 * MIB)
    assert qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={outer}", "inner", "outer").status == 0
    target = "driver=qcow2,file.driver=qcow2,file.file.driver=file,file.file.filename=outer"
    ok("convert", "-n", "-f", "raw", "--target-image-opts", *words, "patchy.raw", target)
    raw = "driver=raw,file.driver=file,file.filename=patchy.raw"
    assert qemu_img("compare", "--image-opts", raw, target).status == 0
    assert qemu_img("check", "--image-opts", target).status == 0
    assert qemu_img("check", "-f", "qcow2", "outer").status == 0


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_was_there_is_written_over(format: str, random_disk: Path) -> None:
    """With zeroes as well."""
    content = patchy("patchy.raw", 4096)
    qemu_img("create", "-f", format, "target", "12M")
    ok("convert", "-n", "-f", "raw", "-O", format, random_disk, "target")
    ok("convert", "-n", "-f", "raw", "-O", format, "patchy.raw", "target")
    assert qemu_img("compare", "-f", "raw", "-F", format, "patchy.raw", "target").status == 0
    assert len(content) == 12 * MIB


@pytest.mark.parametrize(
    "words",
    [
        ("-O", "raw", "disk.raw"),
        ("-O", "qcow2", "disk.raw"),
        ("-O", "qcow2", "odd.raw"),
        ("-c", "-O", "qcow2", "disk.raw"),
        ("-W", "-O", "qcow2", "top.qcow2"),
        ("-O", "raw", "top.qcow2"),
        ("-O", "qcow2", "-o", "extended_l2=on", "top.qcow2"),
        ("-O", "qcow2", "-o", "preallocation=metadata", "top.qcow2"),
        ("-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2"),
    ],
)
def test_without_looking_for_zeroes_everything_is_data(disk: Path, odd: Path, words: tuple[str, ...]) -> None:
    """The same clusters hold data as in what qemu-img makes, wherever they lie."""
    make_chain()
    qemu_io("top.qcow2", "write -z 512k 128k")
    ok("convert", "-S", "0", *words, "ours")
    theirs = qemu_img("convert", "-S", "0", *words, "theirs")
    assert theirs.status == 0, theirs
    kind = words[words.index("-O") + 1]
    maps = [json.loads(qemu_img("map", "-f", kind, "--output=json", name).out) for name in ("ours", "theirs")]
    ours, expected = ([kinds_of(extent) for extent in extents] for extents in maps)
    assert list(joined(ours)) == list(joined(expected))
    assert qemu_img("compare", "-f", kind, "-F", kind, "ours", "theirs").status == 0


def kinds_of(extent: dict[str, Any]) -> tuple[int, tuple[Any, ...]]:
    return extent["length"], tuple(extent[name] for name in ("depth", "present", "zero", "data"))


def joined(extents: list[tuple[int, tuple[Any, ...]]]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The same, extents that are alike made one."""
    for kinds, group in itertools.groupby(extents, key=lambda extent: extent[1]):
        yield sum(length for length, _ in group), kinds
