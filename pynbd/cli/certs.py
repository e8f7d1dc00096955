"""`pynbd certs DIR`: an authority, and what it signs for servers and clients, by the names that QEMU looks for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pynbd.crypto.certificates import Authority

DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")

EPILOG = """\
examples:
  pynbd certs pki
        an authority, a server's and a client's certificate in one folder
  pynbd certs pki --host disks.example.com --host 192.0.2.7
        the server is reached by these
  pynbd certs alice --ca pki --for client --name alice
        one more client of the same authority, in a folder of its own
  pynbd serve --tls-certificates pki --tls-verify-peer disk.raw
        used
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.description = (
        "Make certificates for TLS in a folder: ca-cert.pem, server-cert.pem, client-cert.pem, and their keys. "
        "Keys are not encrypted. What is there already is kept, and used if it is an authority."
    )
    parser.epilog = EPILOG
    parser.add_argument("folder", metavar="DIR", help="where to; it is made if it is missing")
    parser.add_argument("--ca", metavar="DIR", help="folder of the authority that signs (default: a new one in DIR)")
    parser.add_argument(
        "--for",
        dest="ends",
        choices=("both", "server", "client"),
        default="both",
        metavar="END",
        help="server, client or both (default)",
    )
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a name or an address that the server is reached by (repeatable; default: {', '.join(DEFAULT_HOSTS)})",
    )
    parser.add_argument("--name", default="client", help="the client's name, its CN (%(default)s)")
    parser.add_argument("--days", type=int, default=365, metavar="N", help="how long all are good (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; its exit status."""
    from pynbd.block.errors import BlockError
    from pynbd.cli.failure import told

    try:
        made = make(arguments)
    except (OSError, BlockError) as problem:
        print(f"pynbd certs: {told(problem)}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in made))
    return 0


def make(arguments: argparse.Namespace) -> list[Path]:
    """Make what is asked for: the files that are new.

    Raises:
        OptionError: something that was asked for can't be.
        BlockError, OSError: a file is there already, or can't be read or written.
    """
    from pynbd.crypto import certificates

    certificates.check_library()
    folder = Path(arguments.folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = set(folder.iterdir())
    authority = find_authority(arguments, folder)
    hosts = arguments.host or list(DEFAULT_HOSTS)
    if arguments.ends != "client":
        certificates.issue(authority, folder, "server", hosts[0], hosts, arguments.days)
    if arguments.ends != "server":
        certificates.issue(authority, folder, "client", arguments.name, [], arguments.days)
    return sorted(set(folder.iterdir()) - before)


def find_authority(arguments: argparse.Namespace, folder: Path) -> Authority:
    """The authority that is to sign: one that is there, or a new one."""
    from pynbd.crypto import certificates

    if arguments.ca is not None:
        return certificates.load_authority(Path(arguments.ca))
    if (folder / "ca-cert.pem").exists():
        return certificates.load_authority(folder)
    return certificates.make_authority(folder, f"pynbd test authority in {folder.resolve().name}"[:64], arguments.days)
