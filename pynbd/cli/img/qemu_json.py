"""JSON as QEMU's tools print it, to the last blank."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

BUCKETS = 512
"""Of QEMU's dictionaries."""

INDENTATION = 4


def bucket_of(key: str) -> int:
    """Where a key stands among the others: QEMU prints its dictionaries in the order of their hash buckets."""
    octets = key.encode(errors="surrogateescape")
    value = 0x238F13AF * len(octets)
    for number, octet in enumerate(octets):
        value += octet << number * 5 % 24
    return (1103515243 * (value & 0xFFFFFFFF) + 12345 & 0xFFFFFFFF) % BUCKETS


def in_order(tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The items of a dictionary, in the order in which QEMU prints them."""
    return sorted(tree.items(), key=lambda item: bucket_of(item[0]))


def pretty(value: Any, depth: int = 0) -> str:
    """Several lines, as `--output=json` has them."""
    blanks, outer = " " * INDENTATION * (depth + 1), " " * INDENTATION * depth
    if isinstance(value, Mapping):
        lines = [f"{blanks}{_scalar(key)}: {pretty(item, depth + 1)}" for key, item in in_order(value)]
        return "{\n" + ",\n".join(lines) + ("\n" if lines else "") + outer + "}"
    if isinstance(value, list | tuple):
        lines = [blanks + pretty(item, depth + 1) for item in value]
        return "[\n" + ",\n".join(lines) + ("\n" if lines else "") + outer + "]"
    return _scalar(value)


def compact(value: Any) -> str:
    """One line, as in `json:{…}` names."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {compact(item)}" for key, item in in_order(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(compact, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    import json  # not for those who only want the order

    if isinstance(value, str):
        # A file name is bytes; what is no UTF-8 in it can't be told in JSON.
        value = value.encode(errors="surrogateescape").decode(errors="replace")
    text = json.dumps(value)
    return (
        re.sub(r"(?<!\\)((?:\\\\)*)\\u([0-9a-f]{4})", _upper, text)
        if isinstance(value, str) and "\\u" in text
        else text
    )


def _upper(escape: "re.Match[str]") -> str:
    """QEMU writes the digits of an escape in capitals."""
    return f"{escape[1]}\\u{escape[2].upper()}"
