"""Who may come in: exact names, patterns, the first rule that fits, and what is said of nobody."""

from __future__ import annotations

from typing import Any

import pytest

from pynbd.block.errors import OptionError
from pynbd.block.objects import Objects, parse
from pynbd.server.authz import Authorization


def made(text: str | dict[str, Any]) -> Authorization:
    found = Objects().make(parse(text) if isinstance(text, str) else text)
    assert isinstance(found, Authorization)
    return found


def test_one_name() -> None:
    authorization = made("authz-simple,id=a,identity=CN=alice,,O=Example")
    assert authorization.allows("CN=alice,O=Example")
    for other in ("", "CN=alice", "CN=alice,O=Example,C=GB", "cn=alice,O=Example", "CN=alic?,O=Example"):
        assert not authorization.allows(other)


def test_the_first_rule_that_fits() -> None:
    rules = (
        "rules.0.match=CN=mallory,,O=Example,rules.0.policy=deny,"
        "rules.1.match=CN=*,,O=Example,rules.1.policy=allow,rules.1.format=glob"
    )
    authorization = made(f"authz-list,id=a,{rules},policy=deny")
    assert authorization.allows("CN=alice,O=Example")
    assert not authorization.allows("CN=mallory,O=Example")
    assert not authorization.allows("CN=alice,O=Other")
    assert not authorization.allows("cn=alice,O=Example")


@pytest.mark.parametrize("policy", ["allow", "deny"])
def test_nobody_is_named(policy: str) -> None:
    assert made({"qom-type": "authz-list", "id": "a", "policy": policy}).allows("CN=alice") is (policy == "allow")
    assert not made("authz-list,id=a").allows("CN=alice")


def test_a_pattern_is_one_only_where_it_is_said_to_be() -> None:
    authorization = made("authz-list,id=a,rules.0.match=CN=*,rules.0.policy=allow")
    assert authorization.allows("CN=*")
    assert not authorization.allows("CN=alice")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("authz-simple,id=a", "identity: object 'a' needs this option"),
        ("authz-list,id=a,rules.0.match=x,rules.0.policy=maybe", "rules.0.policy: 'maybe' is not one of"),
        ("authz-list,id=a,rules.0.match=x", "rules.0"),
    ],
)
def test_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        made(text)
