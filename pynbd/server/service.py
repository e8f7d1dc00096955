"""`Service`: a configuration brought to life. It opens the disks, serves them, and ends in order."""

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbd_protocol.uri import NbdUri
from pynbd.block.backend import BlockBackend
from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.errors import OptionError
from pynbd.block.graph import Graph
from pynbd.block.node import Node
from pynbd.block.objects import Objects
from pynbd.block.permissions import Permission
from pynbd.block.registry import is_python_file
from pynbd.server import events
from pynbd.server.access import AccessList, AccessRule
from pynbd.server.activation import Handed, reachable, uri_at
from pynbd.server.check import NOBODY_BY_NAME, check, filter_tree, snapshot_tree
from pynbd.server.config import Config, ExportOptions, ListenOptions, is_authorization, parse_address
from pynbd.server.events import about
from pynbd.server.export import Export, bitmaps_of
from pynbd.server.server import NbdServer

if TYPE_CHECKING:
    from pynbd.server.tls import ServerTls
    from pynbd.server.workers import Workers

log = logging.getLogger(__name__)

CACHE_OPTIONS: Mapping[str, dict[str, str]] = {
    "none": {"direct": "on"},
    "writeback": {},
    "writethrough": {},
    "directsync": {"direct": "on"},
    "unsafe": {"no-flush": "on"},
}
"""What QEMU's cache modes mean for the nodes."""

WRITE_THROUGH = ("writethrough", "directsync")
"""Modes in which every write is durable before it is answered."""


class Service:
    """The disks of a configuration, opened and exported; use `open_service`."""

    def __init__(self, graph: Graph, server: NbdServer) -> None:
        self.graph = graph
        self.server = server
        self.uris: list[NbdUri] = []

    async def add_export(self, name: str, wanted: ExportOptions) -> Export:
        """Open a disk and serve it under a name.

        Raises:
            OptionError, BlockError, OSError: it can't be opened; nothing of it stays open.
        """
        backend = BlockBackend(f"export {name!r}")
        before = set(self.graph.nodes)
        try:
            node = await self._open_disk(wanted)
            writable = not (wanted.read_only or node.read_only)
            held = Permission.CONSISTENT_READ | (Permission.WRITE if writable else Permission.NONE)
            if wanted.resize and writable:
                held |= Permission.RESIZE
            backend.write_cache = wanted.cache not in WRITE_THROUGH
            # Others may look on. Nobody else may write behind our clients' backs, in this process or another.
            self.graph.attach(backend, node, held, Permission.ALL & ~(Permission.WRITE | Permission.RESIZE))
            self._make_bitmaps(node, wanted)
            export = Export(
                name,
                backend,
                description=wanted.description,
                allocation_depth=wanted.allocation_depth,
                bitmaps=wanted.bitmaps,
                min_block=wanted.min_block,
                resize=wanted.resize and writable,
                access=self._access_list(wanted.access, self.graph.objects),
            )
            self.server.add_export(export)
        except BaseException:
            if backend.root is not None:
                self.graph.detach(backend)
            await self._close_since(before)
            raise
        return export

    def change_rules(self, config: Config) -> None:
        """Read anew who may connect and use which export, who is authorized, and what a client may take.

        It holds for clients that come from now on. Exports that the configuration does not have keep their rules.

        Raises:
            OptionError: something is wrong with them; all stays as it was.
        """
        objects, server = Objects(), self.server
        for described in config.objects:
            if is_authorization(described):
                objects.make(described)
        tls = server.tls
        if tls is not None:
            from pynbd.server.tls import authorized_anew

            tls = authorized_anew(tls, config.server, objects)
        elif config.server.tls_authz:
            raise OptionError("server.tls-authz: this server was started without TLS")
        access = AccessList(config.server.access, objects)
        of_exports = {name: self._access_list(wanted.access, objects) for name, wanted in config.exports.items()}
        server.tls = tls
        server.change_rules(config.server.client_limits, access)
        for name, export in server.exports.items():
            export.access = of_exports.get(name, export.access)

    def _access_list(self, rules: Sequence[AccessRule], objects: Objects) -> AccessList:
        """Rules that are ready for use.

        Raises:
            OptionError: a rule says something wrong, or is about names that nobody can have.
        """
        tls = self.server.tls
        if any(rule.wants_name for rule in rules) and not (tls and tls.credentials.wants_client_identity):
            raise OptionError(NOBODY_BY_NAME)
        return AccessList(rules, objects)

    async def _close_since(self, before: set[str]) -> None:
        """Close what was opened for an export that came to nothing."""
        while unused := [n for name, n in self.graph.nodes.items() if name not in before and not n.parents]:
            await self.graph.close(unused[0])

    async def _open_disk(self, wanted: ExportOptions) -> Node:
        node = await self._open_image(wanted)
        if wanted.snapshot and not wanted.read_only:
            node = await self._temporary_overlay(node, wanted)
        for entry in wanted.filters:
            defaults = {"discard": "unmap", "read-only": node.read_only}
            node = await self.graph.open({**defaults, **filter_tree(entry), "file": node})
        return node

    async def _open_image(self, wanted: ExportOptions) -> Node:
        if isinstance(wanted.disk, str) and wanted.disk in self.graph.nodes:
            return await self._snapshot_of(self.graph.nodes[wanted.disk], wanted)
        tree = self.graph.describe(wanted.disk, format=wanted.format)
        if wanted.offset:
            if tree.get("driver", "raw") != "raw":
                raise OptionError(f"offset: only a raw disk can begin at an offset, not {tree['driver']!r}")
            tree = {**tree, "driver": "raw", "offset": wanted.offset}
        if is_python_file(str(tree.get("driver", ""))) and wanted.discard == "ignore":
            tree = {"discard": "unmap", **tree}  # its author decides: there is nothing below it to protect
        image = await self.graph.open(
            tree,
            read_only=wanted.read_only or wanted.snapshot or bool(wanted.load_snapshot),
            discard=wanted.discard,
            detect_zeroes="off" if wanted.snapshot else wanted.detect_zeroes,
            cache=CACHE_OPTIONS[wanted.cache],
        )
        return await self._snapshot_of(image, wanted)

    async def _snapshot_of(self, image: Node, wanted: ExportOptions) -> Node:
        """The internal snapshot that is wanted of an image, or the image itself."""
        if not wanted.load_snapshot:
            return image
        return await self.graph.open({**snapshot_tree(wanted.load_snapshot), "file": image})

    async def _temporary_overlay(self, below: Node, wanted: ExportOptions) -> Node:
        """An overlay whose file is gone from its folder as soon as it is open: nothing is left behind, ever."""
        with temporary_file() as filename:
            file = {"driver": "file", "filename": filename, "locking": "off", "cache": {"no-flush": "on"}}
            tree: dict[str, Any] = {"driver": "overlay", "discard": "unmap", "file": file, "backing": below}
            return await self.graph.open({**tree, "detect-zeroes": wanted.detect_zeroes})

    @staticmethod
    def _make_bitmaps(node: Node, wanted: ExportOptions) -> None:
        for name in wanted.bitmaps:
            if name not in bitmaps_of(node):
                node.bitmaps[name] = DirtyBitmap(name, node.size)
        if wanted.bitmaps:
            node.relink()

    async def listen(self, where: ListenOptions) -> None:
        """Listen on all addresses; `uris` says how they are reached (for the default export).

        Raises:
            OptionError, OSError: one of them can't be.
        """
        # Unix sockets come last: whoever waits for one to appear finds all the others, too.
        uris: dict[str, list[NbdUri]] = {text: [] for text in where.listen}
        for text in sorted(where.listen, key=lambda text: bool(parse_address(text).path)):
            uris[text] += await self._listen_at(text)
        self.uris += [uri for text in where.listen for uri in uris.pop(text, [])]

    async def _listen_at(self, text: str) -> list[NbdUri]:
        address = parse_address(text)
        secure = self.server.tls is not None and self.server.tls.policy == "required"
        if address.path:
            self.server.listen_unix(address.path)
            return [NbdUri("nbds+unix" if secure else "nbd+unix", socket_path=address.path)]
        if address.is_vsock:
            uri = uri_at(self.server.listen_vsock(address.cid, address.port), tls=secure)
            assert uri is not None
            return [uri]
        try:
            bound = await self.server.listen_tcp(address.host, address.port)
        except socket.gaierror as problem:
            raise OptionError(f"can't listen on {text}: {problem.strerror}") from problem
        return [NbdUri("nbds" if secure else "nbd", host=reachable(host), port=port) for host, port in bound]

    def adopt(self, handed: Sequence[Handed]) -> None:
        """Serve at sockets that somebody else has opened, and the clients among them; all are ours from now on."""
        secure = self.server.tls is not None and self.server.tls.policy == "required"
        for one in handed:
            if not one.listens:
                self.server.receive(one.sock, one.sock.getpeername())
                continue
            self.server.listen_on(one.sock)
            uri = uri_at(one.sock, tls=secure)
            log.info(
                "listens at %s%s",
                uri or "a socket without a name",
                f" ({one.name})" if one.name else "",
                extra=about(events.LISTENING, uri=uri, name=one.name or None),
            )
            if uri is not None:
                self.uris.append(uri)

    async def close(self, grace_s: float) -> None:
        """Send the clients away, flush, and close the disks.

        Raises:
            OSError, BlockError: something could not be flushed; all is closed.
        """
        await self.server.close(grace_s)
        failed = None if self.server.workers is None else await self.server.workers.stop()
        for export in self.server.exports.values():
            if export.backend.in_flight:
                log.error("export %r: %d requests are lost", export.name, export.backend.in_flight)
                continue
            self.graph.detach(export.backend)
        try:
            await self.graph.close_all()
        except OSError as problem:
            text = f"not everything could be flushed, what was written last may be lost: {problem.strerror or problem}"
            raise OSError(problem.errno, text) from problem
        if failed is not None:
            raise failed


@contextlib.asynccontextmanager
async def open_service(
    config: Config,
    *,
    handed: Sequence[Handed] = (),
    grace_s: float = 10.0,
    workers: "Workers | None" = None,
    shared: bool = False,
) -> AsyncIterator[Service]:
    """Open everything that a configuration names, listen, and at the end close it in order.

    Args:
        config: what to serve, and where.
        handed: where to serve besides; these sockets are closed at the end.
        grace_s: how long requests in flight may take at the end.
        workers: processes that are to serve the clients; they open the same disks, after this one has, and before
            anybody can connect.
        shared: whether this is one of them.

    Raises:
        OptionError, BlockError, OSError: something can't be opened; nothing stays open.
    """
    check(config)
    objects = Objects()
    for described in config.objects:
        objects.make(described)
    server = NbdServer(
        [],
        max_clients=config.server.max_clients,
        payload_pool=config.server.payload_memory,
        structured=config.server.structured_replies,
        extended=config.server.extended_headers,
        tls=wanted_tls(config.server, objects),
        limits=config.server.client_limits,
        access=AccessList(config.server.access, objects),
    )
    service = Service(Graph(objects, shared=shared), server)
    try:
        for tree in config.nodes:
            await service.graph.open(tree)
        for name, wanted in config.exports.items():
            await service.add_export(name, wanted)
        if workers is not None:
            await workers.begin(service)
        await service.listen(config.server)
        service.adopt(handed)
        yield service
    finally:
        await service.close(grace_s)


def wanted_tls(where: ListenOptions, objects: Objects) -> "ServerTls | None":
    """TLS, if there is to be any; only then is it imported.

    Raises:
        OptionError, OSError: there is something wrong with certificates or keys.
    """
    if where.tls == "off" or not (where.tls_creds or where.tls_certificates or where.tls_psk):
        return None
    from pynbd.server.tls import server_tls

    return server_tls(where, objects)


@contextlib.contextmanager
def temporary_file() -> Iterator[str]:
    """The name of an empty file that is gone afterwards; whoever has opened it meanwhile keeps what is in it."""
    descriptor, filename = tempfile.mkstemp(prefix="pynbd-", suffix=".overlay")
    os.close(descriptor)
    try:
        yield filename
    finally:
        Path(filename).unlink()
