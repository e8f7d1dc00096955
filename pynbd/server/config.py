"""What a server serves, and where: the same structure from a TOML file and from the command line.

[server]
listen = ["127.0.0.1:10809", "[::1]:10809", "unix:/run/pynbd.sock"]

[[object]]                        # secrets that nodes refer to by id
qom-type = "secret"
id = "sec0"
file = "/etc/pynbd/disk0.key"

[[node]]                          # disks that several exports, filters or overlays use by name
node-name = "base"
driver = "raw"
read-only = true
file = { driver = "file", filename = "base.raw" }

[export.disk0]
disk = "disk0.raw"                # a file name, a URI, a node's name, or a table of options
format = "raw"
description = "the first disk"
filters = ["nofilter", { driver = "delay", read = "5ms" }]
bitmaps = ["backup"]

[[export.disk0.access]]           # the first rule that fits a client decides; whom none fits is denied
policy = "allow"                  # or read-only, or deny
address = "10.0.0.0/8"
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from nbd_protocol.constants import DEFAULT_PORT
from nbd_protocol.uri import MAX_VSOCK_NUMBER
from pynbd.block import options
from pynbd.block.errors import OptionError
from pynbd.server.access import AccessRule
from pynbd.server.limits import NO_LIMITS, ClientLimits

MAX_CONFIG_BYTES = 4 << 20
"""A configuration file larger than this is a mistake."""

MAX_CONFIGURED_CLIENTS = 1_000_000
"""More descriptors than any process has."""

MAX_MIN_BLOCK_BYTES = 65536
"""The largest minimum block size that the specification allows."""

MAX_WORKERS = 64
"""Processes beyond the number of processors gain nothing."""

MAX_SOCKET_PATH_BYTES = 107
"""What the kernel takes as the name of a Unix socket, without the NUL at its end."""

MAX_PORT = 65535

HOST_AND_PORT = re.compile(
    r"(?P<bare_v6>[^\[\]:]*:[^\[\]:]*:[^\[\]]*)"
    r"|(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<host>[^\[\]:]*))(?::(?P<port>.*))?",
    re.DOTALL,
)
"""An address; what has two colons and no brackets is one of IPv6 without a port."""

VSOCK_ADDRESS = re.compile(r"vsock:(?:(?P<cid>[0-9]{0,10}):)?(?P<port>[0-9]{1,10})")

TOML_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]


class ListenOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where a server listens, and how many clients it takes.

    Args:
        listen: addresses: `HOST:PORT`, `[V6]:PORT`, `HOST`, `unix:PATH`, `vsock:PORT`, `vsock:CID:PORT`.
        max_clients: clients at one time, 0 for the default.
        structured_replies, extended_headers: whether these framings are offered.
        payload_memory: for payloads of all clients together, in bytes.
        tls: whether clients may or must use TLS; required, if it is said who we are to them.
        tls_creds: the object that says who we are; or else
        tls_certificates: a folder with ca-cert.pem, server-cert.pem and server-key.pem; or else
        tls_psk: a file with a line `USER:KEY` for each client.
        tls_verify_peer: with certificates, whether clients must have a certificate of that authority.
        tls_authz: the object that says which of those clients may come in; all, if there is none.
        access: who may connect at all, by address or as a user of this machine; see `pynbd.server.access`.
        client_limits: what one client may take.
        workers: processes that serve the clients; 1: the one that listens does it; auto: one for each processor.
    """

    listen: tuple[str, ...] = ()
    max_clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CONFIGURED_CLIENTS)] = 0
    structured_replies: options.OnOff = True
    extended_headers: options.OnOff = True
    payload_memory: options.Size = 64 << 20
    tls: Literal["off", "allowed", "required"] | None = None
    tls_creds: str = ""
    tls_certificates: str = ""
    tls_psk: str = ""
    tls_verify_peer: options.OnOff = False
    tls_authz: str = ""
    access: tuple[AccessRule, ...] = ()
    client_limits: ClientLimits = NO_LIMITS
    workers: Annotated[int, msgspec.Meta(ge=1, le=MAX_WORKERS)] | Literal["auto"] = 1


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """One export.

    Args:
        disk: what it shows: a file name, a URI, dotted keys, `json:{…}`, the name of a node, or a table.
        format: the format of an image that is given by name; guessed if empty.
        description: for people.
        read_only: clients can't write.
        snapshot: writes go to a temporary overlay, and are lost at the end.
        load_snapshot: an internal snapshot of the disk is shown instead of it: its id, its name, or
            `snapshot.id=ID,snapshot.name=NAME`.
        filters: on top of the disk, the first one nearest to it; names, or tables with `driver`.
        bitmaps: dirty bitmaps that are made if need be, and can be asked for as `qemu:dirty-bitmap:NAME`.
        allocation_depth: `qemu:allocation-depth` can be asked for.
        offset: where in the image the disk begins, in bytes.
        cache: how writes are cached, as in QEMU.
        discard, detect_zeroes: as every node takes them.
        min_block: requests must be multiples of it, in bytes.
        resize: clients may resize the disk (an experimental part of the protocol).
        access: which clients may use it and which may write; to the others it is not there.
    """

    disk: str | dict[str, Any]
    format: str = ""
    description: str = ""
    read_only: options.OnOff = False
    snapshot: options.OnOff = False
    load_snapshot: str = ""
    filters: tuple[str | dict[str, Any], ...] = ()
    bitmaps: tuple[str, ...] = ()
    allocation_depth: options.OnOff = False
    offset: options.Size = 0
    cache: CacheMode = "writeback"
    discard: Literal["ignore", "unmap", "off", "on"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    min_block: options.Size = 1
    resize: options.OnOff = False
    access: tuple[AccessRule, ...] = ()

    def __post_init__(self) -> None:
        if self.min_block & (self.min_block - 1) or not 1 <= self.min_block <= MAX_MIN_BLOCK_BYTES:
            raise ValueError(f"min-block: {self.min_block} is no power of two from 1 to {MAX_MIN_BLOCK_BYTES}")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration.

    Args:
        server: where and how.
        objects: secrets and the like, in the order in which they are made.
        nodes: disks by name, in the order in which they are opened.
        exports: by name; "" is the default export.
    """

    server: ListenOptions = ListenOptions()
    objects: tuple[dict[str, Any], ...] = ()
    nodes: tuple[dict[str, Any], ...] = ()
    exports: dict[str, ExportOptions] = {}


def without_rules(config: Config) -> Config:
    """A configuration without what can be read anew while it is served: access, authorization, and limits."""
    return msgspec.structs.replace(
        config,
        server=msgspec.structs.replace(config.server, access=(), client_limits=NO_LIMITS, tls_authz=""),
        objects=tuple(tree for tree in config.objects if not is_authorization(tree)),
        exports={name: msgspec.structs.replace(wanted, access=()) for name, wanted in config.exports.items()},
    )


def is_authorization(tree: Mapping[str, Any]) -> bool:
    """Whether a description of an object is of one that says who may come in."""
    return str(tree.get("qom-type")).startswith("authz-")


class Address(msgspec.Struct, frozen=True):
    """One place to listen: a Unix socket's path, or a host and a port, or a CID (None: any of ours) and a port."""

    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    is_vsock: bool = False
    cid: int | None = None


def parse_address(text: str) -> Address:
    """An address from `HOST:PORT`, `[V6]:PORT`, `HOST`, `:PORT`, `unix:PATH`, `vsock:PORT` or `vsock:CID:PORT`.

    Raises:
        OptionError: it is none of them.
    """
    if text.startswith("unix:"):
        return Address(path=_socket_path(text.removeprefix("unix:")))
    if text.startswith("vsock:"):
        return _vsock_address(text)
    parts = HOST_AND_PORT.fullmatch(text)
    if parts is None:
        raise OptionError(f"{text!r} is no address: write HOST:PORT, [V6]:PORT, HOST, :PORT, unix:PATH or vsock:PORT")
    host = parts["bracketed"] or parts["bare_v6"] or parts["host"] or ""
    port = parts["port"]
    if port is None:
        return Address(host=host)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= MAX_PORT):
        raise OptionError(f"{text!r}: {port!r} is no port (0 to {MAX_PORT})")
    return Address(host=host, port=int(port))


def _vsock_address(text: str) -> Address:
    """A place to listen from `vsock:PORT`, `vsock::PORT` or `vsock:CID:PORT`.

    Raises:
        OptionError: it is none.
    """
    parts = VSOCK_ADDRESS.fullmatch(text)
    if parts is None or max(int(parts["cid"] or 0), int(parts["port"])) > MAX_VSOCK_NUMBER:
        raise OptionError(f"{text!r}: write vsock:PORT or vsock:CID:PORT, numbers from 0 to {MAX_VSOCK_NUMBER}")
    return Address(port=int(parts["port"]), is_vsock=True, cid=int(parts["cid"]) if parts["cid"] else None)


def _socket_path(path: str) -> str:
    """A path that the kernel takes, and that a URI can say.

    Raises:
        OptionError: it is none.
    """
    length = len(os.fsencode(path))
    if not 0 < length <= MAX_SOCKET_PATH_BYTES or "\0" in path:
        raise OptionError(
            f"{path!r}: the path of a Unix socket has 1 to {MAX_SOCKET_PATH_BYTES} bytes, none of them NUL; "
            f"this one has {length}"
        )
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in path):
        raise OptionError(f"{path!a}: the path of a socket must be UTF-8, for that is how URIs say it")
    return path


def load(filename: str) -> Config:
    """Read and check a configuration file; nothing is opened.

    Raises:
        OptionError: it can't be read, is no TOML, or says something wrong: which file, which key, what was allowed.
    """
    try:
        with Path(filename).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as problem:
        raise OptionError(f"{filename}: {problem.strerror}") from problem
    if len(raw) > MAX_CONFIG_BYTES:
        raise OptionError(f"{filename}: longer than {MAX_CONFIG_BYTES} bytes")
    try:
        tree = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise OptionError(f"{filename}: {problem}") from problem
    try:
        return from_tree(tree)
    except OptionError as problem:
        raise OptionError(f"{filename}: {problem}") from problem


def from_tree(tree: dict[str, Any]) -> Config:
    """A configuration from the tree of its TOML file.

    Raises:
        OptionError: which key is wrong, and what was allowed.
    """
    for key in tree:
        if key not in ("server", "object", "node", "export"):
            raise OptionError(f"{key}: there are only the tables [server], [[object]], [[node]] and [export.NAME]")
    exports = _table(tree, "export", "export")
    nodes = _tables(tree, "node")
    for number, node in enumerate(nodes, 1):
        name = node.get("node-name")
        if not isinstance(name, str) or not name:
            raise OptionError(f"node: the table number {number} needs a node-name, found {name!r}")
    return Config(
        server=options.convert(_table(tree, "server", "server"), ListenOptions, path="server.", driver="[server]"),
        objects=tuple(_tables(tree, "object")),
        nodes=tuple(nodes),
        exports={name: _export(exports, name) for name in exports},
    )


def _export(exports: dict[str, Any], name: str) -> ExportOptions:
    path = f"export.{toml_key(name)}"
    return options.convert(_table(exports, name, path), ExportOptions, path=f"{path}.", driver=f"[{path}]")


def toml_key(name: str) -> str:
    """A name as a key in TOML."""
    return name if TOML_BARE_KEY.fullmatch(name) else msgspec.json.encode(name).decode()


def _tables(tree: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tables = tree.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise OptionError(f"{name}: expected tables, written [[{name}]]")
    return tables


def _table(tree: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    table = tree.get(name, {})
    if not isinstance(table, dict):
        raise OptionError(f"{path}: expected a table, found {table!r}")
    return table
