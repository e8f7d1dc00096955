"""NBD URIs, parsed and made.

Source: `doc/uri.md` of the NetworkBlockDevice/nbd project, RFC 3986 (generic syntax) and RFC 6874 (IPv6 zones). The
query parameters `tls-certificates`, `tls-psk-file` and `tls-username` are not in that document: they are what libnbd's
tools understand (`tls-username` is a second spelling of the `user@` part), and so are the schemes `nbd+vsock` and
`nbds+vsock`, whose host is the number of a virtual machine.

>>> uri = parse_uri("nbd://example.com/disk")
>>> uri.host, uri.port, uri.export
('example.com', 10809, 'disk')
>>> str(NbdUri("nbd+unix", socket_path="/run/my disk.sock", export="a/b"))
'nbd+unix:///a/b?socket=/run/my%20disk.sock'
"""

from __future__ import annotations

import difflib
import re
from ipaddress import IPv6Address
from typing import Final, Literal, cast, get_args
from urllib.parse import quote, unquote_to_bytes

import msgspec

from nbd_protocol.constants import DEFAULT_PORT, MAX_STRING_BYTES

Scheme = Literal["nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"]
TlsType = Literal["anon", "x509", "psk"]

SCHEMES: Final[tuple[str, ...]] = get_args(Scheme)
TLS_TYPES: Final[tuple[str, ...]] = get_args(TlsType)

MAX_URI_CHARACTERS: Final = 64 * 1024
"""Every field at its largest, percent-encoded, fits several times; more is no URI but an accident."""

VSOCK_HOST_CID: Final = 2
"""The number of the machine that runs the virtual ones (VMADDR_CID_HOST of vsock(7)), as these see it."""

MAX_VSOCK_NUMBER: Final = (1 << 32) - 2
"""CIDs and ports have 32 bits; all of them set means "any"."""

_MAX_PORT_DIGITS: Final = 10
_DEFAULT_HOST: Final = "localhost"
_SPLIT: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?://(?P<authority>[^/?#]*))?(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?"
    r"(?P<fragment>#.*)?",
    re.DOTALL,
)
_AUTHORITY: Final = re.compile(
    r"(?:(?P<user>[^@]*)@)?(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^\[\]:@]*))(?::(?P<port>[0-9]*))?"
)
_VSOCK_NUMBER: Final = re.compile(r"[0-9]{1,10}")
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
# What RFC 3986 forbids anywhere in a URI unless it is percent-encoded, among ASCII. Other characters (IRIs, as people
# type them) are taken as the UTF-8 they would have been encoded to.
_FORBIDDEN: Final = re.compile(r'[\x00-\x20\x7f"<>\\^`{|}]')
# Left readable when a URI is made. `&`, `=`, `+` and `#` never are: other parsers give them a meaning of their own.
_SAFE_IN_PATH: Final = "/:@!$'()*,;"
_SAFE_IN_QUERY: Final = "/:@!$'()*,"
_SAFE_IN_HOST: Final = "!$'()*,"


class UriError(ValueError):
    """The text is no NBD URI, or the parts cannot be said as one; the message names the part and what was allowed."""


class NbdUri(msgspec.Struct, frozen=True, kw_only=False):
    """Where an export is and how to reach it (doc/uri.md). `str()` makes the URI.

    Arguments:
        scheme: `nbd`, `nbds` (TLS or nothing), `nbd+unix`, `nbds+unix`, `nbd+vsock`, `nbds+vsock`.
        host: for TCP: a host name or an address, IPv6 without brackets; "" means localhost. For vsock: a CID, which is
            the number of a virtual machine, or of its host; "" means the host (2).
        port: for TCP: 1…65535; for vsock: 0…2³²-2.
        socket_path: for the Unix schemes, and only for them; a leading NUL names an abstract socket.
        export: at most 4096 bytes of UTF-8, no NUL; "" is the server's default export.
        tls_username: for pre-shared keys.
        tls_type: `anon`, `x509` or `psk`; None leaves it to the client.
        tls_hostname: the name that the server's certificate must bear, where it is not `host`.
        tls_verify_peer: None is the client's default, which should be to verify.
        tls_certificates: a directory with ca-cert.pem, client-cert.pem, client-key.pem.
        tls_psk_file: a file of `user:key` lines.

    Raises UriError (a ValueError) if the parts contradict each other.
    """

    scheme: Scheme
    host: str = ""
    port: int = DEFAULT_PORT
    socket_path: str = ""
    export: str = ""
    tls_username: str | None = None
    tls_type: TlsType | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    tls_certificates: str | None = None
    tls_psk_file: str | None = None

    def with_export(self, export: str) -> NbdUri:
        """The same place, another export."""
        return msgspec.structs.replace(self, export=export)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UriError(f"scheme {self.scheme!r} is none of {', '.join(SCHEMES)}")
        if self.is_unix:
            self._check_unix()
        else:
            self._check_host_and_port()
        _check_export(self.export)
        if self.tls_type is not None and self.tls_type not in TLS_TYPES:
            raise UriError(f"tls-type {self.tls_type!r} is none of {', '.join(TLS_TYPES)}")
        for name, value in self._text_parameters():
            if "\0" in value.removeprefix("\0") or (value.startswith("\0") and name != "socket"):
                raise UriError(f"{name} has a NUL character in it: {value!r}")

    def _check_unix(self) -> None:
        if not self.socket_path:
            raise UriError(f"a {self.scheme} URI needs the parameter socket=PATH")
        if self.host or self.port != DEFAULT_PORT:
            raise UriError(f"a {self.scheme} URI has no host and no port, found {self.host!r}, port {self.port}")

    def _check_host_and_port(self) -> None:
        if self.socket_path:
            raise UriError(f"socket={self.socket_path!r} belongs to nbd+unix and nbds+unix, not to {self.scheme}")
        if self.is_vsock:
            self._check_vsock()
        else:
            self._check_tcp()

    def _check_vsock(self) -> None:
        if not self.host:
            msgspec.structs.force_setattr(self, "host", str(VSOCK_HOST_CID))
        if not _VSOCK_NUMBER.fullmatch(self.host) or int(self.host) > MAX_VSOCK_NUMBER:
            raise UriError(f"CID {self.host!r} is no number in 0…{MAX_VSOCK_NUMBER}")
        if not 0 <= self.port <= MAX_VSOCK_NUMBER:
            raise UriError(f"port {self.port} is not in 0…{MAX_VSOCK_NUMBER}")

    def _check_tcp(self) -> None:
        if not 1 <= self.port <= 65535:
            raise UriError(f"port {self.port} is not in 1…65535")
        if not self.host:
            msgspec.structs.force_setattr(self, "host", _DEFAULT_HOST)
        if ":" in self.host:
            _check_ipv6(self.host)
        elif _FORBIDDEN.search(self.host) or re.search(r"[][@/?#%]", self.host):
            raise UriError(f"host {self.host!r} has a character that no host name has")

    def _text_parameters(self) -> list[tuple[str, str]]:
        parameters = (
            ("socket", self.socket_path or None),
            ("tls-type", self.tls_type),
            ("tls-hostname", self.tls_hostname),
            ("tls-certificates", self.tls_certificates),
            ("tls-psk-file", self.tls_psk_file),
            ("tls-username", self.tls_username),
        )
        return [(name, value) for name, value in parameters if value is not None]

    @property
    def is_unix(self) -> bool:
        """Whether the server listens on a Unix domain socket."""
        return self.scheme.endswith("+unix")

    @property
    def is_vsock(self) -> bool:
        """Whether the server is reached over a socket between virtual machines and their host."""
        return self.scheme.endswith("+vsock")

    @property
    def is_tls_required(self) -> bool:
        """Whether the connection must fail if TLS cannot be negotiated (schemes that begin with `nbds`)."""
        return self.scheme.startswith("nbds")

    @property
    def address(self) -> str:
        """What a person calls the server: `host:port`, `[ipv6]:port`, `vsock:cid:port` or the path of the socket."""
        if self.is_unix:
            return self.socket_path.replace("\0", "@", 1)
        if self.is_vsock:
            return f"vsock:{self.host}:{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        user = "" if self.tls_username is None else quote(self.tls_username, safe=_SAFE_IN_HOST) + "@"
        path = "/" + quote(self.export, safe=_SAFE_IN_PATH)
        parameters = [(name, value) for name, value in self._text_parameters() if name != "tls-username"]
        if self.tls_verify_peer is not None:
            parameters.append(("tls-verify-peer", "01"[self.tls_verify_peer]))
        query = "&".join(f"{name}={quote(value, safe=_SAFE_IN_QUERY)}" for name, value in parameters)
        return f"{self.scheme}://{user}{self._authority()}{path}" + (f"?{query}" if query else "")

    def _authority(self) -> str:
        if self.is_unix:
            return ""
        if ":" in self.host:
            host = "[" + self.host.replace("%", "%25", 1) + "]"
        else:
            host = quote(self.host, safe=_SAFE_IN_HOST)
        return host if self.port == DEFAULT_PORT else f"{host}:{self.port}"


def is_uri(text: str) -> bool:
    """Whether `text` begins with one of the NBD schemes, so that parse_uri() should be asked about it."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def parse_uri(text: str) -> NbdUri:
    """The NbdUri that `text` says.

    A missing port is 10809, a missing host of a TCP scheme is localhost, a missing CID of a vsock scheme is that of the
    host, and the export is the path without its first slash, so that `nbd://host//disk` names the export `/disk`. `+`
    is a plus sign, never a blank.

    Raises UriError (a ValueError): the message has the part, what was found and what was allowed. Parameters that are
    not known are refused, as the document asks.
    """
    if len(text) > MAX_URI_CHARACTERS:
        raise UriError(f"an NBD URI has at most {MAX_URI_CHARACTERS} characters, this text has {len(text)}")
    parts = _SPLIT.fullmatch(text)
    if parts is None:
        raise UriError(f"{text!r} is no URI: it has no scheme (one of {', '.join(SCHEMES)})")
    scheme = parts["scheme"].lower()
    if scheme not in SCHEMES:
        raise UriError(f"scheme {scheme!r} of {text!r} is none of {', '.join(SCHEMES)}")
    if parts["fragment"] is not None:
        raise UriError(f"an NBD URI has no fragment, found {parts['fragment']!r} (a # in a name is written %23)")
    if forbidden := _FORBIDDEN.search(text):
        raise UriError(f"{forbidden[0]!r} at character {forbidden.start()} of {text!r} must be percent-encoded")
    user, host, port = _parse_authority(parts["authority"] or "")
    path = parts["path"]
    if path and not path.startswith("/"):
        raise UriError(f"after {scheme}: comes //, found {path!r}")
    query = _parse_query(parts["query"])
    second_user = query.pop("tls-username", None)
    if user is not None and second_user is not None and user != second_user:
        raise UriError(f"user {user!r} before the @ and tls-username={second_user!r} contradict each other")
    return NbdUri(
        cast(Scheme, scheme),
        host=host,
        port=port,
        socket_path=query.get("socket", ""),
        export=_decode("export name", path[1:]),
        tls_username=user if user is not None else second_user,
        tls_type=cast("TlsType | None", query.get("tls-type")),
        tls_hostname=query.get("tls-hostname"),
        tls_verify_peer=_parse_switch("tls-verify-peer", query.get("tls-verify-peer")),
        tls_certificates=query.get("tls-certificates"),
        tls_psk_file=query.get("tls-psk-file"),
    )


_PARAMETERS: Final = (
    "socket",
    "tls-type",
    "tls-hostname",
    "tls-verify-peer",
    "tls-certificates",
    "tls-psk-file",
    "tls-username",
)


def _parse_authority(authority: str) -> tuple[str | None, str, int]:
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise UriError(f"{authority!r} is not [user@]host[:port], an IPv6 address is written in [brackets]")
    user = None if parts["user"] is None else _decode("user", parts["user"])
    if parts["ipv6"] is not None:
        # RFC 6874: the % before the zone is itself encoded; browsers and people leave it bare.
        host = re.sub(r"%(?:25)?", "%", parts["ipv6"], count=1)
        _check_ipv6(host)
    else:
        host = _decode("host", parts["host"])
    digits = parts["port"]
    if digits and len(digits) > _MAX_PORT_DIGITS:
        raise UriError(f"port {digits} has more than {_MAX_PORT_DIGITS} digits")
    return user, host, int(digits) if digits else DEFAULT_PORT


def _parse_query(query: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (query or "").split("&"):
        if not part:
            continue
        encoded_name, equals, encoded_value = part.partition("=")
        name = _decode("parameter", encoded_name)
        if name not in _PARAMETERS:
            nearest = difflib.get_close_matches(name, _PARAMETERS, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            raise UriError(f"unknown parameter {name!r}{hint} (allowed: {', '.join(_PARAMETERS)})")
        if not equals:
            raise UriError(f"parameter {name} has no value, it is written {name}=VALUE")
        if name in found:
            raise UriError(f"parameter {name} is given twice")
        found[name] = _decode(name, encoded_value)
    return found


def _parse_switch(name: str, value: str | None) -> bool | None:
    if value is None:
        return None
    if value not in {"0", "1"}:
        raise UriError(f"{name} is 0 or 1, found {value!r}")
    return value == "1"


def _decode(what: str, text: str) -> str:
    if bad := _BAD_PERCENT.search(text):
        raise UriError(f"{what} {text!r}: % at character {bad.start()} is not followed by two hexadecimal digits")
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeError as error:
        raise UriError(f"{what} {text!r} is not UTF-8: {error}") from None


def _check_ipv6(host: str) -> None:
    try:
        IPv6Address(host)
    except ValueError as error:
        raise UriError(f"{host!r} is no IPv6 address: {error}") from None


def _check_export(export: str) -> None:
    try:
        size = len(export.encode("utf-8"))
    except UnicodeError as error:
        raise UriError(f"export name {export!r} is not UTF-8: {error}") from None
    if size > MAX_STRING_BYTES:
        raise UriError(f"an export name has at most {MAX_STRING_BYTES} bytes, this one has {size}")
    if "\0" in export:
        raise UriError(f"export name {export!r} has a NUL character in it")
