"""The header: what qemu-img wrote is read and written again byte for byte, and what is wrong is refused with reason."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import ImageError
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.header import Header, build_header, parse_header, peek_cluster_size
from pynbd.formats.qcow2.layout import Autoclear, Compatible, CompressionType, Incompatible
from tests.peers import require_tool, run

NAMES = itertools.count()


def made(tmp_path: Path, options: str = "", size: str = "1G", backing: tuple[str, str] | None = None) -> Path:
    """An image of qemu-img's, and its first cluster."""
    path = tmp_path / f"image{next(NAMES)}.qcow2"
    extra = ["-o", options] if options else []
    if backing is not None:
        extra += ["-u", "-b", backing[0], "-F", backing[1]]
    run(require_tool("qemu-img"), "create", "-q", "-f", "qcow2", *extra, path, size)
    return path


def first_cluster(path: Path) -> bytes:
    with path.open("rb") as image:
        size = peek_cluster_size(image.read(112), str(path))
        image.seek(0)
        return image.read(size)


def parsed(path: Path) -> Header:
    return parse_header(first_cluster(path), str(path))


OPTIONS = [
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "refcount_bits=64",
    "extended_l2=on",
    "compression_type=zstd",
    "preallocation=metadata,cluster_size=4k",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_qemu_wrote_is_read_and_written_again(tmp_path: Path, options: str) -> None:
    path = made(tmp_path, options)
    data = first_cluster(path)
    header = parse_header(data, "image")
    built = build_header(header, "image")
    assert data.startswith(built)
    assert not any(data[len(built) :])
    said: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    specific = said["format-specific"]["data"]
    assert header.size == said["virtual-size"]
    assert header.cluster_size == said["cluster-size"]
    assert header.version == (2 if specific["compat"] == "0.10" else 3)
    assert header.refcount_bits == specific.get("refcount-bits", 16)
    assert header.lazy_refcounts == specific.get("lazy-refcounts", False)
    assert header.extended_l2 == specific.get("extended-l2", False)
    assert header.compression_type.name.lower() == specific["compression-type"]


@pytest.mark.parametrize("options", ["", "compat=0.10"])
def test_names_of_other_files(tmp_path: Path, options: str) -> None:
    path = made(tmp_path, options, backing=("some where/bäse.raw", "raw"))
    header = parsed(path)
    assert (header.backing_file, header.backing_format) == ("some where/bäse.raw", "raw")
    assert first_cluster(path).startswith(build_header(header, "image"))
    data_file = tmp_path / "data.raw"
    path = made(tmp_path, f"data_file={data_file},data_file_raw=on")
    header = parsed(path)
    assert header.data_file == str(data_file)
    assert header.data_file_raw
    assert first_cluster(path).startswith(build_header(header, "image"))


def test_a_changed_header_is_read_by_qemu(tmp_path: Path) -> None:
    path = made(tmp_path)
    header = parsed(path)
    header.backing_file, header.backing_format = "other.qcow2", "qcow2"
    header.compatible |= Compatible.LAZY_REFCOUNTS
    header.unknown_extensions.append((0x12345678, b"kept"))
    with path.open("r+b") as image:
        image.write(build_header(header, "image"))
    said = json.loads(run("qemu-img", "info", "--output=json", path))
    assert said["backing-filename"] == "other.qcow2"
    assert said["backing-filename-format"] == "qcow2"
    assert said["format-specific"]["data"]["lazy-refcounts"]
    assert parsed(path).unknown_extensions == [(0x12345678, b"kept")]


@given(
    st.builds(
        Header,
        cluster_bits=st.integers(14, 21),
        size=st.integers(0, 1 << 30),
        l1_size=st.integers(16, 1 << 20),
        l1_table_offset=st.just(3 << 21),
        refcount_table_offset=st.just(1 << 21),
        refcount_table_clusters=st.integers(1, 4),
        nb_snapshots=st.integers(0, 9),
        snapshots_offset=st.just(5 << 21),
        incompatible=st.sampled_from([Incompatible(0), Incompatible.DIRTY, Incompatible.EXTENDED_L2]),
        compatible=st.integers(0, (1 << 64) - 1).map(Compatible),
        autoclear=st.integers(0, (1 << 64) - 1).map(lambda bits: Autoclear(bits & ~3)),
        refcount_order=st.integers(0, 6),
        backing_file=st.none()
        | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200),
        backing_format=st.none() | st.sampled_from(["raw", "qcow2"]),
        unknown_extensions=st.lists(st.tuples(st.integers(1, 99), st.binary(max_size=50)), max_size=3),
    )
)
def test_build_and_parse_are_inverse(header: Header) -> None:
    header.l1_size = max(header.l1_size, header.l1_entries_for(header.size))
    data = build_header(header, "image").ljust(header.cluster_size, b"\0")
    assert parse_header(data, "image") == header


@given(st.binary(max_size=300), st.integers(0, 100))
def test_any_bytes_give_a_header_or_an_image_error(noise: bytes, offset: int) -> None:
    data = bytearray(build_header(Header(l1_table_offset=1 << 16, refcount_table_offset=2 << 16), "image"))
    data[offset : offset + len(noise)] = noise
    try:
        parse_header(bytes(data), "image")
    except ImageError as problem:
        assert str(problem).startswith("image: ")  # noqa: PT017  # either outcome is right


def damaged(tmp_path: Path, offset: int, value: bytes) -> bytes:
    data = bytearray(first_cluster(made(tmp_path, backing=("base", "raw"))))
    data[offset : offset + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0, b"QFX", "no qcow2 image"),
        (4, b"\0\0\0\4", "version 4"),
        (8, b"\0" * 7 + b"\x10", "backing file's name lies at 16"),
        (16, b"\0\1\0\0", "65536 bytes, at most 1023"),
        (20, b"\0\0\0\x16", "cluster_bits is 22"),
        (24, b"\xff" * 8, "size is 18446744073709551615"),
        (32, b"\0\0\0\3", "encryption method 3"),
        (36, b"\xff" * 4, "l1_size is 4294967295"),
        (36, b"\0" * 4, "l1_size is 0, a disk of 1073741824 bytes takes 2"),
        (40, b"\0" * 7 + b"\1", "l1_table_offset is 1,"),
        (48, b"\0" * 8, "refcount_table_offset is 0"),
        (56, b"\0" * 4, "no refcount table"),
        (56, b"\0\0\1\0", "256 clusters, at most 128"),
        (60, b"\0\2\0\0", "131072 snapshots"),
        (96, b"\0\0\0\7", "refcount_order is 7"),
        (100, b"\0\0\0\x60", "header_length is 96"),
        (104, b"\1", "compression_type is 1"),
        (72, b"\0" * 7 + b"\x08", "compression_type is 0"),
    ],
)
def test_what_is_wrong_is_refused(tmp_path: Path, offset: int, value: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        parse_header(damaged(tmp_path, offset, value), "image")


def test_an_unknown_feature_is_refused_by_its_name() -> None:
    header = Header(
        l1_table_offset=1 << 16,
        refcount_table_offset=2 << 16,
        incompatible=Incompatible(1 << 40 | 1 << 63),
        feature_names={(0, 40): "time travel", (1, 63): "something else"},
    )
    data = build_header(header, "image")
    with pytest.raises(ImageError, match="time travel, unknown incompatible feature, bit 63"):
        parse_header(data, "image")


def test_features_that_are_known_to_be_ignored_are_kept() -> None:
    header = Header(
        l1_table_offset=1 << 16, refcount_table_offset=2 << 16, refcount_table_clusters=1, autoclear=Autoclear(1 << 33)
    )
    again = parse_header(build_header(header, "image"), "image")
    assert again.unknown_autoclear == 1 << 33
    assert again.compression_type is CompressionType.ZLIB


def test_a_header_that_does_not_fit_is_refused() -> None:
    header = Header(cluster_bits=9, backing_file="b" * 390)
    assert len(build_header(header, "image")) <= 512  # without names of features
    header.backing_file = "b" * 500
    with pytest.raises(ImageError, match="a cluster has 512"):
        build_header(header, "image")
    header.backing_file = "b" * 1024
    with pytest.raises(ImageError, match="1024 bytes, at most 1023"):
        build_header(header, "image")


def test_structures_have_the_sizes_of_the_specification() -> None:
    assert layout.HEADER_V2.sizeof() == layout.V2_HEADER_BYTES
    assert layout.V2_HEADER_BYTES + layout.HEADER_V3.sizeof() == layout.V3_HEADER_BYTES
    assert layout.V3_HEADER_BYTES + layout.ADDITIONAL_FIELDS.sizeof() == layout.HEADER_BYTES
    assert layout.FEATURE_NAME.sizeof() == layout.FEATURE_NAME_BYTES
    assert layout.SNAPSHOT.sizeof() == layout.SNAPSHOT_BYTES
    assert layout.BITMAP.sizeof() == layout.BITMAP_BYTES
