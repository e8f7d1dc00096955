"""Who may use what: rules about addresses, users of this machine, and the names that TLS has proved.

    policy = "allow", address = "10.0.0.0/8"
    policy = "read-only", name = "CN=*,O=Example"
    policy = "deny"

The first rule that fits a client decides. Whom no rule fits is denied; if all rules deny, they are exceptions, and
everybody else is allowed. So an empty list allows everybody.

A rule fits if all that it says of a client does. `authz` refers to an object `authz-simple` or `authz-list`, the
same that `tls-authz` takes for a whole server.
"""

import fnmatch
import grp
import ipaddress
import pwd
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec

from nbd_protocol.uri import MAX_VSOCK_NUMBER
from pynbd.block import options
from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.server.authz import Authorization
from pynbd.server.visitor import IpAddress, Visitor

Policy = Literal["allow", "read-only", "deny"]
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_RULES = 1000
"""Rules of one list: each client is held against all of them."""

EVERY_ADDRESS = ("all", "any")
VSOCK = "vsock:"
V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

One = TypeVar("One", int | str, str)
Texts = str | tuple[str, ...]
Ids = int | str | tuple[int | str, ...]


class AccessRule(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """One rule; where several values are given, one of them must fit.

    Args:
        policy: what is done with whom it fits: `read-only` clients can't write.
        address: `10.0.0.5`, `10.0.0.0/8`, `fd00::/8`; `vsock:3`; or `ipv4`, `ipv6`, `unix`, `vsock`; or `all`.
        uid, gid: a user or a group of this machine, by number or by name, at a Unix socket.
        name: a pattern for the distinguished name of a certificate, or the user of a key, with `*`, `?` and `[…]`.
        authz: the object that says who it is about.
    """

    policy: Policy
    address: Texts = ()
    uid: Ids = ()
    gid: Ids = ()
    name: Texts = ()
    authz: str = ""

    def __str__(self) -> str:
        said = [
            f"{key}={'|'.join(map(str, several(value)))}"
            for key in ("address", "uid", "gid", "name", "authz")
            if (value := getattr(self, key)) not in ((), "")
        ]
        return f"{self.policy} {','.join(said) or 'all'}"

    @property
    def wants_name(self) -> bool:
        """Whether it is about names, which only TLS proves."""
        return self.name != () or bool(self.authz)


class Decision(NamedTuple):
    """What was decided of a client, and why."""

    policy: Policy
    why: str


ALLOWED = Decision("allow", "there are no rules")


class AccessList:
    """Rules, ready for use.

    Args:
        rules: in their order.
        objects: has those that the rules refer to.

    Raises:
        OptionError: a rule says something wrong; which one.
    """

    def __init__(self, rules: Sequence[AccessRule] = (), objects: Objects | None = None) -> None:
        if len(rules) > MAX_RULES:
            raise OptionError(f"{len(rules)} rules, at most {MAX_RULES} are served")
        self._rules = [
            (_conditions(rule, objects or Objects()), Decision(rule.policy, f"rule {number}, {rule}"))
            for number, rule in enumerate(rules)
        ]
        only_denies = all(rule.policy == "deny" for rule in rules)
        self._otherwise = Decision("allow" if only_denies else "deny", "no rule fits")

    def decide(self, visitor: Visitor) -> Decision:
        """What the rules say of a client, as far as it is known now."""
        if not self._rules:
            return ALLOWED
        for conditions, decision in self._rules:
            if all(fits(visitor) for fits in conditions):
                return decision
        return self._otherwise


Condition = Callable[[Visitor], bool]


def _conditions(rule: AccessRule, objects: Objects) -> list[Condition]:
    """What must hold of a client for a rule to fit."""
    found: list[Condition] = []
    if rule.address != ():
        found.append(_from(several(rule.address)))
    if rule.uid != ():
        uids = frozenset(uid_of(user) for user in several(rule.uid))
        found.append(lambda visitor: visitor.uid in uids)
    if rule.gid != ():
        gids = frozenset(gid_of(group) for group in several(rule.gid))
        found.append(lambda visitor: not gids.isdisjoint(visitor.gids))
    if rule.name != ():
        patterns = several(rule.name)
        found.append(
            lambda visitor: bool(visitor.name) and any(fnmatch.fnmatchcase(visitor.name, text) for text in patterns)
        )
    if rule.authz:
        authorization = objects.find(rule.authz, Authorization)
        found.append(lambda visitor: bool(visitor.name) and authorization.allows(visitor.name))
    return found


def _from(texts: tuple[str, ...]) -> Condition:
    """Whether a client comes from one of some addresses."""
    everybody = any(text in EVERY_ADDRESS for text in texts)
    by_unix, by_vsock = "unix" in texts, "vsock" in texts
    cids = {cid_of(text) for text in texts if text.startswith(VSOCK)}
    words = (*EVERY_ADDRESS, "unix", "vsock")
    networks = [network_of(text) for text in texts if text not in words and not text.startswith(VSOCK)]

    def fits(visitor: Visitor) -> bool:
        by_way = (by_unix and visitor.is_unix) or (by_vsock and visitor.cid is not None) or visitor.cid in cids
        return everybody or by_way or _is_in(visitor.address, networks)

    return fits


def _is_in(address: IpAddress | None, networks: Sequence[IpNetwork]) -> bool:
    return address is not None and any(address in network for network in networks)


def network_of(text: str) -> IpNetwork:
    """A network from `10.0.0.0/8`, `10.0.0.5`, `ipv4` or `ipv6`; one of IPv4 inside of IPv6 is one of IPv4.

    Raises:
        OptionError: it is none.
    """
    text = {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}.get(text, text)
    try:
        network = ipaddress.ip_network(text)
    except ValueError as problem:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise OptionError(
                f"address: {text!r} is none; write 10.0.0.5, 10.0.0.0/8, fd00::/8, vsock:3, ipv4, ipv6, unix, vsock "
                "or all"
            ) from problem
        raise OptionError(f"address: {text!r} has bits beyond its prefix; the network is {str(meant)!r}") from problem
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(V4_MAPPED):
        inside = network.network_address.ipv4_mapped
        return ipaddress.ip_network(f"{inside}/{network.prefixlen - V4_MAPPED.prefixlen}")
    return network


def cid_of(text: str) -> int:
    """The number of a virtual machine, or of its host, from `vsock:3`.

    Raises:
        OptionError: it is none.
    """
    number = text.removeprefix(VSOCK)
    if not is_number(number) or int(number) > MAX_VSOCK_NUMBER:
        raise OptionError(f"address: {text!r}: {number!r} is no CID (0 to {MAX_VSOCK_NUMBER})")
    return int(number)


def uid_of(user: int | str) -> int:
    """The number of a user.

    Raises:
        OptionError: there is none of that name.
    """
    try:
        return _number(user) if is_number(user) else pwd.getpwnam(str(user)).pw_uid
    except KeyError:
        raise OptionError(f"uid: this machine has no user {user!r}") from None


def gid_of(group: int | str) -> int:
    """The number of a group.

    Raises:
        OptionError: there is none of that name.
    """
    try:
        return _number(group) if is_number(group) else grp.getgrnam(str(group)).gr_gid
    except KeyError:
        raise OptionError(f"gid: this machine has no group {group!r}") from None


def is_number(text: int | str) -> bool:
    """Whether it is a number, or one as text."""
    return isinstance(text, int) or (text.isascii() and text.isdecimal() and len(text) <= 10)


def _number(text: int | str) -> int:
    number = int(text)
    if not 0 <= number < (1 << 32) - 1:
        raise OptionError(f"{number} is no number of a user or a group (0 to {(1 << 32) - 2})")
    return number


def several(value: One | tuple[One, ...]) -> tuple[One, ...]:
    """A tuple of what may have been given alone."""
    return value if isinstance(value, tuple) else (value,)


def rule_from(policy: Policy, text: str) -> AccessRule:
    """A rule from `10.0.0.0/8`, `uid=1000` or `address=…,name=…` (a comma in a value is doubled).

    Raises:
        OptionError: it says something wrong.
    """
    tree = options.parse_dotted(text, implied_key="address")
    return options.convert({"policy": policy, **tree}, AccessRule, driver="[access rule]")
