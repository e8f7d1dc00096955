"""Distinguished names as text (RFC 4514), as QEMU and GnuTLS write them: `CN=alice,O=Example,C=GB`."""

from collections.abc import Iterable, Mapping
from typing import Any

SHORT_NAMES: Mapping[str, str] = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "givenName": "GIVENNAME",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "serialNumber": "SERIALNUMBER",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "surname": "SURNAME",
    "title": "T",
    "userId": "UID",
}
"""What the attributes are called in such a text, by OpenSSL's names for them; others keep theirs."""

SPECIAL = frozenset('"+,;<>\\')


def distinguished_name(subject: Iterable[Any]) -> str:
    """The text of a name.

    Args:
        subject: the `subject` of `SSLObject.getpeercert()`: relative names, the most general one first, each of
            (attribute, value) pairs. In the text the most particular one is first.
    """
    relative = ["+".join(f"{SHORT_NAMES.get(key, key)}={escaped(value)}" for key, value in pairs) for pairs in subject]
    return ",".join(reversed(relative))


def escaped(value: str) -> str:
    r"""A value in such a text: `Example, Inc.` is `Example\, Inc.`."""
    text = "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in value).replace("\0", "\\00")
    if text.startswith((" ", "#")):
        text = f"\\{text}"
    if len(value) > 1 and value.endswith(" "):
        text = f"{text[:-1]}\\ "
    return text
