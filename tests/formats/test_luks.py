"""The format luks by itself: what it makes it opens, in every alignment, and never without its passphrase."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.backend import BlockBackend
from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, ImageError, OptionError, PermissionConflict
from pynbd.block.families import Amendable, Measurable
from pynbd.block.graph import Graph
from pynbd.block.permissions import Permission
from pynbd.block.probing import probe_format
from pynbd.crypto.layout import MAGIC
from pynbd.crypto.luks_options import LuksOptions
from pynbd.formats.luks import LuksCreationOptions, LuksFormat
from tests.formats.luks_images import SIZE, content, create, objects, opened

HEADER = 2068480
"""Bytes before the payload, with AES-256 in XTS."""


@pytest.fixture
async def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.luks"
    await create(path)
    return path


@pytest.fixture(scope="module")
def shared_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that say themselves what it holds."""
    path = tmp_path_factory.mktemp("luks") / "disk.luks"
    asyncio.run(create(path, cipher_alg="aes-128", cipher_mode="cbc"))
    return path


def test_it_is_recognised() -> None:
    assert probe_format(MAGIC + b"\0\1" + bytes(600), "x") == "luks"
    with pytest.raises(OptionError, match="this is a luks2 image"):
        probe_format(MAGIC + b"\0\2" + bytes(600), "x")
    assert probe_format(MAGIC, "x") == "raw"


async def test_what_was_written_is_there_again(image: Path) -> None:
    data = random.Random(1).randbytes(SIZE)
    async with opened(image) as backend:
        assert backend.size == SIZE
        await backend.write(0, memoryview(data))
    assert await content(image) == data
    assert data[:512] not in image.read_bytes()


@settings(max_examples=15)
@given(
    writes=st.lists(st.tuples(st.integers(0, 300_000), st.integers(1, 200_000)), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_alignment(shared_image: Path, writes: list[tuple[int, int]], seed: int) -> None:
    """Parts of sectors too, which the block layer reads, modifies and writes."""

    async def check() -> None:
        source = random.Random(seed)
        expected = bytearray(await content(shared_image))
        async with opened(shared_image) as backend:
            for offset, length in writes:
                data = source.randbytes(length)
                expected[offset : offset + length] = data
                await backend.write(offset, memoryview(data))
            for offset, length in writes:
                into = bytearray(length)
                await backend.read(offset, memoryview(into))
                assert into == expected[offset : offset + length]
        assert await content(shared_image) == expected

    asyncio.run(check())


async def test_zeroes_are_written_as_such(image: Path) -> None:
    async with opened(image) as backend:
        await backend.write_zeroes(1000, 100_000)
        into = bytearray(100_000)
        await backend.read(1000, memoryview(into))
        assert into == bytes(100_000)
        assert not backend.node.driver.has_zero_init()
    assert bytes(4096) not in image.read_bytes()[HEADER + 1024 : HEADER + 100_000]


async def test_without_the_passphrase_it_can_be_looked_at(image: Path) -> None:
    graph = Graph(objects())
    node = await graph.open({"driver": "luks", "file": {"filename": str(image)}})
    try:
        assert node.size == SIZE
        told = await node.info()
        assert told.encrypted
        assert told.specific["cipher-alg"] == "aes-256"
        backend = BlockBackend("reader")
        for held in (Permission.CONSISTENT_READ, Permission.WRITE):
            with pytest.raises(PermissionConflict, match="is encrypted; give its passphrase by key-secret"):
                graph.attach(backend, node, held)
        for request in (
            node.path.read(0, memoryview(bytearray(512)), 0),
            node.path.write(0, memoryview(bytes(512)), 0),
        ):
            with pytest.raises(OSError, match="without key-secret") as caught:
                await request
            assert caught.value.errno == errno.ENOKEY
    finally:
        await graph.close_all()


@pytest.mark.parametrize(
    ("secret", "said"),
    [("s1", "disk.luks: the passphrase opens none of the key slots"), ("s9", "there is no secret 's9'")],
)
async def test_the_wrong_passphrase(image: Path, secret: str, said: str) -> None:
    with pytest.raises(BlockError, match=said):
        async with opened(image, secret=secret):
            pytest.fail("it opened")


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (0, "no LUKS container"),
        (500, "key-bytes|LUKS header|LUKS key slot"),
        (4096, "the payload begins at offset 2068480, and the file has 4096 bytes"),
        (HEADER - 1, "and the file has 2068479 bytes"),
    ],
)
async def test_files_that_were_cut(image: Path, length: int, said: str) -> None:
    with image.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(ImageError, match=said):
        async with opened(image):
            pytest.fail("it opened")


async def test_a_payload_that_is_cut_ends_with_its_last_whole_sector(image: Path) -> None:
    for length, size in ((HEADER, 0), (HEADER + 511, 0), (HEADER + 1300, 1024)):
        with image.open("r+b") as file:
            file.truncate(length)
        async with opened(image) as backend:
            assert backend.size == size


async def test_resize(image: Path) -> None:
    async with opened(image) as backend:
        data = random.Random(2).randbytes(4096)
        await backend.truncate(2 * SIZE)
        await backend.write(2 * SIZE - 4096, memoryview(data))
        assert image.stat().st_size == HEADER + 2 * SIZE
        for size, code in ((1000, errno.EINVAL), ((1 << 63) - 512, errno.EFBIG)):
            with pytest.raises(OSError, match="resize to") as caught:
                await backend.truncate(size)
            assert caught.value.errno == code
        assert backend.size == 2 * SIZE
    assert (await content(image))[-4096:] == data


# --- making ---------------------------------------------------------------------------------------------------


async def test_sizes_are_rounded_up_to_sectors(tmp_path: Path) -> None:
    await create(tmp_path / "x", 1000)
    async with opened(tmp_path / "x") as backend:
        assert backend.size == 1024


async def test_preallocation(tmp_path: Path) -> None:
    for mode, blocks in (("off", 0), ("falloc", SIZE), ("full", SIZE)):
        path = tmp_path / mode
        await create(path, preallocation=mode)
        assert path.stat().st_size == HEADER + SIZE
        assert (path.stat().st_blocks * 512 >= SIZE + HEADER) == bool(blocks)
    with pytest.raises(OptionError, match="preallocation: luks takes off, falloc and full"):
        await create(tmp_path / "metadata", preallocation="metadata")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key_secret": ""}, "key-secret: a new encrypted image needs a passphrase"),
        ({"key_secret": "s9"}, "there is no secret 's9'"),
        ({"cipher_alg": "serpent-256"}, "cipher-alg: 'serpent-256' is not supported"),
        ({"size": (1 << 63) - 1}, "behind a header are more than"),
    ],
)
async def test_what_can_not_be_made(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        await create(tmp_path / "x", **options)
    assert (tmp_path / "x").stat().st_size == 0


async def test_measure(tmp_path: Path) -> None:
    assert issubclass(LuksFormat, Measurable)
    await create(tmp_path / "x", 12345)
    found = await LuksFormat.measure(LuksCreationOptions(size=12345), None)
    assert found.required == found.fully_allocated == (tmp_path / "x").stat().st_size
    async with opened(tmp_path / "x") as backend:
        assert (await LuksFormat.measure(LuksCreationOptions(), backend)).required == found.required


def test_every_option_of_a_container_is_one_of_the_format() -> None:
    options = LuksCreationOptions(cipher_alg="aes-128", iter_time=7, preallocation=Preallocation.FULL)
    assert msgspec.to_builtins(options.container()).items() <= msgspec.to_builtins(options).items()
    own = {field.name: (field.type, field.default) for field in msgspec.structs.fields(LuksCreationOptions)}
    for field in msgspec.structs.fields(LuksOptions):
        assert own[field.name] == (field.type, field.default)


# --- key slots ------------------------------------------------------------------------------------------------


async def test_key_slots_are_changed_while_the_disk_is_in_use(image: Path) -> None:
    async with opened(image) as backend:
        driver = backend.node.driver
        assert isinstance(driver, Amendable)
        await driver.amend({"state": "active", "new-secret": "s1", "keyslot": "3", "iter-time": "1"})
        await backend.write(0, memoryview(b"x" * 512))
        slots = (await backend.node.info()).specific["slots"]
        assert [slot["active"] for slot in slots] == [True, False, False, True] + [False] * 4
    assert await content(image, secret="s1") == await content(image)
    async with opened(image, secret="s1") as backend:
        driver = backend.node.driver
        assert isinstance(driver, Amendable)
        await driver.amend({"state": "inactive", "old-secret": "s0"})
    with pytest.raises(BlockError, match="opens none of the key slots in use \\(3\\)"):
        await content(image)


async def test_changes_of_a_read_only_image(image: Path) -> None:
    async with opened(image, Permission.CONSISTENT_READ, read_only=True) as backend:
        driver = backend.node.driver
        assert isinstance(driver, Amendable)
        with pytest.raises(OSError, match="change of key slots") as caught:
            await driver.amend({"state": "active", "new-secret": "s1"})
        assert caught.value.errno == errno.EROFS
        with pytest.raises(OptionError, match="stat: driver 'luks' has no such option"):
            await driver.amend({"stat": "active"})
