"""Every way to say where an NBD server is."""

from __future__ import annotations

from typing import Any

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.storage.nbd.address import parse_name, server_and_export


def inet(host: str, port: int, export: str = "") -> dict[str, Any]:
    return {"server": {"type": "inet", "host": host, "port": port}, "export": export}


def unix(path: str, export: str = "") -> dict[str, Any]:
    return {"server": {"type": "unix", "path": path}, "export": export}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nbd://example.com", inet("example.com", 10809)),
        ("nbd://example.com:10810/a%20b", inet("example.com", 10810, "a b")),
        ("nbd://[::1]:5/x", inet("::1", 5, "x")),
        ("nbd:///x", inet("localhost", 10809, "x")),
        ("nbd+unix:///x?socket=/run/s", unix("/run/s", "x")),
        ("nbd+unix:?socket=s", unix("s")),
        ("nbd:localhost:10809", inet("localhost", 10809)),
        ("nbd:[::1]:10809:exportname=x", inet("::1", 10809, "x")),
        ("nbd:localhost:10809:exportname=a:b=c", inet("localhost", 10809, "a:b=c")),
        ("nbd:unix:/run/s", unix("/run/s")),
        ("nbd:unix:/run/s:t:exportname=x", unix("/run/s:t", "x")),
    ],
)
def test_names(name: str, options: dict[str, Any]) -> None:
    assert parse_name(name) == options
    assert Graph().storage_tree(name) == {"driver": "nbd", **options}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nbds://localhost", "TLS is not supported yet"),
        ("nbds+unix:///?socket=s", "TLS is not supported yet"),
        ("nbd://localhost?tls-certificates=/etc", "TLS is not supported yet"),
        ("nbd+unix:///x", "needs the parameter socket=PATH"),
        ("nbd://localhost:0", "port 0"),
        ("nbd://localhost?sokcet=x", "did you mean socket"),
        ("nbd:localhost", "expected nbd:HOST:PORT"),
        ("nbd:localhost:http", "port 'http' is not in 1 to 65535"),
        ("nbd:localhost:65536", "port '65536' is not in 1 to 65535"),
        ("nbd:localhost:1:export=x", "expected nbd:HOST:PORT"),
    ],
)
def test_wrong_names(name: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_name(name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nbd:[::1]:1", "[::1]:1"),
        ("nbd://h:2/x", "h:2"),
        ("nbd:unix:/run/s", "/run/s"),
        ("nbd+unix:///?socket=%00name", "@name"),
    ],
)
def test_addresses_for_people(name: str, shown: str) -> None:
    address, export = server_and_export(name)
    assert str(address) == shown
    assert server_and_export(str(address.uri(export))) == (address, export)
