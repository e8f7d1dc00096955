"""What `pynbd serve` prints when clients can connect: what is served, and the lines to paste to use it."""

import shlex
import socket
from collections.abc import Iterator

from nbd_protocol.uri import NbdUri
from pynbd.block.node import Node
from pynbd.server.activation import EVERY_ADDRESS
from pynbd.server.config import Config, ExportOptions, parse_address
from pynbd.server.export import Export
from pynbd.server.service import Service

CLIENT_FILES = (("cacert", "ca-cert"), ("cert", "client-cert"), ("key", "client-key"))
"""nbd-client's options for certificates, and QEMU's names of the files."""


def greeting(service: Service, config: Config) -> list[str]:
    """The lines for all exports at all addresses."""
    lines: list[str] = []
    for name, export in service.server.exports.items():
        lines += title(export, config.exports[name])
        for uri in service.uris:
            lines += paste_lines(uri.with_export(name), read_only=export.read_only)
    if any(is_every_address(text) for text in config.server.listen):
        tls = service.server.tls
        if tls is None or tls.policy != "required" or not tls.credentials.wants_client_identity:
            who = "whoever reaches one can use these disks"
        else:
            who = "whoever has a certificate that it believes can use these disks"
        lines += [f"It listens on every address of {socket.gethostname()}: {who}."]
    return lines


def is_every_address(text: str) -> bool:
    """Whether it is for all that this machine has in its networks."""
    address = parse_address(text)
    return address.host in EVERY_ADDRESS and not (address.path or address.is_vsock)


def title(export: Export, wanted: ExportOptions) -> list[str]:
    """What an export is."""
    node = export.backend.node
    name = f"export {export.name!r}" if export.name else "default export"
    disk = wanted.disk if isinstance(wanted.disk, str) else node.filename() or node.driver.name
    access = "read-only" if export.read_only else "writable"
    if wanted.snapshot and not export.read_only:
        access += ", writes are lost at the end"
    lines = [f"{name}: {disk}, {export.backend.size} bytes, {access}"]
    if any(below.write_guard is not None for below in chain(node)) and not export.read_only:
        lines.append("  its format was guessed to be raw; say -f raw if it is (writes to its start are watched)")
    return lines


def chain(node: Node) -> Iterator[Node]:
    """A node and those below it to which its writes go."""
    yield node
    if "file" in node.children:
        yield from chain(node.children["file"].node)


def paste_lines(uri: NbdUri, *, read_only: bool) -> list[str]:
    """The lines to paste for one export at one address, quoted for a shell.

    DIR is the folder of a client's certificates, and NAME what the server's is called, where no address tells it.
    """
    drive = f"file={in_option(str(uri))},format=raw"
    guest, image = ["qemu-system-x86_64"], ["qemu-img", "info"]
    place = [str(uri)]
    if uri.is_vsock:
        drive = f"driver=nbd,{server_options(uri)},export={in_option(uri.export)}"
        place = ["--image-opts", drive]
    if uri.is_tls_required:
        objects = ["tls-creds-x509,id=tls0,endpoint=client,dir=DIR"]
        drive = f"driver=nbd,{server_options(uri)},export={in_option(uri.export)},tls-creds=tls0"
        drive += ",tls-hostname=NAME" if uri.is_unix or uri.is_vsock else ""
        guest += ["-object", *objects]
        image += ["--object", *objects]
        place = ["--image-opts", drive]
    drive += ",if=virtio" + (",readonly=on" if read_only else "")
    return [
        f"  {uri}",
        f"    Linux     {shlex.join(kernel_line(uri, read_only=read_only))}",
        f"    QEMU      {shlex.join([*guest, '-drive', drive])}",
        f"    qemu-img  {shlex.join([*image, *place])}",
    ]


def kernel_line(uri: NbdUri, *, read_only: bool) -> list[str]:
    """What makes it a device of Linux; by vsock, which nbd-client does not know, a file that a loop device takes."""
    if uri.is_vsock:
        return ["nbdfuse", *(["-r"] if read_only else []), "DIR/disk", str(uri)]
    server = ["-unix", uri.socket_path] if uri.is_unix else [uri.host, str(uri.port)]
    client = ["nbd-client", *server, "/dev/nbd0"]
    client += ["-N", uri.export] if uri.export else []
    client += ["-R"] if read_only else []
    if uri.is_tls_required:
        client += [f"-{name}file=DIR/{file}.pem" for name, file in CLIENT_FILES]
    return client


def server_options(uri: NbdUri) -> str:
    """Where a server is, as options of QEMU's driver nbd."""
    if uri.is_unix:
        return f"server.type=unix,server.path={in_option(uri.socket_path)}"
    if uri.is_vsock:
        return f"server.type=vsock,server.cid={uri.host},server.port={uri.port}"
    return f"server.type=inet,server.host={in_option(uri.host)},server.port={uri.port}"


def in_option(value: str) -> str:
    """A value among options: a comma would end it, so QEMU wants it twice."""
    return value.replace(",", ",,")
