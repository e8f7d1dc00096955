"""The driver `nbd`.

Limits: resized only where the server has the experimental RESIZE; a server that restarts must serve an export of the
same size and no less able.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar

import msgspec

from nbd_protocol.constants import (
    MAX_EXTENT_LENGTH_32,
    MAX_PAYLOAD_BYTES,
    META_BASE_ALLOCATION,
    AllocationState,
    Command,
    CommandFlag,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.negotiation_events import Established
from nbd_protocol.uri import SCHEMES
from pynbd.block import errors
from pynbd.block.alignment import round_down
from pynbd.block.driver import Driver, ImageInfo, Preallocation
from pynbd.block.extents import Extent, Status
from pynbd.block.limits import Limits
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions
from pynbd.block.requests import RequestFlag
from pynbd.block.status import MAX_STATUS_EXTENTS
from pynbd.storage.nbd.address import NbdPlace, parse_name
from pynbd.storage.nbd.connection import Connection, Lost, Request
from pynbd.storage.nbd.durability import Durability
from pynbd.storage.nbd.handshake import Handshake
from pynbd.storage.nbd.link import Link
from pynbd.storage.nbd.tls import ClientTls, client_tls

MAX_CONNECTIONS = 16
"""Of one node; more than a few never made a server faster."""

MAX_EFFECT_BYTES = 1 << 30
"""The longest write_zeroes and discard without extended headers: some servers count in signed 32 bits."""

MAX_DELAY_S = (1 << 32) - 1
"""As QEMU's options."""

Delay = Annotated[int, msgspec.Meta(ge=0, le=MAX_DELAY_S)]

FUA = int(RequestFlag.FUA)
MAY_UNMAP = int(RequestFlag.MAY_UNMAP)
NO_FALLBACK = int(RequestFlag.NO_FALLBACK)

ABILITIES = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.CAN_MULTI_CONN
)
"""What an export must still be able to do when its server comes back."""


class NbdOptions(NbdPlace, frozen=True, kw_only=True):
    """Options of the driver `nbd`; the names are QEMU's.

    Args:
        server: where the server is; or else, flat, `host` and `port`, or `path`.
        host: the server's name or address.
        port: its TCP port.
        path: its Unix socket.
        export: the export's name, "" for the server's default.
        reconnect_delay: seconds for which requests wait when the connection is lost, while it is made again and what
            was not answered is sent again; 0: they fail at once, and the next request tries to connect.
        open_timeout: seconds for which opening goes on trying to connect; 0: one attempt.
        tls: nothing may be said without TLS; the options below ask for it as well. If none says what the server's
            certificate is verified with, it is the authorities that the system believes.
        tls_creds: the id of an object `tls-creds-x509` or `tls-creds-psk`: whom we believe, and who we are; or else
        tls_certificates: a folder with ca-cert.pem, and client-cert.pem and client-key.pem if we have some.
        tls_psk_file: instead of certificates, a file with a line `USER:KEY`.
        tls_username: whose key of that file we use; by default, that of who runs this.
        tls_verify_peer: whether the server's certificate is verified at all; with `tls-creds`, that says it.
        tls_hostname: the name that the server's certificate must bear, if it is not the host's.
        connections: to make, where the server allows more than one.
    """

    reconnect_delay: Delay = 0
    open_timeout: Delay = 0
    connections: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONNECTIONS)] = 1


class Nbd(Driver):
    """An export of an NBD server."""

    schemes: ClassVar[tuple[str, ...]] = tuple(SCHEMES)
    Options: ClassVar[type[NodeOptions]] = NbdOptions
    options: NbdOptions

    def __init__(self, options: NodeOptions) -> None:
        super().__init__(options)
        self._address = self.options.address()
        self._durability = Durability()
        self._links: list[Link] = []
        self._first: Link
        self._established: Established | None = None
        self._tls: ClientTls | None = None
        self._flags = TransmissionFlag(0)
        self._max_status = 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return parse_name(filename)

    def filename(self) -> str:
        return str(self.options.uri())

    def _described(self) -> str:
        return f"{self.node.name} ({self.filename()})"

    # --- life ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._tls = client_tls(self.options, self.node.objects)
        try:
            self._first = await self._open_link(self.options.open_timeout)
            if self._flags & TransmissionFlag.CAN_MULTI_CONN:
                for _ in range(1, self.options.connections):
                    await self._open_link(0)
        except BaseException:
            await self.close()
            raise

    async def _open_link(self, timeout_s: int) -> Link:
        link = Link(self._described(), self._dial, self._durability, self.options.reconnect_delay)
        self._links.append(link)
        await link.open(timeout_s)
        return link

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        self._links.clear()

    async def _dial(self, lost: Lost) -> Connection:
        """One attempt to connect to the export; the first tells what it is, all others must find the same."""
        async with Handshake(self._address, tls=self._tls) as handshake:
            connected, established = await handshake.connect(self.options.export)
            try:
                if self._established is None:
                    self._take_export(established)
                else:
                    self._check_same(self._established, established)
            except BaseException:
                connected.close()
                raise
            return Connection(
                self._described(),
                connected,
                established,
                handshake.negotiation.trailing_data,
                self._durability,
                lost,
                keeps_refused=bool(self.options.reconnect_delay),
            )

    def _take_export(self, established: Established) -> None:
        info = established.info
        flags = info.flags
        if flags & TransmissionFlag.READ_ONLY and not self.node.read_only:
            if not self.options.auto_read_only:
                raise errors.BlockError(
                    f"{self._described()}: the server has this export read-only; open it with read-only=on"
                )
            self.node.read_only = True
        extended = established.mode is ReplyMode.EXTENDED
        longest_effect = 0 if extended else MAX_EFFECT_BYTES
        self._max_status = MAX_SIZE_BYTES if extended else MAX_EXTENT_LENGTH_32
        self._flags = flags
        self.size = info.size
        self.write_flags = FUA if flags & TransmissionFlag.SEND_FUA else 0
        self.write_zeroes_flags = self.write_flags | MAY_UNMAP | NO_FALLBACK
        self.limits = Limits(
            request_alignment=info.min_block,
            max_transfer=max(round_down(min(info.max_payload, MAX_PAYLOAD_BYTES), info.min_block), info.min_block),
            optimal_transfer=info.preferred_block,
            max_write_zeroes=longest_effect,
            max_discard=longest_effect,
        )
        self._established = established

    def _check_same(self, before: Established, now: Established) -> None:
        """Whether a connection leads to what the node was opened for.

        Raises:
            BlockError: it does not.
        """
        problem = ""
        missing = before.info.flags & ABILITIES & ~now.info.flags
        if now.info.size != before.info.size:
            problem = f"its size is {now.info.size} now, it was {before.info.size}"
        elif now.info.flags & TransmissionFlag.READ_ONLY and not self.node.read_only:
            problem = "it is read-only now"
        elif missing:
            problem = f"it has no {TransmissionFlag(missing).name} any more"
        elif now.info.min_block > before.info.min_block:
            problem = f"its minimum block is {now.info.min_block} now, it was {before.info.min_block}"
        elif now.info.max_payload < self.limits.max_transfer:
            problem = f"its maximum payload is {now.info.max_payload} now, it was {before.info.max_payload}"
        elif before.mode is ReplyMode.EXTENDED and now.mode is not ReplyMode.EXTENDED:
            problem = "its server has no extended headers any more"
        elif set(before.contexts.values()) - set(now.contexts.values()):
            problem = "its server has no base:allocation any more"
        if problem:
            raise errors.BlockError(
                f"{self.node.name}: '{self._address}' serves another export {self.options.export!r} than before: "
                f"{problem}"
            )

    # --- the data path -------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        links = self._links
        link = self._first if len(links) == 1 else min(links, key=link_load)
        link.submit(request)

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        length = len(into)
        if offset + length > self.size:
            # The last block of a disk that ends in the middle of it.
            length = self.size - offset
            into[length:] = bytes(len(into) - length)
            into = into[:length]
        if length:
            request = Request(Command.READ, offset, length, into=into)
            self._submit(request)
            await request.future

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        if offset + len(data) > self.size:
            data = data[: self.size - offset]
        if data:
            durable = flags & self.write_flags & FUA
            request = Request(
                Command.WRITE,
                offset,
                len(data),
                CommandFlag.FUA if durable else 0,
                data=data,
                volatile=not durable,
            )
            self._submit(request)
            await request.future

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        if not self._flags & TransmissionFlag.SEND_WRITE_ZEROES:
            raise errors.unsupported(self.node.name, "the server has no WRITE_ZEROES")
        if flags & NO_FALLBACK and not self._flags & TransmissionFlag.SEND_FAST_ZERO:
            raise errors.unsupported(self.node.name, "the server has no FAST_ZERO")
        durable = flags & self.write_flags & FUA
        command_flags = CommandFlag.FUA if durable else 0
        if not flags & MAY_UNMAP:
            command_flags |= CommandFlag.NO_HOLE
        if flags & NO_FALLBACK:
            command_flags |= CommandFlag.FAST_ZERO
        await self._affect(Command.WRITE_ZEROES, offset, length, command_flags, volatile=not durable)

    async def discard(self, offset: int, length: int) -> None:
        if not self._flags & TransmissionFlag.SEND_TRIM:
            raise errors.unsupported(self.node.name, "the server has no TRIM")
        await self._affect(Command.TRIM, offset, length, volatile=True)

    async def cache(self, offset: int, length: int) -> None:
        if self._flags & TransmissionFlag.SEND_CACHE:
            for start in range(offset, offset + length, self.limits.max_transfer):
                await self._affect(Command.CACHE, start, min(self.limits.max_transfer, offset + length - start))

    async def _affect(
        self, command: Command, offset: int, length: int, flags: int = 0, *, volatile: bool = False
    ) -> None:
        length = min(length, self.size - offset)
        if length > 0:
            request = Request(command, offset, length, flags, volatile=volatile)
            self._submit(request)
            await request.future

    async def flush_to_disk(self) -> None:
        if self._flags & TransmissionFlag.SEND_FLUSH or self._durability.lost:
            request = Request(Command.FLUSH)
            self._submit(request)
            await request.future

    async def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        assert self._established is not None
        context = next((n for n, name in self._established.contexts.items() if name == META_BASE_ALLOCATION), None)
        if context is None:
            return await super().block_status(offset, length)
        request = Request(Command.BLOCK_STATUS, offset, min(length, self.size - offset, self._max_status))
        self._submit(request)
        await request.future
        # All connections select the same one context; only the number that a server gives it may differ.
        told = next(iter(request.extents.values()))
        found = []
        for run, state in islice(told, MAX_STATUS_EXTENTS):
            found.append(Extent(run, status_of(state), self.node, offset))
            offset += run
        return found

    async def truncate(self, size: int, preallocation: Preallocation, *, exact: bool) -> None:
        if size == self.size or (size < self.size and not exact):
            return
        wish = f"resize of the export from {self.size} to {size} bytes"
        if not self._flags & TransmissionFlag.SEND_RESIZE:
            raise errors.unsupported(self.node.name, f"{wish}: the server does not offer RESIZE")
        if preallocation is not Preallocation.OFF:
            raise errors.unsupported(self.node.name, f"{wish} with preallocation {preallocation.value}")
        request = Request(Command.RESIZE, size)
        self._submit(request)
        await request.future
        self.size = size
        assert self._established is not None
        info = msgspec.structs.replace(self._established.info, size=size)
        self._established = msgspec.structs.replace(self._established, info=info)

    async def allocated_size(self) -> int | None:
        return None

    async def info(self) -> ImageInfo:
        established = self._established
        assert established is not None
        return ImageInfo(
            specific={
                "server": str(self._address),
                "export": self.options.export,
                "replies": established.mode.value,
                "connections": len(self._links),
                "flags": [str(flag.name) for flag in TransmissionFlag if flag & established.info.flags],
                "block-size": {
                    "minimum": established.info.min_block,
                    "preferred": established.info.preferred_block,
                    "maximum": established.info.max_payload,
                },
            }
        )


def link_load(link: Link) -> int:
    """How busy a link is."""
    return link.load


def status_of(state: int) -> int:
    """A state of `base:allocation` in the block layer's terms."""
    status: int = Status.ALLOCATED
    if not state & AllocationState.HOLE:
        status |= Status.DATA
    if state & AllocationState.ZERO:
        status |= Status.ZERO
    return status
