"""What SIGHUP does to a server: files are read again, which it does not read for each client."""

import logging
import os
from collections.abc import Callable, Mapping

from pynbd.block.errors import BlockError
from pynbd.cli.failure import told
from pynbd.cli.logs import LogFile
from pynbd.cli.stopping import Stop
from pynbd.server import events
from pynbd.server.events import about
from pynbd.server.service_manager import ServiceManager

log = logging.getLogger(__name__)

LOG = "log"
"""What `Reload` calls the log file to others."""


class Reload:
    """Reads files again when it is called.

    Args:
        files: what is read again, and how; what fails leaves everything as it was.
        log_file: opened anew, if there is one.
        manager: told of it.
        stop: asked for where SIGHUP means that the terminal is gone at which we were started.
        others: told the name of each that was read again, and `LOG` when the log file was opened anew.
    """

    def __init__(
        self,
        files: Mapping[str, Callable[[], None]],
        log_file: LogFile | None,
        manager: ServiceManager,
        stop: Stop,
        others: Callable[[str], None] | None = None,
    ) -> None:
        self._files = files
        self._log_file = log_file
        self._manager = manager
        self._stop = stop
        self._others = others or (lambda _: None)
        self._had_terminal = os.isatty(0)

    def __call__(self) -> None:
        if self._had_terminal and not os.isatty(0):
            self._stop.request()
            return
        self._manager.reloading()
        try:
            self._reopen_log()
            self._read_again()
        finally:
            self._manager.ready()

    def _read_again(self) -> None:
        for name, read_again in self._files.items():
            try:
                read_again()
            except (OSError, BlockError) as problem:
                log.error(
                    "the old %s stay in use: %s",
                    name,
                    told(problem),
                    extra=about(events.RELOAD_FAILED, error=told(problem)),
                )
            else:
                self._others(name)
                log.info("%s were read again", name, extra=about(events.RELOADED))
        if not self._files:
            log.info("there is nothing to be read again", extra=about(events.RELOADED))

    def _reopen_log(self) -> None:
        if self._log_file is None:
            return
        try:
            self._log_file.reopen()
        except OSError as problem:
            log.error("the log goes on where it was: %s", told(problem), extra=about(events.RELOAD_FAILED))
        else:
            self._others(LOG)
