"""What can be found wrong with a configuration without opening any disk: nearly all that is ever wrong with one.

The same check comes before every start, so that what is wrong is told with its place in the configuration, and
before anything has happened. A driver in a Python file is run, since only it knows its options.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nbd_protocol.constants import MAX_STRING_BYTES
from pynbd.block import objects, options, registry
from pynbd.block.bitmaps import DirtyBitmap
from pynbd.block.driver import Filter
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.graph import Graph
from pynbd.server.access import AccessList, AccessRule
from pynbd.server.config import Config, ExportOptions, parse_address, toml_key
from pynbd.server.limits import NO_LIMITS

NOBODY_BY_NAME = "nobody can be told by name: that needs TLS, with tls-verify-peer or tls-psk"
"""What is wrong with a rule about names that nobody can have."""

NOT_FOR_NODES = ("format", "offset", "cache", "discard", "detect_zeroes")
"""What is said of a node where it is made, not where it is exported."""

Place = Callable[[str], str]
"""What to put before a message about an option: `export.disk0.filters.1: `, or `--filter: ` of a command line."""


def check(config: Config) -> None:
    """Check a whole configuration.

    Raises:
        OptionError: what is wrong, and where: `export.slow.filters.1: …`.
    """
    for number, text in enumerate(config.server.listen):
        with told_at(f"server.listen.{number}: "):
            parse_address(text)
            if text in config.server.listen[:number]:
                raise OptionError(f"{text!r} is given twice")
    check_objects(config)
    check_tls(config)
    check_nodes(config)
    for name, wanted in config.exports.items():
        check_export(name, wanted, config, functools.partial("export.{}.{}: ".format, toml_key(name)))
    check_all_access(config)
    check_workers(config)


@contextlib.contextmanager
def told_at(place: str) -> Iterator[None]:
    """Put the place before the text of an error."""
    try:
        yield
    except BlockError as problem:
        raise OptionError(f"{place}{problem}") from problem


def check_objects(config: Config) -> None:
    """Check the secrets and other objects; what they name is not read.

    Raises:
        OptionError: what is wrong, and with which one.
    """
    ids: set[str] = set()
    for tree in config.objects:
        _, described = objects.checked(tree)
        if described.id in ids:
            raise OptionError(f"object {described.id!r}: there are two objects of that id")
        ids.add(described.id)


def check_tls(config: Config) -> None:
    """Check what is said of TLS; no file is read.

    Raises:
        OptionError: what is wrong.
    """
    where = config.server
    given = [key for key in ("tls-creds", "tls-certificates", "tls-psk") if getattr(where, key.replace("-", "_"))]
    if len(given) > 1:
        raise OptionError(f"server.{given[1]}: {given[0]} says already who we are")
    if where.tls in ("allowed", "required") and not given:
        raise OptionError(f"server.tls: {where.tls!r} needs tls-creds, tls-certificates or tls-psk")
    if where.tls_verify_peer and not where.tls_certificates:
        raise OptionError("server.tls-verify-peer: it goes with tls-certificates; tls-creds has an option of that name")
    if where.tls_authz and (not given or where.tls == "off"):
        raise OptionError("server.tls-authz: there is no TLS that would tell who a client is")
    kinds = {str(tree["id"]): str(tree["qom-type"]) for tree in config.objects}
    for key, name, prefix in (
        ("tls-creds", where.tls_creds, "tls-creds-"),
        ("tls-authz", where.tls_authz, "authz-"),
    ):
        if name and not kinds.get(name, "").startswith(prefix):
            near = ", ".join(known for known, kind in kinds.items() if kind.startswith(prefix)) or "none"
            raise OptionError(f"server.{key}: there is no object {name!r} of a kind {prefix}… (there are: {near})")


def export_rule(name: str, number: int) -> str:
    """Where a rule of an export is."""
    return f"export.{toml_key(name)}.access.{number}: "


def check_all_access(config: Config, place: Callable[[str, int], str] = export_rule) -> None:
    """Check who may connect, and who may use which export.

    Args:
        config: the whole of it.
        place: says where a rule of an export was given.

    Raises:
        OptionError: what is wrong.
    """
    check_access(config.server.access, config, "server.access.{}: ".format)
    for number, rule in enumerate(config.server.access):
        if rule.wants_name or rule.policy == "read-only":
            raise OptionError(
                f"server.access.{number}: before a client has said a word only its address, uid and gid are known, and "
                "it is allowed or denied; tls-authz judges names, and the access of an export the rest"
            )
    for name, wanted in config.exports.items():
        check_access(wanted.access, config, functools.partial(place, name))


def check_access(rules: Sequence[AccessRule], config: Config, place: Callable[[int], str]) -> None:
    """Check rules of access.

    Args:
        rules: in their order.
        config: has the objects that they may refer to.
        place: says where the rule of a number was given.

    Raises:
        OptionError: what is wrong.
    """
    where, kinds = config.server, {str(tree["id"]): str(tree["qom-type"]) for tree in config.objects}
    proves_names = where.tls != "off" and (where.tls_creds or where.tls_psk or where.tls_verify_peer)
    for number, rule in enumerate(rules):
        with told_at(place(number)):
            AccessList((msgspec.structs.replace(rule, authz=""),))
            if rule.wants_name and not proves_names:
                raise OptionError(NOBODY_BY_NAME)
            if rule.authz and not kinds.get(rule.authz, "").startswith("authz-"):
                near = ", ".join(known for known, kind in kinds.items() if kind.startswith("authz-")) or "none"
                raise OptionError(f"authz: there is no object {rule.authz!r} of a kind authz-… (there are: {near})")


def check_workers(config: Config) -> None:
    """Check that several processes can serve what they are to serve, as far as it is not the disks that decide it.

    Raises:
        OptionError: what can't be.
    """
    if config.server.workers == 1:
        return
    for name, wanted in config.exports.items():
        for option, given, why in (
            (
                "snapshot",
                wanted.snapshot and not wanted.read_only,
                "each would write to an overlay of its own",
            ),
            ("bitmaps", wanted.bitmaps, "each would know only of what it has written itself"),
            ("resize", wanted.resize, "the others would not learn of another size"),
        ):
            if given:
                raise OptionError(f"export {name!r}: {option} can't be had with several workers: {why}")
    limits = config.server.client_limits
    counted = msgspec.structs.replace(
        NO_LIMITS, handshake_timeout=limits.handshake_timeout, idle_timeout=limits.idle_timeout
    )
    if limits != counted:
        key = next(key for key in limits.__struct_fields__ if getattr(limits, key) != getattr(counted, key))
        raise OptionError(
            f"client-limits: {key.replace('_', '-')} can't be had with several workers: a client may have connections "
            "at each, and they do not count together"
        )


def check_nodes(config: Config) -> None:
    """Check the nodes: each may use those before it.

    Raises:
        OptionError: what is wrong, and with which node.
    """
    everywhere = node_names(config)
    for number, tree in enumerate(config.nodes):
        name, before = everywhere[number], everywhere[:number]
        with told_at(f"node {name!r}: "):
            if name in before:
                raise OptionError("there are two nodes of that name")
            try:
                Graph().check(tree, known=before)
            except OptionError as problem:
                if can_be_made(tree, everywhere):
                    raise OptionError(f"{problem} (nodes are made in this order: put it before this one)") from problem
                raise


def can_be_made(tree: Mapping[str, Any], known: Collection[str]) -> bool:
    """Whether a node is described well, if nodes of certain names are there."""
    try:
        Graph().check(tree, known=known)
    except OptionError:
        return False
    return True


def node_names(config: Config) -> list[str]:
    """The names of a configuration's nodes."""
    return [str(tree["node-name"]) for tree in config.nodes]


def check_export(name: str, wanted: ExportOptions, config: Config, place: Place) -> None:
    """Check one export.

    Args:
        name: of the export.
        wanted: what it is to be.
        config: has the nodes that it may use.
        place: says where an option of the export was given.

    Raises:
        OptionError: what is wrong.
    """
    known = node_names(config)
    with told_at(place("name")):
        check_text(name)
    with told_at(place("description")):
        check_text(wanted.description)
    with told_at(place("disk")):
        check_disk(wanted, known)
    with told_at(place("load-snapshot")):
        snapshot_tree(wanted.load_snapshot)
    for number, entry in enumerate(wanted.filters):
        with told_at(place(f"filters.{number}")):
            check_filter(entry, known)
    for number, bitmap in enumerate(wanted.bitmaps):
        with told_at(place(f"bitmaps.{number}")):
            check_text(bitmap)
            DirtyBitmap(bitmap, 0)
            if bitmap in wanted.bitmaps[:number]:
                raise OptionError(f"there are two bitmaps named {bitmap!r}")


def check_text(text: str) -> None:
    """Check that clients can be told a text.

    Raises:
        OptionError: it is too long, or no UTF-8.
    """
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise OptionError(f"{text!a} is no UTF-8, which is what NBD's texts are") from None
    if length > MAX_STRING_BYTES or "\0" in text:
        raise OptionError(
            f"{text[:40]!r}… has {length} bytes; clients can be told {MAX_STRING_BYTES}, and no NUL among them"
        )


def check_disk(wanted: ExportOptions, known: Collection[str]) -> None:
    """Check the description of a disk.

    Raises:
        OptionError: what is wrong.
    """
    if isinstance(wanted.disk, str) and wanted.disk in known:
        defaults = ExportOptions(disk=wanted.disk)
        for name in NOT_FOR_NODES:
            if getattr(wanted, name) != getattr(defaults, name):
                option = name.replace("_", "-")
                raise OptionError(f"{wanted.disk!r} is a node: say {option} there (./{wanted.disk} would be a file)")
        return
    graph = Graph()
    tree = graph.describe(wanted.disk, format=wanted.format)
    graph.check(tree, known=known)
    if wanted.offset and tree.get("driver", "raw") != "raw":
        raise OptionError(f"offset: only a raw disk can begin at an offset, not {tree['driver']!r}")


def check_filter(entry: str | Mapping[str, Any], known: Collection[str]) -> None:
    """Check the description of a filter.

    Raises:
        OptionError: what is wrong.
    """
    tree = filter_tree(entry)
    driver = tree.get("driver")
    if not isinstance(driver, str) or not driver:
        raise OptionError("driver: the filter's name is missing")
    kind = registry.driver_class(driver)
    if not issubclass(kind, Filter):
        raise OptionError(f"driver {driver!r} is no filter; there are: {', '.join(registry.filter_names())}")
    if "file" in tree:
        raise OptionError("file: a filter lies on the export's disk, and can't have another one")
    Graph().check({**tree, "file": {"driver": "null"}}, known=known)


def snapshot_tree(text: str) -> dict[str, Any]:
    """The options of the node that shows an internal snapshot, from what `-l` takes; that of the image is missing.

    Raises:
        OptionError: it can't be understood.
    """
    if not text.startswith("snapshot."):
        return {"driver": "qcow2-snapshot", "snapshot": text}
    told = options.parse_dotted(text).get("snapshot", {})
    if not isinstance(told, dict) or told.keys() - {"id", "name"}:
        raise OptionError(f"{text!r}: expected snapshot.id=ID, snapshot.name=NAME or both")
    return {"driver": "qcow2-snapshot"} | {f"snapshot-{key}": value for key, value in told.items()}


def filter_tree(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """A filter's options from `NAME,OPT=VAL` or a table.

    Raises:
        OptionError: it can't be understood.
    """
    return dict(entry) if isinstance(entry, Mapping) else options.parse_dotted(entry, implied_key="driver")
