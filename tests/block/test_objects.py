"""Objects: made of text, found by id, and silent of what may be secret."""

from __future__ import annotations

import pytest

from pynbd.block.errors import BlockError, OptionError
from pynbd.block.graph import Graph
from pynbd.block.objects import KINDS, MAX_OBJECTS, Objects, UserObject, checked, parse
from pynbd.crypto.secrets import Secret

HUNTER = "hunter2"


class Other(UserObject):
    """An object that is no secret."""

    kind = "other"
    Options = Secret.Options


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("secret,id=a,data=x", {"qom-type": "secret", "id": "a", "data": "x"}),
        ("secret,id=a,data=x,,y", {"qom-type": "secret", "id": "a", "data": "x,y"}),
        ("qom-type=secret,id=a", {"qom-type": "secret", "id": "a"}),
        ("secret,id=a,data=b.c=d", {"qom-type": "secret", "id": "a", "data": "b.c=d"}),
        ('{"qom-type": "secret", "id": "a"}', {"qom-type": "secret", "id": "a"}),
    ],
)
def test_both_forms(text: str, tree: dict[str, str]) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize("text", [f"secret,id=a,data=x,{HUNTER}", "{" + HUNTER, f'{{"{HUNTER}', f"secret,{HUNTER}"])
def test_text_that_is_not_understood_is_not_repeated(text: str) -> None:
    with pytest.raises(OptionError, match="an object is written KIND,id=ID") as caught:
        parse(text)
    assert HUNTER not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HUNTER},id=a", "the kind is missing or unknown; there are: "),
        ("id=a,data=x", "the kind is missing"),
        (f"secret,data={HUNTER}", "id: write a letter"),
        (f"secret,id=1,data={HUNTER}", "id: write a letter"),
        (f"secret,id=a,data=x,{HUNTER}=y", "takes only: data, file, format"),
        (f'{{"qom-type": "secret", "id": "a", "data": ["{HUNTER}"]}}', "object 'a'"),
        (f"secret,id=a,data={HUNTER},format=hex", "'hex' is not one of 'base64', 'raw' (object 'a')"),
    ],
)
def test_wrong_options(text: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        Objects().make(parse(text))
    assert said in str(caught.value)
    assert HUNTER not in str(caught.value)
    with pytest.raises(OptionError):
        checked(parse(text))


def test_ids_are_taken_once_and_can_be_given_up() -> None:
    objects = Objects()
    made = objects.make(parse("secret,id=a,data=x"))
    assert objects.find("a", Secret) is made
    with pytest.raises(OptionError, match="there is one of that id already"):
        objects.make(parse("secret,id=a,data=y"))
    objects.remove("a")
    with pytest.raises(BlockError, match="there is no object 'a'"):
        objects.remove("a")
    with pytest.raises(OptionError, match="there is no secret 'a' \\(there are: none\\)"):
        objects.find("a", Secret)


def test_an_object_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "other", f"{__name__}:Other")
    monkeypatch.setattr("pynbd.block.objects.object_class", lambda tree: Other)
    objects = Objects()
    objects.make(parse("other,id=a"))
    with pytest.raises(OptionError, match="object 'a' is a other, not a secret"):
        objects.find("a", Secret)


def test_their_number_is_limited() -> None:
    objects = Objects()
    for number in range(MAX_OBJECTS):
        objects.make(parse(f"secret,id=s{number},data=x"))
    with pytest.raises(OptionError, match="the most there may be"):
        objects.make(parse("secret,id=last,data=x"))


async def test_nodes_reach_the_objects_of_their_graph() -> None:
    objects = Objects()
    graph = Graph(objects)
    node = await graph.open({"driver": "null"})
    try:
        assert graph.objects is objects
        assert node.objects is objects
    finally:
        await graph.close_all()
