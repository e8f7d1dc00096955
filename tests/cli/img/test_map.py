"""`pynbd img map` beside qemu-img's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pynbd.storage import linux
from tests import peers
from tests.cli.img.chains import qemu_io
from tests.cli.img.side_by_side import failure, ok, qemu_img, same
from tests.conftest import DiskMaker


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
@pytest.mark.parametrize("name", ["disk.raw", "odd.raw", "hole.raw", "empty.raw"])
def test_raw(output: str, name: str, disk: Path, odd: Path, make_disk: DiskMaker) -> None:
    make_disk(0, name="empty.raw")
    make_disk(1000, extents=[], name="hole.raw")
    same("map", output, name)


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
@pytest.mark.parametrize(
    "window",
    [
        ("--start-offset=1M", "--max-length=100k"),
        ("-s", "1100k", "-l", "4M"),
        ("--start-offset=700",),
        ("--max-length=0",),
        ("--start-offset=20M",),
        ("--start-offset=nonsense",),
        ("--max-length=-1",),
    ],
)
def test_a_part(output: str, window: tuple[str, ...], disk: Path) -> None:
    same("map", output, *window, disk)


def test_a_part_of_a_file(disk: Path) -> None:
    """Offsets are those in the file."""
    for output in ("--output=human", "--output=json"):
        same("map", output, "--image-opts", "driver=raw,offset=64k,file.driver=file,file.filename=disk.raw")


def test_an_export(disk: Path) -> None:
    """Offsets are those in the export."""
    with peers.qemu_nbd(disk, "-r") as server:
        told = same("map", "--output=json", server.uri())
        assert '"offset"' in told
        assert str(disk) not in ok("map", server.uri())
        assert len(ok("map", server.uri()).splitlines()) == len(qemu_img("map", server.uri()).out.splitlines()) > 1


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
def test_a_huge_disk_with_little_in_it(output: str, folder: Path) -> None:
    """A question for each GiB, or for what each L2 table could tell, would take minutes."""
    made = qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "1P")
    assert made.status == 0, made
    qemu_io("huge.qcow2", "write 700T 3M", "write 10G 64k")
    assert same("map", output, "huge.qcow2").count("\n") >= 3


def test_what_has_no_place_in_a_file(folder: Path) -> None:
    key = ("--object", "secret,id=s,data=abc")
    created = qemu_img("create", *key, "-f", "luks", "-o", "key-secret=s,iter-time=10", "a.luks", "64k")
    assert created.status == 0, created
    image = "driver=luks,key-secret=s,file.driver=file,file.filename=a.luks"
    assert "compressed, encrypted" in failure("map", *key, "--image-opts", image)
    same("map", "--output=json", *key, "--image-opts", image)


@pytest.mark.parametrize("lost", [512, 4096, 60 << 10, 64 << 10])
@pytest.mark.parametrize("clusters", [1, 2, 20, 100])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=64k,preallocation=metadata"])
def test_a_file_that_ends_inside_a_cluster(folder: Path, options: str, clusters: int, lost: int) -> None:
    """Of what has no bytes in the file, QEMU tells only where there is much of it."""
    made = qemu_img("create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "10M")
    assert made.status == 0, made
    image = folder / "a.qcow2"
    qemu_io("a.qcow2", f"write -P 3 64k {64 * clusters}k")
    os.truncate(image, image.stat().st_size - lost)
    for output in ("--output=human", "--output=json"):
        same("map", output, "a.qcow2")


@pytest.mark.parametrize("cluster", ["4k", "64k"])
@pytest.mark.parametrize("punched", [0, 1, 2, 3, 5, 8, 10, 11, 12, 20, 50])
def test_holes_in_the_file_of_an_image(folder: Path, cluster: str, punched: int) -> None:
    made = qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", "a.qcow2", "8M")
    assert made.status == 0, made
    cluster_bytes = int(cluster[:-1]) << 10
    image = folder / "a.qcow2"
    qemu_io("a.qcow2", f"write -P 3 0 {100 * cluster_bytes}")
    os.truncate(image, -(-image.stat().st_size // cluster_bytes) * cluster_bytes)
    with image.open("r+b") as file:
        for number in range(punched):
            at = image.stat().st_size - (2 * number + 1) * cluster_bytes
            linux.fallocate(file.fileno(), linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE, at, cluster_bytes)
    for output in ("--output=human", "--output=json"):
        same("map", output, "a.qcow2")


@pytest.mark.parametrize("output", ["--output=human", "--output=json"])
@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "extended_l2=on", "data_file=d.raw", "data_file=d.raw,extended_l2=on"]
)
def test_what_reads_as_zeroes_and_has_a_place(folder: Path, options: str, output: str) -> None:
    """Clusters that became zero keep theirs, subclusters without content have that of their cluster."""
    made = qemu_img("create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "4M")
    assert made.status == 0, made
    qemu_io("a.qcow2", "write -P 1 0 1M", "write -z 0 64k", "write -z 128k 256k", "write -z 3M 128k")
    if "data_file" not in options:  # what a file says of clusters written in part depends on the file system
        qemu_io("a.qcow2", "write -P 1 2052k 4k", "write -z 2064k 8k", "discard 512k 64k")
    made = qemu_img(
        "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "5M"
    )
    assert made.status == 0, made
    qemu_io("b.qcow2", "write -P 2 132k 4k", "write -z 2056k 4k", "write -P 2 4100k 4k")
    told = same("map", output, "a.qcow2")
    assert output == "--output=human" or '"zero": true, "data": false, "offset": ' in told
    same("map", output, "b.qcow2")


@pytest.mark.parametrize("first", ["plain", "extended"])
def test_compare_looks_at_places(folder: Path, first: str) -> None:
    """A strict comparison tells clusters of zeroes with a place from others, as it does in qemu-img."""
    for name, options in (("plain", "cluster_size=64k"), ("extended", "extended_l2=on")):
        made = qemu_img("create", "-q", "-f", "qcow2", "-o", options, f"{name}.qcow2", "1M")
        assert made.status == 0, made
    qemu_io("plain.qcow2", "write -z 0 64k")
    qemu_io("extended.qcow2", "write -P 1 0 64k", "write -z 0 64k")
    for second in ("plain", "extended"):
        same("compare", "-s", f"{first}.qcow2", f"{second}.qcow2")
