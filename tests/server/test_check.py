"""What is found wrong with a configuration before anything is opened."""

from __future__ import annotations

import os
import socket
import tomllib
from pathlib import Path

import pytest

from pynbd.block.errors import OptionError
from pynbd.server.check import check
from pynbd.server.config import from_tree
from tests.peers import ROOT

NODES = """
[[node]]
node-name = "base"
driver = "memory"
size = "1M"

[[node]]
node-name = "part"
driver = "raw"
offset = "4k"
file = "base"
"""

OBJECTS = """
[[object]]
qom-type = "secret"
id = "s"
data = "x"

[[object]]
qom-type = "tls-creds-x509"
id = "t"
endpoint = "server"
dir = "pki"

[[object]]
qom-type = "authz-simple"
id = "a"
identity = "CN=alice"
"""


def refusal(text: str) -> str:
    """What is said of a configuration."""
    with pytest.raises(OptionError) as refused:
        check(from_tree(tomllib.loads(text)))
    return str(refused.value)


def test_what_is_right_passes() -> None:
    check(
        from_tree(
            tomllib.loads(
                NODES
                + OBJECTS
                + """
                [server]
                listen = ["127.0.0.1:0", "[::1]:0", "unix:/run/x.sock"]
                tls-creds = "t"
                tls-authz = "a"
                [export.a]
                disk = "part"
                filters = ["nofilter", "delay,read=5ms", { driver = "delay", write = "1ms" }]
                bitmaps = ["x", "y"]
                [export.b]
                disk = { driver = "overlay", file = { driver = "memory", size = "1M" }, backing = "base" }
                [export.c]
                disk = "no such file"
                offset = "1M"
                """
            )
        )
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[server]\nlisten = ["a:1", "b:x"]', "server.listen.1: 'b:x': 'x' is no port"),
        ('[server]\nlisten = ["a:1", "a:1"]', "server.listen.1: 'a:1' is given twice"),
        ('[[object]]\nqom-type = "secret"', "object of kind 'secret': id: write a letter"),
        (2 * '[[object]]\nqom-type = "secret"\nid = "s"\n', "there are two objects of that id"),
        ('[server]\ntls = "on"', "server.tls: 'on' is not one of 'allowed', 'off', 'required'"),
        ('[server]\ntls = "required"', "server.tls: 'required' needs tls-creds, tls-certificates or tls-psk"),
        ("[server]\ntls-verify-peer = true", "server.tls-verify-peer: it goes with tls-certificates"),
        (
            '[server]\ntls-creds = "t"',
            "server.tls-creds: there is no object 't' of a kind tls-creds-… (there are",
        ),
        (
            '[server]\ntls-creds = "s"\n' + OBJECTS,
            "server.tls-creds: there is no object 's' of a kind tls-creds-… (there are: t)",
        ),
        (
            '[server]\ntls-creds = "t"\ntls-certificates = "d"\n' + OBJECTS,
            "server.tls-certificates: tls-creds says already",
        ),
        ('[server]\ntls-authz = "a"\n' + OBJECTS, "server.tls-authz: there is no TLS that would tell who a client is"),
        (
            '[server]\ntls-creds = "t"\ntls-authz = "t"\n' + OBJECTS,
            "server.tls-authz: there is no object 't' of a kind authz-… (there are: a)",
        ),
        ('[[node]]\nnode-name = "n"', "node 'n': no driver is given"),
        ('[[node]]\nnode-name = "n"\ndriver = "memry"', "node 'n': driver 'memry' is unknown (did you mean 'memory'?)"),
        ('[[node]]\nnode-name = "9"\ndriver = "null"', "node '9': node-name: '9' is no name"),
        (
            '[[node]]\nnode-name = "n"\ndriver = "raw"\nfile = { driver = "file", filname = "x" }',
            "node 'n': file.filname: driver 'file' has no such option (did you mean 'filename'?)",
        ),
        (
            '[[node]]\nnode-name = "n"\ndriver = "raw"\nfile = { driver = "file", filename = 5 }',
            "node 'n': file.filename: expected `str`, got `int`",
        ),
        ('[[node]]\nnode-name = "n"\ndriver = "raw"\nfile = "m"', "node 'n': file: there is no node 'm'"),
        (
            '[[node]]\nnode-name = "n"\ndriver = "raw"\nfile = "base"' + NODES,
            "node 'n': file: there is no node 'base'; open are: none (nodes are made in this order: put it before",
        ),
        (NODES + NODES, "node 'base': there are two nodes of that name"),
        (NODES + '[export.a]\ndisk = "base"\nformat = "raw"', "export.a.disk: 'base' is a node: say format there"),
        (NODES + '[export.a]\ndisk = "base"\noffset = 512', "export.a.disk: 'base' is a node: say offset there"),
        (NODES + '[export.a]\ndisk = "base"\ncache = "none"', "export.a.disk: 'base' is a node: say cache there"),
        (NODES + '[export.a]\ndisk = "base"\ndiscard = "unmap"', "say discard there"),
        (NODES + '[export.a]\ndisk = "base"\ndetect-zeroes = "on"', "say detect-zeroes there"),
        ('[export.a]\ndisk = { driver = "raw", file = { driver = "file", nam = "x" } }', "export.a.disk: file.nam: dr"),
        ('[export.a]\ndisk = { driver = "raw", file = "gone" }', "export.a.disk: file: there is no node 'gone'"),
        ('[export.a]\ndisk = "foo://x"', "export.a.disk: foo://x: no driver for foo://"),
        ('[export.a]\ndisk = ""', "export.a.disk: an empty file name"),
        ('[export.a]\ndisk = "x"\nformat = "rwa"', "export.a.disk: driver 'rwa' is unknown (did you mean 'raw'?)"),
        ('[export.a]\ndisk = { driver = "null" }\noffset = 512', "export.a.disk: offset: only a raw disk can begin"),
        ('[export.a]\ndisk = "x"\nfilters = ["dealy"]', "export.a.filters.0: driver 'dealy' is unknown"),
        ('[export.a]\ndisk = "x"\nfilters = ["nofilter", "delay,raed=1"]', "export.a.filters.1: raed: driver 'delay'"),
        (
            '[export.a]\ndisk = "x"\nfilters = [{ read = 1 }]',
            "export.a.filters.0: driver: the filter's name is missing",
        ),
        ('[export.a]\ndisk = "x"\nfilters = ["raw"]', "export.a.filters.0: driver 'raw' is no filter; there are: blk"),
        (
            '[export.a]\ndisk = "x"\nfilters = [{ driver = "delay", file = "y" }]',
            "export.a.filters.0: file: a filter lies on the export's disk",
        ),
        ('[export.a]\ndisk = "x"\nbitmaps = ["b", ""]', "export.a.bitmaps.1: bitmap name '': its length must be 1"),
        ('[export.a]\ndisk = "x"\nbitmaps = ["b", "b"]', "export.a.bitmaps.1: there are two bitmaps named 'b'"),
        (f'[export.a]\ndisk = "x"\ndescription = "{"x" * 4097}"', "export.a.description: "),
        (f'[export.{"x" * 4097}]\ndisk = "x"', "has 4097 bytes; clients can be told 4096"),
        ('[export."a b"]\ndisk = ""', 'export."a b".disk: an empty file name'),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, said: str) -> None:
    assert said in refusal(text)


def test_nothing_is_opened(tmp_path: Path) -> None:
    """Neither a server nor a file nor a driver: a FIFO would make whoever opened it wait for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from pathlib import Path\nfrom pynbd import Driver\nclass Mine(Driver):\n    size = 512\n"
        f"    def open(self): Path({str(tmp_path / 'opened')!r}).touch()\n"
        "    def read(self, offset, into): pass\n"
    )
    overlay = {"driver": "overlay", "backing": "base", "file": {"driver": "file", "filename": str(fifo)}}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        listen = f"127.0.0.1:{listener.getsockname()[1]}"
        tree = {
            "server": {"listen": [listen, f"unix:{tmp_path}/s"]},
            "node": [{"node-name": "base", "driver": "raw", "file": {"driver": "file", "filename": str(fifo)}}],
            "export": {
                "a": {"disk": str(fifo), "filters": ["nofilter"]},
                "b": {"disk": f"nbd://{listen}/"},
                "c": {"disk": str(mine)},
                "d": {"disk": "base", "snapshot": True},
                "e": {"disk": overlay},
                "f": {"disk": str(tmp_path / "missing")},
            },
        }
        check(from_tree(tree))
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pyc") in (
        ["fifo", "mine.py"],
        ["__pycache__", "fifo", "mine.py"],
    )


def test_the_example_of_the_manual_is_right() -> None:
    _, _, text = (ROOT / "docs" / "serve.md").read_text().partition("```toml\n")
    config = from_tree(tomllib.loads(text.partition("```")[0]))
    check(config)
    assert set(config.exports) == {"disk0", "yesterday", "vm", "slow", ""}
