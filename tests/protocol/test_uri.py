"""nbd_protocol.uri: what the document's examples mean, what is refused and how, and that made URIs read back."""

from __future__ import annotations

import string
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol.uri import MAX_VSOCK_NUMBER, NbdUri, Scheme, UriError, is_uri, parse_uri


@pytest.mark.parametrize(
    ("text", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/a+b", "a+b"),
        ("nbd://example.com/a/b/c", "a/b/c"),
        ("nbd://example.com/%C3%BC%F0%9F%92%BE", "ü💾"),
        ("nbd://example.com/ü💾", "ü💾"),
        ("nbd://example.com/50%25", "50%"),
    ],
)
def test_export_name_is_the_path_without_its_first_slash(text: str, export: str) -> None:
    assert parse_uri(text).export == export


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("nbd://example.com", "example.com", 10809),
        ("nbd://example.com:10810/x", "example.com", 10810),
        ("nbd://example.com:/x", "example.com", 10809),
        ("NBD://127.0.0.1:1/", "127.0.0.1", 1),
        ("nbd://[::1]", "::1", 10809),
        ("nbds://[2001:db8::1]:65535/x", "2001:db8::1", 65535),
        ("nbd://[fe80::1%25eth0]:5/", "fe80::1%eth0", 5),
        ("nbd://[fe80::1%eth0]:5/", "fe80::1%eth0", 5),
        ("nbd:///x", "localhost", 10809),
        ("nbd://:7777", "localhost", 7777),
        ("nbd:", "localhost", 10809),
    ],
)
def test_authority(text: str, host: str, port: int) -> None:
    uri = parse_uri(text)
    assert (uri.host, uri.port, uri.is_unix, uri.socket_path) == (host, port, False, "")


def test_unix_sockets() -> None:
    uri = parse_uri("nbds+unix:///?socket=/run/my%20nbd.sock")
    assert (uri.scheme, uri.socket_path, uri.export) == ("nbds+unix", "/run/my nbd.sock", "")
    assert uri.is_unix
    assert uri.is_tls_required
    assert uri.address == "/run/my nbd.sock"
    assert parse_uri("nbd+unix:///?socket=a+b;c").socket_path == "a+b;c"
    assert parse_uri("nbd+unix://?socket=s").socket_path == "s"


@pytest.mark.parametrize(
    ("text", "host", "port", "again"),
    [
        ("nbd+vsock://", "2", 10809, "nbd+vsock://2/"),
        ("nbd+vsock:///disk", "2", 10809, "nbd+vsock://2/disk"),
        ("nbd+vsock://1", "1", 10809, "nbd+vsock://1/"),
        ("nbds+vsock://3:5/x", "3", 5, "nbds+vsock://3:5/x"),
        ("nbd+vsock://:5/", "2", 5, "nbd+vsock://2:5/"),
        ("nbd+vsock://4294967294:4294967294/", "4294967294", 4294967294, "nbd+vsock://4294967294:4294967294/"),
        ("nbd+vsock://3:0/", "3", 0, "nbd+vsock://3:0/"),
    ],
)
def test_vsock(text: str, host: str, port: int, again: str) -> None:
    """A missing CID is the host's, as libnbd has it."""
    uri = parse_uri(text)
    assert (uri.host, uri.port, str(uri)) == (host, port, again)
    assert uri.is_vsock
    assert not uri.is_unix
    assert uri.is_tls_required == text.startswith("nbds")
    assert uri.address == f"vsock:{host}:{port}"
    assert is_uri(text)


def test_abstract_socket_begins_with_nul() -> None:
    uri = parse_uri("nbd+unix:///?socket=%00/abstract")
    assert uri.socket_path == "\0/abstract"
    assert uri.address == "@/abstract"
    assert str(uri) == "nbd+unix:///?socket=%00/abstract"


def test_tls_parameters() -> None:
    uri = parse_uri(
        "nbds://alice@h/x?tls-type=psk&tls-psk-file=/k/keys&tls-hostname=real.name&tls-verify-peer=0&tls-certificates=/c"
    )
    assert uri == NbdUri(
        "nbds",
        host="h",
        export="x",
        tls_username="alice",
        tls_type="psk",
        tls_psk_file="/k/keys",
        tls_hostname="real.name",
        tls_verify_peer=False,
        tls_certificates="/c",
    )
    assert parse_uri("nbds://h?tls-username=bob").tls_username == "bob"
    assert parse_uri("nbds://bob@h?tls-username=bob").tls_username == "bob"
    assert parse_uri("nbds+unix://bob@/?socket=s").tls_username == "bob"
    assert parse_uri("nbd://h?tls-verify-peer=1").tls_verify_peer is True
    assert parse_uri("nbd://h").tls_verify_peer is None
    assert not parse_uri("nbd://h").is_tls_required


def test_address_of_ipv6_has_brackets() -> None:
    assert parse_uri("nbd://[::1]:99/").address == "[::1]:99"
    assert parse_uri("nbd://h/").address == "h:10809"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no scheme"),
        ("disk.qcow2", "no scheme"),
        ("http://h/x", "scheme 'http' .* none of nbd, nbds, nbd\\+unix, nbds\\+unix, nbd\\+vsock"),
        ("nbd:disk", "after nbd: comes //"),
        ("nbd://h/x#y", "fragment"),
        ("nbd://h/a b", "' ' at character 9 .* percent-encoded"),
        ("nbd://h/a\nb", "percent-encoded"),
        ("nbd://h/a%2", "not followed by two hexadecimal digits"),
        ("nbd://h/%zz", "not followed by two hexadecimal digits"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/" + "x" * 4097, "at most 4096 bytes, this one has 4097"),
        ("nbd://h/" + "x" * 65536, "at most 65536 characters"),
        ("nbd://h:0/", "port 0 is not in"),
        ("nbd://h:65536/", "port 65536 is not in"),
        ("nbd://h:100000000000000000000/", "has more than 10 digits"),
        ("nbd+vsock://localhost/", "CID 'localhost' is no number in 0…4294967294"),
        ("nbd+vsock://[::1]/", "CID '::1' is no number"),
        ("nbd+vsock://4294967295/", "CID '4294967295' is no number in"),
        ("nbd+vsock://3:4294967295/", "port 4294967295 is not in 0…4294967294"),
        ("nbd+vsock://3/?socket=/s", "belongs to nbd\\+unix"),
        ("nbd://h:x/", "is not \\[user@\\]host\\[:port\\]"),
        ("nbd://::1/", "IPv6 address is written in \\[brackets\\]"),
        ("nbd://[::1/", "brackets"),
        ("nbd://[::g]/", "no IPv6 address"),
        ("nbd://[127.0.0.1]/", "no IPv6 address"),
        ("nbd://a@b@c/", "is not \\[user@\\]"),
        ("nbd://h%2fx/", "character that no host name has"),
        ("nbd+unix:///x", "needs the parameter socket=PATH"),
        ("nbd+unix:///x?socket=", "needs the parameter socket=PATH"),
        ("nbd+unix://h/x?socket=s", "no host and no port, found 'h'"),
        ("nbd+unix://:5/x?socket=s", "no host and no port"),
        ("nbd+unix:///?socket=a%00b", "socket has a NUL"),
        ("nbd://h/x?socket=s", "belongs to nbd\\+unix"),
        ("nbd://h?sokcet=s", "unknown parameter 'sokcet', did you mean socket\\?"),
        ("nbd://h?x-try=1", "unknown parameter 'x-try' \\(allowed: socket, tls-type"),
        ("nbd+unix:///?socket", "written socket=VALUE"),
        ("nbd+unix:///?socket=a&socket=b", "socket is given twice"),
        ("nbds://h?tls-type=x", "tls-type 'x' is none of anon, x509, psk"),
        ("nbds://h?tls-verify-peer=yes", "tls-verify-peer is 0 or 1, found 'yes'"),
        ("nbds://h?tls-hostname=%00", "tls-hostname has a NUL"),
        ("nbds://alice@h?tls-username=bob", "contradict"),
    ],
)
def test_refusals_name_the_part_and_what_was_allowed(text: str, says: str) -> None:
    with pytest.raises(UriError, match=says):
        parse_uri(text)


def test_contradicting_parts_are_refused_when_made_too() -> None:
    with pytest.raises(UriError, match="scheme 'http'"):
        NbdUri("http")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(UriError, match="needs the parameter socket"):
        NbdUri("nbd+unix")
    with pytest.raises(UriError, match="not UTF-8"):
        NbdUri("nbd", export="\udcff")
    with pytest.raises(UriError, match="no IPv6 address"):
        NbdUri("nbd", host="a:b")


@pytest.mark.parametrize(
    "text",
    [
        "nbd://example.com/disk",
        "nbd://example.com:10810/",
        "nbd://[fe80::1%25eth0]:5/x",
        "nbd+unix:///disk?socket=/run/sock",
        "nbds+vsock://3/disk?tls-hostname=real.name",
        "nbds://alice@h/x?tls-type=psk&tls-hostname=real.name&tls-certificates=/c&tls-psk-file=/k&tls-verify-peer=0",
    ],
)
def test_canonical_uris_come_back_unchanged(text: str) -> None:
    assert str(parse_uri(text)) == text


def test_is_uri() -> None:
    assert is_uri("nbd://h")
    assert is_uri("NBDS+UNIX:///x?socket=s")
    assert is_uri("nbd+vsock://")
    assert not is_uri("disk.raw")
    assert not is_uri("nbd")
    assert not is_uri("nbd:unix:/run/sock")
    assert not is_uri("http://h/")


_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
_some_text = _text.filter(bool)
_host = st.one_of(
    st.text(string.ascii_letters + string.digits + ".-_", min_size=1, max_size=30),
    st.text(st.characters(min_codepoint=0xA1, exclude_categories=["Cs"]), min_size=1, max_size=10),
    st.ip_addresses().map(str),
    st.just("fe80::1%eth0"),
)


_number = st.integers(0, MAX_VSOCK_NUMBER)
_place = {
    "": (_host, st.integers(1, 65535)),
    "+unix": (st.just(""), st.just(10809)),
    "+vsock": (_number.map(str), _number),
}


@st.composite
def _uris(draw: st.DrawFn) -> NbdUri:
    scheme = draw(st.sampled_from(get_args(Scheme)))
    way = scheme.removeprefix("nbds").removeprefix("nbd")
    unix = way == "+unix"
    host, port = _place[way]
    return NbdUri(
        scheme,
        host=draw(host),
        port=draw(port),
        socket_path=draw(st.sampled_from(("", "\0"))) + draw(_some_text) if unix else "",
        export=draw(_text),
        tls_username=draw(st.none() | _text),
        tls_type=draw(st.sampled_from((None, "anon", "x509", "psk"))),
        tls_hostname=draw(st.none() | _some_text),
        tls_verify_peer=draw(st.none() | st.booleans()),
        tls_certificates=draw(st.none() | _some_text),
        tls_psk_file=draw(st.none() | _some_text),
    )


@settings(deadline=None)
@given(_uris())
def test_made_uris_read_back(uri: NbdUri) -> None:
    text = str(uri)
    assert parse_uri(text) == uri
    assert text.isascii()
    assert str(parse_uri(text)) == text


@settings(deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"nbds?(\+unix|\+vsock)?://[\x20-\x7f]{0,40}", fullmatch=True))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UriError:
        return
    assert parse_uri(str(uri)) == uri
