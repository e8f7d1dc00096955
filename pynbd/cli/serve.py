"""`pynbd serve`: serve disks over NBD. Here are its arguments; what comes of them is imported when it is used."""

import argparse
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from pynbd.cli.objects import add_object_argument

EPILOG = """\
DISK is a file name, a URI (nbd://…), a Python file with a driver (./mine.py),
dotted options (driver=raw,file.driver=file,file.filename=disk.raw) or
json:{…}. Several disks are given as NAME=DISK. What could be taken for
something else is a file when it begins with ./ or /.

examples:
  pynbd serve disk.raw
        a file, on 127.0.0.1:10809, until Ctrl-C
  pynbd serve -r -f raw -k /run/b.sock b.img
        read-only, on a Unix socket
  pynbd serve a=a.raw b=b.raw
        two exports
  pynbd serve -s golden.raw
        every write goes to a temporary overlay
  pynbd serve --filter delay,read=5ms x.raw
        a slow disk
  pynbd serve driver=./mine.py,size=1G
        a driver of your own, with options
  pynbd serve --run 'qemu-img info "$uri"' x.raw
        only as long as a command runs
"""

MAX_WORKERS = 64
"""As that of the configuration file, which is not imported for the help."""

ELSEWHERE = {
    ("-L", "--list"): "`pynbd list URI` lists the exports of a server",
    ("-c", "--connect"): "serve the disk, then attach it with `nbd-client HOST PORT /dev/nbdX`",
    ("-d", "--disconnect"): "`nbd-client -d /dev/nbdX` detaches a device",
    ("-P", "--partition"): "give the partition's --offset, or driver=raw,offset=…,size=…,file.filename=…",
    ("--tls-hostname",): "it is for clients: `pynbd info --tls-hostname`, and an option of the driver nbd",
    ("-T", "--trace"): "-v and -vv tell more",
    ("--selinux-label",): "start it by `runcon` for an SELinux label",
    ("-V", "--version"): "`pynbd --version` tells the version",
}
"""What qemu-nbd has and `pynbd serve` does not, with what to do instead."""


class Elsewhere(argparse.Action):
    """An option that is not here; the text says what to use."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Refuse it."""
        parser.error(f"{'/'.join(self.option_strings[:2])} is no option here: {self.metavar}")


def number(least: int, most: int, what: str) -> Callable[[str], int]:
    """A type for argparse: a whole number in a range."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} ({least} to {most})")
        return int(text)

    return parse


def workers(text: str) -> int | Literal["auto"]:
    """A type for argparse: how many workers."""
    return "auto" if text == "auto" else number(1, MAX_WORKERS, "number of workers, nor auto")(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments; letters and meanings as qemu-nbd's."""
    parser.usage = (
        "%(prog)s [OPTION…] DISK\n       %(prog)s [OPTION…] NAME=DISK…\n       %(prog)s [OPTION…] --config FILE"
    )
    parser.epilog = EPILOG
    parser.more_words_for = "disk"  # type: ignore[attr-defined]  # it is our own Parser, seen as what it extends
    parser.variables = "PYNBD_SERVE_"  # type: ignore[attr-defined]  # as above
    parser.add_argument("disk", nargs="*", metavar="DISK", help="what to serve, or NAME=DISK")
    disks = parser.add_argument_group("disks")
    _add_disk_arguments(disks)
    add_object_argument(disks)
    _add_export_arguments(parser.add_argument_group("exports"))
    _add_listen_arguments(parser.add_argument_group("where"))
    _add_access_arguments(parser.add_argument_group("who"))
    _add_tls_arguments(parser.add_argument_group("TLS"))
    _add_life_arguments(parser.add_argument_group("life"))
    for names, instead in ELSEWHERE.items():
        parser.add_argument(
            *names, action=Elsewhere, nargs="?", dest="elsewhere", metavar=instead, help=argparse.SUPPRESS
        )


Group = argparse._ArgumentGroup  # noqa: SLF001  # argparse has no public name for the type of its groups


def _add_disk_arguments(group: Group) -> None:
    group.add_argument("-f", "--format", default="", help="format of the image (guessed if not given)")
    group.add_argument("-r", "--read-only", action="store_true", help="clients can't write")
    group.add_argument("-s", "--snapshot", action="store_true", help="writes go to a temporary overlay")
    group.add_argument(
        "-l",
        "--load-snapshot",
        default="",
        metavar="SNAPSHOT",
        help="serve an internal snapshot, read-only: ID, NAME or snapshot.id=ID,snapshot.name=NAME",
    )
    group.add_argument("-o", "--offset", default="", metavar="BYTES", help="where in the image the disk begins")
    group.add_argument("--image-opts", action="store_true", help="DISK is always dotted options or json:{…}")
    cache = group.add_mutually_exclusive_group()
    cache.add_argument("-n", "--nocache", action="store_true", help="the same as --cache=none")
    cache.add_argument(
        "--cache",
        choices=("none", "writeback", "writethrough", "directsync", "unsafe"),
        metavar="MODE",
        help="none (O_DIRECT), writeback (default), writethrough (a write is durable when it is answered), "
        "directsync (both), unsafe (flushes are ignored)",
    )
    group.add_argument(
        "--aio",
        choices=("threads", "native", "io_uring"),
        metavar="MODE",
        help="threads, native, io_uring: accepted; the option aio of the driver file is what counts",
    )
    group.add_argument(
        "--discard",
        choices=("ignore", "off", "unmap", "on"),
        metavar="MODE",
        help="what trims do: ignore (default; or off), unmap (or on: they give space back)",
    )
    group.add_argument(
        "--detect-zeroes",
        choices=("off", "on", "unmap"),
        metavar="MODE",
        help="off (default), on (written zeroes become zeroing), unmap (and give space back)",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[,OPT=VAL…]",
        help="put a filter on top (repeatable; the first is nearest to the disk)",
    )


def _add_export_arguments(group: Group) -> None:
    group.add_argument("-x", "--export-name", metavar="NAME", help="name of the export (default: the empty name)")
    group.add_argument("-D", "--description", default="", metavar="TEXT", help="what people are told of the export")
    group.add_argument("-A", "--allocation-depth", action="store_true", help="offer qemu:allocation-depth")
    group.add_argument(
        "-B",
        "--bitmap",
        action="append",
        default=[],
        metavar="NAME",
        help="keep a dirty bitmap and offer qemu:dirty-bitmap:NAME (repeatable)",
    )


def _add_listen_arguments(group: Group) -> None:
    group.add_argument(
        "-b", "--bind", action="append", default=[], metavar="ADDR", help="address to listen on (repeatable)"
    )
    group.add_argument(
        "-p",
        "--port",
        type=number(0, 65535, "port"),
        metavar="PORT",
        help="port to listen on (default: 10809; 0: any free one)",
    )
    group.add_argument(
        "-k", "--socket", action="append", default=[], metavar="PATH", help="Unix socket to listen on (repeatable)"
    )
    group.add_argument(
        "--vsock",
        action="append",
        default=[],
        metavar="[CID:]PORT",
        help="vsock port to listen on, for virtual machines (repeatable; 0: any free one)",
    )
    group.add_argument(
        "--single",
        "--inetd",
        action="store_true",
        help="serve the one client that the standard input and output are, and nobody else",
    )
    group.add_argument(
        "--default-bind",
        default="127.0.0.1",
        metavar="ADDR",
        help="address to listen on where none is said here nor in --config (default: 127.0.0.1)",
    )
    group.add_argument(
        "-e",
        "--shared",
        type=number(0, 1_000_000, "number of clients"),
        default=0,
        metavar="CLIENTS",
        help="clients at one time; further ones wait (default, and 0: 1024)",
    )


class Rule(argparse.Action):
    """Keeps rules of access of all kinds in the order in which they are given."""

    def __call__(self, _: object, namespace: argparse.Namespace, text: Any, __: str | None = None) -> None:
        """Add one; its policy is what the flag stands for."""
        namespace.access = [*namespace.access, (self.const, text)]


def _add_access_arguments(group: Group) -> None:
    patterns = "10.0.0.0/8, fd00::/8, unix, vsock:CID, all, uid=USER, gid=GROUP, name=PATTERN, authz=ID"
    for flag, policy, meaning in (
        (
            "--allow",
            "allow",
            f"who may use the DISKs, and nobody else: {patterns} (repeatable; the first that fits decides)",
        ),
        ("--allow-read-only", "read-only", "who may read them"),
        ("--deny", "deny", "who may not see them; where nothing is allowed, all others may use them"),
    ):
        group.add_argument(flag, action=Rule, const=policy, dest="access", default=[], metavar="WHO", help=meaning)
    group.add_argument(
        "--client-limits",
        metavar="KEY=VALUE[,…]",
        help="what one client may take: connections, requests, bytes-in-flight, bytes-per-second, bytes-burst, "
        "requests-per-second, requests-burst, handshake-timeout, idle-timeout",
    )


def _add_tls_arguments(group: Group) -> None:
    group.add_argument(
        "--tls",
        choices=("off", "allowed", "required"),
        metavar="MODE",
        help="required (default, where one of the next three is given), allowed (clients may do without), off",
    )
    creds = group.add_mutually_exclusive_group()
    creds.add_argument("--tls-creds", metavar="ID", help="the --object tls-creds-x509 or tls-creds-psk to use")
    creds.add_argument(
        "--tls-certificates", metavar="DIR", help="the folder of ca-cert.pem, server-cert.pem and server-key.pem"
    )
    creds.add_argument("--tls-psk", metavar="FILE", help="a file with a line USER:KEY for each client")
    group.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="with --tls-certificates: clients must have a certificate of that authority",
    )
    group.add_argument("--tls-authz", metavar="ID", help="the --object authz-simple or authz-list of who may come in")


def _add_life_arguments(group: Group) -> None:
    group.add_argument("-t", "--persistent", action="store_true", help="accepted; it keeps serving anyway")
    group.add_argument("--exit-last", action="store_true", help="stop when the last client has gone")
    group.add_argument("--exit-with-parent", action="store_true", help="stop when the process that started it ends")
    group.add_argument("--run", metavar="CMD", help="run CMD in a shell with $uri set, and stop when it ends")
    group.add_argument("--fork", action="store_true", help="go to the background once clients can connect")
    group.add_argument("--pid-file", metavar="FILE", help="write the process id there once clients can connect")
    group.add_argument(
        "-u", "--user", default="", metavar="USER", help="be this user once all is open (name or number)"
    )
    group.add_argument("-g", "--group", default="", metavar="GROUP", help="and of this group, and no other")
    group.add_argument(
        "--confine",
        action="store_true",
        help="open nothing any more once all is open, but what serving takes (Landlock)",
    )
    for flag, what in (("--may-read", "read"), ("--may-write", "write")):
        group.add_argument(
            flag,
            action="append",
            default=[],
            metavar="PATH",
            help=f"with --confine: {what} there all the same (repeatable)",
        )
    group.add_argument(
        "--workers",
        type=workers,
        metavar="N",
        help="processes that serve the clients, for many of them (default: 1; auto: one for each processor)",
    )
    group.add_argument("--config", metavar="FILE", help="read server, nodes and exports from a TOML file")
    group.add_argument("--check-config", action="store_true", help="only check all this; no disk is opened")
    group.add_argument(
        "--log-level",
        choices=("error", "warning", "info", "debug"),
        metavar="LEVEL",
        help="how much is logged: error, warning (default), info (-v), debug (-vv)",
    )
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", metavar="FORMAT", help="text (default) or json"
    )
    group.add_argument("--log-file", metavar="FILE", help="log there, and not on stderr; SIGHUP opens it anew")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but warnings and errors")
    group.add_argument("-v", "--verbose", action="count", default=0, help="tell of clients (-vv: and more)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the exit status."""
    from pynbd.cli.serving import run

    return run(arguments)
