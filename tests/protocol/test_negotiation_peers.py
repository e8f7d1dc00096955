"""Both ends of the negotiation against the real ones: QEMU's, libnbd's, nbdkit's and the kernel tools' of nbd."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbd_protocol.client_negotiation import ClientNegotiation, TlsWish
from nbd_protocol.constants import Command, Option, OptionReplyType, ReplyMode, TransmissionFlag
from nbd_protocol.errors import NbdProtocolError
from nbd_protocol.negotiation import ExportInfo, NeedData, select_contexts
from nbd_protocol.negotiation_events import (
    Aborted,
    ClientEvent,
    Closed,
    Ended,
    Established,
    ExportDescribed,
    ExportQuery,
    ExportsListed,
    ListExports,
    MetaContextQuery,
    MetaContextsListed,
    Ready,
    Refused,
    ServerEvent,
    StartTls,
    TlsWanted,
)
from nbd_protocol.server_negotiation import ServerNegotiation, TlsPolicy
from nbd_protocol.transmission import ServerTransmission, replies_for
from tests.peers import Endpoint, nbd_server, nbdkit, qemu_nbd, require_qemu10, require_tool, run

FLAGS = TransmissionFlag
SIZE_BYTES = 1_000_960
"""No multiple of 512: what is told must be told exactly."""
PATIENCE_S = 30.0
EXPORTS = {
    "disk": ExportInfo(
        SIZE_BYTES,
        FLAGS.SEND_FLUSH | FLAGS.SEND_FUA | FLAGS.SEND_DF | FLAGS.CAN_MULTI_CONN | FLAGS.BLOCK_STATUS_PAYLOAD,
        canonical_name="disk",
        description="a disk of zeroes",
        min_block=1,
        preferred_block=65536,
    ),
    "other disk": ExportInfo(4096, FLAGS.READ_ONLY | FLAGS.SEND_DF, description="sector zero"),
}
CONTEXTS = ["base:allocation", "qemu:allocation-depth"]


# Our server, their clients ----------------------------------------------------------------------------


class OurServer:
    """ServerNegotiation behind a listening socket, one connection after another, with just enough transmission for
    clients that look around: reads find zeroes, block status finds a hole."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext | None, policy: TlsPolicy) -> None:
        self.listener = listener
        self.tls = tls
        self.policy = policy
        self.events: list[ServerEvent] = []
        self.faults: list[NbdProtocolError] = []
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        """Serve until the listener is shut down."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.settimeout(PATIENCE_S)
            try:
                self.serve(connection)
            except NbdProtocolError as error:
                self.faults.append(error)
            except ConnectionError:
                continue  # a client may leave without a word
            finally:
                connection.close()

    def serve(self, connection: socket.socket) -> None:
        negotiation = ServerNegotiation(tls=self.policy)
        secured: ssl.SSLSocket | None = None
        try:
            while True:
                event = negotiation.next_event()
                line = secured or connection
                if isinstance(event, NeedData):
                    line.sendall(negotiation.data_to_send())
                    negotiation.receive_data(line.recv(65536))
                    continue
                self.events.append(event)
                self.answer(negotiation, event)
                line.sendall(negotiation.data_to_send())
                match event:
                    case Aborted() | Closed():
                        return
                    case Ready():
                        self.transmit(line, event, negotiation.trailing_data)
                        return
                    case StartTls():
                        assert self.tls is not None
                        secured = self.tls.wrap_socket(connection, server_side=True)
        finally:
            if secured is not None:
                secured.close()

    def answer(self, negotiation: ServerNegotiation, event: ServerEvent) -> None:
        match event:
            case ListExports():
                negotiation.send_export_list([(name, info.description or "") for name, info in EXPORTS.items()])
            case ExportQuery(name=name) | MetaContextQuery(export=name) if (name or "disk") not in EXPORTS:
                negotiation.refuse(OptionReplyType.ERR_UNKNOWN, f"no export is called {name!r}")
            case ExportQuery(name=name):
                negotiation.accept_export(EXPORTS[name or "disk"])
            case MetaContextQuery(option, _, queries):
                negotiation.send_meta_contexts(list(enumerate(select_contexts(option, queries, CONTEXTS), 1)))
            case StartTls():
                negotiation.accept_tls()

    def transmit(self, line: socket.socket, ready: Ready, received: bytes) -> None:
        transmission, replies = ServerTransmission(ready.mode), replies_for(ready.mode)
        while not transmission.disconnected:
            batch = transmission.parse(memoryview(received), 64)
            received = received[batch.consumed :]
            for request in batch.requests:
                match request.type:
                    case Command.READ:
                        header = bytearray(replies.read_header_size)
                        replies.pack_read_header(header, 0, request.cookie, request.offset, request.length)
                        line.sendall(bytes(header) + bytes(request.length))
                    case Command.BLOCK_STATUS:
                        last = max(ready.contexts)
                        for key in ready.contexts:
                            extents = [(request.length, 3)]
                            line.sendall(replies.block_status(request, key, extents, done=key == last))
                    case Command.DISC:
                        return
                    case _:
                        line.sendall(replies.done(request))
            if batch.needs_data:
                data = line.recv(65536)
                if not data:
                    return
                received += data

    def ready(self) -> Ready:
        """The one export that was chosen."""
        (found,) = (event for event in self.events if isinstance(event, Ready))
        return found


@contextmanager
def our_server(
    *, tcp: bool = False, tls: ssl.SSLContext | None = None, policy: TlsPolicy = "off"
) -> Iterator[tuple[OurServer, Endpoint]]:
    """A running OurServer, which on leaving must not have seen a client break the protocol."""
    with (
        tempfile.TemporaryDirectory(prefix="pynbd-") as folder,
        socket.socket(socket.AF_INET if tcp else socket.AF_UNIX) as listener,
    ):
        listener.bind(("127.0.0.1", 0) if tcp else f"{folder}/nbd.sock")
        listener.listen()
        endpoint = Endpoint(port=listener.getsockname()[1]) if tcp else Endpoint(Path(folder) / "nbd.sock")
        server = OurServer(listener, tls, policy)
        server.thread.start()
        try:
            yield server, endpoint
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.thread.join(PATIENCE_S)
    assert not server.thread.is_alive()
    assert server.faults == []


def test_nbdinfo_of_one_export() -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with our_server() as (server, endpoint):
        (told,) = json.loads(run("nbdinfo", "--json", endpoint.uri("disk")))["exports"]
    assert (told["export-size"], told["is_read_only"], told["can_fua"], told["can_multi_conn"]) == (
        SIZE_BYTES,
        False,
        True,
        True,
    )
    assert (told["block_size_minimum"], told["block_size_preferred"], told["block_size_maximum"]) == (
        1,
        65536,
        32 << 20,
    )
    assert told["contexts"] == CONTEXTS
    assert told["can_df"] is True
    assert server.ready().mode is ReplyMode.STRUCTURED


def test_nbdinfo_lists_every_export_with_its_description() -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with our_server() as (server, endpoint):
        told = json.loads(run("nbdinfo", "--json", "--list", endpoint.uri()))["exports"]
    assert [(export["export-name"], export["export-size"], export["description"]) for export in told] == [
        ("disk", SIZE_BYTES, "a disk of zeroes"),
        ("other disk", 4096, "sector zero"),
    ]
    assert ListExports(secure=False) in server.events


def test_nbdinfo_of_an_unknown_export_says_what_we_said() -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with our_server() as (server, endpoint):
        done = subprocess.run(["nbdinfo", endpoint.uri("no")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr
    assert any(isinstance(event, ExportQuery) and event.name == "no" for event in server.events)


def test_nbdinfo_map_sees_the_contexts_that_it_set() -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    with our_server() as (server, endpoint):
        told = json.loads(run("nbdinfo", "--json", "--map=qemu:allocation-depth", endpoint.uri("disk")))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in told] == [(0, SIZE_BYTES, 3)]
    assert server.ready().contexts == {1: "qemu:allocation-depth"}


@pytest.mark.parametrize("qemu10", [False, True])
@pytest.mark.parametrize("tcp", [False, True])
def test_qemu_img_info(tcp: bool, qemu10: bool) -> None:
    qemu_img = require_qemu10("qemu-img") if qemu10 else require_tool("qemu-img", package="qemu-utils")
    with our_server(tcp=tcp) as (server, endpoint):
        told = json.loads(run(qemu_img, "info", "--output=json", endpoint.uri("disk")))
    # QEMU rounds sizes up to whole sectors for itself.
    assert told["virtual-size"] == -(-SIZE_BYTES // 512) * 512
    ready = server.ready()
    assert ready.mode is (ReplyMode.EXTENDED if qemu10 else ReplyMode.STRUCTURED)
    assert ready.contexts == {1: "base:allocation"}
    assert ready.option == Option.GO


def test_qemu_nbd_lists() -> None:
    qemu = require_tool("qemu-nbd", package="qemu-utils")
    with our_server(tcp=True) as (_, endpoint):
        told = run(qemu, "--list", "-b", endpoint.host, "-p", str(endpoint.port))
    assert "exports available: 2" in told
    assert "description: a disk of zeroes" in told
    assert f"size:  {SIZE_BYTES}" in told
    assert "qemu:allocation-depth" in told


def test_nbd_client_lists() -> None:
    client = require_tool("nbd-client", package="nbd-client")
    with our_server(tcp=True) as (server, endpoint):
        told = run(client, "-l", endpoint.host, str(endpoint.port))
    assert "\ndisk: a disk of zeroes\nother disk: sector zero\n" in told
    assert server.events[0] == ListExports(secure=False)


def test_conformance_07_nbd_client_says_go_without_info_requests() -> None:
    client = require_tool("nbd-client", package="nbd-client")
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has NBD: its client would attach")
    with our_server(tcp=True) as (server, endpoint):
        # Without NBD in the kernel it fails after the negotiation, which is all that is wanted here.
        subprocess.run(
            [client, "-N", "disk", endpoint.host, str(endpoint.port), "/dev/nbd0"], capture_output=True, check=False
        )
    assert server.events[0] == ExportQuery(Option.GO, "disk", (), secure=False)
    assert server.ready().mode is ReplyMode.SIMPLE


# Their servers, our client ----------------------------------------------------------------------------


class OurClient:
    """ClientNegotiation over a blocking socket, as simple as it can be used."""

    def __init__(self, negotiation: ClientNegotiation, line: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self.negotiation = negotiation
        self.line = line
        self.tls = tls

    def answer(self) -> ClientEvent:
        while True:
            event = self.negotiation.next_event()
            if data := self.negotiation.data_to_send():
                self.line.sendall(data)
            if isinstance(event, NeedData):
                self.negotiation.receive_data(self.line.recv(65536))
            elif isinstance(event, TlsWanted):
                assert self.tls is not None
                self.line = self.tls.wrap_socket(self.line, server_hostname="localhost")
                self.negotiation.tls_established()
            else:
                return event

    def connect(self, export: str = "", contexts: tuple[str, ...] = ("base:allocation",)) -> Established:
        self.negotiation.connect(export, contexts=contexts)
        event = self.answer()
        assert isinstance(event, Established), event
        return event

    def describe(self, export: str = "") -> ExportDescribed:
        self.negotiation.describe(export)
        event = self.answer()
        assert isinstance(event, ExportDescribed), event
        return event

    def list_exports(self) -> list[tuple[str, str]]:
        self.negotiation.list_exports()
        event = self.answer()
        assert isinstance(event, ExportsListed), event
        return [(export.name, export.details) for export in event.exports]

    def list_meta_contexts(self, export: str = "", *queries: str) -> tuple[str, ...]:
        self.negotiation.list_meta_contexts(export, queries)
        event = self.answer()
        assert isinstance(event, MetaContextsListed), event
        return event.contexts


@contextmanager
def our_client(
    endpoint: Endpoint,
    *,
    tls: ssl.SSLContext | None = None,
    wish: TlsWish = "off",
    extended: bool = True,
    structured: bool = True,
) -> Iterator[OurClient]:
    negotiation = ClientNegotiation(tls=wish, extended=extended, structured=structured)
    client = OurClient(negotiation, endpoint.connect(PATIENCE_S), tls)
    try:
        yield client
    finally:
        client.line.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize(("qemu10", "mode"), [(False, ReplyMode.STRUCTURED), (True, ReplyMode.EXTENDED)])
def test_qemu_nbd_serves(disk: Path, qemu10: bool, mode: ReplyMode) -> None:
    with qemu_nbd(disk, "-x", "disk", "-D", "words about it", "-A", qemu10=qemu10) as peer:
        with our_client(peer.endpoint) as client:
            assert client.list_exports() == [("disk", "words about it")]
            described = client.describe("disk").info
            contexts = client.list_meta_contexts("disk")
            assert contexts == ("base:allocation", "qemu:allocation-depth")
            assert client.list_meta_contexts("disk", "qemu:") == ("qemu:allocation-depth",)
            client.negotiation.connect("nothing")
            refused = client.answer()
            assert isinstance(refused, Refused)
            assert refused.reply_type == OptionReplyType.ERR_UNKNOWN
            established = client.connect("disk", contexts)
        assert established.mode is mode
        assert set(established.contexts.values()) == set(contexts)
        assert established.info.size == described.size == 1 << 20
        assert established.info.description == "words about it"
        assert established.info.flags & (FLAGS.SEND_DF | FLAGS.SEND_FLUSH | FLAGS.SEND_WRITE_ZEROES)
        assert bool(established.info.flags & FLAGS.BLOCK_STATUS_PAYLOAD) is qemu10
        with our_client(peer.endpoint) as client:
            client.list_exports()
            client.negotiation.abort()
            assert client.answer() == Ended()
            assert client.line.recv(1) == b""


@pytest.mark.parametrize(
    ("extended", "structured", "mode"),
    [(True, True, ReplyMode.STRUCTURED), (True, False, ReplyMode.SIMPLE), (False, False, ReplyMode.SIMPLE)],
)
def test_nbdkit_serves(extended: bool, structured: bool, mode: ReplyMode) -> None:
    options = ["-e", "disk", "--filter=exportname"]
    arguments = ["exportname=disk", "exportname-list=explicit", "exportdesc=fixed:words about it"]
    with nbdkit("memory", "10M", *arguments, options=options) as peer:
        with our_client(peer.endpoint, extended=extended, structured=structured) as client:
            assert client.list_exports() == [("disk", "words about it")]
            assert client.describe("disk").info.description == "words about it"
            if mode is ReplyMode.STRUCTURED:
                assert client.list_meta_contexts("disk") == ("base:allocation",)
            established = client.connect("disk")
        assert established.mode is mode
        assert established.info.size == 10 << 20
        assert bool(established.contexts) is (mode is ReplyMode.STRUCTURED)


@pytest.mark.parametrize(
    ("mask", "style", "option"),
    [("3", "fixed newstyle", Option.GO), ("1", "fixed newstyle", Option.GO), ("0", "newstyle", Option.EXPORT_NAME)],
)
def test_nbdkit_of_every_newstyle(mask: str, style: str, option: Option) -> None:
    with nbdkit("memory", "1M", options=[f"--mask-handshake={mask}"]) as peer, our_client(peer.endpoint) as client:
        established = client.connect()
        assert client.negotiation.style == style
        assert established.option == option
        assert established.info.size == 1 << 20
        assert established.info.flags & FLAGS.SEND_FLUSH


def test_nbdkit_of_oldstyle() -> None:
    with nbdkit("memory", "1M", options=["--oldstyle"]) as peer, our_client(peer.endpoint) as client:
        established = client.connect()
        assert client.negotiation.style == "oldstyle"
        assert established.info.size == 1 << 20
        assert established.info.flags & FLAGS.SEND_FLUSH


def test_should_reconnect_comes_before_nbdkit_hangs_up() -> None:
    with nbdkit("memory", "1M") as peer, our_client(peer.endpoint) as client:
        while not client.negotiation.should_reconnect:
            client.describe()
            if not client.negotiation.should_reconnect:
                client.list_meta_contexts()
        client.negotiation.abort()
        assert client.answer() == Ended()


def test_nbd_server_serves(disk: Path) -> None:
    with (
        nbd_server({"one": disk, "two": disk}, "flush = true", "fua = true") as peer,
        our_client(peer.endpoint) as client,
    ):
        established = client.connect("one")
        assert established.option == Option.GO
        assert established.info.size == 1 << 20
        assert established.info.flags & (FLAGS.SEND_FLUSH | FLAGS.SEND_FUA) == FLAGS.SEND_FLUSH | FLAGS.SEND_FUA


def test_nbd_server_refuses_an_unknown_export(disk: Path) -> None:
    with nbd_server({"one": disk}) as peer, our_client(peer.endpoint) as client:
        client.negotiation.connect("three")
        event = client.answer()
        assert isinstance(event, Refused)


# TLS, both ways ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as libnbd and nbdkit want it: ca-cert.pem signs itself and serves as server's and client's too."""
    openssl = require_tool("openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "server-key.pem", folder / "ca-cert.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    run(openssl, "req", "-x509", *kind, *name, "-keyout", key, "-out", certificate)
    (folder / "server-cert.pem").write_bytes(certificate.read_bytes())
    return folder


def test_conformance_08_nbdkit_that_requires_tls(certificates: Path) -> None:
    options = ["--tls=require", f"--tls-certificates={certificates}"]
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    with nbdkit("memory", "1M", options=options) as peer:
        with our_client(peer.endpoint, tls=context, wish="require") as client:
            established = client.connect()
            assert established.secure
            assert established.mode is ReplyMode.STRUCTURED
            assert established.contexts
        with our_client(peer.endpoint) as client:
            client.negotiation.connect()
            refused = client.answer()
            assert isinstance(refused, Refused)
            assert refused.reply_type == OptionReplyType.ERR_TLS_REQD


@pytest.mark.parametrize("wish", ["prefer", "require"])
def test_conformance_08_nbdkit_without_tls(wish: TlsWish) -> None:
    with nbdkit("memory", "1M") as peer, our_client(peer.endpoint, wish=wish) as client:
        client.negotiation.connect()
        event = client.answer()
        assert isinstance(event, Established if wish == "prefer" else Refused)


@pytest.mark.parametrize("policy", ["allowed", "required"])
def test_conformance_08_nbdinfo_over_tls(certificates: Path, policy: TlsPolicy) -> None:
    require_tool("nbdinfo", package="libnbd-bin")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
    with our_server(tcp=True, tls=context, policy=policy) as (server, endpoint):
        uri = f"nbds://localhost:{endpoint.port}/disk?tls-certificates={certificates}"
        (told,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert told["export-size"] == SIZE_BYTES
    assert server.ready().secure
    assert server.ready().mode is ReplyMode.STRUCTURED
