"""Who may come in, by the name that TLS has proved: QEMU's objects `authz-simple` and `authz-list`.

authz-simple,id=authz0,identity=CN=alice,,O=Example                 one name; a comma in a value is doubled
authz-list,id=authz0,rules.0.match=CN=*,,O=Example,rules.0.format=glob,rules.0.policy=allow,policy=deny
"""

import fnmatch
from typing import ClassVar, Literal

import msgspec

from pynbd.block.objects import ObjectOptions, Objects, UserObject

Policy = Literal["allow", "deny"]


class Authorization(UserObject):
    """Says who may come in."""

    kind: ClassVar[str] = "authz-simple"

    def allows(self, identity: str) -> bool:
        """Whether somebody may.

        Args:
            identity: the distinguished name of a certificate, or the user of a key.
        """
        raise NotImplementedError


class AuthzSimpleOptions(ObjectOptions, frozen=True, kw_only=True):
    """Options of `authz-simple`.

    Args:
        identity: who may come in.
    """

    identity: str


class AuthzSimple(Authorization):
    """One name may come in."""

    kind = "authz-simple"
    Options: ClassVar[type[ObjectOptions]] = AuthzSimpleOptions

    def __init__(self, options: ObjectOptions, objects: Objects) -> None:
        super().__init__(options, objects)
        assert isinstance(options, AuthzSimpleOptions)
        self._identity = options.identity

    def allows(self, identity: str) -> bool:
        return identity == self._identity


class AuthzRule(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A rule of `authz-list`.

    Args:
        match: a name, or with the format `glob` a pattern with `*`, `?` and `[…]`.
        policy: what is done with whom it fits.
        format: `exact` or `glob`.
    """

    match: str
    policy: Policy
    format: Literal["exact", "glob"] = "exact"

    def fits(self, identity: str) -> bool:
        """Whether it is about somebody."""
        if self.format == "glob":
            return fnmatch.fnmatchcase(identity, self.match)
        return identity == self.match


class AuthzListOptions(ObjectOptions, frozen=True, kw_only=True):
    """Options of `authz-list`.

    Args:
        rules: the first that fits decides.
        policy: what is done where none fits.
    """

    rules: tuple[AuthzRule, ...] = ()
    policy: Policy = "deny"


class AuthzList(Authorization):
    """The first rule that fits decides."""

    kind = "authz-list"
    Options: ClassVar[type[ObjectOptions]] = AuthzListOptions

    def __init__(self, options: ObjectOptions, objects: Objects) -> None:
        super().__init__(options, objects)
        assert isinstance(options, AuthzListOptions)
        self._options = options

    def allows(self, identity: str) -> bool:
        decided = next((rule.policy for rule in self._options.rules if rule.fits(identity)), self._options.policy)
        return decided == "allow"
