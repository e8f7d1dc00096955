"""What becomes of a service when its files are read again (by itself; test_serve_reload.py has the whole server)."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from pynbd.block.errors import OptionError
from pynbd.cli.reloading import Reload
from pynbd.cli.stopping import Stop
from pynbd.server.service_manager import ServiceManager


def refused() -> None:
    raise OptionError("10.0.0.0/99 is no network")


def broken() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(("read_again", "raises"), [(refused, None), (broken, ZeroDivisionError)])
async def test_the_manager_is_told_that_it_goes_on(
    tmp_path: Path, read_again: object, raises: type[Exception] | None
) -> None:
    """Also after a mistake of ours: it would wait for the end of the reload, and then end the service."""
    place = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, contextlib.ExitStack() as at_end:
        told.bind(str(place))
        told.setblocking(False)
        manager = ServiceManager(str(place))
        at_end.callback(manager.close)
        reload = Reload({"rules": read_again}, None, manager, Stop(at_end))  # type: ignore[dict-item]
        with pytest.raises(raises) if raises else contextlib.nullcontext():
            reload()
        messages = [told.recv(1000), told.recv(1000)]
        assert b"RELOADING=1" in messages[0]
        assert b"READY=1" in messages[1]
