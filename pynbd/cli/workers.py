"""`pynbd serve --workers`: the processes are forked, and this is what each of them does. See `pynbd.server.workers`."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Literal, NoReturn

import msgspec

from pynbd.block.errors import BlockError
from pynbd.cli.background import leave_streams
from pynbd.cli.failure import told, unexpected
from pynbd.cli.reloading import LOG
from pynbd.cli.serving import Start, files_to_reload, privileges_of, read_anew
from pynbd.server import events
from pynbd.server.config import Config
from pynbd.server.events import about
from pynbd.server.loop import serving_loop
from pynbd.server.service import Service, open_service
from pynbd.server.worker import WorkerEnd
from pynbd.server.workers import Workers

log = logging.getLogger(__name__)

COORDINATED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that reach all processes of a terminal, or of a unit of systemd. The server hears them, and tells workers."""


def with_workers(start: Start) -> Start:
    """Fork the workers, if there are to be several. To be called before there is an event loop, or a thread.

    Args:
        start: how the server was started; it kills the workers at its end, if they are still there then.

    Raises:
        OSError: there can't be so many processes.
    """
    count = number_of(start.config.server.workers)
    if count == 1:
        return start
    workers = Workers()
    start.at_end.callback(workers.end_at_once)
    with contextlib.ExitStack() as ends:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        for ours, theirs in pairs:
            ends.callback(theirs.close)
            ours.setblocking(False)
            theirs.setblocking(False)
        for ours, theirs in pairs:
            pid = os.fork()
            if not pid:
                for other in (sock for pair in pairs for sock in pair if sock is not theirs):
                    other.close()
                run_worker(start, theirs, count)
            workers.add(pid, ours)
    return start._replace(workers=workers)


def number_of(wanted: int | Literal["auto"]) -> int:
    """How many workers are wanted on this machine."""
    return len(os.sched_getaffinity(0)) if wanted == "auto" else wanted


def run_worker(start: Start, sock: socket.socket, count: int) -> NoReturn:
    """Be a worker, in a process that has just been forked, until that ends."""
    status = 1
    try:
        for number in COORDINATED:
            signal.signal(number, signal.SIG_IGN)
        # Where clients come, and who waits for us to be ready, is no matter of a worker; what it holds open stays open.
        for one in start.handed:
            one.sock.close()
        start.manager.close()
        if start.announce is not None:
            os.close(start.announce)
        for handler in logging.getLogger().handlers:
            handler.addFilter(named)
        with asyncio.Runner(loop_factory=lambda: serving_loop(count)) as runner:
            status = runner.run(work(start, sock, count))
    except BaseException as problem:
        log.critical("a worker process ends: %s", problem, exc_info=problem)
    finally:
        # Whatever the process that was forked would do at its end is left to that.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def named(record: logging.LogRecord) -> bool:
    """Let a line of the log say, to programs, whose it is; no line is left out."""
    record.fields = {**getattr(record, "fields", {}), "worker": os.getpid()}
    return True


async def work(start: Start, sock: socket.socket, count: int) -> int:
    """What a worker does: wait for its turn, open the disks, serve, close.

    Returns:
        The exit status: 0, or 1 if something was wrong, which the server was told then.
    """
    end = WorkerEnd(sock)
    await end.begun.wait()
    if end.stopped.is_set():
        return 0
    try:
        await serve_clients(start, end, count)
    except (OSError, BlockError) as problem:
        end.fail(told(problem), problem.errno if isinstance(problem, OSError) else None)
    except Exception as problem:
        end.fail(unexpected(problem), None)
        log.debug("how it came to that:", exc_info=problem)
    else:
        return 0
    return 1


async def serve_clients(start: Start, end: WorkerEnd, count: int) -> None:
    """Open the disks, serve until told to stop, close.

    Raises:
        OSError, BlockError: it could not begin, or something could not be flushed at the end; all is closed.
    """
    privileges = privileges_of(start.arguments)
    async with contextlib.AsyncExitStack() as closing:
        with end.interrupting():
            service = await closing.enter_async_context(open_service(share_of(start.config, count), shared=True))
        if privileges is not None:
            privileges.give_up(service)
        if start.announce is not None:
            leave_streams()
        end.serve(service.server, functools.partial(read_again, files_of(start, service)))
        await end.stopped.wait()


def share_of(config: Config, count: int) -> Config:
    """What one of several workers is to serve: no addresses, and its part of the memory."""
    server = msgspec.structs.replace(
        config.server, listen=(), payload_memory=config.server.payload_memory // count, workers=1
    )
    return msgspec.structs.replace(config, server=server)


def files_of(start: Start, service: Service) -> Mapping[str, Callable[[], None]]:
    """What is read again, and how, where the server has done so without finding anything wrong."""
    files = files_to_reload(start, service, lambda: service.change_rules(read_anew(start)))
    return files if start.log_file is None else {**files, LOG: start.log_file.reopen}


def read_again(files: Mapping[str, Callable[[], None]], name: str) -> None:
    """Read one of them."""
    try:
        files[name]()
    except (OSError, BlockError) as problem:
        text = told(problem)
        log.error(
            "worker process %d keeps the old %s: %s",
            os.getpid(),
            name,
            text,
            extra=about(events.RELOAD_FAILED, error=text),
        )
