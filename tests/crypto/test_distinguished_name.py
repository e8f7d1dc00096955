"""Distinguished names as text: what RFC 4514 says, and what GnuTLS makes of the same certificate."""

from __future__ import annotations

import pytest

from pynbd.crypto.distinguished_name import distinguished_name

UK = ((("countryName", "GB"),), (("organizationName", "Example Home"),), (("commonName", "laptop.example.com"),))


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ((), ""),
        (UK, "CN=laptop.example.com,O=Example Home,C=GB"),
        (((("organizationName", "Sue, Grabbit and Runn"),),), r"O=Sue\, Grabbit and Runn"),
        (((("commonName", 'a+b"c;d<e>f\\g'),),), r"CN=a\+b\"c\;d\<e\>f\\g"),
        (((("commonName", "# a "),),), r"CN=\# a\ "),
        (((("commonName", " "),),), r"CN=\ "),
        (((("commonName", "nul\0inside"),),), r"CN=nul\00inside"),
        (((("userId", "jsmith"), ("commonName", "J. Smith")),), "UID=jsmith+CN=J. Smith"),
        (((("1.2.3.4", "x"),),), "1.2.3.4=x"),
    ],
)
def test_the_text(subject: tuple[object, ...], text: str) -> None:
    assert distinguished_name(subject) == text


def test_no_two_names_look_alike() -> None:
    """A comma in a name must not make it look like two names."""
    assert distinguished_name(((("commonName", "a,O=b"),),)) != distinguished_name(
        ((("organizationName", "b"),), (("commonName", "a"),))
    )
