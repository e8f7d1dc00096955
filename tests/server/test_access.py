"""Rules of access: what fits whom, the first that decides, the default, and what is wrong with a rule."""

from __future__ import annotations

import ipaddress
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects
from pynbd.server.access import AccessList, AccessRule, Policy, network_of, rule_from
from pynbd.server.visitor import Visitor, plain_address, visitor_at

RULE_TEXTS = [
    ("10.0.0.0/8", {"10.1.2.3": True, "11.0.0.1": False, "::ffff:10.1.2.3": True, "fd00::1": False}),
    ("10.0.0.5", {"10.0.0.5": True, "10.0.0.6": False}),
    ("fd00::/8", {"fd12::1": True, "fe80::1%eth0": False, "10.0.0.5": False}),
    ("fe80::/10", {"fe80::1%eth0": True}),
    ("::ffff:10.0.0.0/104", {"10.1.2.3": True, "::ffff:10.1.2.3": True, "11.0.0.1": False}),
    ("ipv4", {"10.0.0.5": True, "::ffff:10.0.0.5": True, "::1": False}),
    ("ipv6", {"::1": True, "10.0.0.5": False, "::ffff:10.0.0.5": False}),
    ("all", {"10.0.0.5": True, "::1": True}),
    ("unix", {"10.0.0.5": False, "::1": False}),
    ("address.0=10.0.0.5,address.1=::1", {"10.0.0.5": True, "::1": True, "10.0.0.6": False}),
]

UNIX = Visitor("unix#3", uid=1000, gids=frozenset({100, 27}), is_unix=True)
GUEST = Visitor("vsock:3:5", cid=3)
ALICE = Visitor("10.0.0.5:1", address=plain_address("10.0.0.5"), name="CN=alice,O=Example")


def at(host: str) -> Visitor:
    return Visitor(host, address=plain_address(host))


def policies(*rules: tuple[Policy, str]) -> AccessList:
    return AccessList([rule_from(policy, text) for policy, text in rules])


@pytest.mark.parametrize(("text", "expected"), RULE_TEXTS)
def test_addresses(text: str, expected: dict[str, bool]) -> None:
    access = policies(("allow", text))
    assert {host: access.decide(at(host)).policy == "allow" for host in expected} == expected


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
def test_a_network_is_the_same_inside_of_ipv6(
    base: ipaddress.IPv4Address, prefix: int, asked: ipaddress.IPv4Address
) -> None:
    plain = ipaddress.ip_network((base, prefix), strict=False)
    assert network_of(f"::ffff:{plain.network_address}/{96 + prefix}") == plain
    fits = policies(("allow", str(plain))).decide(at(f"::ffff:{asked}")).policy == "allow"
    assert fits == (asked in plain)


@pytest.mark.parametrize(
    ("text", "visitor", "fits"),
    [
        ("unix", UNIX, True),
        ("all", UNIX, True),
        ("ipv4", UNIX, False),
        ("vsock", UNIX, False),
        ("vsock", GUEST, True),
        ("all", GUEST, True),
        ("unix", GUEST, False),
        ("ipv4", GUEST, False),
        ("uid=3", GUEST, False),
        ("vsock:3", GUEST, True),
        ("vsock:4", GUEST, False),
        ("address.0=vsock:4,address.1=vsock:3", GUEST, True),
        ("vsock:0", UNIX, False),
        ("uid=1000", UNIX, True),
        ("uid=1001", UNIX, False),
        ("uid.0=7,uid.1=1000", UNIX, True),
        ("uid=0", at("127.0.0.1"), False),
        ("gid=100", UNIX, True),
        ("gid=27", UNIX, True),
        ("gid=0", UNIX, False),
        ("gid=0", ALICE, False),
        ("uid=root", Visitor("unix#4", uid=0, is_unix=True), True),
        ("name=CN=alice,,O=Example", ALICE, True),
        ("name=CN=*,,O=Example", ALICE, True),
        ("name=*", ALICE, True),
        ("name=*", at("10.0.0.5"), False),
        ("name=cn=alice*", ALICE, False),
        ("10.0.0.0/8,name=CN=alice*", ALICE, True),
        ("11.0.0.0/8,name=CN=alice*", ALICE, False),
        ("10.0.0.0/8,name=CN=bob*", ALICE, False),
        ("authz=admins", ALICE, True),
        ("authz=admins", at("10.0.0.5"), False),
    ],
)
def test_what_fits_whom(text: str, visitor: Visitor, fits: bool) -> None:
    objects = Objects()
    objects.make({"qom-type": "authz-simple", "id": "admins", "identity": "CN=alice,O=Example"})
    access = AccessList([rule_from("read-only", text)], objects)
    assert access.decide(visitor).policy == ("read-only" if fits else "deny")


def test_the_first_rule_that_fits_decides() -> None:
    access = policies(("deny", "10.0.0.5"), ("read-only", "10.0.0.0/24"), ("allow", "10.0.0.0/8"), ("deny", "10.0.0.1"))
    told = [access.decide(at(host)) for host in ("10.0.0.5", "10.0.0.1", "10.1.0.0", "11.0.0.0")]
    assert [decision.policy for decision in told] == ["deny", "read-only", "allow", "deny"]
    assert [decision.why for decision in told] == [
        "rule 0, deny address=10.0.0.5",
        "rule 1, read-only address=10.0.0.0/24",
        "rule 2, allow address=10.0.0.0/8",
        "no rule fits",
    ]


def test_whom_no_rule_fits() -> None:
    """Where anything is allowed, nothing else is; where rules only deny, they are exceptions; no rules deny nobody."""
    stranger = at("192.0.2.1")
    assert policies().decide(stranger).policy == "allow"
    assert policies(("deny", "10.0.0.0/8"), ("deny", "uid=0")).decide(stranger).policy == "allow"
    assert policies(("deny", "10.0.0.0/8"), ("read-only", "unix")).decide(stranger).policy == "deny"
    assert policies(("allow", "10.0.0.0/8")).decide(stranger).policy == "deny"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.5/8", "has bits beyond its prefix; the network is '10.0.0.0/8'"),
        ("example.com", "write 10.0.0.5, 10.0.0.0/8"),
        ("10.0.0", "write 10.0.0.5"),
        ("10.0.0.0/33", "write 10.0.0.5"),
        ("vsock:", "'' is no CID"),
        ("vsock:host", "'host' is no CID"),
        ("vsock:4294967295", "'4294967295' is no CID .0 to 4294967294."),
        ("uid=nobody-of-that-name", "this machine has no user 'nobody-of-that-name'"),
        ("gid=nobody-of-that-name", "this machine has no group"),
        ("uid=4294967295", "no number of a user"),
        ("uid=-1", "this machine has no user '-1'"),
        ("uuid=5", "has no such option"),
        ("authz=nobody", "there is no"),
    ],
)
def test_wrong_rules(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said.replace("(", r"\(")):
        AccessList([rule_from("allow", text)])


def test_too_many_rules() -> None:
    with pytest.raises(OptionError, match="at most 1000"):
        AccessList([AccessRule(policy="deny", uid=number) for number in range(1001)])


def test_who_is_at_a_unix_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        visitor = visitor_at(ours, "")
    assert visitor.uid == os.getuid()
    assert visitor.gids == {os.getgid(), *os.getgroups()}
    assert visitor.is_unix
    assert visitor.key == f"uid {os.getuid()}"
    assert f"pid {os.getpid()}" in str(visitor)


@pytest.mark.parametrize(
    ("family", "listen", "key"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::/64"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_who_is_at_a_tcp_socket(family: int, listen: str, key: str) -> None:
    """A socket for both kinds of addresses sees those of IPv4 as ones of IPv6."""
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((listen, 0))
        listener.listen()
        target = "127.0.0.1" if listen != "::1" else "::1"
        with socket.create_connection((target, listener.getsockname()[1])) as client:
            sock, address = listener.accept()
            with sock:
                visitor = visitor_at(sock, address)
                assert visitor.address == plain_address(target)
                assert visitor.key == key
                assert str(visitor).endswith(f":{client.getsockname()[1]}")
                assert visitor.uid is None
