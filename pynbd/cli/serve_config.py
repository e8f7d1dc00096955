"""What the arguments of `pynbd serve` ask for: a configuration, the same as a TOML file's."""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from nbd_protocol.constants import DEFAULT_PORT
from pynbd.block import objects, options
from pynbd.block.errors import OptionError
from pynbd.server import config as configs
from pynbd.server.access import AccessRule, rule_from
from pynbd.server.check import (
    check,
    check_all_access,
    check_export,
    check_objects,
    check_tls,
    check_workers,
    export_rule,
    told_at,
)
from pynbd.server.config import Config, ExportOptions, ListenOptions
from pynbd.server.limits import ClientLimits

OF_A_DISK = {
    "format": "-f",
    "read_only": "-r",
    "snapshot": "-s",
    "load_snapshot": "-l",
    "offset": "-o",
    "image_opts": "--image-opts",
    "nocache": "-n",
    "cache": "--cache",
    "discard": "--discard",
    "detect_zeroes": "--detect-zeroes",
    "filter": "--filter",
    "description": "-D",
    "allocation_depth": "-A",
    "bitmap": "-B",
    "access": "--allow",
}
"""Arguments that say something of each DISK."""

RULE_FLAGS = {"allow": "--allow", "read-only": "--allow-read-only", "deny": "--deny"}
"""The flags that give rules of access, by policy."""

FLAGS = {
    "filters": "--filter",
    "load-snapshot": "-l",
    "bitmaps": "-B",
    "description": "-D",
    "name": "the export's name",
}
"""The flags that give an export's options, where the message alone does not say which one is meant."""


def configuration(arguments: argparse.Namespace, at_end: contextlib.ExitStack) -> Config:
    """What the arguments (and the file they name) ask for, checked as far as can be without opening a disk.

    Args:
        arguments: those of the command line.
        at_end: takes what is to be cleared away when serving is over.

    Raises:
        OptionError: they don't go together, or the file is wrong.
    """
    check_together(arguments)
    config = configs.Config()
    if arguments.config:
        config = configs.load(arguments.config)
        try:
            check(config)
        except OptionError as problem:
            raise OptionError(f"{arguments.config}: {problem}") from problem
    exports = dict(config.exports)
    disks = named_disks(arguments)
    for name, disk in disks:
        if name in exports:
            raise OptionError(f"there are two exports named {name!r}")
        exports[name] = export_options(disk, arguments)
        check_export(name, exports[name], config, given_by)
    if not exports:
        raise OptionError("nothing to serve: give a DISK, or a --config with an [export]")
    server = msgspec.structs.replace(
        config.server,
        listen=listen_addresses(arguments, config, at_end),
        max_clients=arguments.shared or config.server.max_clients,
        client_limits=client_limits(arguments.client_limits)
        if arguments.client_limits
        else config.server.client_limits,
        workers=arguments.workers or config.server.workers,
    )
    made = (*config.objects, *(objects.parse(text) for text in arguments.object))
    config = msgspec.structs.replace(config, server=with_tls(server, arguments), objects=made, exports=exports)
    check_objects(config)
    try:
        check_tls(config)
    except OptionError as problem:
        raise OptionError(str(problem).replace("server.tls", "--tls")) from problem
    named = {name for name, _ in disks}
    check_all_access(
        config, lambda name, number: rule_flag(number, arguments) if name in named else export_rule(name, number)
    )
    check_workers(config)
    return config


def rule_flag(number: int, arguments: argparse.Namespace) -> str:
    """What to put before a message about a rule: the flag that gave it."""
    policy, text = arguments.access[number]
    return f"{RULE_FLAGS[policy]} {text}: "


def access_rules(arguments: argparse.Namespace) -> tuple[AccessRule, ...]:
    """The rules that the arguments give, in their order.

    Raises:
        OptionError: one says something wrong.
    """
    rules = []
    for number, (policy, text) in enumerate(arguments.access):
        with told_at(rule_flag(number, arguments)):
            rules.append(rule_from(policy, text))
    return tuple(rules)


def client_limits(text: str) -> ClientLimits:
    """What a client may take, from `connections=16,bytes-per-second=100M`.

    Raises:
        OptionError: it says something wrong.
    """
    with told_at("--client-limits: "):
        return options.convert(options.parse_dotted(text), ClientLimits, driver="[server.client-limits]")


def with_tls(server: ListenOptions, arguments: argparse.Namespace) -> ListenOptions:
    """What the arguments say of TLS goes before what the file says: who we are is said as a whole by one of them."""
    given: dict[str, Any] = {}
    if arguments.tls_creds or arguments.tls_certificates or arguments.tls_psk:
        given = {"tls_creds": "", "tls_certificates": "", "tls_psk": "", "tls_verify_peer": False, "tls_authz": ""}
    for name in ("tls", "tls_creds", "tls_certificates", "tls_psk", "tls_verify_peer", "tls_authz"):
        if value := getattr(arguments, name):
            given[name] = value
    return msgspec.structs.replace(server, **given)


def given_by(option: str) -> str:
    """What to put before a message about an option of an export: the flag that gave it."""
    flag = FLAGS.get(option.partition(".")[0])
    return f"{flag}: " if flag else ""


def check_together(arguments: argparse.Namespace) -> None:
    """Check that nothing was said in vain.

    Raises:
        OptionError: two arguments contradict each other, or one has nothing that it could apply to.
    """
    vain = next((flag for name, flag in OF_A_DISK.items() if getattr(arguments, name)), None)
    if vain == OF_A_DISK["access"]:
        vain = RULE_FLAGS[arguments.access[0][0]]
    if vain is not None and arguments.config and not arguments.disk:
        raise OptionError(f"{vain} is said of a DISK on the command line; say it of the export in {arguments.config}")
    if arguments.fork and arguments.run is not None:
        raise OptionError("--fork and --run don't go together: whoever runs a command waits for it")
    if arguments.run is not None and (arguments.user or arguments.group or arguments.confine):
        raise OptionError("--run is for a command with our rights: give up none (--user, --group, --confine)")
    if (arguments.may_read or arguments.may_write) and not arguments.confine:
        raise OptionError("--may-read and --may-write say what --confine leaves: give that as well")
    if arguments.fork and arguments.exit_with_parent:
        raise OptionError("--fork and --exit-with-parent don't go together: in the background there is no parent")


def named_disks(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(export name, disk) of each DISK.

    Raises:
        OptionError: several have no name, or -x is given for several.
    """
    found = [split_name(text, arguments.image_opts) for text in arguments.disk]
    if arguments.export_name is not None:
        if len(found) != 1:
            raise OptionError("-x names one DISK; give several as NAME=DISK")
        if found[0][0] is not None:
            raise OptionError(f"-x {arguments.export_name} and {arguments.disk[0]}: the export has two names")
        return [(arguments.export_name, found[0][1])]
    unnamed = [disk for name, disk in found if name is None]
    if len(found) > 1 and unnamed:
        raise OptionError(f"several disks need names: give NAME={unnamed[0]}")
    return [(name or "", disk) for name, disk in found]


def split_name(text: str, image_opts: bool) -> tuple[str | None, str]:
    """The name and the disk of `NAME=DISK`; the name is None if there is none.

    Args:
        text: the argument.
        image_opts: whether every DISK is options, so that what stands before the first "=" may be the first of them.
    """
    name, equals, disk = text.partition("=")
    if not (equals and name and disk) or any(mark in name for mark in "/:,"):
        return None, text
    if name == "driver" or Path(text).exists():
        return None, text
    if image_opts and not (disk.startswith("json:") or "=" in disk.partition(",")[0]):
        return None, text
    return name, disk


def export_options(disk: str, arguments: argparse.Namespace) -> ExportOptions:
    """One export as the arguments describe it."""
    described: str | dict[str, Any] = disk
    if arguments.image_opts:
        described = options.parse_json(disk) if disk.startswith("json:") else options.parse_dotted(disk)
    return ExportOptions(
        disk=described,
        format=arguments.format,
        description=arguments.description,
        read_only=arguments.read_only,
        snapshot=arguments.snapshot,
        load_snapshot=arguments.load_snapshot,
        filters=tuple(arguments.filter),
        bitmaps=tuple(arguments.bitmap),
        allocation_depth=arguments.allocation_depth,
        offset=options.parse_size(arguments.offset or "0", what="--offset"),
        cache=arguments.cache or ("none" if arguments.nocache else "writeback"),
        discard=arguments.discard or "ignore",
        detect_zeroes=arguments.detect_zeroes or "off",
        access=access_rules(arguments),
    )


def listen_addresses(arguments: argparse.Namespace, config: Config, at_end: contextlib.ExitStack) -> tuple[str, ...]:
    """Where to listen; the default is loopback, and for --run a socket of its own.

    Raises:
        OptionError: an address is none.
    """
    port = DEFAULT_PORT if arguments.port is None else arguments.port
    hosts = arguments.bind or ([arguments.default_bind] if arguments.port is not None else [])
    if "" in arguments.socket:
        raise OptionError("-k: an empty path")
    # Absolute, for that is how it is printed.
    addresses = [f"unix:{os.path.abspath(path)}" for path in arguments.socket]  # noqa: PTH100  # resolve() would follow links
    addresses += [_with_port(host, port) for host in hosts]
    addresses += [f"vsock:{place}" for place in arguments.vsock]
    for address in addresses:
        configs.parse_address(address)
    if addresses or config.server.listen:
        return tuple(addresses) or config.server.listen
    if arguments.run is not None:
        folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix="pynbd-"))
        return (f"unix:{folder}/nbd.sock",)
    configs.parse_address(_with_port(arguments.default_bind, port))
    return (_with_port(arguments.default_bind, port),)


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
