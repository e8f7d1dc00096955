"""The sockets that `pynbd serve` is started with, instead of addresses: a service manager's, or those of one client."""

import argparse
import os

import msgspec

from pynbd.block.errors import OptionError
from pynbd.server.activation import Handed, take_sockets, take_standard_streams
from pynbd.server.config import Config

ADDRESSES = {"bind": "-b", "port": "-p", "socket": "-k", "vsock": "--vsock"}
"""Arguments that say where to listen."""

NOT_FOR_ONE = {**ADDRESSES, "run": "--run", "fork": "--fork", "shared": "-e", "workers": "--workers"}
"""Arguments that mean nothing where one client is there already."""


def given_sockets(arguments: argparse.Namespace) -> list[Handed]:
    """The sockets that the process was started with; none, if it is to listen by itself.

    Raises:
        OptionError: an argument contradicts them.
        BlockError: they are none that can be served.
    """
    if arguments.single:
        refuse(arguments, NOT_FOR_ONE, "there is one client, at the standard input, and no other (--single)")
        return [take_standard_streams()]
    handed = take_sockets(os.environ, os.getpid())
    if handed:
        refuse(arguments, ADDRESSES, "the sockets are given by who has started us (LISTEN_FDS)")
    return handed


def refuse(arguments: argparse.Namespace, flags: dict[str, str], why: str) -> None:
    """Refuse arguments that would be in vain.

    Raises:
        OptionError: one of them was given.
    """
    for name, flag in flags.items():
        if getattr(arguments, name) not in (None, False, 0, []) or (name == "port" and arguments.port == 0):
            raise OptionError(f"{flag}: {why}")


def without_addresses(config: Config) -> Config:
    """The same configuration, but all clients come where sockets are given."""
    return msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, listen=()))
