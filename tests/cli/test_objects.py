"""`--object` of the verbs that open disks."""

from __future__ import annotations

import pytest

from pynbd.block.errors import OptionError
from pynbd.cli import make_parser
from pynbd.cli.objects import make_objects
from pynbd.crypto.secrets import Secret
from tests.cli.pynbd_command import failure


@pytest.mark.parametrize("words", [["serve", "x"], ["copy", "x", "y"]])
def test_verbs_take_any_number(words: list[str]) -> None:
    assert make_parser(words[0]).parse_args(words).object == []
    parsed = make_parser(words[0]).parse_args([*words, "--object", "secret,id=a,data=x", "--object=secret,id=b,data=y"])
    objects = make_objects(parsed.object)
    assert [objects.find(name, Secret).reveal() for name in "ab"] == [b"x", b"y"]


def test_one_may_refer_to_those_before_it() -> None:
    key, late = "secret,id=k,data=x", "secret,id=s,data=x,keyid=k"
    with pytest.raises(OptionError, match="'k' has 1 bytes"):
        make_objects([key, late.replace("data=x,", "data=x,iv=AAAA,")])
    with pytest.raises(OptionError, match="there is no secret 'k'"):
        make_objects([late, key])


@pytest.mark.parametrize("words", [["serve", "driver=null"], ["copy", "driver=null", "x"]])
def test_errors_are_one_line_without_the_secret(words: list[str]) -> None:
    said = failure(*words, "--object", "secret,id=a,data=x,hunter2")
    assert said.startswith("object: an object is written KIND,id=ID")
    assert "hunter2" not in said
