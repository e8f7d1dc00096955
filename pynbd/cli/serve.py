"""`pynbd serve`: serve disks over NBD."""

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynbd.cli.failure import told

if TYPE_CHECKING:
    from pynbd.server.config import Config, ExportOptions
    from pynbd.server.service import Service

EPILOG = """\
DISK is a file name, a URI (nbd://…), a Python file with a driver (./mine.py), dotted options
(driver=raw,file.driver=file,file.filename=disk.raw) or json:{…}. Several disks are given as NAME=DISK.

examples:
  pynbd serve disk.raw                        serve a file on 127.0.0.1:10809, until Ctrl-C
  pynbd serve -r -f raw -k /run/b.sock b.img  read-only, on a Unix socket
  pynbd serve a=a.raw b=b.raw                 two exports
  pynbd serve -s golden.raw                   every write goes to a temporary overlay
  pynbd serve --filter delay,read=5ms x.raw   a slow disk
  pynbd serve --run 'qemu-img info $uri' x.raw
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments; letters and meanings as qemu-nbd's."""
    parser.epilog = EPILOG
    parser.add_argument("disk", nargs="*", metavar="DISK", help="what to serve, or NAME=DISK")
    image = parser.add_argument_group("disks")
    image.add_argument("-f", "--format", default="", help="format of the image (guessed if not given)")
    image.add_argument("-r", "--read-only", action="store_true", help="clients can't write")
    image.add_argument("-s", "--snapshot", action="store_true", help="writes go to a temporary overlay")
    image.add_argument("-o", "--offset", default="0", metavar="BYTES", help="where in the image the disk begins")
    image.add_argument("--image-opts", action="store_true", help="DISK is always dotted options")
    image.add_argument("-n", "--nocache", action="store_true", help="the same as --cache=none")
    image.add_argument(
        "--cache",
        choices=("none", "writeback", "writethrough", "directsync", "unsafe"),
        help="how writes are cached (default: writeback)",
    )
    image.add_argument("--aio", choices=("threads", "native", "io_uring"), help="accepted; all are served alike")
    image.add_argument("--discard", choices=("ignore", "off", "unmap", "on"), default="ignore", help="default: ignore")
    image.add_argument("--detect-zeroes", choices=("off", "on", "unmap"), default="off", help="default: off")
    image.add_argument(
        "--filter", action="append", default=[], metavar="NAME[,OPT=VAL…]", help="put a filter on top (repeatable)"
    )
    export = parser.add_argument_group("exports")
    export.add_argument("-x", "--export-name", metavar="NAME", help="name of the export (default: the empty name)")
    export.add_argument("-D", "--description", default="", metavar="TEXT", help="what people are told of the export")
    export.add_argument("-A", "--allocation-depth", action="store_true", help="offer qemu:allocation-depth")
    export.add_argument(
        "-B", "--bitmap", action="append", default=[], metavar="NAME", help="keep and offer a dirty bitmap (repeatable)"
    )
    listen = parser.add_argument_group("where")
    listen.add_argument(
        "-b", "--bind", action="append", default=[], metavar="ADDR", help="address to listen on (repeatable)"
    )
    listen.add_argument("-p", "--port", type=int, metavar="PORT", help="port to listen on (default: 10809; 0: any)")
    listen.add_argument(
        "-k", "--socket", action="append", default=[], metavar="PATH", help="Unix socket to listen on (repeatable)"
    )
    listen.add_argument("-e", "--shared", type=int, default=0, metavar="CLIENTS", help="clients at one time")
    life = parser.add_argument_group("life")
    life.add_argument("-t", "--persistent", action="store_true", help="accepted; it keeps serving anyway")
    life.add_argument("--exit-last", action="store_true", help="stop when the last client has gone")
    life.add_argument("--run", metavar="CMD", help="run CMD in a shell with $uri set, and stop when it ends")
    life.add_argument("--fork", action="store_true", help="go to the background once clients can connect")
    life.add_argument("--pid-file", metavar="FILE", help="write the process id there once clients can connect")
    life.add_argument("--config", metavar="FILE", help="read servers, nodes and exports from a TOML file")
    life.add_argument("--check-config", action="store_true", help="only check the configuration")
    life.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    life.add_argument("-v", "--verbose", action="count", default=0, help="tell of clients (-vv: and more)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from pynbd.block.errors import BlockError

    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        format="pynbd serve: %(message)s",
    )
    try:
        with contextlib.ExitStack() as at_end:
            config = configuration(arguments, at_end)
            if arguments.check_config:
                return check(config, arguments)
            announce = daemonize() if arguments.fork else None
            return asyncio.run(serve(config, arguments, announce))
    except (OSError, BlockError) as problem:
        print(f"pynbd serve: {told(problem)}", file=sys.stderr)
        return 1


# --- what to serve --------------------------------------------------------------------------------------------


def configuration(arguments: argparse.Namespace, at_end: contextlib.ExitStack) -> "Config":
    """What the arguments (and the file they name) ask for.

    Raises:
        OptionError: they don't go together, or the file is wrong.
    """
    import msgspec

    from pynbd.block.errors import OptionError
    from pynbd.server import config as configs

    config = configs.load(arguments.config) if arguments.config else configs.Config()
    exports = dict(config.exports)
    for name, disk in named_disks(arguments):
        if name in exports:
            raise OptionError(f"there are two exports named {name!r}")
        exports[name] = export_options(disk, arguments)
    if not exports:
        raise OptionError("nothing to serve: give a DISK, or a --config with an [export]")
    addresses = listen_addresses(arguments, config, at_end)
    server = msgspec.structs.replace(
        config.server, listen=addresses, max_clients=arguments.shared or config.server.max_clients
    )
    return msgspec.structs.replace(config, server=server, exports=exports)


def named_disks(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(export name, disk) of each DISK.

    Raises:
        OptionError: several have no name, or -x is given for several.
    """
    from pynbd.block.errors import OptionError

    found = [split_name(text, arguments.image_opts) for text in arguments.disk]
    if arguments.export_name is not None:
        if len(found) != 1:
            raise OptionError("-x names one DISK; give several as NAME=DISK")
        return [(arguments.export_name, found[0][1])]
    unnamed = [disk for name, disk in found if name is None]
    if len(found) > 1 and unnamed:
        raise OptionError(f"several disks need names: give NAME={unnamed[0]}")
    return [(name or "", disk) for name, disk in found]


def split_name(text: str, image_opts: bool) -> tuple[str | None, str]:
    """The name and the disk of `NAME=DISK`; the name is None if there is none."""
    name, equals, disk = text.partition("=")
    plain = not any(mark in name for mark in "/:,.") and not text.startswith(("driver=", "json:"))
    if equals and name and disk and plain and not Path(text).exists() and not (image_opts and "=" not in disk):
        return name, disk
    return None, text


def export_options(disk: str, arguments: argparse.Namespace) -> "ExportOptions":
    """One export as the arguments describe it."""
    from pynbd.block import options
    from pynbd.server.config import ExportOptions

    described: str | dict[str, Any] = disk
    if arguments.image_opts:
        described = options.parse_json(disk) if disk.startswith("json:") else options.parse_dotted(disk)
    return ExportOptions(
        disk=described,
        format=arguments.format,
        description=arguments.description,
        read_only=arguments.read_only,
        snapshot=arguments.snapshot,
        filters=tuple(arguments.filter),
        bitmaps=tuple(arguments.bitmap),
        allocation_depth=arguments.allocation_depth,
        offset=options.parse_size(arguments.offset, what="--offset"),
        cache=arguments.cache or ("none" if arguments.nocache else "writeback"),
        discard=arguments.discard,
        detect_zeroes=arguments.detect_zeroes,
    )


def listen_addresses(arguments: argparse.Namespace, config: "Config", at_end: contextlib.ExitStack) -> tuple[str, ...]:
    """Where to listen; the default is loopback, and for --run a socket of its own."""
    from pynbd.block.errors import OptionError

    if arguments.port is not None and not 0 <= arguments.port <= 65535:
        raise OptionError(f"-p: {arguments.port} is no port (0 to 65535)")
    port = 10809 if arguments.port is None else arguments.port
    hosts = arguments.bind or (["127.0.0.1"] if arguments.port is not None else [])
    addresses = [f"unix:{os.path.abspath(path)}" for path in arguments.socket]  # noqa: PTH100  # "-k x" is printed whole
    addresses += [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]
    if addresses or config.server.listen:
        return tuple(addresses) or config.server.listen
    if arguments.run is not None:
        folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix="pynbd-"))
        return (f"unix:{folder}/nbd.sock",)
    return (f"127.0.0.1:{port}",)


def check(config: "Config", arguments: argparse.Namespace) -> int:
    """Check the configuration, and say so."""
    from pynbd.server import service

    asyncio.run(service.check(config))
    if not arguments.quiet:
        exports = ", ".join(repr(name) for name in config.exports)
        print(f"{arguments.config or 'the command line'} is good: {len(config.exports)} exports ({exports})")
    return 0


# --- serving --------------------------------------------------------------------------------------------------


async def serve(config: "Config", arguments: argparse.Namespace, announce: int | None) -> int:
    """Open, announce, serve until something says "stop", close.

    Args:
        config: what to serve.
        arguments: how.
        announce: where to tell the process that started us that clients can connect.
    """
    from pynbd.server.service import open_service

    stop = asyncio.Event()
    install_signals(stop)
    status = 0
    async with open_service(config) as service:
        if arguments.exit_last:
            service.server.on_client_gone.append(lambda: None if service.server.connections else stop.set())
        if not (arguments.quiet or arguments.fork or arguments.run):
            print("\n".join(greeting(service)), flush=True)
        with pid_file(arguments.pid_file):
            if announce is not None:
                report_ready(announce)
            if arguments.run is None:
                await stop.wait()
            else:
                status = await run_command(arguments.run, service, stop)
    return status


def install_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT stops in order, the second one at once."""
    loop = asyncio.get_running_loop()

    def told_to_stop(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop, number)


def greeting(service: "Service") -> list[str]:
    """What is served, and the lines to paste for those who want to use it."""
    lines: list[str] = []
    for export in service.server.exports.values():
        node = export.backend.node
        title = f"export {export.name!r}" if export.name else "default export"
        access = "read-only" if export.read_only else "writable"
        lines.append(f"{title}: {node.filename() or node.name}, {export.backend.size} bytes, {access}")
        if node.write_guard is not None:
            lines.append("  its format was guessed to be raw; say -f raw if it is (writes to its start are watched)")
        for uri in service.uris:
            lines += paste_lines(service, export.name, str(uri.with_export(export.name)), uri.socket_path)
    return [*lines, "", "Stop with Ctrl-C."]


def paste_lines(service: "Service", name: str, uri: str, socket_path: str) -> list[str]:
    """The lines to paste for one export at one address."""
    quoted = shlex.quote(uri)
    lines = [f"  {uri}"]
    if socket_path:
        client = f"nbd-client -unix {shlex.quote(socket_path)} /dev/nbd0"
    else:
        host, port = next((u.host, u.port) for u in service.uris if str(u.with_export(name)) == uri)
        client = f"nbd-client {host} {port} /dev/nbd0"
    lines.append(f"    Linux     {client}" + (f" -N {shlex.quote(name)}" if name else ""))
    lines.append(f"    QEMU      qemu-system-x86_64 -drive file={shlex.quote(uri)},format=raw,if=virtio")
    lines.append(f"    qemu-img  qemu-img info {quoted}")
    return lines


@contextlib.contextmanager
def pid_file(name: str | None) -> Any:
    """The process id in a file, as long as it serves."""
    if name is None:
        yield
        return
    Path(name).write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        Path(name).unlink(missing_ok=True)


async def run_command(command: str, service: "Service", stop: asyncio.Event) -> int:
    """Run a command with the server's address in its environment; its exit status is ours."""
    uri = service.uris[0]
    name = next(iter(service.server.exports))
    environment = {"uri": str(uri.with_export(name)), "nbd": str(uri.with_export(name))}
    if uri.socket_path:
        environment["unixsocket"] = uri.socket_path
    process = await asyncio.create_subprocess_shell(command, env={**os.environ, **environment})
    waits = [asyncio.ensure_future(process.wait()), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if process.returncode is None:
        process.terminate()
        await process.wait()
    for wait in waits:
        wait.cancel()
    status = process.returncode
    assert status is not None
    return status if status >= 0 else 128 - status


# --- going to the background ------------------------------------------------------------------------------------


def daemonize() -> int:
    """Fork: the child goes on, the parent waits until it says that clients can connect, and exits.

    Returns:
        in the child, where to say it.
    """
    ready, announce = os.pipe()
    if os.fork():
        os.close(announce)
        with os.fdopen(ready, "rb") as pipe:
            sys.exit(0 if pipe.read(1) else 1)
    os.close(ready)
    os.setsid()
    return announce


def report_ready(announce: int) -> None:
    """Tell the parent that clients can connect, and leave its terminal."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    os.write(announce, b"1")
    os.close(announce)
