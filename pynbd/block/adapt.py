"""Drivers written outside pynbd, made to fit: plain functions run in a thread pool, trailing parameters may be
missing, `read` may return bytes, and `serial = True` lets one call in at a time.

The adapted methods belong to an object of their own: a driver that calls its own methods gets them as it wrote them.
"""

import asyncio
import errno
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from pynbd.block.driver import Driver, Filter
from pynbd.block.errors import OptionError, io_error

DATA_METHODS = {
    "read": 3,
    "write": 3,
    "write_zeroes": 3,
    "discard": 2,
    "cache": 2,
    "flush_to_os": 0,
    "flush_to_disk": 0,
}
"""What may be adapted, and how many arguments the block layer calls it with."""

SHAPE_METHODS = {"block_status": 2, "truncate": 2}
"""More of them, which a serial driver is not asked for during other calls, either."""

LIFE_METHODS = {"open": 0, "close": 0, "allocated_size": 0, "info": 0}

OTHER_NAMES = {
    "extents": "block_status",
    "flush": "flush_to_disk",
    "pread": "read",
    "pwrite": "write",
    "trim": "discard",
    "zero": "write_zeroes",
}
"""What other servers call these methods. One of such a name would never be called, and who notices a flush that is
missing?"""

Method = Callable[..., Awaitable[Any]]


def is_built_in(kind: type[Driver]) -> bool:
    """Whether a driver is part of pynbd, and so follows the full contract."""
    return kind.__module__.partition(".")[0] == "pynbd"


class Adapted(Driver):
    """A foreign driver as the block layer calls it: its methods made to fit, and nothing else of it."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.options)
        lock = asyncio.Lock() if driver.serial else None
        for name, arguments in (DATA_METHODS | SHAPE_METHODS | LIFE_METHODS).items():
            method: Method = getattr(driver, name)
            if getattr(type(driver), name) is not getattr(Driver, name):
                method = _waited_for(_with_fewer_arguments(driver, name, arguments))
                if name == "read":
                    method = _filling(driver, method)
                if lock is not None and name not in LIFE_METHODS:
                    method = _serialised(method, lock)
            setattr(self, name, method)


def adapt(driver: Driver) -> Driver:
    """What the block layer calls instead of a foreign driver.

    Raises:
        OptionError: a method can't be called with the arguments it gets, or has another server's name.
    """
    default = Filter if isinstance(driver, Filter) else Driver
    for theirs, ours in OTHER_NAMES.items():
        if callable(getattr(driver, theirs, None)) and getattr(type(driver), ours) is getattr(default, ours):
            raise OptionError(f"driver {driver.name!r}: {theirs}() would never be called; its name here is {ours}()")
    return Adapted(driver)


def _with_fewer_arguments(driver: Driver, name: str, arguments: int) -> Callable[..., Any]:
    """The method, called without the trailing arguments that it does not take."""
    method: Callable[..., Any] = getattr(driver, name)
    parameters = list(inspect.signature(method).parameters.values())
    kinds = {p.kind for p in parameters}
    takes_named = (
        name != "truncate" or inspect.Parameter.VAR_KEYWORD in kinds or any(p.name == "exact" for p in parameters)
    )
    parameters = [p for p in parameters if (name, p.name) != ("truncate", "exact")]  # always given by its name
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = arguments if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional)
    only_named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if any(p.default is p.empty for p in [*positional[arguments:], *only_named]):
        raise OptionError(f"driver {driver.name!r}: {name}{inspect.signature(method)} takes too many arguments")
    if taken >= arguments and takes_named:
        return method
    if taken < min(arguments, 2 if name != "truncate" else 1):
        raise OptionError(f"driver {driver.name!r}: {name}{inspect.signature(method)} takes too few arguments")
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def called(*given: Any, **named: Any) -> Any:
            return await method(*given[:taken], **(named if takes_named else {}))

        return called

    @functools.wraps(method)
    def called_plainly(*given: Any, **named: Any) -> Any:
        return method(*given[:taken], **(named if takes_named else {}))

    return called_plainly


def _waited_for(method: Callable[..., Any]) -> Method:
    """A coroutine function: the method itself, or one that runs it in the pool."""
    if inspect.iscoroutinefunction(method):
        return method

    @functools.wraps(method)
    async def in_pool(*given: Any, **named: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(method, *given, **named))

    return in_pool


def _filling(driver: Driver, method: Method) -> Method:
    """`read` that always fills `into`, also where the driver returned bytes."""

    async def read(offset: int, into: memoryview, flags: int) -> None:
        data = await method(offset, into, flags)
        if data is None:
            return
        if len(data) != len(into):
            raise io_error(
                errno.EIO, driver.node.name, f"driver {driver.name}: read returned {len(data)} bytes, not {len(into)}"
            )
        into[:] = data

    return read


def _serialised(method: Method, lock: asyncio.Lock) -> Method:
    async def one_at_a_time(*given: Any, **named: Any) -> Any:
        async with lock:
            return await method(*given, **named)

    return one_at_a_time
