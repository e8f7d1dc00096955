"""Every way to describe a disk to a graph, and what a description that stands inside an image may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph


def test_all_ways_to_say_one_thing() -> None:
    graph = Graph()
    tree = {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "a,b"}}
    for description in (
        tree,
        "json:" + json.dumps(tree),
        'json:{"driver": "raw", "offset": 512, "file.driver": "file", "file.filename": "a,b"}',
        'json:{"driver": "raw", "offset": 512, "file.driver": "file", "file": {"filename": "a,b"}}',
    ):
        assert graph.describe(description) == tree
    assert graph.describe("driver=raw,offset=512,file.driver=file,file.filename=a,,b") == {**tree, "offset": "512"}


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("disk.raw", {"driver": "file", "filename": "disk.raw"}),
        ("/a b/c,d=e", {"driver": "file", "filename": "/a b/c,d=e"}),
        ("x:y", {"driver": "file", "filename": "x:y"}),
        ("./nbd://x", {"driver": "file", "filename": "./nbd://x"}),
        ("file:/tmp/x", {"driver": "file", "filename": "/tmp/x"}),
        ("file:///tmp/x", {"driver": "file", "filename": "/tmp/x"}),
        ("host_device:/dev/x", {"driver": "host_device", "filename": "/dev/x"}),
        ("null-co://", {"driver": "null"}),
        ("null-aio://", {"driver": "null"}),
        (
            "nbd://localhost:1/export",
            {"driver": "nbd", "server": {"type": "inet", "host": "localhost", "port": 1}, "export": "export"},
        ),
    ],
)
def test_names(name: str, storage: dict[str, Any]) -> None:
    graph = Graph()
    assert graph.describe(name) == {"file": storage}
    assert graph.describe(name, format="raw") == {"driver": "raw", "file": storage}
    assert graph.describe({"filename": name, "read-only": True}) == {"file": storage, "read-only": True}
    assert graph.describe(name, format=storage["driver"]) == storage


@pytest.mark.parametrize(
    ("description", "format", "said"),
    [
        ("", "", "an empty file name"),
        (
            "gopher://x/y",
            "",
            "gopher://x/y: no driver for gopher://; there are: blkdebug://, file://, host_device://, nbd://",
        ),
        ("nbd+x://y", "", "(write ./nbd+x://y for a file)"),
        ("driver=raw,file.driver=file,file.filename=x", "qcow2", "format 'qcow2' was asked for, but"),
        ('json:{"driver": 5}', "raw", "format 'raw' was asked for, but the description says driver 5"),
        ("json:7", "", "json: expected an object"),
        ("nbd://h:port/", "", "nbd://h:port/: "),
        ("null-co:", "", "null-co:: a null disk is named null-co:// or null-aio://"),
        ("null-co:///x", "", "null-co:///x: a null disk is named null-co:// or null-aio://"),
    ],
)
def test_wrong_descriptions(description: str, format: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        Graph().describe(description, format=format)
    assert said in str(caught.value)


async def test_a_description_is_opened(graph: Graph, tmp_path: Path) -> None:
    disk = tmp_path / "a,b"
    disk.write_bytes(b"x" * 4096)
    doubled = str(disk).replace(",", ",,")
    nested = {"driver": "raw", "file": {"driver": "file", "filename": str(disk)}, "size": "1k"}
    for description, size in (
        (str(disk), 4096),
        (f"file:{disk}", 4096),
        (f"driver=raw,file.driver=file,file.filename={doubled},read-only=on,size=1k", 1024),
        ("json:" + json.dumps(nested), 1024),
        (nested, 1024),
        ({"filename": str(disk), "read-only": "on"}, 4096),
    ):
        node = await graph.open(description, read_only=True)
        assert (node.driver.name, node.size, node.read_only) == ("raw", size, True)
        into = memoryview(bytearray(10))
        await node.path.read(0, into, 0)
        assert bytes(into) == b"x" * 10
        await graph.close(node)


# --- names inside images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ('json:{"driver": "EVIL"}', "can't be named inside an image; allowed are: file, host_device, luks, nbd, "),
        ("driver=EVIL", "can't be named inside an image"),
        ("driver=EVIL:Class", "can't be named inside an image"),
        ('json:{"driver": "raw", "file": {"driver": "EVIL"}}', "can't be named inside an image"),
        ('json:{"driver": "raw", "file.driver": "EVIL"}', "can't be named inside an image"),
        ('json:{"file": {"driver": "EVIL"}}', "can't be named inside an image"),
        ("driver=memory,size=1k", "driver 'memory' can't be named inside an image"),
        ("driver=blkdebug,file.driver=null", "driver 'blkdebug' can't be named inside an image"),
        ("blkdebug::x", "driver 'blkdebug' can't be named inside an image"),
        ('json:{"driver": "raw", "file": "secret"}', "file: an image can't name a node ('secret')"),
        ('json:{"file": "secret"}', "file: an image can't name a node ('secret')"),
    ],
)
async def test_names_inside_images_run_no_code(graph: Graph, tmp_path: Path, description: str, said: str) -> None:
    """Nor do they open what only a person may: other drivers, and nodes that are open for somebody else."""
    ran = tmp_path / "ran"
    evil = tmp_path / "evil.py"
    evil.write_text(
        f"open({str(ran)!r}, 'w')\nfrom pynbd.block.driver import Driver\nclass Class(Driver):\n    size = 512\n"
    )
    secret = await graph.open({"driver": "model", "size": 4096, "node-name": "secret"})
    with pytest.raises(OptionError) as caught:
        await graph.open(description.replace("EVIL", str(evil)), trusted=False)
    assert said in str(caught.value)
    assert not ran.exists()
    assert list(graph.nodes.values()) == [secret]
    assert not secret.parents


async def test_a_python_file_that_an_image_names_is_bytes(graph: Graph, tmp_path: Path) -> None:
    ran, evil = tmp_path / "ran", tmp_path / "evil.py"
    evil.write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(OptionError, match=r"driver '.*evil.py' can't be named inside an image"):
        await graph.open(str(evil), format=str(evil), trusted=False)
    node = await graph.open(str(evil), trusted=False, read_only=True)
    assert node.driver.name == "raw"
    assert node.size == evil.stat().st_size
    assert not ran.exists()


async def test_an_image_does_not_decide_how_it_is_opened(graph: Graph, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    description = json.dumps({"driver": "raw", "read-only": False, "file": {"driver": "file", "filename": str(disk)}})
    assert (await graph.open(f"json:{description}", trusted=False, read_only=True)).read_only
