"""`Objects`: what a graph needs beside nodes, by id: secrets, and whatever else QEMU makes with `--object`.

    secret,id=sec0,file=passphrase.txt
    {"qom-type": "secret", "id": "sec0", "file": "passphrase.txt"}

Kinds of objects stand in a table and are imported when one is made. What an object was made of may be a secret: no
message repeats a value, nor a key that nobody knows, for that may be a passphrase with a comma in it.
"""

import importlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import msgspec

from pynbd.block import options as opt
from pynbd.block.errors import BlockError, OptionError

KINDS = {
    "authz-list": "pynbd.server.authz:AuthzList",
    "authz-simple": "pynbd.server.authz:AuthzSimple",
    "secret": "pynbd.crypto.secrets:Secret",
    "tls-creds-psk": "pynbd.crypto.tls_psk:TlsCredsPsk",
    "tls-creds-x509": "pynbd.crypto.tls_credentials:TlsCredsX509",
}
"""Where each kind of object (QEMU's `qom-type`) is to be found."""

OBJECT_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,254}")
"""Ids that QEMU calls well-formed, of a length that no message is spoilt by."""

MAX_OBJECTS = 4096
"""Objects of one graph; each disk of a large server needs one secret at the most."""

HOW_TO_WRITE = (
    'an object is written KIND,id=ID,KEY=VALUE… (a comma in a value is doubled) or {"qom-type": "KIND", "id": "ID", …}'
)


class ObjectOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What every object takes.

    Args:
        qom_type: its kind.
        id: under which it is found.
    """

    qom_type: str
    id: str


class UserObject:
    """The base of every kind of object.

    Args:
        options: of the class's own `Options`, checked and converted.
        objects: those that were made before it, which it may refer to.

    Raises:
        OptionError: they contradict each other, or refer to what is not there.
        OSError: something that they name can't be read.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[ObjectOptions]]

    def __init__(self, options: ObjectOptions, objects: "Objects") -> None:
        self.id = options.id


AnyObject = TypeVar("AnyObject", bound=UserObject)


class Objects:
    """The objects of one graph, by id."""

    def __init__(self) -> None:
        self._by_id: dict[str, UserObject] = {}

    def make(self, tree: Mapping[str, Any]) -> UserObject:
        """Make an object of its options.

        Args:
            tree: the options, `qom-type` and `id` among them.

        Raises:
            OptionError: they are wrong, the id is taken, or there are too many objects.
            OSError: something that they name can't be read.
        """
        kind, options = checked(tree)
        name = options.id
        if name in self._by_id:
            raise OptionError(f"object {name!r}: there is one of that id already")
        if len(self._by_id) >= MAX_OBJECTS:
            raise OptionError(f"object {name!r}: there are {MAX_OBJECTS} objects already, the most there may be")
        made = self._by_id[name] = kind(options, self)
        return made

    def find(self, name: str, kind: type[AnyObject]) -> AnyObject:
        """The object of an id, which must be of a kind.

        Raises:
            OptionError: there is none, or it is of another kind.
        """
        found = self._by_id.get(name)
        if found is None:
            near = ", ".join(key for key, value in self._by_id.items() if isinstance(value, kind)) or "none"
            raise OptionError(
                f"there is no {kind.kind} {name!r} (there are: {near}); --object {kind.kind},id=… makes one"
            )
        if not isinstance(found, kind):
            raise OptionError(f"object {name!r} is a {found.kind}, not a {kind.kind}")
        return found

    def remove(self, name: str) -> None:
        """Forget an object. Who has looked it up before keeps it.

        Raises:
            BlockError: there is none of that id.
        """
        if self._by_id.pop(name, None) is None:
            raise BlockError(f"there is no object {name!r}")


def checked(tree: Mapping[str, Any]) -> tuple[type[UserObject], ObjectOptions]:
    """The class and the typed options of the object that a tree describes. Nothing is made or read.

    Raises:
        OptionError: something is wrong with them.
    """
    kind = object_class(tree)
    name = tree.get("id")
    if not isinstance(name, str) or not OBJECT_ID.fullmatch(name):
        raise OptionError(
            f"object of kind {kind.kind!r}: id: write a letter, then up to 254 letters, digits, '-', '.' and '_'"
        )
    known = [field.encode_name for field in msgspec.structs.fields(kind.Options)]
    if not set(tree) <= set(known):
        raise OptionError(
            f"object {name!r}: {kind.kind!r} takes only: {', '.join(sorted(known))} (a comma in a value is doubled)"
        )
    return kind, opt.convert(tree, kind.Options, driver=f"object {name!r}")


def object_class(tree: Mapping[str, Any]) -> type[UserObject]:
    """The class of the object that some options describe.

    Raises:
        OptionError: there is no such kind, or it can't be loaded.
    """
    kind = tree.get("qom-type")
    if not isinstance(kind, str) or kind not in KINDS:
        # What was meant for the kind may be anything else that was misplaced.
        raise OptionError(f"object: the kind is missing or unknown; there are: {', '.join(KINDS)}; {HOW_TO_WRITE}")
    module, _, attribute = KINDS[kind].partition(":")
    found: type[UserObject] = getattr(importlib.import_module(module), attribute)
    return found


def parse(text: str) -> dict[str, Any]:
    """The options of an object from `KIND,id=ID,…` or from JSON, not checked yet.

    Raises:
        OptionError: it is neither; the text is not repeated.
    """
    try:
        return opt.parse_json(text) if text.lstrip().startswith("{") else opt.parse_dotted(text, implied_key="qom-type")
    except OptionError:
        raise OptionError(f"object: {HOW_TO_WRITE}") from None
