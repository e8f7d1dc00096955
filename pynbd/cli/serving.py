"""The life of `pynbd serve`: open, announce, serve until something says "stop", close."""

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from pynbd.block.errors import BlockError
from pynbd.cli.background import daemonize, pid_file, report_ready
from pynbd.cli.failure import told, unexpected
from pynbd.cli.given_sockets import given_sockets, without_addresses
from pynbd.cli.greeting import greeting
from pynbd.cli.logs import BEGIN, LogFile, begin_logging
from pynbd.cli.reloading import Reload
from pynbd.cli.serve_config import configuration
from pynbd.cli.stopping import Stop, until_parent_has_gone
from pynbd.server import events
from pynbd.server.activation import Handed
from pynbd.server.config import Config, without_rules
from pynbd.server.events import about
from pynbd.server.loop import serving_loop
from pynbd.server.service import Service, open_service
from pynbd.server.service_manager import ServiceManager

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """How a server was started.

    Args:
        arguments: those of the command line.
        config: what to serve.
        handed: sockets to serve at that were open already, if there are any.
        manager: the service manager that wants to be told.
        announce: where to tell the process that started us that clients can connect; None where that is no matter.
        at_end: what is cleared away when all is closed, and also where that comes at once.
        log_file: where the log goes, if not to the standard error.
    """

    arguments: argparse.Namespace
    config: Config
    handed: Sequence[Handed]
    manager: ServiceManager
    announce: int | None
    at_end: contextlib.ExitStack
    log_file: LogFile | None


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the exit status."""
    with contextlib.ExitStack() as logging_ends:
        try:
            log_file = begin_logging(arguments, logging_ends)
        except OSError as problem:
            print(f"{BEGIN}{told(problem)}", file=sys.stderr)
            return 1
        return run_logged(arguments, log_file)


def run_logged(arguments: argparse.Namespace, log_file: LogFile | None) -> int:
    """As `run`, once there is a log."""
    manager = ServiceManager()
    try:
        with contextlib.ExitStack() as at_end:
            config = configuration(arguments, at_end)
            if arguments.check_config:
                return say_good(config, arguments)
            manager = ServiceManager.of(os.environ, os.getpid())
            handed = given_sockets(arguments)
            if handed:
                config = without_addresses(config)
            announce = daemonize() if arguments.fork else None
            with asyncio.Runner(loop_factory=serving_loop) as runner:
                return runner.run(serve(Start(arguments, config, handed, manager, announce, at_end, log_file)))
    except (OSError, BlockError) as problem:
        failed(told(problem), problem, manager, log_file)
    except Exception as problem:
        # Drivers are anybody's code. Its author finds the line in the message, and the way there with -vv.
        failed(unexpected(problem), problem, manager, log_file)
        log.debug("how it came to that:", exc_info=problem)
    finally:
        manager.close()
    return 1


def failed(text: str, problem: Exception, manager: ServiceManager, log_file: LogFile | None) -> None:
    """Say why it ends: in the log, and to who waits for it to begin."""
    log.error("%s", text, extra=about(events.FAILED, error=text))
    if log_file is not None:
        print(f"{BEGIN}{text}", file=sys.stderr)
    below = problem if isinstance(problem, OSError) else problem.__cause__
    manager.failed(text, below.errno if isinstance(below, OSError) else None)


def say_good(config: Config, arguments: argparse.Namespace) -> int:
    """Say that the configuration is good; it was checked as it was read."""
    if not arguments.quiet:
        exports = ", ".join(repr(name) for name in config.exports)
        print(f"{arguments.config or 'the command line'} is good; exports: {exports}")
    return 0


async def serve(start: Start) -> int:
    """Open, announce, serve until something says "stop", close.

    Returns:
        The exit status: 0, or that of the command of --run.

    Raises:
        OSError, BlockError: it could not begin, or something could not be flushed at the end; all is closed.
    """
    arguments, at_end = start.arguments, start.at_end
    stop = Stop(at_end)
    if arguments.exit_with_parent:
        stop.after(until_parent_has_gone())
    privileges = None
    if arguments.user or arguments.group or arguments.confine:
        from pynbd.cli.privileges import Privileges

        privileges = Privileges(arguments)
    async with contextlib.AsyncExitStack() as closing:
        with stop.interrupting(start.announce):
            service = await closing.enter_async_context(open_service(start.config, handed=start.handed))
        at_end.callback(service.server.unlink_sockets)
        at_end.enter_context(pid_file(arguments.pid_file))
        if privileges is not None:
            privileges.give_up(service)
        if arguments.exit_last:
            service.server.on_client_gone.append(lambda: None if service.server.connections else stop.request())
        if start.handed and not any(one.listens for one in start.handed):
            stop.after(service.server.until_idle())  # all clients that there will ever be are here
        reload = Reload(files_to_reload(start, service), start.log_file, start.manager, stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        if not start.handed:
            say_ready(service, start.config, arguments)
        if start.announce is not None:
            report_ready(start.announce)
        start.manager.follow(service.server)
        start.manager.ready(os.getpid() if arguments.fork else None)
        log.info("clients can connect", extra=about(events.READY, exports=len(service.server.exports), pid=os.getpid()))
        closing.callback(begin_end, start.manager)
        if arguments.run is not None:
            from pynbd.cli.companion import run_command

            return await run_command(arguments.run, service, stop, at_end, start.config.server.tls_certificates)
        await stop.requested.wait()
    return 0


def files_to_reload(start: Start, service: Service) -> dict[str, Callable[[], None]]:
    """What SIGHUP reads again, and how."""
    files: dict[str, Callable[[], None]] = {}
    if service.server.tls is not None:
        files["certificates and keys"] = service.server.tls.credentials.reload
    if start.arguments.config:
        files[f"rules of {start.arguments.config}"] = functools.partial(reload_rules, start, service)
    return files


def reload_rules(start: Start, service: Service) -> None:
    """Read the configuration anew, and let its rules and limits hold for clients that come from now on.

    Raises:
        OptionError: something is wrong with it; the old rules stay.
    """
    arguments, before = start.arguments, start.config
    with contextlib.ExitStack() as nothing_new:
        # What a command is run for (and where it finds us) was settled at the start.
        config = configuration(argparse.Namespace(**{**vars(arguments), "run": None}), nothing_new)
    if start.handed or arguments.run is not None:
        config = msgspec.structs.replace(
            config, server=msgspec.structs.replace(config.server, listen=before.server.listen)
        )
    service.change_rules(config)
    if without_rules(config) != without_rules(before):
        log.warning(
            "%s: what else has changed there than rules and limits wants a restart",
            arguments.config,
            extra=about(events.RELOADED),
        )


def begin_end(manager: ServiceManager) -> None:
    """The end has begun."""
    log.info("stops", extra=about(events.STOPPING))
    manager.stopping()


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
