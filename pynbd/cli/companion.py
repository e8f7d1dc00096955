"""The command of `pynbd serve --run`, for which the server is there."""

import asyncio
import contextlib
import functools
import os
import signal
import sys

import msgspec

from pynbd.cli.stopping import Stop
from pynbd.server.service import Service


async def run_command(
    command: str, service: Service, stop: Stop, at_end: contextlib.ExitStack, certificates: str
) -> int:
    """Run a command with the server's address in its environment, until it ends or we are told to stop.

    Args:
        command: for a shell.
        service: what it is to use.
        stop: says when it has to end.
        at_end: where it is ended if that comes at once.
        certificates: the folder of TLS; a command for which the server is started may have its own there.

    Returns:
        Its exit status, as a shell has it.
    """
    uri = service.uris[0].with_export(next(iter(service.server.exports)))
    if uri.is_tls_required and certificates:
        uri = msgspec.structs.replace(uri, tls_certificates=os.path.join(os.getcwd(), certificates))  # noqa: PTH109, PTH118  # a name, and no file is asked for it
    environment = {**os.environ, "uri": str(uri), "nbd": str(uri)}
    if uri.socket_path:
        environment["unixsocket"] = uri.socket_path
    # A session of its own is a group of its own, which is ended with all that it has started (uvloop can't make the
    # group alone). On a terminal it must stay in ours to be able to read, and Ctrl-C reaches it there.
    apart = sys.stdin is None or not sys.stdin.isatty()
    process = await asyncio.create_subprocess_shell(command, env=environment, start_new_session=apart)
    end = functools.partial(os.killpg, process.pid) if apart else process.send_signal
    ended = asyncio.ensure_future(process.wait())
    at_end.callback(lambda: None if ended.done() else end(signal.SIGKILL))
    told = asyncio.ensure_future(stop.requested.wait())
    try:
        await asyncio.wait((ended, told), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            end(signal.SIGTERM)
        status = await ended
    finally:
        told.cancel()
    return status if status >= 0 else 128 - status
