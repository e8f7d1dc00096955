"""The JSON Schema of everything that can be written for a disk: all drivers' options, and the nodes they take.

`BlockdevOptions` is any driver's options, told apart by `driver`; `BlockdevRef` is what stands for a child: those, or
the name of a node that is open. The names are QEMU's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from pynbd.block.driver import Driver
from pynbd.block.options import SWITCH_WORDS
from pynbd.block.registry import ALIASES
from pynbd.cli.driver_reference import argument_texts, is_size, paragraphs

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = "#/$defs/{name}"

BLOCKDEV_REF = {"$ref": REFERENCE.format(name="BlockdevRef")}

SIZE_TEXT = {
    "type": "string",
    # Behind `$` Python would let a line end.
    "pattern": r"^[ \t\n\v\f\r]*\+?"
    r"(0[xX][0-9a-fA-F]{1,20}|([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})[bBkKmMgGtTpPeE]?)$(?!\n)",
}
"""A size with a suffix, as text."""


def schema_of(kinds: Mapping[str, type[Driver]]) -> dict[str, Any]:
    """The schema of the options of these drivers.

    Args:
        kinds: the drivers by name; their children may be nodes of any of them.
    """
    drivers = list(dict.fromkeys(kinds[name] for name in sorted(kinds)))
    structs = list(dict.fromkeys(struct for kind in drivers for struct in structs_in(kind.Options)))
    references, components = msgspec.json.schema_components(structs, ref_template=REFERENCE)
    names = [str(reference["$ref"]).removeprefix(REFERENCE.format(name="")) for reference in references]
    for struct, name in zip(structs, names, strict=True):
        _describe(components[name], struct)
    name_of = dict(zip(structs, names, strict=True))
    definitions = {name: component for name, component in components.items() if not _is_top(name, name_of, drivers)}
    mapping: dict[str, str] = {}
    for kind in drivers:
        own = f"BlockdevOptions{kind.__name__}"
        while own in definitions:
            own += "_"
        names_of_kind = driver_names(kind, kinds)
        definitions[own] = _with_children(components[name_of[kind.Options]], kind, names_of_kind)
        mapping |= dict.fromkeys(names_of_kind, REFERENCE.format(name=own))
    definitions["BlockdevOptions"] = {
        "description": "A node: its driver, and that driver's options.",
        "oneOf": [{"$ref": reference} for reference in dict.fromkeys(mapping.values())],
        "discriminator": {"propertyName": "driver", "mapping": mapping},
    }
    definitions["BlockdevRef"] = {
        "description": "A node: its options, or the name of one that is open.",
        "anyOf": [{"type": "string"}, {"$ref": REFERENCE.format(name="BlockdevOptions")}],
    }
    return {"$schema": DIALECT, "title": "BlockdevOptions", "$ref": REFERENCE.format(name="BlockdevOptions")} | {
        "$defs": dict(sorted(definitions.items()))
    }


def driver_names(kind: type[Driver], kinds: Mapping[str, type[Driver]]) -> list[str]:
    """The names that a driver is registered under, and the others that it goes by."""
    names = [name for name, registered in kinds.items() if registered is kind]
    return [*names, *(alias for alias, name in ALIASES.items() if name in names)]


def structs_in(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """A struct, and all structs that its fields hold."""
    yield from _structs_of(msgspec.inspect.type_info(kind))


def _structs_of(info: msgspec.inspect.Type) -> Iterator[type[msgspec.Struct]]:
    if isinstance(info, msgspec.inspect.StructType):
        yield info.cls
        for field in info.fields:
            yield from _structs_of(field.type)
    elif isinstance(info, msgspec.inspect.Metadata):
        yield from _structs_of(info.type)
    elif isinstance(info, msgspec.inspect.UnionType):
        for kind in info.types:
            yield from _structs_of(kind)
    elif isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        yield from _structs_of(info.item_type)


def _is_top(name: str, name_of: dict[type[msgspec.Struct], str], drivers: list[type[Driver]]) -> bool:
    """Whether a component is the options of a driver, which get a definition for each driver of their own."""
    return any(name_of[kind.Options] == name for kind in drivers)


def _describe(component: dict[str, Any], struct: type[msgspec.Struct]) -> None:
    """Say of each property what its option's docstring says, and take text where the options do."""
    component["description"] = paragraphs(struct.__doc__)[0]
    texts = argument_texts(struct)
    for field in msgspec.structs.fields(struct):
        written = component["properties"][field.encode_name]
        info = msgspec.inspect.type_info(field.type)
        also = written_as_text(info)
        if also is not None:
            default = {"default": written.pop("default")} if "default" in written else {}
            written = {"anyOf": [written, also], **default}
        component["properties"][field.encode_name] = {"description": texts.get(field.name, ""), **written}


def written_as_text(info: msgspec.inspect.Type) -> dict[str, Any] | None:
    """The schema of the text that also stands for a value that is none: `64k`, `on`."""
    if is_size(info):
        return dict(SIZE_TEXT)
    if isinstance(info, msgspec.inspect.Metadata):
        return written_as_text(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        kinds = [kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType)]
        return written_as_text(kinds[0]) if len(kinds) == 1 else None
    if isinstance(info, msgspec.inspect.BoolType):
        return {"enum": sorted(SWITCH_WORDS)}
    return None


def _with_children(component: dict[str, Any], kind: type[Driver], names: list[str]) -> dict[str, Any]:
    """The options of one driver: those of its struct, its name, and its children."""
    properties = dict(component["properties"])
    properties["driver"] = {"description": "the driver's name", "enum": names}
    aliases = {child: [name for name, own in kind.child_aliases.items() if own == child] for child in kind.children}
    required = ["driver", *(name for name in component.get("required", ()) if name != "driver")]
    either: list[dict[str, Any]] = []
    for child, spec in kind.children.items():
        for name in (child, *aliases[child]):
            properties[name] = {"description": "a node", **BLOCKDEV_REF}
        if not spec.optional and aliases[child]:
            either.append({"oneOf": [{"required": [name]} for name in (child, *aliases[child])]})
        elif not spec.optional:
            required.append(child)
    return {
        **component,
        "title": names[0],
        "description": paragraphs(kind.__doc__)[0],
        "properties": properties,
        "required": required,
        **({"allOf": either} if either else {}),
    }
