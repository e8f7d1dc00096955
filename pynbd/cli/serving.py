"""The life of `pynbd serve`: open, announce, serve until something says "stop", close."""

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from pynbd.block.errors import BlockError
from pynbd.cli.background import daemonize, pid_file, report_ready
from pynbd.cli.failure import told, unexpected
from pynbd.cli.greeting import greeting
from pynbd.cli.serve_config import configuration
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
            announce = daemonize() if arguments.fork else None
            with asyncio.Runner(loop_factory=serving_loop) as runner:
                return runner.run(serve(config, arguments, announce, at_end))
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
    config: Config, arguments: argparse.Namespace, announce: int | None, at_end: contextlib.ExitStack
) -> int:
    """Open, announce, serve until something says "stop", close.

    Args:
        config: what to serve.
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
            service = await closing.enter_async_context(open_service(config))
        at_end.callback(service.server.unlink_sockets)
        at_end.enter_context(pid_file(arguments.pid_file))
        if arguments.exit_last:
            service.server.on_client_gone.append(lambda: None if service.server.connections else stop.requested.set())
        say_ready(service, config, arguments)
        if service.server.tls is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, service.server.tls.credentials)
        if announce is not None:
            report_ready(announce)
        if arguments.run is not None:
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


class Stopped(BlockError):
    """A signal came before clients could connect."""


class Stop:
    """SIGTERM and SIGINT: the first one stops in order, the second one at once.

    Args:
        at_end: what is cleared away even then.
    """

    def __init__(self, at_end: contextlib.ExitStack) -> None:
        self.requested = asyncio.Event()
        self._at_end = at_end
        self._opening: asyncio.Task[Any] | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told, number)

    def _told(self, number: int) -> None:
        if self.requested.is_set():
            self._at_end.close()
            os._exit(128 + number)
        self.requested.set()
        if self._opening is not None:
            self._opening.cancel()

    @contextlib.contextmanager
    def interrupting(self, announce: int | None) -> Iterator[None]:
        """Let the first signal break off what is done inside: opening may wait for another server.

        Args:
            announce: a pipe to who waits until we are ready. If they go away, that breaks it off as well.

        Raises:
            Stopped: it came.
        """
        loop = asyncio.get_running_loop()
        self._opening = task = asyncio.current_task()
        assert task is not None
        if announce is not None:
            # There is nothing to read from our end: it only ever tells that the other one was closed.
            loop.add_reader(announce, task.cancel)
        try:
            yield
        except asyncio.CancelledError:
            raise Stopped("stopped before clients could connect") from None
        finally:
            self._opening = None
            if announce is not None:
                loop.remove_reader(announce)


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
    # A group of its own is ended with all that it has started. On a terminal it must stay in ours to be able to read,
    # and Ctrl-C reaches it there.
    group = None if sys.stdin is not None and sys.stdin.isatty() else 0
    process = await asyncio.create_subprocess_shell(command, env=environment, process_group=group)
    end = process.send_signal if group is None else functools.partial(os.killpg, process.pid)
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
