"""Which drivers there are, and which one a name, a URI or an image's first bytes call for.

Built-in drivers stand in a table and are imported when they are used. Third parties register a `Driver` class
under the entry-point group `pynbd.drivers`. A driver may also be a Python file, but only where the person who
starts pynbd names it: never from inside an image.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pynbd.block.driver import Driver, Filter
from pynbd.block.errors import OptionError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints
    from pathlib import Path

ENTRY_POINTS = "pynbd.drivers"

BUILT_IN = {
    "blkdebug": "pynbd.filters.blkdebug:BlkDebug",
    "delay": "pynbd.filters.delay:Delay",
    "file": "pynbd.storage.file:File",
    "host_device": "pynbd.storage.file:HostDevice",
    "luks": "pynbd.formats.luks:LuksFormat",
    "memory": "pynbd.storage.memory:Memory",
    "nbd": "pynbd.storage.nbd:Nbd",
    "nofilter": "pynbd.filters.nofilter:NoFilter",
    "null": "pynbd.storage.null:Null",
    "overlay": "pynbd.formats.overlay:Overlay",
    "qcow2": "pynbd.formats.qcow2.driver:Qcow2",
    "qcow2-snapshot": "pynbd.formats.qcow2.snapshot_node:Qcow2Snapshot",
    "raw": "pynbd.formats.raw:Raw",
}

ALIASES = {"null-co": "null", "null-aio": "null"}
"""Other names of drivers, as QEMU has them."""

SCHEMES = {
    "blkdebug": "blkdebug",
    "file": "file",
    "host_device": "host_device",
    "null-co": "null",
    "null-aio": "null",
    "nbd": "nbd",
    "nbds": "nbd",
    "nbd+unix": "nbd",
    "nbds+unix": "nbd",
    "nbd+vsock": "nbd",
    "nbds+vsock": "nbd",
}
"""The driver of each URI scheme."""

IMAGE_ALLOW_LIST = frozenset({"file", "host_device", "luks", "nbd", "null", "qcow2", "raw"})
"""Drivers that a name found inside an image (a backing file, an extent) may open."""


def driver_class(name: str, *, trusted: bool = True) -> type[Driver]:
    """The driver of a name, or of a Python file (`./mine.py`, `./mine.py:Class`).

    Args:
        name: as in `driver=NAME`.
        trusted: whether a person named it; what an image names opens only drivers of an allow-list.

    Raises:
        OptionError: there is none, or it is not to be used here; the text says which there are.
    """
    name = ALIASES.get(name, name)
    if not trusted and name not in IMAGE_ALLOW_LIST:
        raise OptionError(
            f"driver {name!r} can't be named inside an image; allowed are: {', '.join(sorted(IMAGE_ALLOW_LIST))}"
        )
    if name in BUILT_IN:
        return _imported(BUILT_IN[name], name)
    if is_python_file(name):
        return load_file(name)
    for point in _entry_points().select(name=name):
        return _imported(point.value, name)
    import difflib  # here and below: what few commands need is imported for those few

    near = difflib.get_close_matches(name, list(all_names()), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(f"driver {name!r} is unknown{hint}; there are: {', '.join(all_names())}")


def _imported(target: str, name: str) -> type[Driver]:
    module, _, attribute = target.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as problem:
        # Whatever the module of a third party does as it is imported, it concerns this driver alone.
        raise OptionError(f"driver {name!r} ({target}) can't be loaded: {problem}") from problem
    if not (isinstance(kind, type) and issubclass(kind, Driver)):
        raise OptionError(f"driver {name!r} ({target}) is no pynbd.Driver")
    return kind


def _entry_points() -> "EntryPoints":
    # It takes a quarter of the time in which a small command is done.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


def all_names() -> Iterator[str]:
    """All drivers that can be named, built-in and registered, in alphabetical order."""
    registered = {point.name for point in _entry_points()}
    yield from sorted(BUILT_IN.keys() | registered)


def filter_names() -> list[str]:
    """The filters among them."""
    return [name for name in all_names() if issubclass(driver_class(name), Filter)]


def is_python_file(name: str) -> bool:
    """Whether a name is that of a driver in a Python file."""
    return name.partition(":")[0].endswith(".py")


def load_file(name: str) -> type[Driver]:
    """The driver in a Python file: the only `Driver` class that is made there, or the one named after a colon.

    Raises:
        OptionError: no such file, it does not run, or it holds no driver (or several, and none was named).
    """
    from pathlib import Path

    filename, _, wanted = name.partition(":")
    path = Path(filename).resolve()
    if not path.is_file():
        raise OptionError(f"{filename}: no such file")
    module = _run_file(path, filename)
    kinds = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Driver) and value.__module__ == module.__name__
    }
    if wanted:
        if wanted not in kinds:
            raise OptionError(f"{filename}: no Driver class {wanted!r}; found: {', '.join(kinds) or 'none'}")
        return kinds[wanted]
    if len(kinds) != 1:
        found = ", ".join(kinds) or "none"
        raise OptionError(
            f"{filename}: expected one Driver class, found {found}" + (f" (say {filename}:CLASS)" if kinds else "")
        )
    return next(iter(kinds.values()))


def _run_file(path: "Path", filename: str) -> Any:
    import hashlib
    import importlib.util

    name = f"pynbd_driver_{path.stem}_{hashlib.blake2s(bytes(path), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{filename}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as problem:
        del sys.modules[name]
        if not isinstance(problem, Exception | SystemExit):
            raise
        line = _line_of(problem, path)
        where = filename if line is None else f"{filename}:{line}"
        raise OptionError(f"{where}: {type(problem).__name__}: {problem}") from problem
    return module


def _line_of(problem: BaseException, path: "Path") -> int | None:
    """The last line of a file that was at work when something went wrong, be it further down in a library."""
    if isinstance(problem, SyntaxError) and problem.filename == str(path):
        return problem.lineno
    import traceback

    lines = [line for frame, line in traceback.walk_tb(problem.__traceback__) if frame.f_code.co_filename == str(path)]
    return lines[-1] if lines else None
