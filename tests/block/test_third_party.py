"""Drivers from outside pynbd: by file, by entry point, and as docs/writing-drivers.md and README.md show them."""

import asyncio
import errno
import importlib
import json
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pynbd.block import registry
from pynbd.block.backend import BlockBackend
from pynbd.block.errors import OptionError
from pynbd.block.extents import Status
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.permissions import Permission
from tests.peers import ROOT, pynbd_serve, require_tool, run

GUIDE = ROOT / "docs" / "writing-drivers.md"

Save = Callable[[str, str], str]


def examples(document: Path) -> dict[str, str]:
    """The Python code of a document, by the file name in its first line (`# NAME.py`)."""
    blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.M | re.S)
    found = {}
    for number, code in enumerate(blocks):
        named = re.match(r"# (\w+\.py)\n", code)
        found[named[1] if named else f"block{number}.py"] = code[named.end() :] if named else code
    return found


EXAMPLES = examples(GUIDE)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves code under a name; the path."""

    def save(name: str, code: str) -> str:
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)

    return save


@pytest.fixture
def example(save: Save) -> Callable[[str], str]:
    return lambda name: save(name, EXAMPLES[name])


async def using(graph: Graph, description: str | dict[str, Any], *, discard: str = "ignore") -> BlockBackend:
    """A user of a disk, who may write."""
    user = BlockBackend("test")
    node = await graph.open(description, discard=discard)
    graph.attach(user, node, Permission.CONSISTENT_READ | Permission.WRITE)
    return user


async def content(user: BlockBackend, offset: int, length: int) -> bytes:
    found = bytearray(length)
    await user.read(offset, memoryview(found))
    return bytes(found)


# --- the guide -----------------------------------------------------------------------------------------------------


def code_lines(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


def test_the_guide_has_no_code_that_is_not_tested() -> None:
    names = ["digits.py", "scratch.py", "table.py", "pattern.py", "caesar.py", "sparse.py", "test_scratch.py"]
    assert list(EXAMPLES) == names


async def test_read_only_in_five_lines(graph: Graph, example: Callable[[str], str]) -> None:
    assert code_lines(EXAMPLES["digits.py"]) == 5
    user = await using(graph, example("digits.py"))
    assert user.size == 1 << 20
    assert await content(user, 5, 20) == b"56789abcdef012345678"
    with pytest.raises(OSError, match="driver digits can't write") as failure:
        await user.write(0, memoryview(b"x"))
    assert failure.value.errno == errno.ENOTSUP


def mirrored() -> str:
    """The example of the README."""
    (code,) = examples(ROOT / "README.md").values()
    return code


@pytest.mark.parametrize("name", ["scratch.py", "table.py", "sparse.py", "mirrored.py"])
async def test_writable(graph: Graph, save: Save, name: str) -> None:
    code = mirrored() if name == "mirrored.py" else EXAMPLES[name]
    user = await using(graph, save(name, code), discard="unmap")
    assert await content(user, 3999, 200) == bytes(200)
    await user.write(4000, memoryview(b"hello " * 2000))
    assert await content(user, 3999, 12002) == b"\0" + b"hello " * 2000 + b"\0"
    await user.write_zeroes(4096, 4096)
    assert await content(user, 4000, 4200) == (b"hello " * 16) + bytes(4096) + (b"hello " * 2000)[4192:4200]
    await user.discard(0, 1 << 20)
    await user.flush()
    assert sum(extent.length for extent in await user.block_status(0, 8192)) <= 8192
    with pytest.raises(OSError, match="outside the disk"):
        await user.write(user.size - 1, memoryview(b"xy"))


def test_writable_in_ten_lines() -> None:
    assert code_lines(EXAMPLES["scratch.py"]) <= 10


async def test_options_of_a_driver_in_a_file(graph: Graph, example: Callable[[str], str]) -> None:
    path = example("pattern.py")
    user = await using(graph, f"driver={path},size=64k,byte=255")
    assert user.size == 1 << 16
    assert await content(user, 0, 3) == b"\xff\xff\xff"
    with pytest.raises(OptionError, match=r"bite: driver 'pattern' has no such option \(did you mean 'byte'\?\)"):
        await graph.open(f"driver={path},bite=1")
    with pytest.raises(OptionError, match="byte: expected `int`"):
        await graph.open(f"driver={path},byte=many")


async def test_a_filter_in_a_file(graph: Graph, example: Callable[[str], str]) -> None:
    user = await using(graph, {"driver": example("caesar.py"), "file": {"driver": "memory", "size": 65536}})
    below = user.node.children["file"].node
    await user.write(10, memoryview(b"attack"))
    await user.write_zeroes(4096, 16)
    assert await content(user, 10, 6) == b"attack"
    assert await content(user, 4096, 16) == bytes(16)
    assert await read(below, 10, 6) == b"dwwdfn"
    assert user.node.is_filter
    assert [extent.zero for extent in await user.block_status(0, 65536)] == [False]


async def read(node: Node, offset: int, length: int) -> bytes:
    found = bytearray(length)
    await node.path.read(offset, memoryview(found), 0)
    return bytes(found)


async def test_the_sparse_disk_is_sparse(graph: Graph, example: Callable[[str], str]) -> None:
    user = await using(graph, example("sparse.py"), discard="unmap")
    await user.write((1 << 39) + 5, memoryview(b"x"))
    (hole,) = await user.block_status((1 << 39) - 4096, 1 << 16)
    (data,) = await user.block_status(1 << 39, 1 << 16)
    assert (hole.length, hole.zero, data.length, data.data) == (4096, True, 4096, True)
    await user.discard(1 << 39, 4096)
    assert all(extent.zero for extent in await user.block_status((1 << 39) - 4096, 1 << 16))


async def test_the_test_of_the_guide_passes(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save("scratch.py", EXAMPLES["scratch.py"])
    code = compile(EXAMPLES["test_scratch.py"], "test_scratch.py", "exec")
    names: dict[str, Callable[..., Awaitable[None]]] = {}
    exec(code, names)
    await names["test_what_is_written_is_read"](path=str(tmp_path / "scratch.py"))


@pytest.mark.parametrize("arguments", [[], ["--filter", "blkdebug"], ["--filter", "delay,read=1us"]], ids=str)
def test_served(example: Callable[[str], str], arguments: list[str]) -> None:
    """The ten lines behind a real client."""
    qemu_io = require_tool("qemu-io", package="qemu-utils")
    with pynbd_serve(*arguments, example("scratch.py")) as peer:
        commands = ["write -P 7 1k 64k", "read -P 7 1k 64k", "write -z 4k 4k", "read -P 0 4k 4k", "flush"]
        words = [word for command in commands for word in ("-c", command)]
        run(qemu_io, "-f", "raw", *words, peer.uri())


# --- by file -------------------------------------------------------------------------------------------------------

DISK = """
from pynbd import Driver
class Disk(Driver):
    size = 4096
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("size = 1", r"expected one Driver class, found none"),
        ("import nothing_like_this", r":1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("\n\n1 / 0", r":3: ZeroDivisionError"),
        (DISK + "class Other(Driver): pass", r"expected one Driver class, found Disk, Other \(say .*\.py:CLASS\)"),
        (DISK + "    async def read(self, offset): pass", r"'disk': read\(offset\) takes too few arguments"),
        (DISK + "    size = -5", r"driver disk has a size of -5"),
    ],
)
async def test_what_is_wrong_with_a_file_is_told(graph: Graph, save: Save, code: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as failure:
        await graph.open(save("wrong.py", code))
    assert type(failure.value).__module__ == "pynbd.block.errors"
    assert not graph.nodes


async def test_one_of_several_classes_is_named(graph: Graph, save: Save) -> None:
    path = save("both.py", DISK + "class Other(Driver):\n    size = 512\n")
    assert (await graph.open(f"{path}:Other")).size == 512
    with pytest.raises(OptionError, match="no Driver class 'Third'; found: Disk, Other"):
        await graph.open(f"{path}:Third")
    with pytest.raises(OptionError, match=r"missing\.py: no such file"):
        await graph.open(path.replace("both", "missing"))


@pytest.mark.parametrize("form", ["{}", "driver={}", 'json:{{"driver": "{}"}}', "driver=raw,file.driver={}"])
async def test_a_name_inside_an_image_runs_no_code(graph: Graph, save: Save, tmp_path: Path, form: str) -> None:
    path = save("evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')" + DISK)
    if form == "{}":  # just a file, of Python text
        assert await read(await graph.open(path, trusted=False), 0, 4) == b"open"
    else:
        with pytest.raises(OptionError, match="can't be named inside an image"):
            await graph.open(form.format(path), trusted=False)
    assert not (tmp_path / "ran").exists()


# --- fitted ----------------------------------------------------------------------------------------------------------


async def test_plain_functions_run_in_threads(graph: Graph, save: Save) -> None:
    code = DISK + (
        "    threads = []\n"
        "    def read(self, offset, into):\n"
        "        import threading\n"
        "        self.threads.append(threading.get_ident())\n"
        "        return bytes(len(into))\n"
        "    def block_status(self, offset, length):\n"
        "        from pynbd import Extent, Status\n"
        "        return [Extent(length, Status.ZERO | Status.ALLOCATED)]\n"
    )
    user = await using(graph, save("threads.py", code))
    await content(user, 0, 512)
    threads: list[int] = vars(type(user.node.driver))["threads"]
    assert threads
    assert threading.get_ident() not in threads
    assert [extent.status for extent in await user.block_status(0, 4096)] == [Status.ZERO | Status.ALLOCATED]


async def test_calls_overlap_unless_the_driver_is_serial(graph: Graph, save: Save) -> None:
    code = DISK + (
        "    now = most = 0\n"
        "    async def read(self, offset, into):\n"
        "        import asyncio\n"
        "        self.now += 1\n"
        "        self.most = max(self.most, self.now)\n"
        "        await asyncio.sleep(0)\n"
        "        self.now -= 1\n"
    )
    for name, more, most in (("free.py", "", 8), ("serial.py", "    serial = True\n", 1)):
        user = await using(graph, save(name, code + more))
        await asyncio.gather(*(content(user, n * 512, 512) for n in range(8)))
        assert vars(user.node.driver)["most"] == most


async def test_bytes_of_another_length_are_an_error(graph: Graph, save: Save) -> None:
    user = await using(graph, save("short.py", DISK + "    def read(self, offset, into): return b'xy'\n"))
    with pytest.raises(OSError, match="read returned 2 bytes, not 512") as failure:
        await content(user, 0, 512)
    assert failure.value.errno == errno.EIO


async def test_an_errno_of_the_driver_reaches_the_user(graph: Graph, save: Save) -> None:
    code = DISK + "    def write(self, offset, data): raise OSError(28, 'the shelf is full')\n"
    user = await using(graph, save("full.py", code))
    with pytest.raises(OSError, match="the shelf is full") as failure:
        await user.write(0, memoryview(b"x"))
    assert failure.value.errno == errno.ENOSPC


# --- by entry point ------------------------------------------------------------------------------------------------

PACKAGE = '''
from pynbd import Driver
class Somebody(Driver):
    """A disk from another package."""
    size = 4096
    async def read(self, offset, into): into[:] = b"r" * len(into)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside pynbd that registers drivers: a sound one, one that takes a built-in name, two broken ones."""
    (tmp_path / "third_party_disks.py").write_text(PACKAGE)
    info = tmp_path / "third_party_disks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-disks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pynbd.drivers]\n"
        "registered = third_party_disks:Somebody\n"
        "memory = third_party_disks:Somebody\n"
        "gone = third_party_disks:Missing\n"
        "no-driver = third_party_disks:__name__\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(importlib.import_module("sys").modules, "third_party_disks", raising=False)


async def test_a_registered_driver_is_known_by_name(graph: Graph, installed: None) -> None:
    user = await using(graph, "driver=registered")
    assert await content(user, 0, 3) == b"rrr"
    assert "registered" in registry.all_names()
    nested = await graph.open("driver=raw,offset=512,file.driver=registered")
    assert nested.size == 4096 - 512


async def test_a_built_in_name_cannot_be_taken(installed: None) -> None:
    assert registry.driver_class("memory").__module__ == "pynbd.storage.memory"


async def test_a_broken_registration_is_told(installed: None) -> None:
    with pytest.raises(OptionError, match=r"driver 'gone' \(third_party_disks:Missing\) can't be loaded"):
        registry.driver_class("gone")
    with pytest.raises(OptionError, match=r"'no-driver' \(third_party_disks:__name__\) is no pynbd.Driver"):
        registry.driver_class("no-driver")


async def test_an_image_may_not_name_a_registered_driver(graph: Graph, installed: None) -> None:
    with pytest.raises(OptionError, match="can't be named inside an image"):
        await graph.open("driver=registered", trusted=False)


def test_registered_drivers_are_listed(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    from pynbd.cli import main

    assert main(["drivers"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^registered +storage +A disk from another", listed, re.M)
    assert re.search(r"^gone +\(driver 'gone'", listed, re.M)
    assert main(["drivers", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)["$defs"]
    reference = schema["BlockdevOptions"]["discriminator"]["mapping"]["registered"]
    assert schema[reference.removeprefix("#/$defs/")]["properties"]["driver"]["enum"] == ["registered"]
