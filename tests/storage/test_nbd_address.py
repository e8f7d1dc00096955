"""Every way to say where an NBD server is."""

from __future__ import annotations

from typing import Any

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.block.options import convert
from pynbd.storage.nbd.address import NbdPlace, parse_name, place_of


def inet(host: str, port: int, export: str = "") -> dict[str, Any]:
    return {"server": {"type": "inet", "host": host, "port": port}, "export": export}


def unix(path: str, export: str = "") -> dict[str, Any]:
    return {"server": {"type": "unix", "path": path}, "export": export}


def vsock(cid: int, port: int = 10809, export: str = "") -> dict[str, Any]:
    return {"server": {"type": "vsock", "cid": cid, "port": port}, "export": export}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nbd://example.com", inet("example.com", 10809)),
        ("nbd://example.com:10810/a%20b", inet("example.com", 10810, "a b")),
        ("nbd://[::1]:5/x", inet("::1", 5, "x")),
        ("nbd:///x", inet("localhost", 10809, "x")),
        ("nbd+unix:///x?socket=/run/s", unix("/run/s", "x")),
        ("nbd+unix:?socket=s", unix("s")),
        ("nbd+vsock:///x", vsock(2, export="x")),
        ("nbd+vsock://1:5", vsock(1, 5)),
        ("nbds+vsock://3/x?tls-hostname=h", {**vsock(3, export="x"), "tls": True, "tls-hostname": "h"}),
        ("nbd:localhost:10809", inet("localhost", 10809)),
        ("nbd:[::1]:10809:exportname=x", inet("::1", 10809, "x")),
        ("nbd:localhost:10809:exportname=a:b=c", inet("localhost", 10809, "a:b=c")),
        ("nbd:unix:/run/s", unix("/run/s")),
        ("nbd:unix:/run/s:t:exportname=x", unix("/run/s:t", "x")),
        ("nbds://localhost", {**inet("localhost", 10809), "tls": True}),
        (
            "nbds://alice@h/?tls-psk-file=k&tls-type=psk",
            {**inet("h", 10809), "tls": True, "tls-psk-file": "k", "tls-username": "alice"},
        ),
        (
            "nbds+unix:///x?socket=s&tls-certificates=/a/b&tls-hostname=h&tls-verify-peer=0&tls-type=x509",
            {
                **unix("s", "x"),
                "tls": True,
                "tls-certificates": "/a/b",
                "tls-hostname": "h",
                "tls-verify-peer": False,
            },
        ),
    ],
)
def test_names(name: str, options: dict[str, Any]) -> None:
    assert parse_name(name) == options
    assert Graph().storage_tree(name) == {"driver": "nbd", **options}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nbd://localhost?tls-certificates=/etc", "tls-certificates belongs to nbds://"),
        ("nbd+unix:///?socket=s&tls-verify-peer=0", "tls-verify-peer belongs to nbds://"),
        ("nbds://localhost?tls-type=psk", "tls-type=psk and tls-psk-file go together"),
        ("nbds://localhost?tls-type=x509&tls-psk-file=k", "tls-type=psk and tls-psk-file go together"),
        ("nbds://localhost?tls-type=anon", "there is TLS only with certificates"),
        ("nbd+unix:///x", "needs the parameter socket=PATH"),
        ("nbd+vsock://host/", "CID 'host' is no number"),
        ("nbd+vsock://3?tls-hostname=h", "tls-hostname belongs to nbds://"),
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
        ("nbd+vsock://3:2167438071/x", "vsock:3:2167438071"),
    ],
)
def test_addresses_for_people(name: str, shown: str) -> None:
    place = place_of(name)
    assert str(place.address()) == shown
    assert place_of(str(place.uri())) == place


@pytest.mark.parametrize(
    "name",
    [
        "nbds://h:2/x?tls-hostname=other&tls-certificates=/a%20b&tls-verify-peer=0",
        "nbds+unix:///a?socket=/run/s",
        "nbd://h/x",
        "nbds+vsock://3:5/a%20b?tls-hostname=other",
    ],
)
def test_a_uri_says_it_again(name: str) -> None:
    uri = place_of(name).uri()
    assert place_of(str(uri)) == place_of(name)
    assert str(place_of(name).uri("other")) == str(uri.with_export("other"))


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("nbd://h", {"tls_hostname": "x"}, "'tls-hostname' and 'tls-verify-peer' need TLS"),
        ("nbds://h?tls-certificates=a", {"tls_creds": "tls0"}, "'tls-creds' says already what"),
        ("nbds://h?tls-verify-peer=0", {"tls_creds": "tls0"}, "'tls-creds' says already what"),
        ("nbds://h?tls-psk-file=k", {"tls_creds": "tls0"}, "'tls-creds' says already what"),
        ("nbds://h?tls-psk-file=k&tls-certificates=a", {}, "with 'tls-psk-file' there are no certificates"),
        ("nbds://alice@h", {}, "'tls-username' needs 'tls-psk-file'"),
    ],
)
def test_what_contradicts(name: str, more: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        place_of(name, **more)
    assert place_of("nbd://h", tls_creds="tls0").uses_tls


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"type": "unix", "path": "s", "cid": "3"}, "has a path, and no host, port and cid"),
        ({"type": "inet", "host": "h", "cid": "3"}, "has host and port, and no path and cid"),
        ({"type": "inet", "host": "h", "port": "0"}, "port 0 is not in 1 to 65535"),
        ({"type": "inet", "host": "h", "port": "65536"}, "port 65536 is not in 1 to 65535"),
        ({"type": "vsock", "port": "5"}, "type 'vsock' needs its cid"),
        ({"type": "vsock", "cid": "3", "host": "h"}, "has cid and port, and no path and host"),
        ({"type": "vsock", "cid": "4294967295"}, "cid"),
        ({"type": "fd", "str": "3"}, "type"),
    ],
)
def test_servers_that_are_none(server: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        convert({"server": server}, NbdPlace, driver="nbd")


def test_a_server_behind_vsock() -> None:
    """QEMU's SocketAddress has text for both numbers."""
    place = convert({"server": {"type": "vsock", "cid": "3", "port": "5"}, "export": "x"}, NbdPlace, driver="nbd")
    assert str(place.uri()) == "nbd+vsock://3:5/x"
    place = convert({"server": {"type": "vsock", "cid": 3}, "tls": "on"}, NbdPlace, driver="nbd")
    assert str(place.uri()) == "nbds+vsock://3/"
