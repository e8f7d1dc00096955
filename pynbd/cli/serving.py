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
from typing import TYPE_CHECKING, NamedTuple

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

if TYPE_CHECKING:
    from pynbd.cli.privileges import Privileges
    from pynbd.server.workers import Workers

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
        workers: processes that serve the clients, if there are any.
    """

    arguments: argparse.Namespace
    config: Config
    handed: Sequence[Handed]
    manager: ServiceManager
    announce: int | None
    at_end: contextlib.ExitStack
    log_file: LogFile | None
    workers: "Workers | None" = None


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
            start = Start(arguments, config, handed, manager, announce, at_end, log_file)
            if config.server.workers != 1:
                from pynbd.cli.workers import with_workers

                start = with_workers(start)
            with asyncio.Runner(loop_factory=serving_loop) as runner:
                return runner.run(serve(start))
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
    privileges = privileges_of(arguments)
    async with contextlib.AsyncExitStack() as closing:
        with stop.interrupting(start.announce):
            service = await closing.enter_async_context(opened(start))
        at_end.callback(service.server.unlink_sockets)
        at_end.enter_context(pid_file(arguments.pid_file))
        if privileges is not None:
            privileges.give_up(service)
        if arguments.exit_last:
            service.server.on_client_gone.append(lambda: None if service.server.using else stop.request())
        if start.handed and not any(one.listens for one in start.handed):
            stop.after(service.server.until_idle())  # all clients that there will ever be are here
        workers = start.workers
        if workers is not None:
            stop.after(workers.until_none_is_left())
        others = None if workers is None else workers.reload
        files = files_to_reload(start, service, functools.partial(reload_rules, start, service))
        reload = Reload(files, start.log_file, start.manager, stop, others)
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

            status = await run_command(arguments.run, service, stop, at_end, start.config.server.tls_certificates)
        else:
            await stop.requested.wait()
            status = 0
        if workers is not None and workers.are_lost:
            raise BlockError("no worker process is left to serve the clients")
    return status


def opened(start: Start) -> contextlib.AbstractAsyncContextManager[Service]:
    """What is to be served."""
    return open_service(start.config, handed=start.handed, workers=start.workers)


def privileges_of(arguments: argparse.Namespace) -> "Privileges | None":
    """What is to be given up once all is open, if anything is. To be made before anything starts a thread.

    Raises:
        OptionError: there is no such user or group.
    """
    if not (arguments.user or arguments.group or arguments.confine):
        return None
    from pynbd.cli.privileges import Privileges

    return Privileges(arguments)


def files_to_reload(start: Start, service: Service, reload_rules: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """What SIGHUP reads again, and how.

    Args:
        start: how the server was started.
        service: what it serves.
        reload_rules: reads the configuration file.
    """
    files: dict[str, Callable[[], None]] = {}
    if service.server.tls is not None:
        files["certificates and keys"] = service.server.tls.credentials.reload
    if start.arguments.config:
        files[f"rules of {start.arguments.config}"] = reload_rules
    return files


def reload_rules(start: Start, service: Service) -> None:
    """Read the configuration anew, and let its rules and limits hold for clients that come from now on.

    Raises:
        OptionError: something is wrong with it; the old rules stay.
    """
    config = read_anew(start)
    service.change_rules(config)
    if without_rules(config) != without_rules(start.config):
        log.warning(
            "%s: what else has changed there than rules and limits wants a restart",
            start.arguments.config,
            extra=about(events.RELOADED),
        )


def read_anew(start: Start) -> Config:
    """What the configuration file says now.

    Raises:
        OptionError: something is wrong with it.
    """
    arguments, before = start.arguments, start.config
    with contextlib.ExitStack() as nothing_new:
        # What a command is run for (and where it finds us) was settled at the start.
        config = configuration(argparse.Namespace(**{**vars(arguments), "run": None}), nothing_new)
    if start.handed or arguments.run is not None:
        config = msgspec.structs.replace(
            config, server=msgspec.structs.replace(config.server, listen=before.server.listen)
        )
    return config


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
