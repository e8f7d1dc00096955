"""Compressed clusters: what is made can be read through a window of 4 KiB."""

import random
import sys
import zlib
from collections.abc import Iterator

import pytest

from pynbd.formats.qcow2 import compression
from pynbd.formats.qcow2.compression import CompressionError
from pynbd.formats.qcow2.layout import CompressionType

CLUSTER_BYTES = 65536


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """Which library compresses is found out once: not by another test, and not for one."""
    for chosen in (compression._deflate, compression._inflate):
        chosen.cache_clear()
    yield
    for chosen in (compression._deflate, compression._inflate):
        chosen.cache_clear()


def far_repetitions() -> bytes:
    """A cluster that a larger window would compress by far better."""
    return (random.Random(7).randbytes(6000) * 11)[:CLUSTER_BYTES]


@pytest.mark.parametrize("with_isal", [True, False])
@pytest.mark.parametrize("data", [bytes(CLUSTER_BYTES), far_repetitions(), b"abc" * 20000 + bytes(5536)])
def test_deflated_clusters_need_a_small_window(monkeypatch: pytest.MonkeyPatch, data: bytes, with_isal: bool) -> None:
    if with_isal:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
    compress = compression.compressor(CompressionType.ZLIB)
    assert (compress is compression.deflate) is not with_isal
    packed = compress(data)
    stream = zlib.decompressobj(compression.WINDOW_BITS)
    assert stream.decompress(packed) == data
    assert stream.eof
    inflate = compression.decompressor(CompressionType.ZLIB)
    assert inflate(memoryview(packed + b"behind"), CLUSTER_BYTES) == data


@pytest.mark.parametrize("library", ["zlib", "isal.isal_zlib"])
@pytest.mark.parametrize("damaged", [b"", b"\0", b"\xff" * 100, compression.deflate(far_repetitions())[:-500]])
def test_what_is_damaged(library: str, damaged: bytes) -> None:
    inflate = compression.inflate_by(pytest.importorskip(library))
    with pytest.raises(CompressionError):
        inflate(damaged, CLUSTER_BYTES)


def test_no_more_comes_out_than_a_cluster() -> None:
    inflate = compression.decompressor(CompressionType.ZLIB)
    assert inflate(compression.deflate(bytes(100 << 20)), CLUSTER_BYTES) == bytes(CLUSTER_BYTES)


def test_one_thread_compresses_many_clusters_with_zstd() -> None:
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    compress, decompress = (
        compression.compressor(CompressionType.ZSTD),
        compression.decompressor(CompressionType.ZSTD),
    )
    for data in (far_repetitions(), bytes(CLUSTER_BYTES), far_repetitions()):
        assert decompress(compress(data), CLUSTER_BYTES) == data
