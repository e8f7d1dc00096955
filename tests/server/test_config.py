"""Configurations: addresses, every key of a file, and what is said of each that is wrong."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pynbd.block.errors import OptionError
from pynbd.server.access import AccessRule
from pynbd.server.config import (
    MAX_CONFIG_BYTES,
    MAX_SOCKET_PATH_BYTES,
    Address,
    Config,
    ExportOptions,
    ListenOptions,
    from_tree,
    load,
    parse_address,
    toml_key,
)
from pynbd.server.limits import ClientLimits

# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", Address("127.0.0.1", 10809)),
        ("localhost:0", Address("localhost", 0)),
        ("localhost", Address("localhost", 10809)),
        (":65535", Address("", 65535)),
        ("", Address("", 10809)),
        ("[::1]:80", Address("::1", 80)),
        ("[::1]", Address("::1", 10809)),
        ("::1", Address("::1", 10809)),
        ("fe80::1%eth0", Address("fe80::1%eth0", 10809)),
        ("unix:/run/x.sock", Address(path="/run/x.sock")),
        ("vsock:10809", Address(port=10809, is_vsock=True)),
        ("vsock::10809", Address(port=10809, is_vsock=True)),
        ("vsock:3:0", Address(port=0, is_vsock=True, cid=3)),
        ("vsock:0:4294967294", Address(port=4294967294, is_vsock=True, cid=0)),
        ("unix:a:1", Address(path="a:1")),
        ("unix:" + "x" * MAX_SOCKET_PATH_BYTES, Address(path="x" * MAX_SOCKET_PATH_BYTES)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host:65536", "'65536' is no port (0 to 65535)"),
        ("host:", "'' is no port"),
        ("host:nbd", "'nbd' is no port"),
        ("host:٣", "is no port"),
        ("host:" + "9" * 5000, "is no port"),
        ("[::1", "is no address"),
        ("[::1]x:1", "is no address"),
        ("unix:", "1 to 107 bytes"),
        ("unix:" + "x" * (MAX_SOCKET_PATH_BYTES + 1), "this one has 108"),
        ("unix:" + "ä" * 54, "this one has 108"),
        ("unix:\udcff", "must be UTF-8"),
        ("vsock:", "write vsock:PORT or vsock:CID:PORT"),
        ("vsock:host:1", "write vsock:PORT or vsock:CID:PORT"),
        ("vsock:3:", "write vsock:PORT"),
        ("vsock:٣", "write vsock:PORT"),
        ("vsock:4294967295", "numbers from 0 to 4294967294"),
        ("vsock:4294967295:1", "numbers from 0 to 4294967294"),
    ],
)
def test_wrong_addresses(text: str, said: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_address(text)
    assert said in str(refused.value)


# --- files ----------------------------------------------------------------------------------------------------

EVERYTHING = """
[server]
listen = ["127.0.0.1:0", "unix:/run/x.sock"]
max-clients = 7
workers = 3
structured-replies = false
extended-headers = "off"
payload-memory = "16M"
tls = "allowed"
tls-creds = "tls0"
tls-certificates = "pki"
tls-psk = "keys.psk"
tls-verify-peer = "on"
tls-authz = "authz0"
access = [{ policy = "deny", address = ["10.0.0.5", "fd00::/8"] }, { policy = "allow", uid = [0, "nobody"] }]
client-limits = { connections = 16, bytes-per-second = "100M", handshake-timeout = 2.5 }

[[object]]
qom-type = "secret"
id = "sec0"
file = "key"

[[node]]
node-name = "golden"
driver = "memory"
size = "1M"

[export.disk-0]
disk = "disk.raw"
format = "raw"
description = "the first"
read-only = true
snapshot = true
filters = ["nofilter", { driver = "delay", read = "5ms" }]
bitmaps = ["b"]
allocation-depth = true
offset = "64k"
cache = "writethrough"
discard = "unmap"
detect-zeroes = "on"
min-block = 512
load-snapshot = "one"
resize = true
access = [{ policy = "read-only", address = "unix", gid = "daemon", name = "CN=*", authz = "authz0" }]

[export.""]
disk = { driver = "null" }
"""


def test_every_key() -> None:
    import tomllib

    config = from_tree(tomllib.loads(EVERYTHING))
    assert config == Config(
        server=ListenOptions(
            listen=("127.0.0.1:0", "unix:/run/x.sock"),
            max_clients=7,
            workers=3,
            structured_replies=False,
            extended_headers=False,
            payload_memory=16 << 20,
            tls="allowed",
            tls_creds="tls0",
            tls_certificates="pki",
            tls_psk="keys.psk",
            tls_verify_peer=True,
            tls_authz="authz0",
            access=(
                AccessRule(policy="deny", address=("10.0.0.5", "fd00::/8")),
                AccessRule(policy="allow", uid=(0, "nobody")),
            ),
            client_limits=ClientLimits(connections=16, bytes_per_second=100 << 20, handshake_timeout=2.5),
        ),
        objects=({"qom-type": "secret", "id": "sec0", "file": "key"},),
        nodes=({"node-name": "golden", "driver": "memory", "size": "1M"},),
        exports={
            "disk-0": ExportOptions(
                disk="disk.raw",
                format="raw",
                description="the first",
                read_only=True,
                snapshot=True,
                filters=("nofilter", {"driver": "delay", "read": "5ms"}),
                bitmaps=("b",),
                allocation_depth=True,
                offset=65536,
                cache="writethrough",
                discard="unmap",
                detect_zeroes="on",
                min_block=512,
                load_snapshot="one",
                resize=True,
                access=(AccessRule(policy="read-only", address="unix", gid="daemon", name="CN=*", authz="authz0"),),
            ),
            "": ExportOptions(disk={"driver": "null"}),
        },
    )


def test_every_key_is_in_that_test() -> None:
    for kind in (ListenOptions, ExportOptions):
        for field in msgspec.structs.fields(kind):
            assert f"\n{field.encode_name} = " in EVERYTHING


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [", "Invalid value"),
        ("[serer]", "serer: there are only the tables [server], [[object]], [[node]] and [export.NAME]"),
        ("server = 5", "server: expected a table, found 5"),
        ('export.a = "x"', "export.a: expected a table, found 'x'"),
        ('export."a.b" = "x"', 'export."a.b": expected a table'),
        ('[server]\nlisten = "x"', "server.listen: expected `array`, got `str`"),
        ("[server]\nlisten = [5]", "server.listen[0]: expected `str`, got `int`"),
        ("[server]\nmax-clients = -1", "server.max-clients: expected `int` >= 0"),
        ("[server]\nworkers = 0", "server.workers: expected"),
        ('[server]\nworkers = "all"', "server.workers: "),
        ('[server]\nmax-clients = "x"', "server.max-clients: expected `int`, got `str`"),
        ('[server]\npayload-memory = "x"', "server.payload-memory: 'x' is no size"),
        ("[server]\nlisen = []", "server.lisen: table [server] has no such option (did you mean 'listen'?)"),
        ("[object]\nx = 1", "object: expected tables, written [[object]]"),
        ("[node]\nx = 1", "node: expected tables, written [[node]]"),
        ("[[node]]\ndriver = 'null'", "node: the table number 1 needs a node-name, found None"),
        ("[[node]]\nnode-name = 5", "the table number 1 needs a node-name, found 5"),
        ("[export.a]", "export.a.disk: table [export.a] needs this option"),
        ("[export.a]\ndisk = 5", "export.a.disk: expected `str | object`, got `int`"),
        (
            '[export.a]\ndisk = "x"\nformt = "raw"',
            "export.a.formt: table [export.a] has no such option (did you mean 'f",
        ),
        ('[export.a]\ndisk = "x"\nread-only = "maybe"', "export.a.read-only: 'maybe' is neither 'on' nor 'off'"),
        ('[export.a]\ndisk = "x"\noffset = "1q"', "export.a.offset: '1q' is no size"),
        ('[export.a]\ndisk = "x"\ncache = "foo"', "export.a.cache: 'foo' is not one of 'directsync', 'none'"),
        ('[export.a]\ndisk = "x"\nfilters = [5]', "export.a.filters[0]: expected `str | object`"),
        ('[export.a]\ndisk = "x"\nmin-block = 3', "export.a: min-block: 3 is no power of two from 1 to 65536"),
        ('[export.a]\ndisk = "x"\nmin-block = "128k"', "export.a: min-block: 131072 is no power of two"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "pynbd.toml"
    file.write_text(text)
    with pytest.raises(OptionError) as refused:
        load(str(file))
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(OptionError) as refused:
            load(str(path))
        return str(refused.value)

    assert refusal(tmp_path) == f"{tmp_path}: Is a directory"
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: No such file or directory"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    assert "can't decode byte 0xff" in refusal(binary)
    deep = tmp_path / "deep"
    deep.write_text("x = " + "[" * 100_000)
    assert refusal(deep).startswith(f"{deep}: ")


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    os.mkfifo(endless)
    written = 0

    def write() -> None:
        nonlocal written
        with endless.open("wb", buffering=0) as pipe:
            try:
                while True:
                    written += pipe.write(bytes(65536))
            except BrokenPipeError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(OptionError, match=f"longer than {MAX_CONFIG_BYTES} bytes"):
        load(str(endless))
    writer.join()
    assert written <= MAX_CONFIG_BYTES + (1 << 20)


@pytest.mark.parametrize("name", ["a", "a-b_C9", "", "a.b", 'say "x"', "tab\t", "back\\slash", "ä"])
def test_names_as_keys(name: str) -> None:
    import tomllib

    tree: dict[str, Any] = tomllib.loads(f"{toml_key(name)} = 1")
    assert tree == {name: 1}
