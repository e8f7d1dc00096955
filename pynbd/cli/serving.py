"""The life of `pynbd serve`: open, announce, serve until something says "stop", close."""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pynbd.block.errors import BlockError
from pynbd.cli.background import daemonize, pid_file, report_ready
from pynbd.cli.failure import told, unexpected
from pynbd.cli.given_sockets import given_sockets, without_addresses
from pynbd.cli.greeting import greeting
from pynbd.cli.serve_config import configuration
from pynbd.cli.stopping import Stop
from pynbd.server.activation import Handed
from pynbd.server.config import Config
from pynbd.server.loop import serving_loop
from pynbd.server.service import Service, open_service

if TYPE_CHECKING:
    from pynbd.crypto.tls_credentials import TlsCredentials

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the exit status."""
    logging.basicConfig(format="pynbd serve: %(message)s")
    for name in ("pynbd", "nbd_protocol"):
        logging.getLogger(name).setLevel(LEVELS[min(arguments.verbose, 2)])
    try:
        with contextlib.ExitStack() as at_end:
            config = configuration(arguments, at_end)
            if arguments.check_config:
                return say_good(config, arguments)
            handed = given_sockets(arguments)
            if handed:
                config = without_addresses(config)
            announce = daemonize() if arguments.fork else None
            with asyncio.Runner(loop_factory=serving_loop) as runner:
                return runner.run(serve(config, handed, arguments, announce, at_end))
    except (OSError, BlockError) as problem:
        print(f"pynbd serve: {told(problem)}", file=sys.stderr)
    except Exception as problem:
        # Drivers are anybody's code. Its author finds the line in the message, and the way there with -vv.
        print(f"pynbd serve: {unexpected(problem)}", file=sys.stderr)
        log.debug("how it came to that:", exc_info=problem)
    return 1


def say_good(config: Config, arguments: argparse.Namespace) -> int:
    """Say that the configuration is good; it was checked as it was read."""
    if not arguments.quiet:
        exports = ", ".join(repr(name) for name in config.exports)
        print(f"{arguments.config or 'the command line'} is good; exports: {exports}")
    return 0


async def serve(
    config: Config,
    handed: Sequence[Handed],
    arguments: argparse.Namespace,
    announce: int | None,
    at_end: contextlib.ExitStack,
) -> int:
    """Open, announce, serve until something says "stop", close.

    Args:
        config: what to serve.
        handed: the sockets to serve at that we were started with, if there are any.
        arguments: how.
        announce: where to tell the process that started us that clients can connect.
        at_end: what is cleared away when all is closed, and also where that comes at once.

    Returns:
        The exit status: 0, or that of the command of --run.

    Raises:
        OSError, BlockError: it could not begin, or something could not be flushed at the end; all is closed.
    """
    stop = Stop(at_end)
    async with contextlib.AsyncExitStack() as closing:
        with stop.interrupting(announce):
            service = await closing.enter_async_context(open_service(config, handed=handed))
        at_end.callback(service.server.unlink_sockets)
        at_end.enter_context(pid_file(arguments.pid_file))
        if arguments.exit_last:
            service.server.on_client_gone.append(lambda: None if service.server.connections else stop.requested.set())
        if handed and not any(one.listens for one in handed):
            stop.after(service.server.until_idle())  # all clients that there will ever be are here
        if not handed:
            say_ready(service, config, arguments)
        if service.server.tls is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, service.server.tls.credentials)
        if announce is not None:
            report_ready(announce)
        if arguments.run is not None:
            from pynbd.cli.companion import run_command

            return await run_command(arguments.run, service, stop, at_end, config.server.tls_certificates)
        await stop.requested.wait()
    return 0


def reload(credentials: "TlsCredentials") -> None:
    """Take certificates and keys that have been replaced, for clients that come from now on."""
    try:
        credentials.reload()
    except (OSError, BlockError) as problem:
        log.error("the old certificates and keys stay in use: %s", told(problem))
    else:
        log.info("certificates and keys were read again")


def say_ready(service: Service, config: Config, arguments: argparse.Namespace) -> None:
    """Print what is served and how to use it; in the background only what nobody can know otherwise."""
    if arguments.quiet or arguments.run is not None:
        return
    lines = [*greeting(service, config), "", "Stop with Ctrl-C."]
    if arguments.fork:
        chosen = arguments.port == 0
        lines = [str(uri.with_export(name)) for name in config.exports for uri in service.uris] if chosen else []
    if lines:
        print("\n".join(lines), flush=True)
